"""Each benchmark from end to end on the demo model: its figures are what was run, and its lines what was found."""

import dataclasses
import json
import re
import sys

import pytest

from mini_vllm.bench import suite
from mini_vllm.bench.latency import add_bandwidth, decode_step_seconds, latency_lines, measure_latency
from mini_vllm.bench.report import Metric, Report
from mini_vllm.bench.runner import RequestTiming, Run, with_engine
from mini_vllm.bench.startup import PARTS, measure_startup, start_once, startup_lines
from mini_vllm.bench.throughput import (
    Load,
    measure_nano,
    measure_sweep,
    measure_throughput,
    nano_lines,
    sweep_lines,
    throughput_lines,
)
from mini_vllm.bench.workloads import random_workload

ENGINE = {"device": "cpu", "max_model_len": 128, "enable_prefix_caching": False}


# ---- latency ----------------------------------------------------------------------------------------------


def test_latency():
    report, tracer = measure_latency(
        ENGINE, input_len=8, output_len=5, batch_size=3, num_iters=4, num_iters_warmup=1, traced=True
    )
    metrics = report.metrics
    assert len(metrics["latency_s"].samples) == len(metrics["decode_ms"].samples) == 4
    assert metrics["output_throughput"].samples == pytest.approx([15 / s for s in metrics["latency_s"].samples])
    assert 0 < metrics["decode_ms"].median < 1e3 * metrics["latency_s"].median / 4
    assert len(metrics["ttft_ms"].samples) == 12
    assert report.vllm["latencies"] == metrics["latency_s"].samples
    assert (report.workload["num_prompt_tokens"], report.workload["num_output_tokens"]) == (24, 15)
    assert report.details["decode_step_bytes"] > 0
    assert [span.name for span in tracer.spans].count("step") >= 5

    text = "\n".join(latency_lines(report))
    average = re.search(r"^Avg latency: ([\d.e-]+) seconds$", text, re.MULTILINE)
    assert float(average[1]) == pytest.approx(sum(metrics["latency_s"].samples) / 4)
    for q in (10, 25, 50, 75, 90, 99):
        assert re.search(rf"^{q}% percentile latency: [\d.e-]+ seconds$", text, re.MULTILINE)
    assert "ms per step of 3 tokens" in text
    assert "context 8 to 13" in text
    assert "Bandwidth limit" not in text  # measured on a GPU only
    assert re.search(r"^KV cache: at most \d+ of \d+ blocks in use", text, re.MULTILINE)
    json.dumps(report.to_dict())


def test_latency_of_a_single_token_has_no_decode_step():
    report, tracer = measure_latency(ENGINE, output_len=1, batch_size=2, num_iters=1, num_iters_warmup=0)
    assert "decode_ms" not in report.metrics
    assert "tpot_ms" not in report.metrics
    assert tracer is None
    assert not any(line.startswith("Decode") for line in latency_lines(report))


def test_a_decode_step_is_timed_after_the_last_prompt():
    early, late = RequestTiming(11, ttft=2.7, e2e=6.7), RequestTiming(11, ttft=3.0, e2e=7.0)
    assert decode_step_seconds(Run(7.0, [early, late, early], 3)) == pytest.approx(0.4)


def test_a_batch_that_never_decodes_together_has_no_decode_step():
    early, late = RequestTiming(11, ttft=1.0, e2e=6.0), RequestTiming(11, ttft=3.0, e2e=7.0)
    assert decode_step_seconds(Run(7.0, [early, late, early], 3)) is None
    report, _ = measure_latency(
        {**ENGINE, "max_num_batched_tokens": 16, "max_num_seqs": 16},
        input_len=32, output_len=4, batch_size=6, num_iters=1, num_iters_warmup=0,
    )  # fmt: skip
    assert "decode_ms" not in report.metrics
    assert any(line.startswith("Decode: no step of the whole batch") for line in latency_lines(report))


def test_share_of_the_bandwidth_limit():
    report = Report("latency", {}, {}, {"decode_ms": Metric([2.0, 4.0], "ms")}, details={"decode_step_bytes": 4e9})
    add_bandwidth(report, 4e12)  # a millisecond
    assert report.metrics["share_of_bandwidth_limit"].samples == pytest.approx([0.5, 0.25])
    assert report.details["bandwidth_gb_per_s"] == pytest.approx(4000)


# ---- throughput -------------------------------------------------------------------------------------------

VLLM_LINE = r"Throughput:\s*([\d.]+)\s*requests/s,\s*([\d.]+)\s*total tokens/s,\s*([\d.]+)\s*output tokens/s"


