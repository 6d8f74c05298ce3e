"""`mini-vllm bench latency`: one batch from prompt to last token, again and again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

from mini_vllm.bench.gpu_monitor import gpu_monitor
from mini_vllm.bench.report import (
    PERCENTILES,
    Metric,
    Report,
    engine_lines,
    latency_blocks,
    percentile,
    request_metrics,
)
from mini_vllm.bench.runner import (
    Run,
    decode_step_bytes,
    engine_state,
    generate,
    measured_roofs,
    trace,
    with_engine,
)
from mini_vllm.bench.workloads import Workload, random_workload
from mini_vllm.engine.llm_engine import LLMEngine
from mini_vllm.tracing import Tracer


def measure_latency(
    arguments: dict[str, Any],
    *,
    input_len: int = 32,
    output_len: int = 128,
    batch_size: int = 8,
    num_iters: int = 30,
    num_iters_warmup: int = 10,
    temperature: float = 1.0,
    detokenize: bool = True,
    seed: int = 0,
    traced: bool = False,
) -> tuple[Report, Tracer | None]:
    """Time batches of equal requests on a new engine. `traced`: one more iteration, which is not timed, as a trace."""

    def measure(engine: LLMEngine) -> tuple[Report, Tracer | None]:
        workload = random_workload(batch_size, input_len, output_len, engine.model_config.vocab_size, seed=seed)
        workload.check_fits(engine.max_model_len)
        params = workload.sampling_params(temperature, detokenize)
        for _ in tqdm(range(num_iters_warmup), desc="Warmup iterations", disable=None):
            generate(engine, workload, params)
        before = engine.stats()
        with gpu_monitor(engine.runner.ops.device) as gpu:
            iterations = tqdm(range(num_iters), desc="Bench iterations", disable=None)
            runs = [generate(engine, workload, params) for _ in iterations]
        report = latency_report(workload, runs, engine_state(engine, before))
        report.details["gpu"] = gpu
        report.workload |= {"temperature": temperature, "detokenize": detokenize and engine.tokenizer is not None}
        report.details["decode_step_bytes"] = decode_step_bytes(engine, batch_size, input_len + output_len / 2)
        return report, trace(engine, workload, params) if traced else None

    report, tracer = with_engine(arguments, measure)
    if report.engine["device"] == "cuda" and "decode_ms" in report.metrics:
        # After the engine is gone, since its KV cache takes all the memory that it finds.
        add_bandwidth(report, measured_roofs()[0])
    return report, tracer


def latency_report(workload: Workload, runs: list[Run], engine: dict[str, Any]) -> Report:
    """Figures of iterations of one batch of equal requests."""
    latencies = [run.elapsed for run in runs]
    metrics = {
        "latency_s": Metric(latencies, "s"),
        "output_throughput": Metric([run.num_output_tokens / run.elapsed for run in runs], "tok/s", True),
        **request_metrics(runs),
    }
    decode = [decode_step_seconds(run) for run in runs]
    if None not in decode:
        metrics["decode_ms"] = Metric([1e3 * seconds for seconds in decode], "ms")
    return Report(
        benchmark="latency",
        workload={"batch_size": len(workload), **workload.summary()},
        engine=engine,
        metrics=metrics,
        vllm={
            "avg_latency": float(np.mean(latencies)),
            "std_latency": float(np.std(latencies)),
            "latencies": latencies,
            "percentiles": {str(q): percentile(latencies, q) for q in PERCENTILES},
        },
    )


def decode_step_seconds(run: Run) -> float | None:
    """Seconds of a decode step of a batch of equal requests; None if there was none that held all of them.

    The time per token of the request whose first token came last: by then no prompt is being computed any more. If the
    others are far ahead of it by then, since their prompts took many steps, they also end earlier, and its steps become
    smaller ones: more than a tenth of its time is too much.
    """
    last = max(run.requests, key=lambda request: request.ttft)
    ahead = last.ttft - min(request.ttft for request in run.requests)
    return last.tpot if ahead <= (last.e2e - last.ttft) / 10 else None


def add_bandwidth(report: Report, bandwidth: float) -> None:
    """Compare the decode steps with what reading their bytes takes at `bandwidth`, bytes a second."""
    report.details["bandwidth_gb_per_s"] = bandwidth / 1e9
    limit = 1e3 * report.details["decode_step_bytes"] / bandwidth
    shares = [limit / ms for ms in report.metrics["decode_ms"].samples]
    report.metrics["share_of_bandwidth_limit"] = Metric(shares, "", True)


def latency_lines(report: Report) -> Iterator[str]:
    """What `vllm bench latency` prints, and then what it does not."""
    yield f"Avg latency: {report.vllm['avg_latency']} seconds"
    yield f"Std latency: {report.vllm['std_latency']} seconds"
    for q, seconds in report.vllm["percentiles"].items():
        yield f"{q}% percentile latency: {seconds} seconds"
    metrics = report.metrics
    yield f"Output throughput: {metrics['output_throughput'].median:.2f} output tokens/s"
    if "decode_ms" in metrics:
        decode, workload = metrics["decode_ms"], report.workload
        yield (
            f"Decode: {decode.median:.3f} ms per step of {workload['batch_size']} tokens "
            f"(P10 {percentile(decode.samples, 10):.3f}, P90 {percentile(decode.samples, 90):.3f}), "
            f"context {workload['input_len']} to {workload['input_len'] + workload['output_len']}"
        )
    elif report.workload["output_len"] > 1:
        yield (
            "Decode: no step of the whole batch to time, since its prompts took many steps; "
            "raise --max-num-batched-tokens to compute them in one"
        )
    if "share_of_bandwidth_limit" in metrics:
        details = report.details
        yield (
            f"Bandwidth limit: {metrics['share_of_bandwidth_limit'].median:.0%} reached; a step reads at least "
            f"{details['decode_step_bytes'] / 1e9:.3f} GB, reading moves {details['bandwidth_gb_per_s']:.0f} GB/s here"
        )
    yield from latency_blocks(metrics)
    yield from engine_lines(report)
