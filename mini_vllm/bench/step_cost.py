"""What a step takes on a GPU: a table of measured step times, and a linear model fitted to it.

seconds = fixed                  weights are read once, kernels are launched
        + per_decode_sequence    for each sequence that decodes
        + per_context_token      for each token whose K/V a decoding sequence reads
        + per_prefill_step       if prompts are computed: long steps' kernels are launched one by one, not as a graph
        + per_prefill_token      for each token of a prompt that is computed
        + per_attention_pair     for each pair of a prompt's token and one that it sees
        + per_moved_token        for each token whose K/V moves between device and host memory
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np

from mini_vllm.bench.files import output_path, read_json, write_json
from mini_vllm.bench.presets import PRESETS, preset_arguments
from mini_vllm.bench.report import environment
from mini_vllm.bench.runner import with_engine
from mini_vllm.bench.workloads import MAX_TOKEN_ID
from mini_vllm.engine.llm_engine import LLMEngine
from mini_vllm.engine.model_runner import ModelRunner, StepResult
from mini_vllm.sampling_params import SamplingParams
from mini_vllm.scheduling.scheduler import SchedulerOutput


class StepTime(NamedTuple):
    """A step that computed `tokens` tokens of `sequences` sequences, equally many of each, took `seconds`.

    context: tokens that these sequences had in the end, together. Averages need not be integers.
    """

    tokens: float
    sequences: float
    context: float
    seconds: float

    def features(self) -> tuple[float, ...]:
        """What the coefficients of `StepCost` that `fit` finds are multiplied by, in their order."""
        if self.tokens == self.sequences:
            return 1, self.sequences, self.context, 0, 0, 0
        new, seen = self.tokens / self.sequences, self.context / self.sequences
        return 1, 0, 0, 1, self.tokens, self.tokens * (seen - (new - 1) / 2)


@dataclass(frozen=True)
class StepTable:
    """Step times of one model on one GPU.

    seconds_per_moved_token: to copy its K/V from host memory to the device or back.
    source: where the figures come from, in words.
    """

    rows: list[StepTime]
    seconds_per_moved_token: float
    source: str

    def write(self, path: Path) -> None:
        write_json(asdict(self), path)

    @classmethod
    def read(cls, path: Path) -> StepTable:
        """A JSON file with this class's fields; each row is [tokens, sequences, context, seconds]."""
        found = read_json(path)
        try:
            rows = [StepTime(*map(float, row)) for row in found["rows"]]
            return cls(rows, float(found["seconds_per_moved_token"]), str(found["source"]))
        except (ValueError, TypeError, KeyError) as error:
            form = '{"source": "...", "seconds_per_moved_token": 1e-6, "rows": [[tokens, sequences, context, seconds]]}'
            raise ValueError(f"{path} is not a table of step times like {form}: {error!r}") from None


@dataclass(frozen=True)
class StepCost:
    """Seconds of a step; see the top of this file."""

    fixed: float
    per_decode_sequence: float
    per_context_token: float
    per_prefill_step: float
    per_prefill_token: float
    per_attention_pair: float
    per_moved_token: float = 0.0

    @classmethod
    def fit(cls, table: StepTable) -> StepCost:
        """Least squares of the relative errors; a coefficient that would be negative is 0.

        Raises `ValueError` for rows that leave a coefficient open, or cannot be.
        """
        rows = table.rows
        if not all(row.tokens >= row.sequences > 0 and row.context >= row.tokens and row.seconds > 0 for row in rows):
            raise ValueError("a row of step times needs context >= tokens >= sequences > 0 and seconds > 0")
        features = np.array([row.features() for row in rows], dtype=np.float64).reshape(-1, 6)
        scale = features.max(axis=0, initial=0.0)
        if not scale.all() or np.linalg.matrix_rank(features / scale) < 6:
            raise ValueError(
                "the step times leave a cost open: give decode rows (tokens = sequences) that differ in sequences and "
                "context, and prefill rows that differ in tokens and context"
            )
        relative = features / np.array([[row.seconds] for row in rows])
        coefficients, columns = np.zeros(6), np.arange(6)
        while len(columns):
            solution = np.linalg.lstsq(relative[:, columns], np.ones(len(rows)), rcond=None)[0]
            if solution.min() >= 0:
                coefficients[columns] = solution
                break
            columns = np.delete(columns, solution.argmin())
        return cls(*coefficients.tolist(), table.seconds_per_moved_token)

    def error(self, rows: Iterable[StepTime]) -> float:
        """The largest difference from a row, as a share of the row."""
        costs = (
            self.fixed,
            self.per_decode_sequence,
            self.per_context_token,
            self.per_prefill_step,
            self.per_prefill_token,
            self.per_attention_pair,
        )
        return max(
            abs(sum(c * f for c, f in zip(costs, row.features(), strict=True)) / row.seconds - 1) for row in rows
        )

    def seconds(self, plan: SchedulerOutput, block_size: int) -> float:
        decodes = context = prefill = pairs = 0
        for _, start, num_tokens, _ in plan.scheduled:
            if num_tokens == 1:
                decodes += 1
                context += start + 1
            else:
                prefill += num_tokens
                pairs += num_tokens * start + num_tokens * (num_tokens + 1) // 2
        return (
            self.fixed
            + self.per_decode_sequence * decodes
            + self.per_context_token * context
            + self.per_prefill_step * (prefill > 0)
            + self.per_prefill_token * prefill
            + self.per_attention_pair * pairs
            + self.per_moved_token * block_size * len(plan.transfers)
        )


