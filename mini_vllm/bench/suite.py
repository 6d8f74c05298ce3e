"""`mini-vllm bench suite`: the figures that this engine is held to, beside those of vLLM and nano-vllm.

Their figures are data in `ROWS`, as measured in 2026-11 on one NVIDIA H200 (driver 580, CUDA 13.0): vLLM 0.26.0, the
better of its in-process and separate-process modes; nano-vllm with FlashAttention-3; random weights of the real shapes,
bfloat16, greedy (the nano workload: temperature 0.6), prefix caching off, prompts as token ids. On another GPU the
ratios mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from mini_vllm.bench.gpu_monitor import gpu_monitor
from mini_vllm.bench.latency import decode_step_seconds
from mini_vllm.bench.presets import preset_arguments
from mini_vllm.bench.report import Metric, Report
from mini_vllm.bench.runner import decode_step_bytes, engine_state, generate, measured_roofs, with_engine
from mini_vllm.bench.startup import measure_startup
from mini_vllm.bench.throughput import NANO_ENGINE, nano_report
from mini_vllm.bench.workloads import random_workload
from mini_vllm.engine.llm_engine import LLMEngine
from mini_vllm.sampling_params import SamplingParams

PEERS = "vLLM 0.26.0 and nano-vllm, 2026-11, one H200"
# One engine serves all rows of a model: that of `mini-vllm bench nano`, with room for more than 4096 prompt tokens.
ENGINE = {**NANO_ENGINE, "max_model_len": 4352, "enable_prefix_caching": False}
QUICK_ENGINE = {"max_model_len": 512, "enable_prefix_caching": False}


@dataclass(frozen=True)
class Measured:
    """A row's figure; step_bytes: what a decode step must read, to compare with the bandwidth."""

    metric: Metric
    step_bytes: float | None = None


@dataclass(frozen=True)
class Row:
    """A figure to measure on an engine of `preset` (None: the demo model), and what others reach."""

    name: str
    preset: str | None
    measure: Callable[[LLMEngine], Measured]
    vllm: float | None = None
    nano_vllm: float | None = None


def decode(batch_size: int, input_len: int = 128, output_len: int = 256, iters: int = 10) -> Callable:
    """Milliseconds per decode step of a batch, greedy."""

    def measure(engine: LLMEngine) -> Measured:
        workload = random_workload(batch_size, input_len, output_len, engine.model_config.vocab_size)
        params = workload.sampling_params(temperature=0)
        generate(engine, workload, params)
        samples = [1e3 * decode_step_seconds(generate(engine, workload, params)) for _ in range(iters)]
        return Measured(Metric(samples, "ms/step"), decode_step_bytes(engine, batch_size, input_len + output_len / 2))

    return measure


def prefill(num_prompts: int = 16, input_len: int = 4096, iters: int = 5) -> Callable:
    """Prompt tokens per second of one `generate` with one output token each."""

    def measure(engine: LLMEngine) -> Measured:
        workload = random_workload(num_prompts, input_len, 1, engine.model_config.vocab_size)
        params = workload.sampling_params(temperature=0)
        generate(engine, workload, params)
        samples = [workload.num_prompt_tokens / generate(engine, workload, params).elapsed for _ in range(iters)]
        return Measured(Metric(samples, "tok/s", higher_is_better=True))

    return measure


def nano(iters: int = 3, **smaller: int) -> Callable:
    """Output tokens per second of nano-vllm's workload."""

    def measure(engine: LLMEngine) -> Measured:
        return Measured(nano_report(engine, iters, **smaller).metrics["output_throughput"])

    return measure


# The rows of a model are measured in this order, on one engine: each meets the GPU and the free blocks as the one
# before has left them.
ROWS = [
    Row("Qwen3-0.6B decode, batch 1", "qwen3-0.6b", decode(1), vllm=1.63, nano_vllm=2.22),
    Row("Qwen3-0.6B decode, batch 8", "qwen3-0.6b", decode(8), vllm=1.63, nano_vllm=2.28),
    Row("Qwen3-0.6B nano workload", "qwen3-0.6b", nano(), vllm=23_560, nano_vllm=20_520),
    Row("Qwen3-0.6B prefill 16 x 4096", "qwen3-0.6b", prefill(), vllm=354_500, nano_vllm=319_400),
    Row("Qwen3-8B decode, batch 1", "qwen3-8b", decode(1), vllm=5.19),
    Row("Qwen3-8B decode, batch 8", "qwen3-8b", decode(8), vllm=5.49),
    Row("Qwen3-8B nano workload", "qwen3-8b", nano(), vllm=9_080),
    Row("Qwen3-8B prefill 16 x 4096", "qwen3-8b", prefill(), vllm=40_430),
]
QUICK_ROWS = [
    Row("demo decode, batch 1", None, decode(1, 16, 16, iters=3)),
    Row("demo decode, batch 8", None, decode(8, 16, 16, iters=3)),
    Row("demo small nano workload", None, nano(1, num_prompts=8, max_input_len=32, max_output_len=16)),
    Row("demo prefill 2 x 256", None, prefill(2, 256, iters=3)),
]
# From import to an engine that is ready. The peers' best: vLLM 12 + 46 s (to 17 + 77), nano-vllm 12 + 20 s.
STARTUP_PEERS = {"vllm": 58.0, "nano_vllm": 32.0}


