"""`mini-vllm doctor`: can this machine run the CUDA backend?"""

from __future__ import annotations

import json

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the facts as JSON.")
def doctor(as_json: bool) -> None:
    """Check driver, GPU, CuPy, NVRTC, cuBLAS and headers, compile and run a kernel, and say what is missing.

    Exit code 0 also without a GPU, where the NumPy backend serves; 1 if CUDA is installed but fails.
    """
    from mini_vllm.doctor import examine

    facts = examine()
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    else:
        for section, values in facts.items():
            if isinstance(values, dict):
                click.echo(f"{section}")
                for name, value in values.items():
                    click.echo(f"  {name:<26}{value}")
        click.echo(facts["verdict"])
    if facts["verdict"].startswith("CUDA is installed but"):
        raise SystemExit(1)
