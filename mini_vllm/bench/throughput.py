"""`mini-vllm bench throughput`, `nano` and `sweep`: many requests, all at once or arriving over time."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from mini_vllm.bench.gpu_monitor import gpu_monitor
from mini_vllm.bench.report import (
    Metric,
    Report,
    engine_lines,
    latency_blocks,
    request_metrics,
    serving_keys,
    serving_lines,
)
from mini_vllm.bench.runner import Run, engine_state, generate, stream, trace, with_engine
from mini_vllm.bench.workloads import Workload, nano_workload, poisson_arrivals, random_workload
from mini_vllm.engine.llm_engine import LLMEngine
from mini_vllm.tracing import Tracer

NANO_ENGINE = {"max_model_len": 4096, "max_num_batched_tokens": 16384}  # nano-vllm's own settings for its benchmark
NANO_TEMPERATURE = 0.6


@dataclass(frozen=True)
class Load:
    """How requests arrive.

    request_rate: a second, on average; inf is all at once. max_concurrency: in the engine at once, at most.
    watched: step by step, with every token's time noted, as a server would; otherwise in one `generate` call.
    """

    request_rate: float = math.inf
    max_concurrency: int | None = None
    watched: bool = False
    seed: int = 0

    @property
    def is_watched(self) -> bool:
        return self.watched or self.max_concurrency is not None or math.isfinite(self.request_rate)

    def arrivals(self, num_requests: int) -> list[float]:
        return poisson_arrivals(num_requests, self.request_rate, self.seed)

    def run(self, engine: LLMEngine, workload: Workload, params: list[Any]) -> Run:
        if not self.is_watched:
            return generate(engine, workload, params, use_tqdm=sys.stderr.isatty())
        return stream(engine, workload, params, self.arrivals(len(workload)), self.max_concurrency, progress=True)


def warm_up(engine: LLMEngine, workload: Workload) -> None:
    """A short run, so that the first figure does not pay for what happens once."""
    few = Workload([prompt[:64] for prompt in workload.prompts[:8]], [8] * min(8, len(workload)), {})
    generate(engine, few, few.sampling_params(1.0, detokenize=False))
    engine.reset_prefix_cache()


def measure_throughput(
    arguments: dict[str, Any],
    make_workload: Callable[[LLMEngine], Workload],
    load: Load,
    *,
    temperature: float = 1.0,
    detokenize: bool = True,
    num_warmups: int = 1,
    traced: bool = False,
) -> tuple[Report, Run, Tracer | None]:
    """Run a workload once on a new engine. `traced`: once more, which is not timed, as a trace."""

    def measure(engine: LLMEngine) -> tuple[Report, Run, Tracer | None]:
        workload = make_workload(engine)
        workload.check_fits(engine.max_model_len)
        params = workload.sampling_params(temperature, detokenize)
        for _ in range(num_warmups):
            warm_up(engine, workload)
        before = engine.stats()
        with gpu_monitor(engine.runner.ops.device) as gpu:
            run = load.run(engine, workload, params)
        report = throughput_report(workload, [run], engine_state(engine, before))
        report.details["gpu"] = gpu
        report.workload |= {
            "temperature": temperature,
            "detokenize": detokenize and engine.tokenizer is not None,
            "request_rate": "inf" if math.isinf(load.request_rate) else load.request_rate,
            "max_concurrency": load.max_concurrency,
        }
        if load.is_watched:
            report.vllm |= serving_keys(report, run)
        tracer = None
        if traced:
            engine.reset_prefix_cache()
            tracer = trace(engine, workload, params, load.arrivals(len(workload)), load.max_concurrency)
        return report, run, tracer

    return with_engine(arguments, measure)


def throughput_report(workload: Workload, runs: list[Run], engine: dict[str, Any]) -> Report:
    """Figures of one or more runs of the same workload."""
    prompt_tokens = workload.num_prompt_tokens

    def rate(count: Callable[[Run], int]) -> list[float]:
        return [count(run) / run.elapsed for run in runs]

    metrics = {
        "elapsed_s": Metric([run.elapsed for run in runs], "s"),
        "request_throughput": Metric(rate(lambda run: len(run.requests)), "req/s", True),
        "output_throughput": Metric(rate(lambda run: run.num_output_tokens), "tok/s", True),
        "total_throughput": Metric(rate(lambda run: prompt_tokens + run.num_output_tokens), "tok/s", True),
        **request_metrics(runs),
    }
    return Report(
        benchmark="throughput",
        workload=workload.summary(),
        engine=engine,
        metrics=metrics,
        vllm={
            "elapsed_time": metrics["elapsed_s"].median,
            "num_requests": len(workload),
            "total_num_tokens": prompt_tokens + runs[0].num_output_tokens,
            "requests_per_second": metrics["request_throughput"].median,
            "tokens_per_second": metrics["total_throughput"].median,
        },
    )


def throughput_lines(report: Report, run: Run, load: Load) -> Iterator[str]:
    """What `vllm bench throughput` prints, and where tokens were watched, what `vllm bench serve` does."""
    metrics = report.metrics
    yield (
        f"Throughput: {metrics['request_throughput'].median:.2f} requests/s, "
        f"{metrics['total_throughput'].median:.2f} total tokens/s, "
        f"{metrics['output_throughput'].median:.2f} output tokens/s"
    )
    yield f"Total num prompt tokens:  {report.workload['num_prompt_tokens']}"
    yield f"Total num output tokens:  {run.num_output_tokens}"
    if load.is_watched:
        yield from serving_lines(report, run, load.request_rate, load.max_concurrency)
    else:
        yield from latency_blocks(metrics)
    yield from engine_lines(report)


# ---- nano-vllm's benchmark --------------------------------------------------------------------------------


def measure_nano(
    arguments: dict[str, Any], *, num_iters: int = 1, traced: bool = False, **smaller: int
) -> tuple[Report, Tracer | None]:
    """nano-vllm's bench.py on a new engine; `smaller`: `nano_workload`'s limits, where all of it takes too long."""

    def measure(engine: LLMEngine) -> tuple[Report, Tracer | None]:
        with gpu_monitor(engine.runner.ops.device) as gpu:
            report = nano_report(engine, num_iters, **smaller)
        report.details["gpu"] = gpu
        if not traced:
            return report, None
        workload = nano_workload(engine.model_config.vocab_size, **smaller)
        return report, trace(engine, workload, workload.sampling_params(NANO_TEMPERATURE))

    return with_engine(arguments, measure)


def nano_report(engine: LLMEngine, num_iters: int, **smaller: int) -> Report:
    """Run nano-vllm's workload on an engine, after a warm-up call as there."""
    workload = nano_workload(engine.model_config.vocab_size, **smaller)
    workload.check_fits(engine.max_model_len)
    params = workload.sampling_params(NANO_TEMPERATURE)
    warm_up(engine, workload)
    before, runs = engine.stats(), []
    for _ in tqdm(range(num_iters), desc="nano workload", disable=None):
        engine.reset_prefix_cache()
        runs.append(generate(engine, workload, params))
    report = throughput_report(workload, runs, engine_state(engine, before))
    report.benchmark = "nano"
    report.workload["temperature"] = NANO_TEMPERATURE
    if not workload.description["exact"]:
        report.notes.append(
            "Not nano-vllm's workload, whose figures this one cannot be compared with: "
            f"{len(workload)} prompts of at most {workload.description['max_input_len']} tokens with ids up to "
            f"{workload.description['max_token_id']}, at most {workload.description['max_output_len']} output tokens."
        )
    return report


