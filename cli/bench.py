"""`mini-vllm bench`: latency, throughput, start-up, and how they compare."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mini_vllm.bench.files import output_path
from mini_vllm.bench.presets import PRESETS, preset_arguments
from mini_vllm.cli.options import ENGINE_OPTIONS, GroupedCommand, engine_options, given, option_group
from mini_vllm.config import DEVICES

if TYPE_CHECKING:
    from mini_vllm.bench.report import Report
    from mini_vllm.bench.throughput import Load
    from mini_vllm.tracing import Tracer


def positive(**attributes: Any) -> dict[str, Any]:
    return {"type": click.IntRange(min=1), "show_default": True, **attributes}


def count(**attributes: Any) -> dict[str, Any]:
    return {"type": click.IntRange(min=0), "show_default": True, **attributes}


OUTPUT_JSON = ("--output-json", output_path("Write every sample, the workload and the machine to this file."))
PROFILE = ("--profile", output_path("Run once more and write a trace for ui.perfetto.dev to this file."))
PLOT = ("--plot", output_path("Draw a picture of it (png, svg, pdf); needs the plot extra."))
TIMELINE = ("--plot", output_path("Run once more and draw its steps over time (png, svg, pdf); needs the plot extra."))
DEBUG = ("--debug", {"is_flag": True, "help": "Show the traceback of an error."})
MODEL = [
    ("--preset", {"type": click.Choice(list(PRESETS)), "help": "A real model's shape with random weights."}),
    ("--seed", count(default=0, help="Of the workload, the requests and random weights.")),
]
SAMPLING = [
    ("--temperature", {"type": click.FloatRange(0, 2), "default": 1.0, "show_default": True, "help": "0 is greedy."}),
    ("--disable-detokenize", {"is_flag": True, "help": "Leave the time that text takes out of it."}),
]


def command(short_help: str, *options: tuple[str, dict[str, Any]]) -> Callable:
    """A bench command that runs a model, with its own options first and the engine's last."""

    def decorate(function: Callable) -> click.Command:
        decorated = option_group("Options", [*options, DEBUG])(option_group("Engine", MODEL)(engine_options(function)))
        return bench.command(cls=GroupedCommand, short_help=short_help)(decorated)

    return decorate


@click.group()
def bench() -> None:
    """Measure latency, throughput and start-up; --preset runs real model shapes without a download.

    Options and printed lines are vLLM's where it has them, and as there prefix caching is off unless asked for. Without
    --model or --preset the bundled demo model runs.
    """


@contextmanager
def engine_arguments(values: dict[str, Any], **defaults: Any) -> Iterator[dict[str, Any]]:
    """The arguments of `EngineConfig` that the options describe; a bad one is bad usage."""
    from mini_vllm import EngineConfig

    if values["preset"] is not None and values["model"] is not None:
        raise click.UsageError("--preset is a model of its own; give it or --model, not both")
    with preset_arguments(values["preset"]) as preset:
        defaults = {"enable_prefix_caching": False, "seed": values["seed"], **defaults}
        arguments = {**defaults, **given(ENGINE_OPTIONS, values), **preset}
        try:
            EngineConfig(**arguments)
        except ValueError as error:
            raise click.UsageError(str(error)) from None
        yield arguments


def publish(
    report: Report,
    lines: Iterable[str],
    output_json: Path | None,
    tracer: Tracer | None = None,
    profile: Path | None = None,
    timeline: Path | None = None,
) -> None:
    """Print the figures and write the files that were asked for."""
    for line in lines:
        click.echo(line)
    if output_json is not None:
        report.write(output_json)
    if profile is not None:
        profile.write_text(tracer.to_chrome_json(), encoding="utf-8")
    if timeline is not None:
        from mini_vllm.bench.plot import plot_timeline

        plot_timeline(tracer, timeline)


def check_plot(path: Path | None) -> None:
    if path is not None:
        from mini_vllm.bench.plot import require_matplotlib

        require_matplotlib()


# ---- commands ---------------------------------------------------------------------------------------------


