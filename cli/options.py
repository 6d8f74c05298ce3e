"""Options that several commands share, and how they become engine arguments and sampling parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from mini_vllm.config import DEVICES, DTYPES, GENERATION_CONFIGS, LOAD_FORMATS, SCHEDULING_POLICIES

if TYPE_CHECKING:
    from mini_vllm import LLM, SamplingParams

# Group, flag and click arguments. Defaults live in EngineConfig and SamplingParams: an option that is not
# given is not passed on.
ENGINE_OPTIONS = [
    ("--model", {"help": "Directory of an HF checkpoint or hub id; default is the bundled demo model."}),
    ("--revision", {"help": "Branch, tag or commit of a hub id."}),
    ("--device", {"type": click.Choice(DEVICES), "help": "auto is CUDA where that works, else the CPU."}),
    ("--dtype", {"type": click.Choice(DTYPES), "help": "Of weights, activations and KV cache."}),
    ("--max-model-len", {"type": int, "help": "Tokens of prompt and output together."}),
    ("--block-size", {"type": int, "help": "Tokens per KV-cache block."}),
    ("--num-kv-blocks", {"type": int, "help": "Size of the KV cache in blocks."}),
    ("--kv-cache-memory", {"type": int, "help": "Size of the KV cache in bytes."}),
    ("--max-num-seqs", {"type": int, "help": "Sequences running at once."}),
    ("--max-num-batched-tokens", {"type": int, "help": "Tokens per engine step."}),
    ("--gpu-memory-utilization", {"type": float, "help": "Share of GPU memory to use."}),
    (
        "--enable-prefix-caching/--no-enable-prefix-caching",
        {"default": None, "help": "Share and keep the K/V of equal prefixes (on by default)."},
    ),
    ("--swap-space", {"type": int, "help": "Bytes of host memory for K/V that does not fit the device."}),
    ("--policy", {"type": click.Choice(SCHEDULING_POLICIES), "help": "Who runs first: fcfs by default."}),
    ("--enforce-eager", {"is_flag": True, "default": None, "help": "Use no CUDA graphs."}),
    ("--load-format", {"type": click.Choice(LOAD_FORMATS), "help": "dummy: random weights, for benchmarks."}),
    (
        "--generation-config",
        {"type": click.Choice(GENERATION_CONFIGS), "help": "none: ignore the checkpoint's defaults."},
    ),
]
SAMPLING_OPTIONS = [
    ("--max-tokens", {"type": int, "help": "Output tokens at most."}),
    ("--min-tokens", {"type": int, "help": "Output tokens before the end is allowed."}),
    ("--temperature", {"type": float, "help": "0 is greedy."}),
    ("--top-p", {"type": float, "help": "Nucleus sampling: keep this probability mass."}),
    ("--top-k", {"type": int, "help": "Keep this many most likely tokens."}),
    ("--min-p", {"type": float, "help": "Keep tokens this likely relative to the best."}),
    ("--repetition-penalty", {"type": float, "help": "Above 1 discourages tokens already seen."}),
    ("--presence-penalty", {"type": float, "help": "Subtracted once for tokens in the output."}),
    ("--frequency-penalty", {"type": float, "help": "Subtracted per occurrence in the output."}),
    ("--seed", {"type": int, "help": "Same seed, same text."}),
    ("--stop", {"multiple": True, "help": "End before this text; may be repeated."}),
    ("--ignore-eos", {"is_flag": True, "default": None, "help": "Go on after the end-of-text token."}),
    ("--logprobs", {"type": int, "help": "Log probabilities of this many top tokens (with --json or --output)."}),
]
DEFAULT_MAX_TOKENS = 256  # the API's 16, which is vLLM's, would cut a newcomer's first story short


class GroupedCommand(click.Command):
    """A command whose help shows its options under headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record is not None:
                groups.setdefault(getattr(param, "group", "Options"), []).append(record)
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records)


class GroupedOption(click.Option):
    def __init__(self, *args: Any, group: str = "Options", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = group


def option_group(group: str, options: list[tuple[str, dict[str, Any]]]) -> Callable:
    """A decorator that adds options, {flag or "flag and aliases": attributes}, under one heading of the help."""

    def decorate(function: Callable) -> Callable:
        for flag, attributes in reversed(options):
            function = click.option(*flag.split(), cls=GroupedOption, group=group, **attributes)(function)
        return function

    return decorate


engine_options = option_group("Engine", ENGINE_OPTIONS)
sampling_options = option_group("Sampling", SAMPLING_OPTIONS)


def given(options: list[tuple[str, dict[str, Any]]], values: dict[str, Any]) -> dict[str, Any]:
    """The values of a group that the user gave."""
    names = [flag.split("/")[0].removeprefix("--").replace("-", "_") for flag, _ in options]
    return {name: values[name] for name in names if values[name] not in (None, ())}


def make_llm(values: dict[str, Any], **sampling: Any) -> tuple[LLM, SamplingParams]:
    """The engine and the sampling parameters that the options describe.

    The parameters are the checkpoint's defaults with what the user gave, and `sampling`, on top. A bad value
    is bad usage, said before a model is loaded.
    """
    from mini_vllm import LLM, EngineConfig, SamplingParams

    engine = given(ENGINE_OPTIONS, values)
    sampling.update(given(SAMPLING_OPTIONS, values))
    try:
        EngineConfig(**engine)
        SamplingParams(**{"max_tokens": None, **sampling})
    except ValueError as error:
        raise click.UsageError(str(error)) from None

    llm = LLM(**engine)
    if "max_new_tokens" not in llm.llm_engine.generation_config:
        sampling.setdefault("max_tokens", DEFAULT_MAX_TOKENS)
    return llm, replace(llm.get_default_sampling_params(), **sampling)