def row_names(quick: bool = False) -> list[str]:
    return [row.name for row in (QUICK_ROWS if quick else ROWS)] + list(startup_names(quick).values())


def startup_names(quick: bool) -> dict[str, str]:
    """The rows of the start-up: their names by phase."""
    model = "demo" if quick else "Qwen3-0.6B"
    return {phase: f"{model} startup, {phase}" for phase in ("cold", "warm")}


def run_suite(
    *, quick: bool = False, only: Sequence[str] = (), device: str = "auto", startup_iters: tuple[int, int] = (2, 3)
) -> Report:
    """Check the tokens, measure the GPU's roofs, then every row whose name contains one of `only` (all, if empty).

    A row that fails is in `details["failures"]` with its error; the others go on. startup_iters: cold, warm.

    Raises:
        ValueError: `only` selects nothing, or the device is the CPU and not `quick`.
        RuntimeError: the device's tokens are not those of the specification.
    """

    def selected(name: str) -> bool:
        return not only or any(text.lower() in name.lower() for text in only)

    if not any(map(selected, row_names(quick))):
        raise ValueError(f"--only {' '.join(only)} selects none of the rows: {'; '.join(row_names(quick))}")
    found_device, check = check_tokens(device)
    if found_device == "cpu" and not quick:
        raise ValueError("the suite runs models of up to 8 billion parameters and needs a GPU; --quick runs the demo")
    report = Report("suite", {"quick": quick, "only": list(only)}, {"device": found_device}, {})
    report.details = {"check": check, "peers": PEERS, "roofs": {}, "engines": {}, "rows": {}, "failures": {}}
    if found_device == "cuda":
        bandwidth, flops = measured_roofs()
        report.details["roofs"] = {"bandwidth_gb_per_s": bandwidth / 1e9, "matmul_tflop_per_s": flops / 1e12}

    rows = [row for row in (QUICK_ROWS if quick else ROWS) if selected(row.name)]
    with tqdm(total=len(rows) + 1, desc="Suite", unit="row", disable=None) as progress:
        for preset in dict.fromkeys(row.preset for row in rows):
            with preset_arguments(preset) as arguments:
                arguments |= {**(QUICK_ENGINE if quick else ENGINE), "device": device}
                _measure_rows(report, arguments, [row for row in rows if row.preset == preset], progress)
        _measure_startup(report, quick, device, selected, startup_iters)
        progress.update()
    return report


def _measure_rows(report: Report, arguments: dict[str, Any], rows: list[Row], progress: tqdm) -> None:
    """Measure the rows of one model on one engine."""
    failures = report.details["failures"]

    def measure(engine: LLMEngine) -> None:
        before = engine.stats()
        for row in rows:
            progress.set_postfix_str(row.name)
            try:
                engine.reset_prefix_cache()
                with gpu_monitor(engine.runner.ops.device) as gpu:
                    measured = row.measure(engine)
                add_row(report, row.name, measured, row.vllm, row.nano_vllm)
                report.details["rows"][row.name]["gpu"] = gpu
            except Exception as error:  # the other rows are worth having; the suite says that it failed
                failures[row.name] = f"{type(error).__name__}: {error}"
            progress.update()
        report.details["engines"][rows[0].preset or "demo"] = engine_state(engine, before)

    try:
        with_engine(arguments, measure)
    except Exception as error:
        for row in rows:
            if row.name not in report.metrics:
                failures.setdefault(row.name, f"{type(error).__name__}: {error}")


def add_row(
    report: Report, name: str, measured: Measured, vllm: float | None = None, nano_vllm: float | None = None
) -> None:
    """Put a row's figure into the report, beside the peers'."""
    metric = measured.metric
    report.metrics[name] = metric
    entry: dict[str, Any] = {"vllm": vllm, "nano_vllm": nano_vllm}
    for peer in ("vllm", "nano_vllm"):
        if entry[peer] is not None:
            ratio = metric.median / entry[peer]
            entry[f"times_{peer}"] = ratio if metric.higher_is_better else 1 / ratio
    bandwidth = report.details["roofs"].get("bandwidth_gb_per_s")
    if measured.step_bytes is not None:
        entry["step_bytes"] = measured.step_bytes
        if bandwidth is not None:
            entry["share_of_bandwidth_limit"] = measured.step_bytes / (bandwidth * 1e9) / (metric.median / 1e3)
    report.details["rows"][name] = entry