def a_workload(engine):
    return random_workload(6, 10, 4, engine.model_config.vocab_size)


@pytest.mark.parametrize("load", [Load(), Load(watched=True), Load(max_concurrency=2), Load(request_rate=200.0)])
def test_throughput(load):
    report, run, tracer = measure_throughput(ENGINE, a_workload, load, traced=load.max_concurrency is not None)
    text = "\n".join(throughput_lines(report, run, load))
    requests, total, output = map(float, re.search(VLLM_LINE, text).groups())
    assert requests == pytest.approx(6 / run.elapsed, abs=0.01)
    assert total == pytest.approx(84 / run.elapsed, abs=0.01)
    assert output == pytest.approx(24 / run.elapsed, abs=0.01)
    assert "Total num prompt tokens:  60\nTotal num output tokens:  24" in text
    assert report.vllm["tokens_per_second"] == pytest.approx(total, abs=0.01)
    assert "Mean TTFT (ms):" in text
    watched = load != Load()
    assert ("Mean ITL (ms):" in text) == ("Serving Benchmark Result" in text) == watched
    assert ("mean_itl_ms" in report.vllm) == watched
    assert run.peak_concurrency <= (load.max_concurrency or 6)
    assert (tracer is not None) == (load.max_concurrency is not None)
    json.dumps(report.to_dict(), allow_nan=False)


def test_a_workload_longer_than_the_context_is_refused():
    with pytest.raises(ValueError, match="204 tokens, prompt and output, but max_model_len=128"):
        measure_throughput(ENGINE, lambda engine: random_workload(2, 200, 4, 500), Load())


def test_nano_made_smaller_says_so_and_counts_output_tokens():
    report, tracer = measure_nano(ENGINE, num_iters=2, num_prompts=4, max_input_len=20, max_output_len=6)
    seconds = report.metrics["elapsed_s"]
    tokens = report.workload["num_output_tokens"]
    assert len(seconds.samples) == 2
    assert report.metrics["output_throughput"].samples == pytest.approx([tokens / s for s in seconds.samples])
    lines = list(nano_lines(report))
    assert re.fullmatch(rf"Total: {tokens}tok, Time: [\d.]+s, Throughput: [\d.]+tok/s", lines[0])
    assert lines[-1].startswith("Not nano-vllm's workload")
    assert report.workload["temperature"] == 0.6
    assert tracer is None


def test_sweep():
    loads = [Load(max_concurrency=1), Load(max_concurrency=3)]
    report = measure_sweep(ENGINE, loads, num_prompts=4, input_len=8, output_len=4)
    points = report.details["points"]
    assert [point["load"] for point in points] == ["concurrency 1", "concurrency 3"]
    for point in points:
        assert {"ttft_ms", "tpot_ms", "itl_ms", "e2el_ms", "output_throughput"} < set(point)
        assert report.metrics[f"ttft_ms @ {point['load']}"].median == point["ttft_ms"]
    assert sum(line.startswith("concurrency ") for line in sweep_lines(report)) == 2


def test_an_engine_is_given_up_after_its_benchmark():
    import gc
    import weakref

    engines, frozen = [], []

    def measure(engine):
        engines.append(weakref.ref(engine))
        frozen.append(gc.get_freeze_count())
        return 7

    assert with_engine(ENGINE, measure) == 7
    assert frozen[0] > 1000  # a full collection meanwhile looks at what the benchmark makes, not at every module
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert engines[0]() is None


# ---- start-up ---------------------------------------------------------------------------------------------


def test_startup_measures_fresh_processes_part_by_part():
    report = measure_startup(ENGINE, num_iters_cold=1, num_iters_warmup=0, num_iters_warm=2)
    seconds = {name: metric.median for name, metric in report.metrics.items()}
    assert len(report.metrics["warm_total_s"].samples) == 2
    for phase in ("cold", "warm"):
        parts = {name for name in PARTS if f"{phase}_{name}_s" in seconds}
        assert {"python", "import", "weights", "kv_cache", "first_token"} <= parts
        assert all(metric > 0 for metric in report.metrics[f"{phase}_python_s"].samples)
    one = {name: report.metrics[f"cold_{name}_s"].samples[0] for name in (*parts, "ready", "total")}
    assert one["total"] == pytest.approx(sum(one[name] for name in parts))
    assert one["ready"] == pytest.approx(one["total"] - one["python"] - one["first_token"])
    lines = list(startup_lines(report))
    assert lines[0].split() == ["seconds,", "median", "cold", "warm"]
    assert sum(line.startswith("Avg startup time: ") for line in lines) == 2
    assert report.vllm["warm_startup_times"] == report.metrics["warm_ready_s"].samples


