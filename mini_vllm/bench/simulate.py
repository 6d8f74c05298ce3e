"""Hours of traffic in minutes, without a GPU: `python -m mini_vllm.bench.simulate --policy fcfs --policy sjf`.

The scheduler and the prefix cache are the engine's own, and plan every step; only the GPU is simulated. What a step
takes comes from `step_cost`, and the clock jumps from step to step. As in the engine on a GPU, a step is planned while
the one before it runs.

The traffic is conversations. They start as a Poisson process, and each is about one of a few system prompts, of which
the first is the most popular. A turn's prompt is all that was said before and a new message; it comes when its author
has read the answer, after a think time. So requests come in a steady stream as long as answers do.

A message's tokens are all the same, its own number: the prefix cache only ever compares tokens, and two prefixes are
equal just where they are made of the same messages.
"""

from __future__ import annotations

import heapq
import math
import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from mini_vllm.bench.files import output_path, write_json
from mini_vllm.bench.plot import plot_simulation, require_matplotlib
from mini_vllm.bench.report import Metric, Report, percentile, request_metrics
from mini_vllm.bench.runner import RequestTiming, Run
from mini_vllm.bench.step_cost import STEP_TABLES, StepCost, StepTable
from mini_vllm.bench.workloads import poisson_arrivals
from mini_vllm.config import EngineConfig
from mini_vllm.engine.llm_engine import MEASURED_TOKENS
from mini_vllm.sampling_params import SamplingParams
from mini_vllm.scheduling.block_manager import BlockManager
from mini_vllm.scheduling.policy import POLICIES
from mini_vllm.scheduling.radix_tree import RadixTree
from mini_vllm.scheduling.scheduler import Scheduler, SchedulerOutput
from mini_vllm.scheduling.sequence import Sequence

NUM_PRIORITIES = 3  # each conversation has one of these, at random
LONGEST = 8  # a length is at most this many times the mean


# ---- traffic ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """think_time: seconds from the answer before to this message. Lengths are tokens."""

    think_time: float
    input_len: int
    output_len: int


@dataclass(frozen=True)
class Conversation:
    """system_prompt: its number, which is also its token; start: seconds."""

    start: float
    system_prompt: int
    system_len: int
    priority: int
    turns: list[Turn]

    @property
    def num_tokens(self) -> int:
        return self.system_len + sum(turn.input_len + turn.output_len for turn in self.turns)