def _measure_startup(
    report: Report, quick: bool, device: str, selected: Callable[[str], bool], iters: tuple[int, int]
) -> None:
    preset, peers = (None, {}) if quick else ("qwen3-0.6b", STARTUP_PEERS)
    wanted = {phase: name for phase, name in startup_names(quick).items() if selected(name)}
    if not wanted:
        return
    counts = {"num_iters_cold": iters[0] * ("cold" in wanted), "num_iters_warm": iters[1] * ("warm" in wanted)}
    try:
        with preset_arguments(preset) as arguments:
            startup = measure_startup({**arguments, "device": device}, **counts)
    except RuntimeError as error:
        report.details["failures"] |= dict.fromkeys(wanted.values(), str(error))
        return
    for phase, name in wanted.items():
        add_row(report, name, Measured(startup.metrics[f"{phase}_ready_s"]), **peers)
    report.details["startup"] = {name: metric.to_dict() for name, metric in startup.metrics.items()}


# ---- what comes first -------------------------------------------------------------------------------------

CHECK_PROMPTS = [
    "Once upon a time",
    "The king said to his daughter that",
    "a",
    "In the middle of the dark forest there stood an old house, and in the house there lived a witch who",
    "The wolf " * 20,
]


def check_tokens(device: str) -> tuple[str, str]:
    """(the device, what was checked): its greedy tokens of the demo model in float32 must be the NumPy backend's.

    Raises `RuntimeError` at the first difference: figures of wrong results are worth nothing.
    """
    params = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)

    def tokens(device: str) -> tuple[str, list[list[int]]]:
        def measure(engine: LLMEngine) -> tuple[str, list[list[int]]]:
            outputs = engine.generate(CHECK_PROMPTS, params)
            return engine.runner.ops.device, [output.outputs[0].token_ids for output in outputs]

        small = {"max_model_len": 512, "max_num_seqs": 8, "num_kv_blocks": 512}
        return with_engine({"device": device, "dtype": "float32", **small}, measure)

    found_device, actual = tokens(device)
    if found_device == "cpu":
        return found_device, "nothing to check: the device is the CPU, whose backend is the specification"
    compare_tokens(actual, tokens("cpu")[1])
    return found_device, f"greedy tokens of {len(CHECK_PROMPTS)} prompts in float32 are those of the NumPy backend"


def compare_tokens(actual: list[list[int]], expected: list[list[int]]) -> None:
    """Raise `RuntimeError` that names the first difference."""
    for prompt, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        for position, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            if a != b:
                raise RuntimeError(
                    f"the GPU computes something else than the specification: prompt {prompt} of the demo model gives "
                    f"token {a} at output position {position}, the NumPy backend {b} (greedy, float32); "
                    "nothing was measured, run the tests: pytest -m gpu"
                )


# ---- the table --------------------------------------------------------------------------------------------


def suite_lines(report: Report) -> Iterator[str]:
    """The check, the roofs and a line for each row."""
    details = report.details
    yield f"Check: {details['check']}."
    if details["roofs"]:
        roofs = details["roofs"]
        yield f"Roofs: reading {roofs['bandwidth_gb_per_s']:.0f} GB/s, matmul {roofs['matmul_tflop_per_s']:.0f} TFLOP/s"
    yield f"Others' figures: {details['peers']}. times: how much faster we are; of limit: share of the bandwidth limit;"
    yield "MHz and W: the GPU's clock and power meanwhile, medians."
    heads = ("ours", "unit", "spread", "vLLM", "times", "nano-vllm", "times", "of limit", "MHz", "W")
    widths = (11, 9, 8, 11, 7, 11, 7, 10, 7, 6)
    yield f"{'':<30}" + "".join(f"{head:>{width}}" for head, width in zip(heads, widths, strict=True))
    for name, metric in report.metrics.items():
        row = details["rows"][name]
        cells = [_figure(metric.median), metric.unit, f"{metric.spread:.1%}"]
        for peer in ("vllm", "nano_vllm"):
            cells += [_figure(row[peer]), f"{row[f'times_{peer}']:.2f}" if row[peer] is not None else "-"]
        share = row.get("share_of_bandwidth_limit")
        cells.append("-" if share is None else f"{share:.0%}")
        gpu = row.get("gpu", {})
        cells += [f"{gpu[name]:.0f}" if name in gpu else "-" for name in ("sm_clock_mhz", "power_w")]
        yield f"{name:<30}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
    for name, error in details["failures"].items():
        yield f"{name:<30} FAILED: {error}"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
