"""What planning a step takes on the host: `python -m mini_vllm.bench.scheduler`.

All sequences decode, as they do in nearly every step of a busy server: `schedule` gives each a token, and a block to
every sixteenth or so; `update` books the tokens. Behind them a queue waits for a seat, which none of them leaves.
Nothing else is timed: no model, no arrays, no detokenizer.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click

from mini_vllm.bench.files import output_path
from mini_vllm.bench.report import Metric, Report, percentile
from mini_vllm.sampling_params import SamplingParams
from mini_vllm.scheduling.block_manager import BlockManager
from mini_vllm.scheduling.radix_tree import RadixTree
from mini_vllm.scheduling.scheduler import Scheduler
from mini_vllm.scheduling.sequence import Sequence


@dataclass(frozen=True)
class Timing:
    """Microseconds: of `schedule` and `update` in each step, of `add` for each request (the mean), and of each of
    the garbage collector's runs that fell into the timed calls.
    """

    schedule: list[float]
    update: list[float]
    add: float
    gc_pauses: list[float]

    @property
    def step(self) -> list[float]:
        return [a + b for a, b in zip(self.schedule, self.update, strict=True)]


def time_steps(
    num_seqs: int,
    num_waiting: int,
    *,
    num_steps: int = 1000,
    context: int = 1024,
    block_size: int = 16,
    prefix_caching: bool = True,
) -> Timing:
    """Time steps of `num_seqs` decoding sequences of about `context` tokens, none of them alike."""
    longest = context + block_size + num_steps
    blocks = BlockManager(num_seqs * (longest // block_size + 1), block_size)
    scheduler = Scheduler(
        blocks,
        max_num_seqs=num_seqs,
        max_num_batched_tokens=num_seqs * (context + block_size),
        cache=RadixTree(blocks) if prefix_caching else None,
    )
    params = SamplingParams(max_tokens=None, ignore_eos=True)
    # Lengths differ, so that blocks run full in different steps. Nobody looks at the prompts in the queue.
    prompts = [[i] * (context + i % block_size) for i in range(num_seqs)] + [[0]] * num_waiting
    sequences = [Sequence(i, prompt, params, max_num_tokens=longest + 1) for i, prompt in enumerate(prompts)]
    start = time.perf_counter_ns()
    for seq in sequences:
        scheduler.add(seq)
    add = (time.perf_counter_ns() - start) / 1e3 / len(sequences)

    token_ids = [0] * num_seqs
    scheduler.update(scheduler.schedule(), token_ids)  # all prompts at once
    schedule, update = [], []
    with gc_pauses() as pauses:
        for _ in range(num_steps):
            start = time.perf_counter_ns()
            plan = scheduler.schedule()
            planned = time.perf_counter_ns()
            scheduler.update(plan, token_ids)
            booked = time.perf_counter_ns()
            schedule.append((planned - start) / 1e3)
            update.append((booked - planned) / 1e3)
    assert len(plan.scheduled) == len(scheduler.running) == num_seqs, "every sequence decoded to the end"
    assert scheduler.num_waiting == num_waiting, "nobody left the queue"
    return Timing(schedule, update, add, pauses)


@contextmanager
def gc_pauses() -> Iterator[list[float]]:
    """A list that gets the microseconds of each run of the garbage collector, while the context lasts."""
    pauses: list[float] = []
    start = 0

    def watch(phase: str, info: dict[str, int]) -> None:
        nonlocal start
        if phase == "start":
            start = time.perf_counter_ns()
        else:
            pauses.append((time.perf_counter_ns() - start) / 1e3)

    gc.collect()  # what others left behind is not ours to pay
    gc.callbacks.append(watch)
    try:
        yield pauses
    finally:
        gc.callbacks.remove(watch)


def timing_report(timings: dict[int, Timing], workload: dict[str, object]) -> Report:
    """timings: by number of waiting requests."""
    metrics = {}
    for num_waiting, timing in timings.items():
        found = {"schedule": timing.schedule, "update": timing.update, "step": timing.step, "add": [timing.add]}
        metrics |= {f"{name}_us @ {num_waiting} waiting": Metric(samples, "us") for name, samples in found.items()}
        if timing.gc_pauses:
            metrics[f"gc_pause_us @ {num_waiting} waiting"] = Metric(timing.gc_pauses, "us")
    return Report("scheduler", workload, {"device": "cpu"}, metrics)


def timing_lines(timings: dict[int, Timing]) -> Iterator[str]:
    """A block of lines for each number of waiting requests."""
    for num_waiting, timing in timings.items():
        yield f"{f'{num_waiting} waiting, us':<24}{'median':>10}{'P90':>10}{'P99':>10}{'max':>10}"
        for name, samples in (
            ("schedule", timing.schedule),
            ("update", timing.update),
            ("schedule + update", timing.step),
        ):
            yield f"  {name:<22}" + "".join(f"{percentile(samples, q):>10.1f}" for q in (50, 90, 99, 100))
        yield f"  add, for each request: {timing.add:.2f}, the mean"
        pauses, seconds = timing.gc_pauses, sum(timing.step)
        longest = f", the longest {max(pauses):.1f} us" if pauses else ""
        yield f"  garbage collector: {len(pauses)} runs{longest}, {sum(pauses) / seconds:.1%} of the time"


@click.command()
@click.option("--num-seqs", default=256, show_default=True, type=click.IntRange(min=1), help="Decoding sequences.")
@click.option(
    "--waiting",
    "queue_lengths",
    multiple=True,
    default=(0, 1000, 100_000),
    show_default=True,
    type=click.IntRange(min=0),
    help="Requests behind them in the queue. May be given more than once.",
)
@click.option("--steps", "num_steps", default=1000, show_default=True, type=click.IntRange(min=1))
@click.option("--context", default=1024, show_default=True, type=click.IntRange(min=1), help="Tokens of a sequence.")
@click.option("--block-size", default=16, show_default=True, type=click.IntRange(min=1))
@click.option("--no-prefix-caching", is_flag=True)
@click.option("--output-json", **output_path("Write every sample to this file."))
def main(
    num_seqs: int,
    queue_lengths: tuple[int, ...],
    num_steps: int,
    context: int,
    block_size: int,
    no_prefix_caching: bool,
    output_json: Path | None,
) -> None:
    """Time the scheduler's part of a decode step, in microseconds."""
    settings = {"num_steps": num_steps, "context": context, "block_size": block_size}
    settings["prefix_caching"] = not no_prefix_caching
    timings = {num_waiting: time_steps(num_seqs, num_waiting, **settings) for num_waiting in queue_lengths}
    click.echo(f"{num_seqs} decoding sequences, {num_steps} steps")
    for line in timing_lines(timings):
        click.echo(line)
    if output_json is not None:
        timing_report(timings, {"num_seqs": num_seqs, **settings}).write(output_json)


if __name__ == "__main__":
    main()
