"""Time decode steps of a preset: `python -m mini_vllm.bench.decode --preset qwen3-0.6b --batch-size 1 --context 128`.

A step is timed on the host, from one `LLMEngine.step` to the next, with scheduling, sampling and the copy of the
tokens in it; dummy weights, token-id prompts, all sequences the same length.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path

import click

from mini_vllm.bench.presets import PRESETS, write_preset
from mini_vllm.engine.llm_engine import LLMEngine
from mini_vllm.sampling_params import SamplingParams


def time_decode(
    preset: str, batch_size: int, context: int, steps: int, **engine_arguments: object
) -> dict[str, object]:
    """Seconds per decode step at about `context` tokens: median, spread and every sample, and the start-up time."""
    with tempfile.TemporaryDirectory() as directory:
        start = time.perf_counter()
        engine = LLMEngine(
            write_preset(preset, Path(directory)),
            load_format="dummy",
            max_model_len=context + 3 * steps + 16,
            max_num_seqs=max(batch_size, 8),
            max_num_batched_tokens=8192,
            **engine_arguments,
        )
        ready = time.perf_counter() - start
    # The context grows by a token a step; it starts half the steps short, so that it is `context` on average.
    prompt_len = max(1, context - steps // 2)
    params = SamplingParams(temperature=0, max_tokens=2 * steps + 16, ignore_eos=True)
    for i in range(batch_size):
        engine.add_request(str(i), [(7 * i + 13 * j) % 10000 for j in range(prompt_len)], params)
    while any(seq.num_output_tokens < 3 for seq in engine.scheduler.running) or engine.scheduler.waiting:
        engine.step()
    samples = []
    for _ in range(steps):
        start = time.perf_counter()
        engine.step()
        samples.append(time.perf_counter() - start)
    return {
        "preset": preset,
        "batch_size": batch_size,
        "context": context,
        "ms_per_step": statistics.median(samples) * 1e3,
        "p10_ms": statistics.quantiles(samples, n=10)[0] * 1e3,
        "p90_ms": statistics.quantiles(samples, n=10)[-1] * 1e3,
        "ready_s": ready,
        "samples_ms": [sample * 1e3 for sample in samples],
    }


@click.command()
@click.option("--preset", default="qwen3-0.6b", type=click.Choice(list(PRESETS)), show_default=True)
@click.option("--batch-size", default=1, show_default=True)
@click.option("--context", default=256, show_default=True, help="Tokens of each sequence, on average.")
@click.option("--steps", default=128, show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--enforce-eager", is_flag=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write every sample here.")
def main(
    preset: str, batch_size: int, context: int, steps: int, device: str, enforce_eager: bool, json_path: Path | None
) -> None:
    """Time decode steps with dummy weights."""
    result = time_decode(preset, batch_size, context, steps, device=device, enforce_eager=enforce_eager)
    click.echo(
        f"{preset}, batch {batch_size}, context {context}: {result['ms_per_step']:.3f} ms per step "
        f"(p10 {result['p10_ms']:.3f}, p90 {result['p90_ms']:.3f}); ready after {result['ready_s']:.1f} s"
    )
    if json_path is not None:
        json_path.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