@dataclass(frozen=True)
class Traffic:
    """What conversations are drawn from. Lengths are means of a log-normal distribution with a long tail.

    request_rate: requests a second while answers are quick next to think times; inf is all conversations at once.
    system_prompts: how many there are; conversations without one if 0.
    think_time: seconds, the mean of an exponential distribution.
    """

    num_requests: int = 100_000
    request_rate: float = 20.0
    turns: int = 4
    system_prompts: int = 20
    system_len: int = 512
    input_len: int = 128
    output_len: int = 256
    think_time: float = 30.0
    seed: int = 0

    def conversations(self) -> list[Conversation]:
        """The same ones whatever becomes of them; the last is shorter if `turns` does not divide `num_requests`."""
        rng = random.Random(f"conversations {self.seed}")  # another stream than that of the arrivals
        starts = poisson_arrivals(-(-self.num_requests // self.turns), self.request_rate / self.turns, self.seed)
        system_lens = [_length(rng, self.system_len) for _ in range(self.system_prompts)]
        popularity = [1 / rank for rank in range(1, self.system_prompts + 1)]
        conversations = []
        for i, start in enumerate(starts):
            system = rng.choices(range(self.system_prompts), popularity)[0] if self.system_prompts else 0
            num_turns = min(self.turns, self.num_requests - i * self.turns)
            turns = [
                Turn(
                    rng.expovariate(1 / self.think_time) if self.think_time else 0.0,
                    _length(rng, self.input_len),
                    _length(rng, self.output_len),
                )
                for _ in range(num_turns)
            ]
            system_len = system_lens[system] if self.system_prompts else 0
            conversations.append(Conversation(start, system, system_len, rng.randrange(NUM_PRIORITIES), turns))
        return conversations


def _length(rng: random.Random, mean: int) -> int:
    drawn = rng.lognormvariate(math.log(mean) - 0.5, 1.0)
    return max(1, min(round(drawn), LONGEST * mean))


# ---- the engine, without a GPU ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Server:
    """The settings of the simulated engine, in `EngineConfig`'s words; swap_blocks: KV blocks in host memory."""

    num_kv_blocks: int = 32_768
    block_size: int = EngineConfig.block_size
    max_num_seqs: int = EngineConfig.max_num_seqs
    max_num_batched_tokens: int = 2048
    swap_blocks: int = 0
    enable_prefix_caching: bool = True

    def scheduler(self, policy: str) -> Scheduler:
        blocks, cache = BlockManager(self.num_kv_blocks, self.block_size), None
        if self.enable_prefix_caching:
            cache = RadixTree(blocks, BlockManager(self.swap_blocks, self.block_size) if self.swap_blocks else None)
        return Scheduler(
            blocks,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            cache=cache,
            policy=POLICIES[policy],
        )


@dataclass
class Request:
    """One turn. Times are seconds; `started` is when the first step that computes some of it does."""

    conversation: int
    turn: int
    arrival: float
    priority: int
    num_prompt_tokens: int
    started: float | None = None
    first_token: float | None = None
    finished: float | None = None
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0


@dataclass(frozen=True)
class Sample:
    """The state at a time. num_used_blocks: those that sequences own, not those that only the cache remembers."""

    seconds: float
    num_running: int
    num_waiting: int
    num_used_blocks: int


@dataclass
class Simulation:
    """What happened. requests: in order of arrival. elapsed, busy: seconds in all, and while a step ran."""

    policy: str
    requests: list[Request] = field(default_factory=list)
    timeline: list[Sample] = field(default_factory=list)  # at most one a second
    elapsed: float = 0.0
    busy: float = 0.0
    num_steps: int = 0
    num_computed_tokens: int = 0
    num_moved_blocks: int = 0

    @property
    def num_prompt_tokens(self) -> int:
        return sum(request.num_prompt_tokens for request in self.requests)

    @property
    def num_output_tokens(self) -> int:
        return sum(request.num_output_tokens for request in self.requests)

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that were found in the cache when the request started, and not computed."""
        return sum(request.num_cached_tokens for request in self.requests)

    @property
    def num_preemptions(self) -> int:
        return sum(request.num_preemptions for request in self.requests)


class Simulator:
    """Runs conversations to their end. `ValueError` if the longest does not fit into the KV cache alone."""

    def __init__(self, conversations: list[Conversation], server: Server, cost: StepCost, policy: str) -> None:
        longest, capacity = max(c.num_tokens for c in conversations), server.num_kv_blocks * server.block_size
        if longest > capacity:
            raise ValueError(
                f"the longest conversation has {longest} tokens, but the KV cache holds {capacity}; raise "
                "--num-kv-blocks or lower --turns or the lengths"
            )
        self.conversations, self.server, self.cost = conversations, server, cost
        self.scheduler = server.scheduler(policy)
        self.scheduler.seconds_to_load_block = cost.per_moved_token * server.block_size
        self.scheduler.seconds_to_compute_token = cost.per_prefill_token
        self.result = Simulation(policy)
        self.now = 0.0
        self._in_flight: SchedulerOutput | None = None
        self._params = SamplingParams(max_tokens=None, ignore_eos=True)
        self._first_message = 1 + max(c.system_prompt for c in conversations)
        self._histories: dict[int, list[int]] = {}  # by conversation, while its author thinks
        self._arrivals = [(c.start, i, 0) for i, c in enumerate(conversations)]  # a heap: (seconds, conversation, turn)
        heapq.heapify(self._arrivals)

    def run(self, progress: bool = False) -> Simulation:
        num_requests = sum(len(conversation.turns) for conversation in self.conversations)
        with tqdm(total=num_requests, desc=self.result.policy, unit="req", disable=None if progress else True) as bar:
            while self._arrivals or self.scheduler.has_unfinished():
                while self._arrivals and self._arrivals[0][0] <= self.now:
                    self._arrive(*heapq.heappop(self._arrivals))
                if self.scheduler.has_unfinished():
                    bar.update(self._step())
                else:
                    self.now = self._arrivals[0][0]
        self.result.elapsed = self.now
        return self.result

    def _arrive(self, now: float, index: int, turn_index: int) -> None:
        conversation, seq_id = self.conversations[index], len(self.result.requests)
        turn = conversation.turns[turn_index]
        if turn_index == 0:
            prompt = [conversation.system_prompt] * conversation.system_len
        else:
            prompt = self._histories.pop(index)
        prompt += [self._first_message + 2 * seq_id] * turn.input_len
        self.result.requests.append(Request(index, turn_index, now, conversation.priority, len(prompt)))
        longest = len(prompt) + turn.output_len
        self.scheduler.add(
            Sequence(seq_id, prompt, self._params, max_num_tokens=longest, priority=conversation.priority)
        )

    def _step(self) -> int:
        """Let the GPU run a step; returns how many requests ended with it."""
        scheduler, result = self.scheduler, self.result
        plan = self._in_flight or scheduler.schedule()
        assert plan.scheduled, "the scheduler has work and plans none"
        next_plan = scheduler.schedule()
        self._in_flight = next_plan if next_plan.scheduled else None
        if not result.timeline or self.now >= result.timeline[-1].seconds + 1:
            used = self.server.num_kv_blocks - scheduler.num_available_blocks
            result.timeline.append(Sample(self.now, len(scheduler.running), scheduler.num_waiting, used))
        for seq in plan.admitted:
            request = result.requests[seq.seq_id]
            if request.started is None:
                request.started = self.now

        seconds, num_tokens = self.cost.seconds(plan, self.server.block_size), plan.num_tokens
        self.now += seconds
        result.busy += seconds
        result.num_steps += 1
        result.num_computed_tokens += num_tokens
        result.num_moved_blocks += len(plan.transfers)
        if num_tokens >= MEASURED_TOKENS:
            scheduler.seconds_to_compute_token = seconds / num_tokens

        token_ids = []
        for seq, start, num_tokens, samples in plan.scheduled:
            if samples:
                token_ids.append(self._first_message + 2 * seq.seq_id + 1)
                if start + num_tokens == seq.num_prompt_tokens:
                    result.requests[seq.seq_id].first_token = self.now
        finished = [seq for seq in scheduler.update(plan, token_ids) if seq.is_finished]
        for seq in finished:
            self._finish(seq)
        return len(finished)

    def _finish(self, seq: Sequence) -> None:
        request = self.result.requests[seq.seq_id]
        request.finished = self.now
        request.num_output_tokens = seq.num_output_tokens
        request.num_cached_tokens = seq.num_cached_tokens
        request.num_preemptions = seq.num_preemptions
        turns, next_turn = self.conversations[request.conversation].turns, request.turn + 1
        if next_turn < len(turns):
            self._histories[request.conversation] = seq.token_ids
            arrival = self.now + turns[next_turn].think_time
            heapq.heappush(self._arrivals, (arrival, request.conversation, next_turn))


# ---- figures ----------------------------------------------------------------------------------------------


def simulation_metrics(simulation: Simulation) -> dict[str, Metric]:
    """Time in the queue, TTFT, TPOT and end-to-end latency of each request, and what the whole took."""
    requests, elapsed = simulation.requests, simulation.elapsed
    timings = [RequestTiming(r.num_output_tokens, r.first_token - r.arrival, r.finished - r.arrival) for r in requests]
    ttfts: dict[int, list[float]] = {}
    for request, timing in zip(requests, timings, strict=True):
        ttfts.setdefault(request.priority, []).append(1e3 * timing.ttft)
    return {
        "hit_rate": Metric([simulation.num_cached_tokens / simulation.num_prompt_tokens], "share", True),
        "saved_tokens": Metric([simulation.num_cached_tokens], "tokens", True),
        "computed_tokens": Metric([simulation.num_computed_tokens], "tokens"),
        "preemptions": Metric([simulation.num_preemptions], "times"),
        "moved_blocks": Metric([simulation.num_moved_blocks], "blocks"),
        "request_throughput": Metric([len(requests) / elapsed], "req/s", True),
        "output_throughput": Metric([simulation.num_output_tokens / elapsed], "tok/s", True),
        "busy_share": Metric([simulation.busy / elapsed], "share"),
        "elapsed_s": Metric([elapsed], "s"),
        "queue_ms": Metric([1e3 * (r.started - r.arrival) for r in requests], "ms"),
        **request_metrics([Run(elapsed, timings, peak_concurrency=max(s.num_running for s in simulation.timeline))]),
        **{f"ttft_priority_{level}_ms": Metric(ttfts[level], "ms") for level in sorted(ttfts)},
    }


TITLES = {  # with the format of what there is one of; of the others, mean and percentiles
    "hit_rate": ("Prefix cache hit rate", ".1%"),
    "saved_tokens": ("Prompt tokens saved", ",.0f"),
    "computed_tokens": ("Tokens computed", ",.0f"),
    "preemptions": ("Preemptions", ",.0f"),
    "moved_blocks": ("Blocks moved to or from host", ",.0f"),
    "request_throughput": ("Requests/s", ".2f"),
    "output_throughput": ("Output tokens/s", ",.0f"),
    "busy_share": ("GPU busy", ".1%"),
    "elapsed_s": ("Simulated seconds", ",.0f"),
    "queue_ms": ("Queue time, ms", ""),
    "ttft_ms": ("TTFT, ms", ""),
    "tpot_ms": ("TPOT, ms", ""),
    "e2el_ms": ("E2EL, ms", ""),
    **{f"ttft_priority_{level}_ms": (f"TTFT of priority {level}, ms", "") for level in range(NUM_PRIORITIES)},
}


def table_lines(metrics: dict[str, dict[str, Metric]]) -> Iterator[str]:
    """A column for each policy; metrics: by policy and name."""

    def row(title: str, cells: Iterable[str]) -> str:
        return f"{title:<34}" + "".join(f"{cell:>14}" for cell in cells)

    yield row("", metrics)
    for name, (title, form) in TITLES.items():
        columns = [found[name].samples for found in metrics.values() if name in found]
        if not columns:
            continue  # answers of a single token have no time between tokens
        if form:
            yield row(title, (format(samples[0], form) for samples in columns))
            continue
        yield row(f"{title}: mean", (f"{sum(samples) / len(samples):,.1f}" for samples in columns))
        for q in (50, 90, 99):
            yield row(f"  P{q}", (f"{percentile(samples, q):,.1f}" for samples in columns))


def simulation_report(
    simulations: list[Simulation],
    metrics: dict[str, dict[str, Metric]],
    traffic: Traffic,
    server: Server,
    cost: StepCost,
    table: StepTable,
) -> Report:
    """All policies in one report."""
    rate = "inf" if math.isinf(traffic.request_rate) else traffic.request_rate  # JSON knows no infinity
    totals = {name: getattr(simulations[0], name) for name in ("num_prompt_tokens", "num_output_tokens")}
    timelines = {
        s.policy: {name: [getattr(sample, name) for sample in s.timeline] for name in Sample.__dataclass_fields__}
        for s in simulations
    }
    return Report(
        benchmark="simulate",
        workload={**asdict(traffic), "request_rate": rate, **totals},
        engine={**asdict(server), "step_cost": asdict(cost), "step_times": table.source},
        metrics={f"{name} @ {policy}": metric for policy, found in metrics.items() for name, metric in found.items()},
        details={"policies": list(metrics), "timelines": timelines},
        notes=["The GPU is simulated: step times are a model of measured ones."],
    )


# ---- command line -----------------------------------------------------------------------------------------


def _at_least(low: int) -> click.IntRange:
    return click.IntRange(min=low)


@click.command()
@click.option("--num-requests", default=Traffic.num_requests, show_default=True, type=_at_least(1))
@click.option(
    "--request-rate",
    default=Traffic.request_rate,
    show_default=True,
    type=click.FloatRange(min=0, min_open=True),
    help='Requests a second; "inf" starts all conversations at once.',
)
@click.option("--turns", default=Traffic.turns, show_default=True, type=_at_least(1), help="Of each conversation.")
@click.option("--system-prompts", default=Traffic.system_prompts, show_default=True, type=_at_least(0))
@click.option("--system-len", default=Traffic.system_len, show_default=True, type=_at_least(1), help="Mean, in tokens.")
@click.option("--input-len", default=Traffic.input_len, show_default=True, type=_at_least(1), help="Mean of a message.")
@click.option("--output-len", default=Traffic.output_len, show_default=True, type=_at_least(1), help="Mean.")
@click.option(
    "--think-time",
    default=Traffic.think_time,
    show_default=True,
    type=click.FloatRange(min=0),
    help="Mean seconds from an answer to the next message.",
)
@click.option("--seed", default=Traffic.seed, show_default=True)
@click.option(
    "--policy",
    "policies",
    multiple=True,
    type=click.Choice(list(POLICIES)),
    help="May be given more than once; all of them if not at all.",
)
@click.option("--num-kv-blocks", default=Server.num_kv_blocks, show_default=True, type=_at_least(1))
@click.option("--block-size", default=Server.block_size, show_default=True, type=_at_least(1))
@click.option("--max-num-seqs", default=Server.max_num_seqs, show_default=True, type=_at_least(1))
@click.option("--max-num-batched-tokens", default=Server.max_num_batched_tokens, show_default=True, type=_at_least(1))
@click.option("--swap-blocks", default=0, show_default=True, type=_at_least(0), help="KV blocks in host memory.")
@click.option("--no-prefix-caching", is_flag=True)
@click.option("--model", default="qwen3-8b", show_default=True, type=click.Choice(list(STEP_TABLES)))
@click.option(
    "--step-times",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A JSON table of step times, as bench.step_cost writes it, instead of the model's.",
)
@click.option("--plot", **output_path("Draw the figures here (png, svg, pdf); needs the plot extra."))
@click.option("--output-json", **output_path("Write the figures here."))
def main(
    policies: tuple[str, ...],
    num_kv_blocks: int,
    block_size: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    swap_blocks: int,
    no_prefix_caching: bool,
    model: str,
    step_times: Path | None,
    plot: Path | None,
    output_json: Path | None,
    **traffic_options: Any,
) -> None:
    """Simulate hours of chat traffic on one GPU, for each scheduling policy."""
    if max_num_batched_tokens < max_num_seqs:
        raise click.UsageError("--max-num-batched-tokens must be at least --max-num-seqs: each sequence takes one")
    if swap_blocks and no_prefix_caching:
        raise click.UsageError("--swap-blocks holds what the prefix cache gives up; leave out --no-prefix-caching")
    server = Server(num_kv_blocks, block_size, max_num_seqs, max_num_batched_tokens, swap_blocks, not no_prefix_caching)
    try:
        if plot is not None:
            require_matplotlib()
        table = StepTable.read(STEP_TABLES[model] if step_times is None else step_times)
        cost = StepCost.fit(table)
        traffic = Traffic(**traffic_options)
        conversations = traffic.conversations()
        click.echo(f"Step times: {table.source}; the model is within {cost.error(table.rows):.1%} of all of them")
        simulations = []
        for policy in dict.fromkeys(policies or POLICIES):
            start = time.perf_counter()
            simulations.append(Simulator(conversations, server, cost, policy).run(progress=True))
            click.echo(f"{policy}: {simulations[-1].num_steps} steps simulated in {time.perf_counter() - start:.1f} s")
        first = simulations[0]
        click.echo(
            f"{len(first.requests)} requests of {len(conversations)} conversations: {first.num_prompt_tokens} prompt "
            f"and {first.num_output_tokens} output tokens"
        )
        metrics = {simulation.policy: simulation_metrics(simulation) for simulation in simulations}
        for line in table_lines(metrics):
            click.echo(line)
        if plot is not None or output_json is not None:
            found = simulation_report(simulations, metrics, traffic, server, cost, table).to_dict()
        if plot is not None:
            plot_simulation(found, plot)
        if output_json is not None:
            for metric in found["metrics"].values():
                del metric["samples"]  # millions; the seed brings them back
            write_json(found, output_json)
    except (ValueError, RuntimeError) as error:
        raise click.ClickException(str(error)) from None


if __name__ == "__main__":
    main()
