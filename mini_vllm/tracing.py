"""Where a step's time goes: named spans, written as a trace for ui.perfetto.dev or chrome://tracing.

    engine.tracer = tracer = Tracer()
    engine.generate(prompts)
    Path("trace.json").write_text(tracer.to_chrome_json())

Code says what it does by `with tracer.span("schedule"): ...`; with `NULL_TRACER` that costs next to nothing.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple


class Span(NamedTuple):
    """`name` ran on a thread from `start` for `duration`, both in nanoseconds of `time.perf_counter_ns`."""

    name: str
    start: int
    duration: int
    thread: int
    args: dict[str, Any]


class Counter(NamedTuple):
    """What `values` were at `time`, in nanoseconds of `time.perf_counter_ns`."""

    name: str
    time: int
    values: dict[str, float]


class _Null:
    """A span that records nothing."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


class NullTracer:
    """A tracer that is off: a span costs a call, and nothing is kept."""

    _span = _Null()

    def span(self, name: str, **args: Any) -> _Null:
        return self._span

    def counter(self, name: str, **values: float) -> None:
        pass


NULL_TRACER = NullTracer()


class Stopwatch:
    """Seconds between laps, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """What happened since the last lap was `name`."""
        now = time.perf_counter()
        self.seconds[name], self._last = now - self._last, now


class _OpenSpan:
    __slots__ = ("_args", "_name", "_start", "_tracer")

    def __init__(self, tracer: Tracer, name: str, args: dict[str, Any]) -> None:
        self._tracer, self._name, self._args = tracer, name, args

    def __enter__(self) -> None:
        if self._tracer.push is not None:
            self._tracer.push(self._name)
        self._start = time.perf_counter_ns()

    def __exit__(self, kind: type | None, value: BaseException | None, traceback: TracebackType | None) -> None:
        duration = time.perf_counter_ns() - self._start
        self._tracer.spans.append(Span(self._name, self._start, duration, threading.get_ident(), self._args))
        if self._tracer.pop is not None:
            self._tracer.pop()


class Tracer(NullTracer):
    """Records spans and counters from any thread, in memory, until it is dropped.

    push, pop: called at the start (with the name) and at the end of each span, for a profiler that keeps its own
    ranges, such as NVTX.

    Attributes:
        spans: in the order in which they ended, so that an inner one comes before the one around it.
        counters: in the order in which they were recorded.
    """

    def __init__(self, push: Callable[[str], object] | None = None, pop: Callable[[], object] | None = None) -> None:
        self.push, self.pop = push, pop
        self.spans: list[Span] = []
        self.counters: list[Counter] = []

    def span(self, name: str, **args: Any) -> _OpenSpan:
        """A context manager; `args` are shown with the span."""
        return _OpenSpan(self, name, args)

    def counter(self, name: str, **values: float) -> None:
        """Values that the trace draws as a curve over time."""
        self.counters.append(Counter(name, time.perf_counter_ns(), values))

    def to_chrome_json(self) -> str:
        """The trace in Chrome's Trace Event Format; times in microseconds from the first event on."""
        origin = min([s.start for s in self.spans] + [c.time for c in self.counters], default=0)
        process = {"pid": os.getpid()}
        threads = {ident: number for number, ident in enumerate(dict.fromkeys(s.thread for s in self.spans))}
        events: list[dict[str, Any]] = [
            {**process, "tid": 0, "ph": "M", "name": "process_name", "args": {"name": "mini-vllm"}}
        ]
        for span in self.spans:
            times = {"ts": (span.start - origin) / 1e3, "dur": span.duration / 1e3}
            events.append({**process, "tid": threads[span.thread], "ph": "X", "name": span.name, **times})
            if span.args:
                events[-1]["args"] = span.args
        for counter in self.counters:
            where = {"ts": (counter.time - origin) / 1e3, "name": counter.name, "args": counter.values}
            events.append({**process, "tid": 0, "ph": "C", **where})
        return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})
