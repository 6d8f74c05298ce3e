"""Random traffic through a tiny pool, against a naive model of the KV cache.

The model executes a planned step as a device does: it writes the new tokens through the block tables and
then reads each sequence's whole prefix back. Whatever the scheduler gets wrong about blocks, positions or
preemption shows as a slot that holds something else than the reader's own token.
"""

import zlib
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from mini_vllm.sampling_params import SamplingParams
from mini_vllm.scheduling.block_manager import BlockManager
from mini_vllm.scheduling.scheduler import ScheduledSequence, Scheduler, SchedulerOutput
from mini_vllm.scheduling.sequence import FinishReason, Sequence, SequenceStatus

EOS, STOP = 0, 1
LONGEST = 64  # tokens of a sequence at most, to keep the examples quick
BLOCK_SIZES = st.one_of(st.integers(1, 4), st.integers(5, 32))


def lengths(longest: int):
    """(num_prompt_tokens, max_num_tokens); many short prompts that grow long, for these exhaust the pool."""
    return st.one_of(st.integers(1, min(longest, 3)), st.integers(1, longest)).flatmap(
        lambda n: st.tuples(st.just(n), st.one_of(st.just(longest + 1), st.integers(n + 1, longest + 1)))
    )


class PagedCache:
    """The pool as Python lists: each slot holds the (seq_id, position, token) last written."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.blocks: list[list[tuple]] = [[()] * block_size for _ in range(num_blocks)]

    def execute(self, scheduled: list[ScheduledSequence]) -> list[list[int]]:
        """Run one step; returns the prefix that each scheduled sequence attends to, read from the cache."""
        for seq, start, num_tokens, _ in scheduled:
            for position in range(start, start + num_tokens):
                block_id = seq.block_table[position // self.block_size]
                slot = (seq.seq_id, position, seq.token_ids[position])
                self.blocks[block_id][position % self.block_size] = slot
        return [self._read(s.seq, s.start + s.num_tokens) for s in scheduled]

    def _read(self, seq: Sequence, num_tokens: int) -> list[int]:
        prefix = []
        for position in range(num_tokens):
            block_id = seq.block_table[position // self.block_size]
            slot = self.blocks[block_id][position % self.block_size]
            assert slot[:2] == (seq.seq_id, position), f"{seq} reads {slot} at position {position}"
            prefix.append(slot[2])
        return prefix


@dataclass
class Request:
    """What the model knows of a sequence: the tokens it must hold and how it must have ended."""

    seq: Sequence
    tokens: list[int]
    finish_reason: FinishReason | None = None

    def append(self, token: int) -> None:
        self.tokens.append(token)
        params = self.seq.sampling_params
        num_output_tokens = len(self.tokens) - self.seq.num_prompt_tokens
        is_stop = token == STOP or (token == EOS and not params.ignore_eos)
        if is_stop and num_output_tokens > params.min_tokens:
            self.finish_reason = FinishReason.STOP
        elif len(self.tokens) == self.seq.max_num_tokens:
            self.finish_reason = FinishReason.LENGTH


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come, run and are taken back in any order, also while a step runs.

    `in_flight` is the step that runs, between `schedule` and `update`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[Request] = []  # request i has seq_id i
        self.first_admissions: list[int] = []
        self.in_flight: SchedulerOutput | None = None

    @initialize(
        num_blocks=st.integers(1, 6),
        block_size=BLOCK_SIZES,
        max_num_seqs=st.integers(1, 5),
        spare_budget=st.integers(0, 9),
    )
    def create(self, num_blocks, block_size, max_num_seqs, spare_budget):
        self.max_num_seqs = max_num_seqs
        self.budget = max_num_seqs + spare_budget
        self.longest = min(num_blocks * block_size, LONGEST)
        self.block_manager = BlockManager(num_blocks, block_size)
        self.scheduler = Scheduler(self.block_manager, max_num_seqs=max_num_seqs, max_num_batched_tokens=self.budget)
        self.cache = PagedCache(num_blocks, block_size)

    @property
    def unfinished(self) -> list[Request]:
        return [request for request in self.requests if request.finish_reason is None]

    # --- rules ---

    @rule(data=st.data(), min_tokens=st.integers(0, 3), ignore_eos=st.booleans())
    def add(self, data, min_tokens, ignore_eos):
        if len(self.unfinished) == 8:
            return
        num_prompt_tokens, max_num_tokens = data.draw(lengths(self.longest), label="prompt, prompt + output")
        prompt = [1000 * len(self.requests) + i for i in range(num_prompt_tokens)]
        params = SamplingParams(max_tokens=None, min_tokens=min_tokens, stop_token_ids=[STOP], ignore_eos=ignore_eos)
        seq = Sequence(len(self.requests), prompt, params, max_num_tokens=max_num_tokens, eos_token_ids=[EOS])
        self.requests.append(Request(seq, prompt.copy()))
        self.scheduler.add(seq)

    @rule(data=st.data())
    def abort(self, data):
        if not self.requests:
            return
        request = data.draw(st.sampled_from(self.unfinished or self.requests), label="request")
        free_before, owned = self.block_manager.num_free_blocks, len(request.seq.block_table)
        self.scheduler.finish(request.seq, FinishReason.ABORT)
        assert self.block_manager.num_free_blocks == free_before + owned
        request.finish_reason = request.finish_reason or FinishReason.ABORT

    @rule(data=st.data())
    def half_a_step(self, data):
        """Start a step, or finish the one that runs; the other rules may come in between."""
        if self.in_flight is None:
            self.start_step()
        else:
            tokens = st.tuples(*[st.integers(0, 9) for s in self.in_flight.scheduled if s.samples])
            self.finish_step(data.draw(tokens, label="tokens"))

    @rule(count=st.integers(1, 30))
    def run_steps(self, count):
        for _ in range(count):
            if self.in_flight is None:
                self.start_step()
            self.finish_step_without_stops()
            self.check()

    def start_step(self) -> None:
        running, waiting = self.scheduler.running.copy(), list(self.scheduler.waiting)
        decoding = {seq for seq in running if seq.num_tokens - seq.num_computed_tokens == 1}
        owned = [len(seq.block_table) for seq in running]
        num_free = self.block_manager.num_free_blocks

        output = self.in_flight = self.scheduler.schedule()

        self.check_plan(output)
        self.check_preemptions(output.preempted, running, decoding, owned, num_free)
        self.check_order(output, running, waiting, decoding)
        self.check_no_idle_budget(output)
        for s, prefix in zip(output.scheduled, self.cache.execute(output.scheduled), strict=True):
            assert prefix == self.requests[s.seq.seq_id].tokens[: s.start + s.num_tokens]

    def finish_step_without_stops(self) -> None:
        self.finish_step([2 + i for i in range(sum(s.samples for s in self.in_flight.scheduled))])

    def finish_step(self, tokens: SequenceOf[int]) -> None:
        output, self.in_flight = self.in_flight, None
        sampling = [self.requests[s.seq.seq_id] for s in output.scheduled if s.samples]
        advanced = []
        for request, token in zip(sampling, tokens, strict=True):
            if request.finish_reason is None:  # else it was aborted while the step ran
                request.append(token)
                advanced.append(request.seq)
        assert self.scheduler.update(output, tokens) == advanced

    # --- what must hold ---

    @invariant()
    def check(self):
        self.scheduler.check()
        for request in self.requests:
            seq = request.seq
            assert seq.token_ids == request.tokens
            assert seq.finish_reason is request.finish_reason
            assert (seq.status is SequenceStatus.FINISHED) == (request.finish_reason is not None)
            assert not (seq.is_finished and seq.block_table)

    def check_plan(self, output):
        assert output.num_tokens == sum(s.num_tokens for s in output.scheduled) <= self.budget
        assert len({s.seq for s in output.scheduled}) == len(output.scheduled) <= self.max_num_seqs
        for seq, start, num_tokens, samples in output.scheduled:
            assert seq.status is SequenceStatus.RUNNING
            assert start == seq.num_computed_tokens
            assert 1 <= num_tokens <= seq.num_tokens - start
            assert samples == (start + num_tokens == seq.num_tokens)
            assert len(seq.block_table) == self.block_manager.num_blocks_for(seq.num_tokens)

    def check_preemptions(self, preempted, running, decoding, owned, num_free):
        """Victims are the newest, never the oldest, and no more of them than the decodes need."""
        if not preempted:
            return
        assert preempted == running[::-1][: len(preempted)]
        assert len(preempted) < len(running)
        spared = running[: len(running) - len(preempted) + 1]  # as if the last victim had been kept
        blocks = sum(owned[len(spared) :]) + num_free
        needed = sum(
            self.block_manager.num_blocks_for(seq.num_tokens) - num_owned
            for seq, num_owned in zip(spared, owned[: len(spared)], strict=True)
            if seq in decoding
        )
        assert needed > blocks

    def check_order(self, output, running, waiting, decoding):
        """Whoever runs stays, the queue moves up from its head, and neither a decode nor the oldest waits."""
        kept = running[: len(running) - len(output.preempted)]
        admitted = self.scheduler.running[len(kept) :]
        assert self.scheduler.running == kept + admitted
        assert admitted == waiting[: len(admitted)]
        self.first_admissions += [seq.seq_id for seq in admitted if seq.num_preemptions == 0]
        assert self.first_admissions == sorted(set(self.first_admissions))
        scheduled = {s.seq for s in output.scheduled}
        assert scheduled >= decoding.intersection(kept)
        assert scheduled >= {request.seq for request in self.unfinished[:1]}

    def check_no_idle_budget(self, output):
        """Tokens are left over only where nobody could use them."""
        if output.num_tokens == self.budget:
            return
        assert all(s.samples for s in output.scheduled)
        assert len(output.scheduled) == len(self.scheduler.running)
        has_seat = len(self.scheduler.running) < self.max_num_seqs
        if self.scheduler.waiting and has_seat and not output.preempted:
            needed = self.block_manager.num_blocks_for(self.scheduler.waiting[0].num_tokens)
            assert needed > self.block_manager.num_free_blocks

    def teardown(self):
        """Liveness: each step computes at least one token of the oldest request and takes none from it."""
        if self.in_flight is not None:
            self.finish_step_without_stops()
        steps_left = sum(request.seq.max_num_tokens - 1 for request in self.unfinished)
        while self.unfinished:
            assert steps_left > 0, "the scheduler does not come to an end"
            steps_left -= 1
            self.run_steps(1)
        if self.requests:
            assert not self.scheduler.has_unfinished()
            assert self.block_manager.num_free_blocks == self.block_manager.num_blocks


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


def next_token(prefix: list[int]) -> int:
    """A model that attends to every token of its prefix, and to their order."""
    return zlib.crc32(bytes(prefix)) % 256


def generate_alone(prompt: list[int], max_num_tokens: int) -> list[int]:
    tokens = prompt.copy()
    while len(tokens) < max_num_tokens:
        tokens.append(next_token(tokens))
        if tokens[-1] == EOS:
            break
    return tokens


@settings(max_examples=250, deadline=None)
@given(st.data(), st.integers(1, 6), BLOCK_SIZES, st.integers(1, 5), st.integers(0, 9))
def test_tokens_do_not_depend_on_company_budget_or_pool(data, num_blocks, block_size, max_num_seqs, spare):
    longest = min(num_blocks * block_size, LONGEST)
    arrival = st.tuples(lengths(longest), st.integers(0, 255), st.integers(0, 3))
    arrivals = data.draw(st.lists(arrival, min_size=2, max_size=8), label="lengths, salt, steps before")

    scheduler = Scheduler(
        BlockManager(num_blocks, block_size),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + spare,
    )
    cache = PagedCache(num_blocks, block_size)

    def step():
        output = scheduler.schedule()
        prefixes = cache.execute(output.scheduled)
        samples = zip(output.scheduled, prefixes, strict=True)
        scheduler.update(output, [next_token(prefix) for s, prefix in samples if s.samples])

    seqs, prompts = [], []
    for (num_prompt_tokens, max_num_tokens), salt, steps_before in arrivals:
        for _ in range(steps_before):
            step()
        prompt = [(salt + i) % 256 for i in range(num_prompt_tokens)]
        seq = Sequence(len(seqs), prompt, SamplingParams(), max_num_tokens=max_num_tokens, eos_token_ids=[EOS])
        seqs.append(seq)
        prompts.append(prompt)
        scheduler.add(seq)
    for _ in range(sum(seq.max_num_tokens for seq in seqs)):
        step()

    for seq, prompt in zip(seqs, prompts, strict=True):
        assert seq.token_ids == generate_alone(prompt, seq.max_num_tokens)
