"""Random traffic through a tiny pool, against a naive model of the device.

The model executes a plan as a device does: it moves blocks, writes the new tokens through the block tables and then
reads each sequence's whole prefix back. Whatever the scheduler gets wrong about blocks, positions, sharing, forks, the
host tier or preemption shows as a slot that holds something else than the reader's own token. A step is executed when
it is planned, as on a device; the scheduler may learn the tokens of up to two steps later.
"""

import itertools
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mini_vllm.sampling_params import SamplingParams
from mini_vllm.scheduling.block_manager import BlockManager
from mini_vllm.scheduling.policy import POLICIES
from mini_vllm.scheduling.radix_tree import EVICTION_POLICIES, RadixTree
from mini_vllm.scheduling.scheduler import MAX_PREEMPTIONS, ScheduledSequence, Scheduler, SchedulerOutput
from mini_vllm.scheduling.sequence import PENDING, FinishReason, Sequence, SequenceStatus

EOS, STOP = 0, 1
LONGEST = 64  # tokens of a sequence at most, to keep the examples quick
SALTS = (None, None, None, "pepper")


@dataclass
class Setup:
    """The dimensions of a scheduler, and which of its parts it has."""

    num_blocks: int
    block_size: int
    num_host_blocks: int
    max_num_seqs: int
    spare_budget: int
    policy: str
    caches: bool
    eviction: str
    loads: bool  # what is on the host is loaded, else computed again
    block_manager: BlockManager = field(init=False)
    host: BlockManager | None = field(init=False, default=None)

    def make_scheduler(self) -> Scheduler:
        self.block_manager, cache = BlockManager(self.num_blocks, self.block_size), None
        if self.caches:
            if self.num_host_blocks:
                self.host = BlockManager(self.num_host_blocks, self.block_size)
            cache = RadixTree(self.block_manager, self.host, EVICTION_POLICIES[self.eviction]())
        scheduler = Scheduler(
            self.block_manager,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.budget,
            cache=cache,
            policy=POLICIES[self.policy],
        )
        scheduler.seconds_to_load_block = 0.0 if self.loads else 1e9
        return scheduler

    @property
    def budget(self) -> int:
        return self.max_num_seqs + self.spare_budget

    @property
    def longest(self) -> int:
        return min(self.num_blocks * self.block_size, LONGEST)

    def check(self, scheduler: Scheduler) -> None:
        scheduler.check()
        in_use = {block for seq in scheduler.running for block in seq.block_table}
        assert scheduler.num_available_blocks == self.num_blocks - len(in_use), (
            "a block that nobody uses is out of reach"
        )

    def check_empty(self, scheduler: Scheduler) -> None:
        """Nothing runs: all blocks are the cache's at most, and without it nobody's."""
        self.check(scheduler)
        assert not scheduler.has_unfinished()
        assert scheduler.num_available_blocks == self.num_blocks
        scheduler.reset_prefix_cache()
        self.check(scheduler)
        assert self.block_manager.num_free_blocks == self.num_blocks
        assert self.host is None or self.host.num_free_blocks == self.host.num_blocks


SETUPS = st.builds(
    Setup,
    num_blocks=st.integers(1, 8),
    block_size=st.one_of(st.integers(1, 4), st.integers(1, 4), st.integers(5, 32)),
    num_host_blocks=st.sampled_from([0, 1, 3, 8]),
    max_num_seqs=st.integers(1, 6),
    spare_budget=st.integers(0, 9),
    policy=st.sampled_from(["fcfs", "fcfs", "priority", "sjf"]),
    caches=st.sampled_from([True, True, True, False]),
    eviction=st.sampled_from(list(EVICTION_POLICIES)),
    loads=st.sampled_from([True, True, False]),
)