@command(
    "One batch from prompt to last token.",
    ("--input-len", positive(default=32, help="Tokens of each prompt.")),
    ("--output-len", positive(default=128, help="Tokens of each answer.")),
    ("--batch-size", positive(default=8, help="Requests at once.")),
    ("--num-iters-warmup", count(default=10, help="Iterations that are not timed.")),
    ("--num-iters", positive(default=30, help="Iterations that are.")),
    *SAMPLING,
    OUTPUT_JSON,
    PROFILE,
    TIMELINE,
)
def latency(
    input_len: int,
    output_len: int,
    batch_size: int,
    num_iters_warmup: int,
    num_iters: int,
    temperature: float,
    disable_detokenize: bool,
    output_json: Path | None,
    profile: Path | None,
    plot: Path | None,
    debug: bool,
    **values: Any,
) -> None:
    """Time one batch from prompt to last token, and its decode steps.

    \b
    mini-vllm bench latency --num-iters 5
    mini-vllm bench latency --preset qwen3-0.6b --batch-size 1 --input-len 128 --output-len 256 --device cuda
    """
    from mini_vllm.bench.latency import latency_lines, measure_latency

    check_plot(plot)
    with engine_arguments(values, **({"max_num_seqs": batch_size} if batch_size > 256 else {})) as arguments:
        report, tracer = measure_latency(
            arguments,
            input_len=input_len,
            output_len=output_len,
            batch_size=batch_size,
            num_iters=num_iters,
            num_iters_warmup=num_iters_warmup,
            temperature=temperature,
            detokenize=not disable_detokenize,
            seed=values["seed"],
            traced=bool(profile or plot),
        )
    publish(report, latency_lines(report), output_json, tracer, profile, plot)


