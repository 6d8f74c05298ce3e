"""Pictures: that they are drawn, of the right things, and that a missing matplotlib is said before anything runs."""

import importlib.util
import sys
import time

import pytest

from mini_vllm.bench import plot
from mini_vllm.tracing import Tracer

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved."""
    pytest.importorskip("matplotlib")
    saved = []
    save = plot._save
    monkeypatch.setattr(plot, "_save", lambda figure, path: (saved.append(figure), save(figure, path)))
    return saved


def test_sweep_draws_latency_over_throughput(figures, tmp_path):
    path = tmp_path / "sweep.png"
    points = [
        {"load": "concurrency 1", "output_throughput": 10.0, "ttft_ms": 1.0, "tpot_ms": 2.0},
        {"load": "concurrency 2", "output_throughput": 20.0, "ttft_ms": 3.0},  # one output token: no time between
    ]
    plot.plot_sweep("demo model", points, path)
    assert path.read_bytes().startswith(PNG)
    ttft, tpot = figures[0].axes
    assert ttft.lines[0].get_xydata().tolist() == [[10, 1], [20, 3]]
    assert tpot.lines[0].get_xydata().tolist() == [[10, 2]]
    assert [text.get_text() for text in ttft.texts] == ["concurrency 1", "concurrency 2"]


def test_timeline_draws_steps_and_state(figures, tmp_path):
    tracer = Tracer()
    for running in (1, 2, 3):
        with tracer.span("step"), tracer.span("launch"):
            time.sleep(0.002)
        tracer.counter("requests", running=running, waiting=0)
        tracer.counter("kv_blocks", in_use=10 * running)
    path = tmp_path / "timeline.svg"
    plot.plot_timeline(tracer, path)
    assert "<svg" in path.read_text(encoding="utf-8")
    times, requests, cache = figures[0].axes
    steps, launches = (line.get_ydata() for line in times.lines)
    assert all(2 <= launch <= step < 1000 for step, launch in zip(steps, launches, strict=True))
    assert list(requests.lines[0].get_ydata()) == [1, 2, 3]
    assert list(cache.lines[0].get_ydata()) == [10, 20, 30]


def test_an_unknown_format_is_named(figures, tmp_path):
    with pytest.raises(RuntimeError, match=r"cannot be written to .*picture\.xyz"):
        plot.plot_sweep("demo model", [], tmp_path / "picture.xyz")


def test_a_missing_matplotlib_is_said_with_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r'install it with: pip install "mini-vllm\[plot\]"'):
        plot.require_matplotlib()


def test_the_module_needs_no_matplotlib_to_be_imported():
    assert plot.PARTS
    assert "matplotlib.pyplot" not in sys.modules  # a figure of its own: no window system, no global state
