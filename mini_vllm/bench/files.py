"""The files that benchmarks write and read, and the options that name them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click


def output_path(help: str) -> dict[str, Any]:
    """What `click.option` needs to know about a file that will be written."""
    return {"type": click.Path(dir_okay=False, writable=True, path_type=Path), "callback": check_parent, "help": help}


def check_parent(ctx: click.Context, param: click.Parameter, path: Path | None) -> Path | None:
    """A file in a directory that is not there is bad usage, said before anything is measured."""
    if path is not None and not path.absolute().parent.is_dir():
        raise click.BadParameter(f"the directory {path.absolute().parent} does not exist")
    return path


def write_json(value: Any, path: Path) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Raises `ValueError` that names the file, whatever is wrong with it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from None
