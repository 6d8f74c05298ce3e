"""`mini-vllm kernels`: what the CUDA kernels are, compile them, time them."""

from __future__ import annotations

from pathlib import Path

import click

from mini_vllm.bench.files import output_path
from mini_vllm.cli.bench import publish

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

    compiled = list(resources(arch, dtype, head_dim))
    click.echo(f"{'file':<26}{'registers':>10}{'shared':>9}{'stack':>7}{'spills':>8}  kernel")
    for kernel, used in compiled:
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
@click.option("--output-json", "--json", **output_path("Write every sample and the machine to this file."))
@click.option("--only", default="", metavar="TEXT", help="Only cases whose name contains this.")
@dtype_option
def bench(output_json: Path | None, only: str, dtype: str) -> None:
    """Time every kernel on this GPU: microseconds, GB/s or TFLOP/s, and the share of the roof measured here."""
    from mini_vllm.bench.kernels import kernel_lines, measure_kernels

    report = measure_kernels(dtype, only)
    publish(report, kernel_lines(report), output_json)