def lengths(longest: int):
    """(num_prompt_tokens, max_num_tokens): many prompts that grow as long as they can, for these exhaust the pool."""
    prompt = st.one_of(
        st.integers(1, min(longest, 3)), st.sampled_from([longest // 2 + 1, longest]), st.integers(1, longest)
    )
    return prompt.flatmap(
        lambda n: st.tuples(
            st.just(n), st.one_of(st.sampled_from([n + 1, longest + 1]), st.integers(n + 1, longest + 1))
        )
    )


def make_prompt(kind: int, length: int) -> list[int]:
    """One of a few prompts, which agree with each other for a while: up to token 6, up to token 17."""
    return [2 + (p + (kind if p >= 6 else 0) + (7 * kind if p >= 17 else 0)) % 50 for p in range(length)]


class Device:
    """Memory as Python lists, and the tokens of all sequences, also those the scheduler does not know yet.

    The K/V of a token depends on all tokens before it: a slot holds (position, token, hash of what it depends on). This
    includes the salt, and how often the prefix cache was reset by the time the sequence was admitted: it may share with
    those admitted since, and nothing older.
    """

    def __init__(self, setup: Setup) -> None:
        self.block_size = setup.block_size
        self.memory: list[list[tuple | None]] = [[None] * setup.block_size for _ in range(setup.num_blocks)]
        self.host: list[list[tuple | None]] = [[None] * setup.block_size for _ in range(setup.num_host_blocks)]
        self.tables: dict[int, list[int]] = {}  # by seat, as far as the plans tell
        self.slots: dict[int, list[tuple]] = {}  # by seq_id: what each token's slot must hold
        self.num_resets = 0

    def add(self, seq: Sequence) -> None:
        self.set_tokens(seq, seq.token_ids)

    def set_tokens(self, seq: Sequence, tokens: list[int]) -> None:
        self.slots[seq.seq_id] = []
        for token in tokens:
            self.append(seq, token)

    def append(self, seq: Sequence, token: int) -> None:
        slots = self.slots[seq.seq_id]
        before = slots[-1][2] if slots else (seq.cache_salt, self.num_resets)
        slots.append((len(slots), token, hash((before, token))))

    def execute(self, output: SchedulerOutput, draw: Callable[[ScheduledSequence, list[int]], int]) -> list[int]:
        """Run a step; `draw` makes a token of what a sequence reads. Returns the tokens as `update` wants them."""
        self.move_blocks(output)
        for seq in output.admitted:
            self.tables[seq.seat] = seq.block_table.copy()
            self.set_tokens(seq, [token for _, token, _ in self.slots[seq.seq_id]])
        for seq in output.grown:
            self.tables[seq.seat].append(seq.block_table[-1])
        written = [
            self.write(s.seq, position) for s in output.scheduled for position in range(s.start, s.start + s.num_tokens)
        ]
        assert len(set(written)) == len(written), "two tokens of a step share a slot"
        assert len({s.seq.seat for s in output.scheduled}) == len(output.scheduled)
        prefixes = [self.read(s.seq, s.start + s.num_tokens) for s in output.scheduled]
        drawn = [draw(s, prefix) for s, prefix in zip(output.scheduled, prefixes, strict=True) if s.samples]
        for s, token in zip((s for s in output.scheduled if s.samples), drawn, strict=True):
            self.append(s.seq, token)
        return drawn

    def move_blocks(self, output: SchedulerOutput) -> None:
        for to_host, source, target in output.transfers:
            if to_host:
                self.host[target] = self.memory[source].copy()
            else:
                self.memory[target] = self.host[source].copy()
        targets = [target for _, target in output.copies]
        assert len(set(targets)) == len(targets)
        assert not set(targets).intersection(source for source, _ in output.copies), "copies depend on their order"
        for source, target in output.copies:
            self.memory[target] = self.memory[source].copy()

    def write(self, seq: Sequence, position: int) -> tuple[int, int]:
        block, offset = self.tables[seq.seat][position // self.block_size], position % self.block_size
        self.memory[block][offset] = self.slots[seq.seq_id][position]
        return block, offset

    def read(self, seq: Sequence, num_tokens: int) -> list[int]:
        table, expected = self.tables[seq.seat], self.slots[seq.seq_id][:num_tokens]
        blocks = table[: -(-num_tokens // self.block_size)]
        slots = [slot for block in blocks for slot in self.memory[block]][:num_tokens]
        assert slots == expected, f"{seq} reads {slots} instead of {expected}"
        return [token for _, token, _ in slots]


@dataclass
class Request:
    """What the model knows of a sequence: the tokens that it must hold and how it must have ended.

    drawn: tokens of steps in flight.
    """

    seq: Sequence
    tokens: list[int]
    drawn: deque[int] = field(default_factory=deque)
    finish_reason: FinishReason | None = None

    def book_a_token(self) -> None:
        token = self.drawn.popleft()
        self.tokens.append(token)
        params = self.seq.sampling_params
        num_output_tokens = len(self.tokens) - self.seq.num_prompt_tokens
        is_stop = token == STOP or (token == EOS and not params.ignore_eos)
        if is_stop and num_output_tokens > params.min_tokens:
            self.end(FinishReason.STOP)
        elif len(self.tokens) == self.seq.max_num_tokens:
            self.end(FinishReason.LENGTH)

    def end(self, reason: FinishReason) -> None:
        self.finish_reason = self.finish_reason or reason
        self.drawn.clear()


def is_decoding(seq: Sequence) -> bool:
    return seq.num_uncomputed_tokens == 1 and seq.num_tokens < seq.max_num_tokens


def had_to_wait(seq: Sequence, output: SchedulerOutput, block_size: int) -> bool:
    """What a fork is to take over was not computed when this step was planned."""
    source = seq.fork_of
    if source is None or source.status is not SequenceStatus.RUNNING:
        return False
    if source in output.admitted:  # it may have found what another one computes in this step
        index = (seq.num_tokens - 1) // block_size
        for s in output.scheduled:
            written = range(s.start // block_size, (s.start + s.num_tokens - 1) // block_size + 1)
            if s.seq is not source and any(s.seq.block_table[i] == source.block_table[index] for i in written):
                return True
    computed = next((s.start for s in output.scheduled if s.seq is source), source.num_computed_tokens)
    return computed < seq.num_tokens - 1


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come, fork, run and are taken back in any order, also while steps run.

    `in_flight` holds the steps between `schedule` and `update`, with their tokens: two at most.
    """

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[Request] = []  # request i has seq_id i
        self.in_flight: deque[tuple[SchedulerOutput, list[int]]] = deque()

    @initialize(setup=SETUPS)
    def create(self, setup):
        self.setup = setup
        self.scheduler = setup.make_scheduler()
        self.device = Device(setup)

    @property
    def unfinished(self) -> list[Request]:
        return [request for request in self.requests if request.finish_reason is None]

    # --- rules ---

    @rule(
        data=st.data(),
        requests=st.lists(
            st.tuples(st.integers(0, 2), st.sampled_from([0, 0, MAX_PREEMPTIONS - 1, MAX_PREEMPTIONS])),
            min_size=1,
            max_size=3,
        ),
        salt=st.sampled_from(SALTS),
        n=st.sampled_from([1, 1, 1, 2, 3]),
        min_tokens=st.integers(0, 3),
        ignore_eos=st.booleans(),
        scores=st.sampled_from([None, None, None, 0]),
        priority=st.integers(-1, 1),
    )
    def add(self, data, requests, salt, n, min_tokens, ignore_eos, scores, priority):
        """A few requests that differ in their prompts and their past, with n samples each."""
        num_prompt_tokens, max_num_tokens = data.draw(lengths(self.setup.longest), label="prompt, prompt + output")
        params = {"min_tokens": min_tokens, "ignore_eos": ignore_eos}
        for kind, num_preemptions in requests:
            prompt, source = make_prompt(kind, num_prompt_tokens), None
            for i in range(n):
                if len(self.unfinished) == 8:
                    return
                params["prompt_logprobs"] = None if i else scores
                seq = self.add_one(prompt, max_num_tokens, source, salt, priority, **params)
                seq.num_preemptions = num_preemptions  # no example is long enough to get there often
                source = source or seq

    def add_one(self, prompt, max_num_tokens, source, salt, priority, **params) -> Sequence:
        seq = Sequence(
            len(self.requests),
            prompt,
            SamplingParams(max_tokens=None, stop_token_ids=[STOP], **params),
            max_num_tokens=max_num_tokens,
            eos_token_ids=[EOS],
            priority=priority,
            cache_salt=salt,
            fork_of=source,
        )
        self.requests.append(Request(seq, list(prompt)))
        self.device.add(seq)
        self.scheduler.add(seq)
        return seq

    @precondition(lambda self: 0 < len(self.unfinished) < 8)
    @rule(data=st.data(), last=st.sampled_from([None, 2, 3]))
    def fork_what_runs(self, data, last):
        """Go on from all tokens of a sequence, or with another last one, as beams do."""
        request = data.draw(st.sampled_from(self.unfinished), label="source")
        source = request.seq
        prompt = request.tokens if last is None else [*request.tokens[:-1], last]
        if source.fork_of is None and len(prompt) < source.max_num_tokens:
            self.add_one(prompt, source.max_num_tokens, source, source.cache_salt, source.priority)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data):
        request = data.draw(st.sampled_from(self.unfinished or self.requests), label="request")
        others = {block for seq in self.scheduler.running if seq is not request.seq for block in seq.block_table}
        self.scheduler.finish(request.seq, FinishReason.ABORT)
        request.end(FinishReason.ABORT)
        assert self.scheduler.num_available_blocks == self.setup.num_blocks - len(others)

    @rule()
    def reset_prefix_cache(self):
        self.scheduler.reset_prefix_cache()
        self.device.num_resets += self.setup.caches  # without a cache forks go on sharing

    @precondition(lambda self: len(self.in_flight) < 2)
    @rule(data=st.data())
    def launch(self, data):
        self.launch_step(lambda s, prefix: data.draw(st.integers(0, 5), label=f"token of {s.seq.seq_id}"))

    @precondition(lambda self: self.in_flight)
    @rule()
    def book(self):
        self.book_step()

    @rule(count=st.integers(1, 30), overlap=st.booleans())
    def run_steps(self, count, overlap):
        """As the engine does, with tokens that end nothing, and that go on as the prompt of kind 0 does."""
        for _ in range(count):
            if not self.scheduler.has_unfinished() and not self.in_flight:
                return
            while len(self.in_flight) < 1 + overlap:
                self.launch_step(lambda s, prefix: make_prompt(0, len(prefix) + 1)[-1])
                self.check()
            self.book_step()
            self.check()

    # --- steps ---

    def launch_step(self, draw) -> None:
        running, waiting = self.scheduler.running.copy(), self.scheduler.waiting
        decoding = {seq for seq in running if is_decoding(seq)}
        tables = {seq: seq.block_table.copy() for seq in running}
        in_need = {seq for seq in decoding if seq.num_tokens > len(seq.block_table) * self.setup.block_size}
        num_preemptions = {seq: seq.num_preemptions for seq in running}

        output = self.scheduler.schedule()

        self.check_plan(output)
        self.check_victims(output.preempted, running, num_preemptions)
        self.check_need(output.preempted, running, in_need, tables)
        self.check_order(output, running, waiting, decoding)
        self.check_no_idle_budget(output)
        tokens = self.device.execute(output, draw)
        for s, token in zip((s for s in output.scheduled if s.samples), tokens, strict=True):
            self.requests[s.seq.seq_id].drawn.append(token)
        self.in_flight.append((output, tokens))

    def book_step(self) -> None:
        output, tokens = self.in_flight.popleft()
        advanced = []
        for s in output.scheduled:
            request = self.requests[s.seq.seq_id]
            if s.samples and request.finish_reason is None:  # else it ended while the step ran
                request.book_a_token()
                advanced.append(request.seq)
        assert self.scheduler.update(output, tokens) == advanced

    # --- what must hold ---

    @invariant()
    def check(self):
        self.setup.check(self.scheduler)
        for request in self.requests:
            seq = request.seq
            assert seq.token_ids == request.tokens + [PENDING] * len(request.drawn)
            assert seq.finish_reason is request.finish_reason
            assert (seq.status is SequenceStatus.FINISHED) == (request.finish_reason is not None)
            assert not (seq.is_finished and (seq.block_table or seq.fork_of))

    def check_plan(self, output):
        assert output.num_tokens == sum(s.num_tokens for s in output.scheduled) <= self.setup.budget
        assert len({s.seq for s in output.scheduled}) == len(output.scheduled) <= self.setup.max_num_seqs
        for seq, start, num_tokens, samples in output.scheduled:
            assert seq.status is SequenceStatus.RUNNING
            assert num_tokens >= 1
            assert start + num_tokens == seq.num_computed_tokens
            assert samples == (seq.token_ids[start + num_tokens :] == [PENDING])
            num_computable = seq.num_tokens - samples
            assert start + num_tokens <= num_computable
            assert len(seq.block_table) == self.setup.block_manager.num_blocks_for(num_computable)

    def check_victims(self, preempted, running, num_preemptions):
        """Never the first; of the others the last, who lost often only if all after the one in need did."""
        survivors = [seq for seq in running if seq not in preempted]
        assert survivors[:1] == running[:1]
        for i, victim in enumerate(preempted):
            later = [seq for seq in running[running.index(victim) + 1 :] if seq not in preempted[:i]]
            if num_preemptions[victim] < MAX_PREEMPTIONS:
                assert all(num_preemptions[seq] >= MAX_PREEMPTIONS for seq in later)
            else:
                assert not later

    def check_need(self, preempted, running, in_need, tables):
        """No more victims than needed: had the last one been kept, someone would have found no block."""
        if preempted:
            spared = [seq for seq in running if seq not in preempted[:-1]]
            num_available = self.setup.num_blocks - len({block for seq in spared for block in tables[seq]})
            assert len(in_need.intersection(spared)) > num_available

    def check_order(self, output, running, waiting, decoding):
        """Whoever runs stays unless preempted, the queue moves up from its head, no decode and no first one waits."""
        kept = [seq for seq in running if seq not in output.preempted]
        admitted = output.admitted
        assert set(self.scheduler.running) == {*kept, *admitted}
        assert admitted == [seq for seq in waiting if seq in admitted]
        for seq in admitted:
            overtaken = [other for other in waiting[: waiting.index(seq)] if other not in admitted]
            assert all(had_to_wait(other, output, self.setup.block_size) for other in overtaken)
        scheduled = {s.seq for s in output.scheduled}
        assert scheduled >= decoding.intersection(kept)
        assert scheduled >= {seq for seq in kept[:1] if seq.num_tokens < seq.max_num_tokens}

    def check_no_idle_budget(self, output):
        """Tokens are left over only where nobody could use them."""
        if output.num_tokens == self.setup.budget:
            return
        running = self.scheduler.running
        scheduled = {s.seq for s in output.scheduled}
        assert all(s.samples for s in output.scheduled)
        assert all(seq in scheduled or seq.num_tokens == seq.max_num_tokens for seq in running)
        waiting = [seq for seq in self.scheduler.waiting if not had_to_wait(seq, output, self.setup.block_size)]
        if waiting and len(running) < self.setup.max_num_seqs and not output.preempted:
            needed = self.setup.block_manager.num_blocks_for(waiting[0].num_tokens)
            assert needed > self.scheduler.num_available_blocks

    def teardown(self):
        """Liveness: each step computes a token at least of the first that runs, and takes none from it.

        One that waits may be before it in order. Once that one is admitted, the first may lose what it has computed,
        but only to one request after the other.
        """
        while self.in_flight:
            self.book_step()
        requests = self.unfinished
        steps_left = len(requests) * sum(request.seq.max_num_tokens - 1 for request in requests)
        while self.unfinished:
            assert steps_left > 0, "the scheduler does not come to an end"
            steps_left -= 1
            self.run_steps(1, overlap=False)
        if self.requests:
            self.setup.check_empty(self.scheduler)


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)


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


@settings(max_examples=300, deadline=None)
@given(data=st.data(), setup=SETUPS, overlap=st.booleans())
def test_tokens_do_not_depend_on_company_budget_pool_or_cache(data, setup, overlap):
    arrival = st.tuples(lengths(setup.longest), st.integers(0, 2), st.integers(1, 3), st.integers(0, 3))
    arrivals = data.draw(st.lists(arrival, min_size=2, max_size=5), label="lengths, prompt, n, steps before")
    scheduler, device = setup.make_scheduler(), Device(setup)
    in_flight = deque()

    def step():
        while len(in_flight) < 1 + overlap:
            output = scheduler.schedule()
            in_flight.append((output, device.execute(output, lambda s, prefix: next_token(prefix))))
        scheduler.update(*in_flight.popleft())

    seqs, seq_ids = [], itertools.count()
    for (num_prompt_tokens, max_num_tokens), kind, n, steps_before in arrivals:
        for _ in range(steps_before):
            step()
        prompt, source = make_prompt(kind, num_prompt_tokens), None
        for _ in range(n):
            seq = Sequence(
                next(seq_ids),
                prompt,
                SamplingParams(),
                max_num_tokens=max_num_tokens,
                eos_token_ids=[EOS],
                fork_of=source,
            )
            source = source or seq
            seqs.append(seq)
            device.add(seq)
            scheduler.add(seq)
    for _ in range(2 * len(seqs) * sum(seq.max_num_tokens for seq in seqs)):
        step()
        if not scheduler.has_unfinished():
            break

    for seq in seqs:
        prompt = seq.token_ids[: seq.num_prompt_tokens]
        assert seq.token_ids == generate_alone(prompt, seq.max_num_tokens)
    setup.check_empty(scheduler)
