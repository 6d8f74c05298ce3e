"""The scheduler's benchmark: it times what it says. How long that takes is for the benchmark to tell."""

import gc

from click.testing import CliRunner

from mini_vllm.bench.report import load_report
from mini_vllm.bench.scheduler import gc_pauses, main, time_steps, timing_report


def test_every_step_is_timed():
    timing = time_steps(8, 5, num_steps=20, context=30)
    assert len(timing.schedule) == len(timing.update) == len(timing.step) == 20
    assert min(timing.schedule) > 0
    assert min(timing.update) > 0
    assert timing.step == [a + b for a, b in zip(timing.schedule, timing.update, strict=True)]
    assert timing.add > 0


def test_runs_of_the_garbage_collector_are_counted():
    with gc_pauses() as pauses:
        gc.collect()
        gc.collect()
    assert len(pauses) == 2
    assert min(pauses) > 0
    gc.collect()
    assert len(pauses) == 2, "nobody watches after the context"
    timing = time_steps(4, 0, num_steps=2)
    timing.gc_pauses.append(7.0)
    assert timing_report({0: timing}, {}).metrics["gc_pause_us @ 0 waiting"].samples[-1] == 7.0


def test_command(tmp_path):
    path = tmp_path / "report.json"
    arguments = ["--num-seqs", "4", "--waiting", "0", "--waiting", "30", "--steps", "5", "--context", "20"]
    result = CliRunner().invoke(main, [*arguments, "--no-prefix-caching", "--output-json", str(path)])
    assert result.exit_code == 0, result.output
    assert "4 decoding sequences, 5 steps" in result.output
    assert "30 waiting, us" in result.output
    report = load_report(path)
    assert report["workload"] == {
        "num_seqs": 4,
        "num_steps": 5,
        "context": 20,
        "block_size": 16,
        "prefix_caching": False,
    }
    names = [f"{name}_us @ {n} waiting" for n in (0, 30) for name in ("schedule", "update", "step", "add")]
    assert set(names) <= set(report["metrics"])
    assert len(report["metrics"]["step_us @ 30 waiting"]["samples"]) == 5