def test_a_cold_start_has_empty_caches_and_knows_where_models_are(monkeypatch, tmp_path):
    """In place of Python a program that shows its environment and fails."""
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\necho "$XDG_CACHE_HOME $(ls -A "$XDG_CACHE_HOME" | wc -l) $HF_HOME" >&2\nexit 1\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(RuntimeError, match=rf"failed: {tmp_path} 1 {tmp_path}/huggingface"):
        start_once({}, cold=False)
    with pytest.raises(RuntimeError, match=rf"failed: \S+mini-vllm-cold-\S+ 0 {tmp_path}/huggingface"):
        start_once({}, cold=True)


def test_a_start_that_fails_says_why(tmp_path):
    with pytest.raises(RuntimeError, match=r"failed: ValueError: .*without config\.json"):
        start_once({"model": str(tmp_path), "device": "cpu"}, cold=False)


# ---- the suite --------------------------------------------------------------------------------------------


def test_suite_rows_that_fail_are_named_and_the_others_go_on(monkeypatch):
    def fail(engine):
        raise MemoryError("no room")

    good = suite.QUICK_ROWS[0]
    rows = [dataclasses.replace(good, name="bad", measure=fail), good]
    monkeypatch.setattr(suite, "QUICK_ROWS", rows)
    report = suite.run_suite(quick=True, device="cpu", only=["bad", "decode"])
    assert list(report.metrics) == [good.name]
    assert report.details["failures"] == {"bad": "MemoryError: no room"}
    lines = list(suite.suite_lines(report))
    assert any(line.startswith(good.name) and "ms/step" in line for line in lines)
    assert lines[-1].split(None, 1) == ["bad", "FAILED: MemoryError: no room"]

    monkeypatch.setattr(suite, "QUICK_ENGINE", {"num_kv_blocks": 1, "max_model_len": 512})
    report = suite.run_suite(quick=True, device="cpu", only=["bad", "decode"])
    assert set(report.details["failures"]) == {"bad", good.name}
    assert not report.metrics


def test_suite_compares_with_the_peers():
    report = Report("suite", {}, {}, {}, details={"roofs": {"bandwidth_gb_per_s": 4000.0}, "rows": {}})
    step, rate = Metric([0.5, 0.4, 0.6], "ms/step"), Metric([41_040.0], "tok/s", higher_is_better=True)
    suite.add_row(report, "decode", suite.Measured(step, step_bytes=1e9), vllm=1.63)
    suite.add_row(report, "nano", suite.Measured(rate), nano_vllm=20_520)
    assert report.metrics == {"decode": step, "nano": rate}
    rows = report.details["rows"]
    assert rows["decode"]["times_vllm"] == pytest.approx(1.63 / 0.5)
    assert rows["decode"]["share_of_bandwidth_limit"] == pytest.approx(0.25 / 0.5)
    assert rows["nano"] == {"vllm": None, "nano_vllm": 20_520, "times_nano_vllm": pytest.approx(2)}


def test_suite_selects_rows():
    assert suite.row_names() == [row.name for row in suite.ROWS] + [
        "Qwen3-0.6B startup, cold",
        "Qwen3-0.6B startup, warm",
    ]
    with pytest.raises(ValueError, match=r"--only llama selects none of the rows: Qwen3-0\.6B decode"):
        suite.run_suite(only=["llama"])
    with pytest.raises(ValueError, match="needs a GPU; --quick"):
        suite.run_suite(device="cpu")


def test_suite_measures_nothing_if_tokens_are_wrong(monkeypatch):
    """The "GPU" here is the CPU, with a token changed on its way out."""
    change = {}

    def with_fake_gpu(arguments, measure):
        device, tokens = with_engine({**arguments, "device": "cpu"}, measure)
        if arguments["device"] == "cuda":
            device = "cuda"
            for (prompt, position), token in change.items():
                tokens[prompt][position] = token
        return device, tokens

    monkeypatch.setattr(suite, "with_engine", with_fake_gpu)
    assert suite.check_tokens("cuda")[1].startswith("greedy tokens of 5 prompts")
    change[3, 17] = 1999
    with pytest.raises(RuntimeError, match="prompt 3 of the demo model gives token 1999 at output position 17"):
        suite.run_suite(device="cuda")
