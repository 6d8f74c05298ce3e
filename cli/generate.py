"""`mini-vllm generate`: complete prompts from arguments, stdin or a file."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from mini_vllm.cli.options import GroupedCommand, engine_options, make_llm, sampling_options

if TYPE_CHECKING:
    from mini_vllm import LLM, SamplingParams
    from mini_vllm.llm import RequestOutput


@click.command(cls=GroupedCommand)
@click.argument("prompts", nargs=-1, metavar="[PROMPT]...")
@click.option(
    "--input",
    "input_path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Prompts from a file: .txt, one a line, or .jsonl, objects with prompt, prompt_token_ids or messages.",
)
@click.option(
    "--output",
    "output_path",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Write one JSON object a prompt to this file.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a prompt instead of text.")
@click.option("--chat", is_flag=True, help="Wrap each prompt as a user message in the model's chat template.")
@click.option("--system", help="System message, with --chat.")
@click.option("--n", default=1, show_default=True, help="Samples per prompt.")
@click.option("--stream/--no-stream", default=True, help="Print a single prompt's text as it is made (default).")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@sampling_options
@engine_options
def generate(
    prompts: tuple[str, ...],
    input_path: Path | None,
    output_path: Path | None,
    as_json: bool,
    chat: bool,
    system: str | None,
    n: int,
    stream: bool,
    debug: bool,
    **values: Any,
) -> None:
    """Complete PROMPTs; without any, the prompt is read from stdin.

    One prompt is written to stdout as it is made; many show their progress on stderr.

    \b
    mini-vllm generate "Once upon a time"
    mini-vllm generate --model Qwen/Qwen3-0.6B --chat "Name three colours."
    mini-vllm generate --input prompts.jsonl --output out.jsonl --max-tokens 64
    """
    if system is not None and not chat:
        raise click.UsageError("--system needs --chat")
    if prompts and input_path:
        raise click.UsageError("give prompts as arguments or with --input, not both")
    items = read_prompts(prompts, input_path)
    if not items:
        raise click.UsageError("no prompt: give one as an argument, on stdin or with --input")

    llm, params = make_llm(values, n=n)
    inputs = [to_prompt(llm, item, chat, system) for item in items]
    if len(inputs) == 1 and stream and n == 1 and not as_json and output_path is None and params.logprobs is None:
        write_stream(llm, inputs[0], params)
        return
    outputs = llm.generate(inputs, params, use_tqdm=sys.stderr.isatty() or len(inputs) > 1)
    if output_path is not None:
        with open(output_path, "w", encoding="utf-8") as file:
            write_json(outputs, file)
    elif as_json:
        write_json(outputs, sys.stdout)
    else:
        write_text(outputs)


def read_prompts(arguments: tuple[str, ...], path: Path | None) -> list[dict[str, Any]]:
    """Prompts as mappings with one of the keys prompt, prompt_token_ids, messages."""
    if path is None:
        if arguments:
            return [{"prompt": text} for text in arguments]
        text = "" if sys.stdin.isatty() else sys.stdin.read().removesuffix("\n")
        return [{"prompt": text}] if text else []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise click.UsageError(f"{path} cannot be read: {error}") from None
    if path.suffix != ".jsonl":
        return [{"prompt": line} for line in lines if line.strip()]
    return [parse_line(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]


def parse_line(line: str, place: str) -> dict[str, Any]:
    try:
        item = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise click.UsageError(f"{place} is not JSON: {error}") from None
    if isinstance(item, str):
        return {"prompt": item}
    kinds = ("prompt", "prompt_token_ids", "messages")
    if not isinstance(item, dict) or sum(kind in item for kind in kinds) != 1:
        raise click.UsageError(f"{place} must be a string or an object with one of {', '.join(kinds)}")
    return {kind: item[kind] for kind in kinds if kind in item}


def to_prompt(llm: LLM, item: dict[str, Any], chat: bool, system: str | None) -> dict[str, Any]:
    messages = item.get("messages")
    if chat and "prompt" in item:
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages.append({"role": "user", "content": item["prompt"]})
    return item if messages is None else llm.llm_engine.encode_chat(messages)


def write_stream(llm: LLM, prompt: dict[str, Any], params: SamplingParams) -> None:
    pieces: Iterator[str] = llm.stream(prompt, params)
    try:
        for piece in pieces:
            click.echo(piece, nl=False)
    finally:
        pieces.close()
    click.echo()


def write_text(outputs: list[RequestOutput]) -> None:
    """The texts, with a heading line each when there is more than one."""
    many = len(outputs) > 1 or len(outputs[0].outputs) > 1
    for i, output in enumerate(outputs):
        for sample in output.outputs:
            if many:
                label = f"{i}" if len(output.outputs) == 1 else f"{i}.{sample.index}"
                click.echo(f"--- {label}")
            click.echo(sample.text)


def write_json(outputs: list[RequestOutput], file: TextIO) -> None:
    """One object a prompt, in vLLM's field names."""
    for i, output in enumerate(outputs):
        record = {
            "index": i,
            "prompt": output.prompt,
            "prompt_token_ids": output.prompt_token_ids,
            "outputs": [asdict(sample) for sample in output.outputs],
        }
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
