"""Pictures of a benchmark, with matplotlib (the `plot` extra)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mini_vllm.tracing import Tracer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTS = ("schedule", "prepare", "launch", "wait", "detokenize")


def require_matplotlib() -> None:
    """Raise `RuntimeError` with the command that installs it, before anything is measured in vain."""
    if importlib.util.find_spec("matplotlib") is None:
        raise RuntimeError('--plot needs matplotlib; install it with: pip install "mini-vllm[plot]"')


def plot_sweep(title: str, points: list[dict[str, Any]], path: Path) -> None:
    """Latency against throughput over the `points` of a sweep; the format follows the file's name."""
    figure = _figure(11, 4.5)
    figure.suptitle(title)
    panels = figure.subplots(1, 2)
    for panel, key, label in (
        (panels[0], "ttft_ms", "time to first token, median ms"),
        (panels[1], "tpot_ms", "time per output token, median ms"),
    ):
        curve = [(point["output_throughput"], point[key], point["load"]) for point in points if key in point]
        panel.plot([x for x, _, _ in curve], [y for _, y, _ in curve], marker="o")
        for x, y, load in curve:
            panel.annotate(load, (x, y), textcoords="offset points", xytext=(4, 4), fontsize=7)
        panel.set(xlabel="output tokens/s", ylabel=label, ylim=(0, None))
        panel.margins(x=0.15)  # room for the names of the loads
        panel.grid(alpha=0.3)
    _save(figure, path)


def plot_timeline(tracer: Tracer, path: Path) -> None:
    """A traced run over time: how long each step took and on what, who was running, and the KV cache."""
    steps = [span for span in tracer.spans if span.name == "step"]
    origin = min((step.start for step in steps), default=0)

    def seconds(nanoseconds: int) -> float:
        return (nanoseconds - origin) / 1e9

    figure = _figure(11, 8)
    times, requests, cache = figure.subplots(3, 1, sharex=True, height_ratios=(2, 1, 1))
    for name in ("step", *PARTS):
        spans = [span for span in tracer.spans if span.name == name]
        style = {"color": "black", "markersize": 5} if name == "step" else {"markersize": 3}
        if spans:
            milliseconds = [span.duration / 1e6 for span in spans]
            times.plot([seconds(span.start) for span in spans], milliseconds, ".", label=name, **style)
    times.set(ylabel="ms", yscale="log", title="steps and their parts")
    times.legend(loc="upper right", fontsize=8)
    for panel, counter_name, title in ((requests, "requests", "sequences"), (cache, "kv_blocks", "KV blocks")):
        samples = [counter for counter in tracer.counters if counter.name == counter_name]
        for name in samples[0].values if samples else ():
            panel.step([seconds(c.time) for c in samples], [c.values[name] for c in samples], where="post", label=name)
        panel.set(ylabel=title, ylim=(0, None))
        panel.legend(loc="upper right", fontsize=8)
    cache.set(xlabel="seconds")
    _save(figure, path)


def plot_simulation(report: dict[str, Any], path: Path) -> None:
    """A report of `bench.simulate` with its samples: latencies as distributions, queue and KV cache over time."""
    figure = _figure(11, 8)
    panels = figure.subplots(2, 2)
    for panel, key, title in (
        (panels[0, 0], "ttft_ms", "time to first token, ms"),
        (panels[0, 1], "tpot_ms", "time per output token, ms"),
    ):
        for policy in report["policies"]:
            metric = report["metrics"].get(f"{key} @ {policy}")
            if metric is not None:
                samples = sorted(metric["samples"])
                shares = [(i + 1) / len(samples) for i in range(len(samples))]
                panel.step(samples, shares, where="post", label=policy)
        panel.set(xlabel=title, ylabel="share of requests", xscale="log" if key == "ttft_ms" else "linear")
    for policy in report["policies"]:
        timeline = report["timelines"][policy]
        panels[1, 0].plot(timeline["seconds"], timeline["num_waiting"], label=policy, linewidth=0.8)
        used = [100 * blocks / report["engine"]["num_kv_blocks"] for blocks in timeline["num_used_blocks"]]
        panels[1, 1].plot(timeline["seconds"], used, label=policy, linewidth=0.8)
    panels[1, 0].set(xlabel="simulated seconds", ylabel="waiting requests")
    panels[1, 1].set(xlabel="simulated seconds", ylabel="KV blocks of running requests, %")
    for panel in panels.flat:
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    _save(figure, path)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, path: Path) -> None:
    try:
        figure.savefig(path, dpi=150)
    except (ValueError, OSError) as error:  # an unknown format, a directory that is not there
        raise RuntimeError(f"the plot cannot be written to {path}: {error}") from None
