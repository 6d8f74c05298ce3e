"""Spans and counters, the trace that they become, and what a tracer costs that is off."""

import json
import threading
import time

import pytest

from mini_vllm.tracing import NULL_TRACER, Tracer


def events_of(tracer, phase):
    trace = json.loads(tracer.to_chrome_json())
    assert trace["displayTimeUnit"] == "ms"
    return [event for event in trace["traceEvents"] if event["ph"] == phase]


def inside(inner, outer):
    slack = 1e-3  # microseconds: start and duration are rounded to floats one by one
    return (
        inner["tid"] == outer["tid"]
        and outer["ts"] - slack <= inner["ts"]
        and inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"] + slack
    )


def test_spans_nest_and_last_as_long_as_their_work():
    tracer = Tracer()
    for _ in range(2):
        with tracer.span("step", num_tokens=3):
            with tracer.span("schedule"):
                time.sleep(0.002)
            with tracer.span("wait"):
                pass
    spans = events_of(tracer, "X")
    assert [span["name"] for span in spans] == ["schedule", "wait", "step"] * 2
    for first in (0, 3):
        schedule, wait, step = spans[first : first + 3]
        assert inside(schedule, step)
        assert inside(wait, step)
        assert wait["ts"] >= schedule["ts"] + schedule["dur"] - 1e-3
        assert schedule["dur"] >= 2000
        assert step["args"] == {"num_tokens": 3}
    assert min(span["ts"] for span in spans) == 0
    assert spans[5]["ts"] >= spans[2]["ts"] + spans[2]["dur"] - 1e-3


def test_counters_are_curves():
    tracer = Tracer()
    tracer.counter("sequences", running=1, waiting=2)
    tracer.counter("sequences", running=3, waiting=0)
    curve = events_of(tracer, "C")
    assert [event["args"] for event in curve] == [{"running": 1, "waiting": 2}, {"running": 3, "waiting": 0}]
    assert curve[0]["ts"] <= curve[1]["ts"]


def test_threads_have_tracks_of_their_own():
    tracer = Tracer()

    def work():
        with tracer.span("there"):
            pass

    with tracer.span("here"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert {span["name"]: span["tid"] for span in events_of(tracer, "X")} == {"there": 0, "here": 1}


def test_a_profiler_hears_of_each_span_even_if_it_fails():
    calls = []
    tracer = Tracer(push=calls.append, pop=lambda: calls.append("pop"))
    with pytest.raises(ZeroDivisionError), tracer.span("outer"), tracer.span("inner"):
        1 / 0  # noqa: B018
    assert calls == ["outer", "inner", "pop", "pop"]
    assert [span.name for span in tracer.spans] == ["inner", "outer"]


def test_an_empty_trace_is_valid():
    assert events_of(Tracer(), "X") == []


def test_a_tracer_that_is_off_keeps_nothing_and_costs_little():
    with NULL_TRACER.span("a") as first, NULL_TRACER.span("b", detail=1) as second:
        assert first is second is None
    NULL_TRACER.counter("c", value=1)
    assert NULL_TRACER.span("a") is NULL_TRACER.span("b")
    seconds = []
    for _ in range(5):  # the best of a few, since the machine may be busy
        start = time.perf_counter()
        for _ in range(10_000):
            with NULL_TRACER.span("a"):
                pass
        seconds.append(time.perf_counter() - start)
    assert min(seconds) / 10_000 < 2e-6