def nano_lines(report: Report) -> Iterator[str]:
    """nano-vllm's line, and then what it does not print."""
    metrics = report.metrics
    tokens, seconds = report.workload["num_output_tokens"], metrics["elapsed_s"].median
    yield f"Total: {tokens}tok, Time: {seconds:.2f}s, Throughput: {metrics['output_throughput'].median:.2f}tok/s"
    total = metrics["total_throughput"].median
    yield f"Prompt tokens: {report.workload['num_prompt_tokens']}, {total:.2f} total tokens/s"
    if len(metrics["elapsed_s"].samples) > 1:
        yield f"Median of {len(metrics['elapsed_s'].samples)} runs, spread {metrics['elapsed_s'].spread:.1%}"
    yield from latency_blocks(metrics)
    yield from engine_lines(report)


# ---- sweeps -----------------------------------------------------------------------------------------------

SWEPT = ("ttft_ms", "tpot_ms", "itl_ms", "e2el_ms", "request_throughput", "output_throughput", "total_throughput")


def measure_sweep(
    arguments: dict[str, Any],
    loads: list[Load],
    *,
    num_prompts: int,
    input_len: int,
    output_len: int,
    temperature: float = 1.0,
    detokenize: bool = True,
    seed: int = 0,
) -> Report:
    """The same random requests under one load after the other, on one engine."""

    def measure(engine: LLMEngine) -> Report:
        workload = random_workload(num_prompts, input_len, output_len, engine.model_config.vocab_size, seed=seed)
        workload.check_fits(engine.max_model_len)
        params = workload.sampling_params(temperature, detokenize)
        warm_up(engine, workload)
        before, points, metrics = engine.stats(), [], {}
        for load in loads:
            engine.reset_prefix_cache()
            found = throughput_report(workload, [load.run(engine, workload, params)], {}).metrics
            name = load_name(load)
            metrics |= {f"{key} @ {name}": found[key] for key in SWEPT if key in found}
            values = {key: found[key].median for key in SWEPT if key in found}
            points.append({"load": name, **values})
        return Report(
            benchmark="sweep",
            workload={**workload.summary(), "temperature": temperature},
            engine=engine_state(engine, before),
            metrics=metrics,
            details={"points": points},
        )

    return with_engine(arguments, measure)


def load_name(load: Load) -> str:
    if load.max_concurrency is not None:
        return f"concurrency {load.max_concurrency}"
    return f"rate {load.request_rate:g}"


def sweep_lines(report: Report) -> Iterator[str]:
    """A line for each load."""
    yield f"{'load':<20}{'req/s':>10}{'output tok/s':>14}{'TTFT ms':>10}{'TPOT ms':>10}{'ITL ms':>10}{'E2EL ms':>11}"
    for point in report.details["points"]:
        columns = f"{point['load']:<20}{point['request_throughput']:>10.2f}{point['output_throughput']:>14.1f}"
        for name, width in (("ttft_ms", 10), ("tpot_ms", 10), ("itl_ms", 10), ("e2el_ms", 11)):
            columns += f"{point[name]:>{width}.2f}" if name in point else f"{'-':>{width}}"
        yield columns
    yield "Latencies are medians."
    yield from engine_lines(report)
