"""`mini-vllm chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from typing import Any

import click

from mini_vllm.cli.options import GroupedCommand, engine_options, make_llm, sampling_options


@click.command(cls=GroupedCommand)
@click.option("--system", help="System message that opens the conversation.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@sampling_options
@engine_options
def chat(system: str | None, debug: bool, **values: Any) -> None:
    """Talk with a model. /reset forgets the conversation, /exit (or Ctrl-D) leaves, Ctrl-C stops an answer."""
    llm, params = make_llm(values)
    if sys.stdin.isatty():
        import readline  # noqa: F401  # line editing and history in input()
    opening = [] if system is None else [{"role": "system", "content": system}]
    messages = list(opening)
    click.echo("Type a message; /reset starts over, /exit leaves.", err=True)
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if text.strip() == "/exit":
            return
        if text.strip() == "/reset":
            messages = list(opening)
            click.echo("Conversation forgotten.", err=True)
            continue
        if not text.strip():
            continue
        messages.append({"role": "user", "content": text})
        answer: list[str] = []
        try:
            for piece in llm.stream(llm.llm_engine.encode_chat(messages), params):
                answer.append(piece)
                click.echo(piece, nl=False)
        except KeyboardInterrupt:
            click.echo(" [stopped]", nl=False)
        except ValueError as error:  # most likely: the conversation no longer fits the context
            messages.pop()
            click.echo(f"Error: {error}. /reset starts over.", err=True)
            continue
        click.echo()
        messages.append({"role": "assistant", "content": "".join(answer)})