class Datasets(click.Choice):
    """vLLM writes prefix_repetition."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(str(value).replace("_", "-"), param, ctx)


def check_rate(ctx: click.Context, param: click.Parameter, rate: float | None) -> float | None:
    if rate is not None and not rate > 0:
        raise click.BadParameter(f"must be above 0 (inf is all at once), got {rate}")
    return rate


@command(
    "Many requests, at once or as they arrive.",
    (
        "--dataset-name",
        {
            "type": Datasets(("random", "sharegpt", "prefix-repetition")),
            "default": "random",
            "show_default": True,
            "help": "Where prompts come from.",
        },
    ),
    (
        "--dataset-path",
        {"type": click.Path(exists=True, dir_okay=False, path_type=Path), "help": "ShareGPT's JSON file."},
    ),
    ("--num-prompts", positive(default=1000, help="Requests.")),
    ("--input-len --random-input-len", positive(default=1024, help="random: tokens of a prompt.")),
    (
        "--output-len --random-output-len --sharegpt-output-len --prefix-repetition-output-len",
        positive(default=None, help="Tokens of an answer; 128, and for sharegpt as many as the answer there has."),
    ),
    (
        "--random-range-ratio",
        {"type": float, "default": 0.0, "show_default": True, "help": "random: lengths vary by this share."},
    ),
    ("--prefix-len --random-prefix-len", count(default=0, help="random: equal tokens before every prompt.")),
    ("--prefix-repetition-prefix-len", positive(default=256, help="Tokens of a prefix.")),
    ("--prefix-repetition-suffix-len", positive(default=256, help="Tokens after it.")),
    ("--prefix-repetition-num-prefixes", positive(default=10, help="Different prefixes.")),
    (
        "--request-rate",
        {
            "type": float,
            "callback": check_rate,
            "help": "Requests arrive at this rate a second on average (Poisson), inf at once, and each token is timed; "
            "without it all are handed to one generate() call.",
        },
    ),
    ("--max-concurrency", positive(default=None, help="Requests in the engine at once, at most; times each token.")),
    ("--num-warmups", count(default=1, help="Short runs that are not timed.")),
    *SAMPLING,
    OUTPUT_JSON,
    PROFILE,
    TIMELINE,
)
def throughput(
    dataset_name: str,
    dataset_path: Path | None,
    num_prompts: int,
    input_len: int,
    output_len: int | None,
    random_range_ratio: float,
    prefix_len: int,
    prefix_repetition_prefix_len: int,
    prefix_repetition_suffix_len: int,
    prefix_repetition_num_prefixes: int,
    request_rate: float | None,
    max_concurrency: int | None,
    num_warmups: int,
    temperature: float,
    disable_detokenize: bool,
    output_json: Path | None,
    profile: Path | None,
    plot: Path | None,
    debug: bool,
    **values: Any,
) -> None:
    """Run many requests, all at once or as they arrive.

    \b
    mini-vllm bench throughput --num-prompts 16 --input-len 64 --output-len 32
    mini-vllm bench throughput --preset qwen3-8b --request-rate 20 --device cuda
    """
    from mini_vllm.bench import workloads
    from mini_vllm.bench.throughput import Load, measure_throughput, throughput_lines

    check_plot(plot)
    if (dataset_path is None) == (dataset_name == "sharegpt"):
        raise click.UsageError("--dataset-name sharegpt and --dataset-path need each other")
    seed = values["seed"]
    pairs = None if dataset_path is None else workloads.read_sharegpt(dataset_path)

    def make_workload(engine: Any) -> workloads.Workload:
        vocab_size = engine.model_config.vocab_size
        if pairs is not None:
            return workloads.sharegpt_workload(
                pairs, engine.tokenizer, num_prompts, engine.max_model_len, output_len=output_len, seed=seed
            )
        if dataset_name == "prefix-repetition":
            return workloads.prefix_repetition_workload(
                num_prompts,
                vocab_size,
                prefix_len=prefix_repetition_prefix_len,
                suffix_len=prefix_repetition_suffix_len,
                num_prefixes=prefix_repetition_num_prefixes,
                output_len=output_len or 128,
                seed=seed,
            )
        return workloads.random_workload(
            num_prompts,
            input_len,
            output_len or 128,
            vocab_size,
            seed=seed,
            range_ratio=random_range_ratio,
            prefix_len=prefix_len,
        )

    load = Load(
        math.inf if request_rate is None else request_rate,
        max_concurrency,
        watched=request_rate is not None,
        seed=seed,
    )
    with engine_arguments(values) as arguments:
        report, run, tracer = measure_throughput(
            arguments,
            make_workload,
            load,
            temperature=temperature,
            detokenize=not disable_detokenize,
            num_warmups=num_warmups,
            traced=bool(profile or plot),
        )
    publish(report, throughput_lines(report, run, load), output_json, tracer, profile, plot)


@command(
    "nano-vllm's benchmark.",
    ("--num-prompts", positive(default=256, help="Fewer are another workload.")),
    ("--max-input-len", positive(default=1024, help="Shorter prompts are another workload.")),
    ("--max-output-len", positive(default=1024, help="Shorter answers are another workload.")),
    ("--num-iters", positive(default=1, help="Runs; the figures are medians.")),
    OUTPUT_JSON,
    PROFILE,
    TIMELINE,
)
def nano(
    num_prompts: int,
    max_input_len: int,
    max_output_len: int,
    num_iters: int,
    output_json: Path | None,
    profile: Path | None,
    plot: Path | None,
    debug: bool,
    **values: Any,
) -> None:
    """nano-vllm's benchmark: 256 prompts, 142,827 prompt and 133,966 output tokens, temperature 0.6.

    \b
    mini-vllm bench nano --num-prompts 8 --max-input-len 64 --max-output-len 32
    mini-vllm bench nano --preset qwen3-0.6b --device cuda
    """
    from mini_vllm.bench.throughput import NANO_ENGINE, measure_nano, nano_lines

    check_plot(plot)
    defaults = dict(NANO_ENGINE)
    if values["model"] is None and values["preset"] is None:
        del defaults["max_model_len"]  # the demo model's own is shorter
    with engine_arguments(values, **defaults) as arguments:
        report, tracer = measure_nano(
            arguments,
            num_iters=num_iters,
            traced=bool(profile or plot),
            num_prompts=num_prompts,
            max_input_len=max_input_len,
            max_output_len=max_output_len,
        )
    publish(report, nano_lines(report), output_json, tracer, profile, plot)


@command(
    "From an empty process to the first token.",
    ("--num-iters-cold", count(default=3, help="Starts with an empty cache of compiled kernels.")),
    ("--num-iters-warmup", count(default=1, help="Starts that fill the cache, not timed.")),
    ("--num-iters-warm", count(default=3, help="Starts with a filled cache.")),
    OUTPUT_JSON,
)
def startup(
    num_iters_cold: int,
    num_iters_warmup: int,
    num_iters_warm: int,
    output_json: Path | None,
    debug: bool,
    **values: Any,
) -> None:
    """Time the way from an empty process to the first token, part by part.

    \b
    mini-vllm bench startup --preset qwen3-0.6b --device cuda
    """
    from mini_vllm.bench.startup import measure_startup, startup_lines

    if num_iters_cold + num_iters_warm == 0:
        raise click.UsageError("--num-iters-cold and --num-iters-warm are both 0: nothing to measure")
    with engine_arguments(values) as arguments:
        report = measure_startup(
            arguments,
            num_iters_cold=num_iters_cold,
            num_iters_warmup=num_iters_warmup,
            num_iters_warm=num_iters_warm,
        )
    publish(report, startup_lines(report), output_json)


def parse_list(kind: type) -> Callable:
    """A callback for numbers separated by commas, each above 0."""

    def parse(ctx: click.Context, param: click.Parameter, text: str | None) -> list[Any] | None:
        if text is None:
            return None
        try:
            numbers = [kind(part) for part in text.split(",")]
        except ValueError:
            raise click.BadParameter(f"must be numbers separated by commas, got {text!r}") from None
        if not all(number > 0 for number in numbers):
            raise click.BadParameter(f"must be above 0, got {text!r}")
        return numbers

    return parse


@command(
    "Latency against throughput, load by load.",
    ("--max-concurrency", {"callback": parse_list(int), "help": "Requests at once, such as 1,2,4,8,16 (the default)."}),
    ("--request-rate", {"callback": parse_list(float), "help": "Requests a second, such as 1,2,4,inf, instead."}),
    ("--num-prompts", positive(default=64, help="Requests under each load.")),
    ("--input-len", positive(default=128, help="Tokens of a prompt.")),
    ("--output-len", positive(default=64, help="Tokens of an answer.")),
    *SAMPLING,
    OUTPUT_JSON,
    PLOT,
)
def sweep(
    max_concurrency: list[int] | None,
    request_rate: list[float] | None,
    num_prompts: int,
    input_len: int,
    output_len: int,
    temperature: float,
    disable_detokenize: bool,
    output_json: Path | None,
    plot: Path | None,
    debug: bool,
    **values: Any,
) -> None:
    """Latency against throughput: the same requests under one load after the other.

    \b
    mini-vllm bench sweep --num-prompts 16 --plot curves.png
    mini-vllm bench sweep --preset qwen3-8b --request-rate 1,2,4,8,16,inf --num-prompts 200 --device cuda
    """
    from mini_vllm.bench.throughput import Load, measure_sweep, sweep_lines

    check_plot(plot)
    if max_concurrency and request_rate:
        raise click.UsageError("a sweep is over --max-concurrency or over --request-rate, not both")
    loads: list[Load] = [Load(rate, watched=True, seed=values["seed"]) for rate in request_rate or ()]
    if not loads:
        loads = [Load(max_concurrency=limit) for limit in max_concurrency or (1, 2, 4, 8, 16)]
    with engine_arguments(values) as arguments:
        report = measure_sweep(
            arguments,
            loads,
            num_prompts=num_prompts,
            input_len=input_len,
            output_len=output_len,
            temperature=temperature,
            detokenize=not disable_detokenize,
            seed=values["seed"],
        )
    publish(report, sweep_lines(report), output_json)
    if plot is not None:
        from mini_vllm.bench.plot import plot_sweep

        plot_sweep(report.engine["model"], report.details["points"], plot)


@bench.command(short_help="All that this engine is held to, beside others.")
@click.option("--out", "--output-json", "output_json", **output_path("Write every sample to this file."))
@click.option("--only", multiple=True, metavar="TEXT", help="Only rows whose name contains this; may be repeated.")
@click.option("--list", "list_rows", is_flag=True, help="Print the rows' names and leave.")
@click.option("--quick", is_flag=True, help="The demo model instead of real shapes: seconds, also on a CPU.")
@click.option("--device", default="auto", show_default=True, type=click.Choice(DEVICES))
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def suite(
    output_json: Path | None, only: tuple[str, ...], list_rows: bool, quick: bool, device: str, debug: bool
) -> None:
    """Measure everything this engine is held to, beside vLLM's and nano-vllm's figures. Minutes, on a GPU.

    Checks first that the GPU's tokens are right. Exit code 1 if they are not, or if a row fails.
    """
    from mini_vllm.bench.suite import row_names, run_suite, suite_lines

    if list_rows:
        for name in row_names(quick):
            click.echo(name)
        return
    report = run_suite(quick=quick, only=only, device=device)
    publish(report, suite_lines(report), output_json)
    if report.details["failures"]:
        raise click.ClickException(f"{len(report.details['failures'])} rows failed")


@bench.command(short_help="Two --output-json files and their ratios.")
@click.argument("a", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("b", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def compare(a: Path, b: Path) -> None:
    """Print the figures that two --output-json files share, and their ratios b / a."""
    from mini_vllm.bench.report import compare as compare_reports
    from mini_vllm.bench.report import load_report

    for line in compare_reports(load_report(a), load_report(b)):
        click.echo(line)
