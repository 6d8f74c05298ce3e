"""The `mini-vllm` command. A subcommand's module is imported when it is called, so that `--help` is fast."""

from __future__ import annotations

import importlib
import os
import sys

import click

from mini_vllm import __version__

COMMANDS = {
    "generate": "Complete prompts.",
    "chat": "Talk with a model in the terminal.",
    "bench": "Measure latency, throughput and start-up.",
    "doctor": "Check whether this machine can run the CUDA backend.",
    "kernels": "List, compile and time the CUDA kernels.",
}


class LazyGroup(click.Group):
    """Knows its commands by name; the module mini_vllm.cli.<name> is imported when one is needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        return getattr(importlib.import_module(f"mini_vllm.cli.{name}"), name)

    def invoke(self, ctx: click.Context) -> None:
        try:
            super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            # The reader has seen enough, as in `mini-vllm generate ... | head`. Python flushes stdout once more
            # at exit, which would fail again and print a traceback.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="mini-vllm")
def cli() -> None:
    """mini-vllm: LLM inference that installs and starts in seconds and can be hacked down to its kernels."""


def main() -> None:
    """Console entry point: exit code 0 when all went well, 1 when the run failed, 2 for bad usage.

    Errors are one line on stderr; `--debug` on a command shows the traceback. Ctrl-C exits with 130, and a
    closed pipe (`mini-vllm generate ... | head`) ends quietly.
    """
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Exit as exit_:
        sys.exit(exit_.exit_code)
    except click.UsageError as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("\nInterrupted.", err=True)
        sys.exit(130)
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        message = error.format_message() if isinstance(error, click.ClickException) else str(error)
        click.echo(f"Error: {message or type(error).__name__}", err=True)
        sys.exit(1)