STEP_TABLES = {
    path.stem.removeprefix("steps_"): path for path in sorted(Path(__file__).with_name("results").glob("steps_*.json"))
}
"""Files of measured tables, by model; this module's command made them on one H200."""


# ---- measuring --------------------------------------------------------------------------------------------


@contextmanager
def recorded(runner: ModelRunner) -> Iterator[list[StepTime]]:
    """A list that gets every step that `runner` runs, while the context lasts.

    A step starts when it is launched, or when the one before it is done.
    """
    rows: list[StepTime] = []
    launch, done = runner.launch, 0.0

    def timed_launch(plan: SchedulerOutput) -> Callable[[], StepResult]:
        context = sum(s.start + s.num_tokens for s in plan.scheduled)
        launched = time.perf_counter()
        wait = launch(plan)

        def timed_wait() -> StepResult:
            nonlocal done
            result = wait()
            now = time.perf_counter()
            rows.append(StepTime(plan.num_tokens, len(plan.scheduled), context, now - max(launched, done)))
            done = now
            return result

        return timed_wait

    runner.launch = timed_launch
    try:
        yield rows
    finally:
        del runner.launch


def measure_step_times(
    engine: LLMEngine, batch_sizes: Iterable[int], contexts: Iterable[int], num_steps: int = 32
) -> StepTable:
    """Decode steps of each batch size at each context, and prefill steps of many prompts, of one, and of a part of one.

    A decode row is the median of `num_steps` steps, a prefill row that of at least 3. The engine needs a swap space, at
    least 16 seats, and room for a prompt of twice its max_num_batched_tokens.
    """
    rng = random.Random(0)
    budget = engine.config.max_num_batched_tokens

    def add(count: int, length: int, max_tokens: int) -> list[str]:
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        vocab_size = min(MAX_TOKEN_ID, engine.model_config.vocab_size)
        for i in range(count):
            engine.add_request(str(i), [rng.randrange(vocab_size) for _ in range(length)], params)
        return [str(i) for i in range(count)]

    def run() -> None:
        while engine.has_unfinished_requests():
            engine.step()
        engine.reset_prefix_cache()

    table: list[StepTime] = []
    for batch_size in batch_sizes:
        for context in contexts:
            request_ids = add(batch_size, context, max_tokens=engine.max_model_len - context)
            while engine.scheduler.num_waiting or any(s.num_output_tokens < 3 for s in engine.scheduler.running):
                engine.step()
            with recorded(engine.runner) as rows:
                for _ in range(num_steps):
                    engine.step()
            assert all(row.tokens == batch_size for row in rows), "not all sequences decoded to the end"
            table.append(StepTime(*map(statistics.median, zip(*rows, strict=True))))
            for request_id in request_ids:
                engine.abort_request(request_id)
            engine.reset_prefix_cache()
    kinds: dict[tuple[float, ...], list[float]] = {}
    # Lengths that fill the steps evenly, so that all sequences of a step have equally many tokens.
    for length, count in ((budget // 16, 1), (budget // 16, 16), (budget // 4, 4), (budget, 1), (2 * budget, 1)):
        with recorded(engine.runner) as rows:
            for _ in range(max(3, num_steps // 8)):
                add(count, length, max_tokens=1)
                run()
        for *kind, seconds in rows:
            kinds.setdefault(tuple(kind), []).append(seconds)
    table += [StepTime(*kind, statistics.median(seconds)) for kind, seconds in kinds.items()]
    found = environment(engine.runner.ops.device)
    return StepTable(
        table,
        engine.runner.seconds_to_load_block() / engine.config.block_size,
        f"mini-vllm {found['mini_vllm']}, {found.get('git_commit', 'not in git')}, on {found.get('gpu', found['cpu'])}",
    )


@click.command()
@click.option("--preset", type=click.Choice(list(PRESETS)), help="With random weights; default: the demo model.")
@click.option("--device", default="auto", show_default=True)
@click.option("--batch-size", "batch_sizes", multiple=True, default=(1, 8, 64, 256), show_default=True)
@click.option("--context", "contexts", multiple=True, default=(256, 2048), show_default=True)
@click.option("--max-num-batched-tokens", default=8192, show_default=True)
@click.option("--swap-space", default=1 << 28, show_default=True, help="Bytes, to measure what moving blocks takes.")
@click.option("--steps", "num_steps", default=32, show_default=True)
@click.option("--output", required=True, **output_path("The table, as JSON."))
def main(
    preset: str | None,
    batch_sizes: tuple[int, ...],
    contexts: tuple[int, ...],
    num_steps: int,
    output: Path,
    **engine_options: Any,
) -> None:
    """Measure a table of step times, and fit the model to it."""
    with preset_arguments(preset) as arguments:
        arguments |= {**engine_options, "max_num_seqs": max(*batch_sizes, 16), "skip_tokenizer_init": True}
        table = with_engine(arguments, lambda engine: measure_step_times(engine, batch_sizes, contexts, num_steps))
    table.write(output)
    cost = StepCost.fit(table)
    click.echo(f"{'tokens':>8}{'sequences':>11}{'context':>10}{'ms':>10}")
    for row in table.rows:
        click.echo(f"{row.tokens:>8.0f}{row.sequences:>11.0f}{row.context:>10.0f}{1e3 * row.seconds:>10.3f}")
    click.echo(f"{cost}; within {cost.error(table.rows):.1%} of every row")


if __name__ == "__main__":
    main()
