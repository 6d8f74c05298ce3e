"""`mini-vllm kernels`: what the CUDA kernels are, compile them, time them."""

from __future__ import annotations

from pathlib import Path

import click

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a")
dtype_option = click.option(
    "--dtype", default="bfloat16", show_default=True, type=click.Choice(("float32", "float16", "bfloat16"))
)
head_dim_option = click.option("--head-dim", default=128, show_default=True, help="Attention head size.")


@click.group()
def kernels() -> None:
    """List, compile and time the CUDA kernels."""


@kernels.command("list")
@click.option("--arch", type=click.Choice(ARCHITECTURES), help="Default: this GPU's, or sm_90a without one.")
@dtype_option
@head_dim_option
def list_(arch: str | None, dtype: str, head_dim: int) -> None:
    """Each kernel instance a model uses, with its file, registers, shared memory and spills. Needs no GPU."""
    from mini_vllm.bench.kernels import resources

    click.echo(f"{'file':<26}{'registers':>10}{'shared':>9}{'stack':>7}{'spills':>8}  kernel")
    for kernel, used in resources(arch, dtype, head_dim):
        click.echo(
            f"{kernel.file:<26}{used.registers:>10}{used.shared_bytes:>9}{used.stack_bytes:>7}{used.spill_bytes:>8}"
            f"  {kernel.name}"
        )


@kernels.command("compile")
@click.option("--arch", "archs", default="sm_90a", show_default=True, help="Architectures, separated by commas.")
@dtype_option
@head_dim_option
def compile_(archs: str, dtype: str, head_dim: int) -> None:
    """Compile all kernels of a dtype and head size into the cache. Needs no GPU."""
    from mini_vllm.bench.kernels import compile_for

    for arch in archs.split(","):
        if arch not in ARCHITECTURES:
            raise click.UsageError(f"--arch {arch!r} is not one of {', '.join(ARCHITECTURES)}")
        count, seconds = compile_for(arch, dtype, head_dim)
        click.echo(f"{arch}: {count} kernels, {seconds:.1f} s of compiling")


@kernels.command("bench")
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Also write every sample here."
)
@click.option("--only", help="Only cases whose name contains this text.")
@dtype_option
def bench(json_path: Path | None, only: str | None, dtype: str) -> None:
    """Time every kernel on this GPU: microseconds, GB/s or TFLOP/s, and the share of the roof measured here."""
    import json

    from mini_vllm.bench.kernels import run

    click.echo(f"{'case':<56}{'us':>10}{'spread':>8}{'GB/s':>8}{'TFLOP/s':>9}{'of roof':>9}")
    report = run(dtype, only)
    for case in report["cases"]:
        click.echo(
            f"{case['name']:<56}{case['us']:>10.2f}{case['spread']:>7.1%} {case['gb_per_s']:>7.0f}"
            f"{case['tflop_per_s']:>9.1f}{case['share_of_roof']:>9.0%}"
        )
    if json_path is not None:
        json_path.write_text(json.dumps(report, indent=1))
