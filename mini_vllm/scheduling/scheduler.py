"""Continuous batching: which sequences run in the next step, with how many tokens, in which blocks.

There is no prefill or decode phase. A step has a budget of tokens; a decoding sequence wants one, a prompt
wants as many as are left of it (chunked prefill), and both mix freely.

`schedule` plans a step on the assumption that all steps planned before have run, or will have run before this one:
a token that is still being drawn is `PENDING`. So the host may plan step n + 1 while the device runs step n.

Blocks have owners, and are free when they have none. A sequence owns the blocks of its table, the prefix cache (a
`RadixTree`) owns those it remembers. Only full blocks are ever shared, and nobody writes to a full block, so sharing
needs no further care. What a step computes may be shared from the moment it is planned: the step writes the K/V of all
its tokens, layer by layer, before any of them is read.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple

from mini_vllm.scheduling.block_manager import BlockManager
from mini_vllm.scheduling.policy import Policy, fcfs
from mini_vllm.scheduling.radix_tree import Node, RadixTree
from mini_vllm.scheduling.sequence import PENDING, FinishReason, Sequence, SequenceStatus

MAX_PREEMPTIONS = 3
"""A sequence that lost its blocks this often keeps them while another one can give up its own."""


class ScheduledSequence(NamedTuple):
    """`num_tokens` tokens of `seq`, from position `start` on, run in this step.

    The plan is fixed when it is made: an abort may reset the sequence while the step runs.
    """

    seq: Sequence
    start: int
    num_tokens: int
    samples: bool  # the step reaches the sequence's last token, so that a new one is drawn


class Transfer(NamedTuple):
    """A block moves between device and host memory, all layers of it."""

    to_host: bool
    source: int
    target: int


@dataclass
class SchedulerOutput:
    """One step: who runs, and what happens to blocks before: first `transfers`, in order, then `copies`.

    scheduled: decoding sequences first.
    admitted: sequences that entered the batch, with seat and blocks.
    grown: sequences of which the block table got longer, other than the admitted ones.
    preempted: sequences that lost their seats and blocks.
    copies: (source, target) blocks of forks; no target is another one's source.
    """

    scheduled: list[ScheduledSequence] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    grown: list[Sequence] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    transfers: list[Transfer] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(s.num_tokens for s in self.scheduled)


class Scheduler:
    """Decides under a token budget, a number of seats and a pool of blocks.

    `running` is in the policy's order, `waiting` a heap in the same order; who comes first in it is never
    overtaken. A sequence owns blocks for all its tokens from admission on, so only decoding can run out of
    them: then the last in order that was not preempted too often goes back to the queue, never the first. The
    engine guarantees that each sequence fits into the pool alone. So the first in order always runs, and every
    request ends.

    Args:
        cache: remembers the blocks of finished and preempted sequences by their tokens; None: nothing is shared
            but between forks.
        policy: who goes first.
    """

    def __init__(
        self,
        block_manager: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        cache: RadixTree | None = None,
        policy: Policy = fcfs,
    ) -> None:
        assert max_num_batched_tokens >= max_num_seqs, "every running sequence must get its token in every step"
        self.block_manager = block_manager
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.cache = cache
        self.policy = policy
        self.running: list[Sequence] = []
        self._queue: list[tuple[tuple[float, int], Sequence]] = []  # a heap; finished ones are skipped when met
        self._seats = list(range(max_num_seqs - 1, -1, -1))
        self.num_waiting = 0
        self.num_preemptions = 0
        self.num_scheduled_tokens = 0  # the policies' clock
        # What it takes to get a block back: set by whoever measures. Until then, loading is taken to be cheap.
        self.seconds_to_load_block = 0.0
        self.seconds_to_compute_token = 1.0

    @property
    def waiting(self) -> list[Sequence]:
        """The queue in order; for tests and displays, since it sorts."""
        return [seq for _, seq in sorted(self._queue, key=lambda entry: entry[0]) if not seq.is_finished]

    def add(self, seq: Sequence) -> None:
        seq.sort_key = (self.policy(seq, self.num_scheduled_tokens), seq.seq_id)
        self._enqueue(seq)

    def _enqueue(self, seq: Sequence) -> None:
        heapq.heappush(self._queue, (seq.sort_key, seq))
        self.num_waiting += 1

    def has_unfinished(self) -> bool:
        return bool(self.num_waiting or self.running)

    # ---- planning -----------------------------------------------------------------------------------------

    def schedule(self) -> SchedulerOutput:
        """Plan the next step. Each plan is handed to `update` with its tokens, in order."""
        output = SchedulerOutput()
        self._schedule_decodes(output)
        budget = self.max_num_batched_tokens - len(output.scheduled)
        budget = self._continue_prefills(output, budget)
        if not output.preempted:  # a victim gets its blocks back when there are some to spare
            self._admit(output, budget)
        for seq, _, num_tokens, samples in output.scheduled:
            seq.num_computed_tokens += num_tokens
            self.num_scheduled_tokens += num_tokens
            if samples:
                seq.token_ids.append(PENDING)
                seq.num_pending_tokens += 1
        return output

    def _schedule_decodes(self, output: SchedulerOutput) -> None:
        """One token for each sequence whose prompt is done; the last in order make room for the first."""
        block_size = self.block_manager.block_size
        for seq in self.running.copy():
            num_tokens = len(seq.token_ids)
            if num_tokens - seq.num_computed_tokens != 1 or num_tokens >= seq.max_num_tokens:
                continue  # a prompt, or its last token is being drawn already
            if num_tokens > len(seq.block_table) * block_size:
                while not self.num_available_blocks and seq.status is SequenceStatus.RUNNING:
                    output.preempted.append(self._preempt_for(seq))
                if seq.status is SequenceStatus.RUNNING:
                    seq.block_table += self._allocate(1, output)
                    output.grown.append(seq)
            if seq.status is SequenceStatus.RUNNING:
                output.scheduled.append(ScheduledSequence(seq, num_tokens - 1, 1, True))
                if num_tokens == seq.num_prompt_tokens:  # the one that a chunk has left
                    self._publish(seq, num_tokens)

    def _continue_prefills(self, output: SchedulerOutput, budget: int) -> int:
        """The next chunk of each admitted sequence that is still being computed; their blocks are there."""
        for seq in self.running:
            if budget > 0 and len(seq.token_ids) - seq.num_computed_tokens > 1:
                budget -= self._schedule_chunk(output, seq, budget)
        return budget

    def _schedule_chunk(self, output: SchedulerOutput, seq: Sequence, budget: int) -> int:
        start, num_tokens = seq.num_computed_tokens, min(seq.num_uncomputed_tokens, budget)
        end = start + num_tokens
        output.scheduled.append(ScheduledSequence(seq, start, num_tokens, end == seq.num_tokens))
        self._publish(seq, end)
        return num_tokens

    def _publish(self, seq: Sequence, num_tokens: int) -> None:
        """From now on others may share the full blocks of the first `num_tokens` tokens.

        Not where the cache has the same tokens in another block: a sequence's path holds its own blocks only. What
        nobody's table holds is then evictable, and a sequence that fits into the pool alone needs no more than that.
        """
        if self.cache is not None and not self.cache.is_cached(seq.cache_node, seq.token_ids):
            full = num_tokens // self.block_manager.block_size
            seq.cache_node = self.cache.extend(seq.cache_node, seq.token_ids, seq.block_table[:full])

    # ---- admission ----------------------------------------------------------------------------------------

    def _admit(self, output: SchedulerOutput, budget: int) -> None:
        """Move sequences from the queue into the batch, in order, while tokens, seats and blocks last."""
        forks_of_this_step = []
        while self._queue and budget > 0 and self._seats:
            _, seq = self._queue[0]
            if seq.is_finished:
                heapq.heappop(self._queue)
                continue
            if self._waits_for_its_source(seq, output):
                forks_of_this_step.append(heapq.heappop(self._queue))
                continue
            if not self._take_blocks(seq, output):
                break
            heapq.heappop(self._queue)
            self.num_waiting -= 1
            seq.status = SequenceStatus.RUNNING
            seq.seat = self._seats.pop()
            insort(self.running, seq, key=attrgetter("sort_key"))
            output.admitted.append(seq)
            budget -= self._schedule_chunk(output, seq, budget)
        for entry in forks_of_this_step:
            heapq.heappush(self._queue, entry)

    def _waits_for_its_source(self, seq: Sequence, output: SchedulerOutput) -> bool:
        """What a fork is to take over is still being computed, at the latest by this step: copies come before it."""
        source, reusable = seq.fork_of, seq.num_tokens - 1
        if source is None or source.status is not SequenceStatus.RUNNING:
            return False
        if source.num_computed_tokens < reusable:
            return True
        # What a source found in the cache when it was admitted in this step may be another one's to compute in it.
        if source not in output.admitted:
            return False
        block_size = self.block_manager.block_size
        block = source.block_table[reusable // block_size]
        return any(
            block in other.block_table[start // block_size : -(-(start + num_tokens) // block_size)]
            for other, start, num_tokens, _ in output.scheduled
            if other is not source
        )

    def _take_blocks(self, seq: Sequence, output: SchedulerOutput) -> bool:
        """Give a sequence its block table, with as much as possible already computed; False if blocks are short."""
        block_size = self.block_manager.block_size
        reusable = seq.num_tokens - 1  # at least one token is computed, for its logits
        full = reusable // block_size
        scores = seq.sampling_params.prompt_logprobs is not None  # takes hidden states, which nobody keeps
        source = seq.fork_of
        if source is not None and (scores or source.status is not SequenceStatus.RUNNING):
            source = None
        node, num_host = None, 0
        if self.cache is not None:
            if source is not None:
                self._publish(source, reusable)  # the fork finds it there
            node = self.cache.match(seq.token_ids, 0 if scores else full, seq.cache_salt)
            if self.seconds_to_load_block >= block_size * self.seconds_to_compute_token:
                node = self.cache.device_ancestor(node)
            num_host = self.cache.host_blocks(node)
            self.cache.acquire(node)  # from here on, nothing on this path is evicted
            cached = node.depth
        else:
            shared = [] if source is None else source.block_table[:full]
            cached = len(shared)
        num_new = self.block_manager.num_blocks_for(seq.num_tokens) - cached
        if num_new + num_host > self.num_available_blocks:
            if node is not None:
                self.cache.release(node)
            return False

        if node is not None:
            if num_host:
                self._make_room(num_host, output)
                output.transfers += [Transfer(False, host, block) for host, block in self.cache.load(node)]
            shared = node.path_block_ids()
            seq.cache_node = node
        seq.block_table = shared
        self.block_manager.share(seq.block_table)
        seq.num_computed_tokens = len(seq.block_table) * block_size
        seq.block_table += self._allocate(num_new, output)
        # The copy goes on from blocks of the source. These were not found if the cache was reset since it came.
        is_fork = source is not None and (node is None or node in source.cache_node.path())
        if is_fork and reusable % block_size:
            assert cached == full, "what a fork's source has published is found"
            output.copies.append((source.block_table[full], seq.block_table[full]))
            seq.num_computed_tokens = reusable
        seq.fork_of = None
        if seq.num_preemptions == 0:
            seq.num_cached_tokens = seq.num_computed_tokens
        if self.cache is not None:
            self.cache.record(seq.num_tokens, seq.num_computed_tokens)
        return True

    @property
    def num_available_blocks(self) -> int:
        """Blocks that are free or can be made so."""
        evictable = 0 if self.cache is None else self.cache.num_evictable_blocks
        return self.block_manager.num_free_blocks + evictable

    def _make_room(self, count: int, output: SchedulerOutput) -> None:
        missing = count - self.block_manager.num_free_blocks
        if missing > 0:
            output.transfers += [Transfer(True, block, host) for block, host in self.cache.evict(missing)]

    def _allocate(self, count: int, output: SchedulerOutput) -> list[int]:
        self._make_room(count, output)
        return self.block_manager.allocate(count)

    # ---- preemption and the end ---------------------------------------------------------------------------

    def _preempt_for(self, seq: Sequence) -> Sequence:
        """Send `seq` or one after it back to the queue: the last that was not preempted too often.

        It keeps its tokens. Those before `seq` are part of the step already; the first of all never goes.
        """
        candidates = self.running[max(self.running.index(seq), 1) :]
        assert candidates, "a sequence that fits into the pool alone is never preempted when it runs alone"
        victim = next((s for s in reversed(candidates) if s.num_preemptions < MAX_PREEMPTIONS), candidates[-1])
        self.running.remove(victim)
        self._release(victim)
        victim.status = SequenceStatus.PREEMPTED
        victim.num_preemptions += 1
        self.num_preemptions += 1
        self._enqueue(victim)
        return victim

    def update(self, output: SchedulerOutput, token_ids: SequenceOf[int]) -> list[Sequence]:
        """Book a step that has run: `token_ids` holds one token for each scheduled sequence that samples, in order.

        Returns the sequences that got a token. Those that ended with it are FINISHED and own no blocks any
        more; sequences that ended while the step ran are skipped.
        """
        sampling = [s for s in output.scheduled if s.samples]
        assert len(token_ids) == len(sampling), f"{len(token_ids)} tokens for {len(sampling)} sampling sequences"
        advanced = []
        for (seq, start, num_tokens, _), token_id in zip(sampling, token_ids, strict=True):
            if seq.is_finished:
                continue
            reason = seq.set_token(start + num_tokens, token_id)
            if reason is not None:
                self.finish(seq, reason)
            advanced.append(seq)
        return advanced

    def finish(self, seq: Sequence, reason: FinishReason) -> None:
        """End a sequence in any state; its blocks are free, or the cache's alone, at once.

        A step in flight may still write to them: whoever gets them next does so in a later step. A finished
        sequence stays as it is.
        """
        if seq.is_finished:
            return
        if seq.status is SequenceStatus.RUNNING:
            self.running.remove(seq)
            self._release(seq)
        else:
            self.num_waiting -= 1
        seq.drop_pending_tokens()
        seq.fork_of = None
        seq.status = SequenceStatus.FINISHED
        seq.finish_reason = reason

    def _release(self, seq: Sequence) -> None:
        if self.cache is not None:
            num_full = min(seq.num_computed_tokens, seq.num_known_tokens) // self.block_manager.block_size
            node = self.cache.extend(seq.cache_node, seq.token_ids, seq.block_table[:num_full])
            self.cache.release(node)
            seq.cache_node = None
        self.block_manager.release(seq.block_table)
        seq.block_table = []
        seq.num_computed_tokens = 0
        self._seats.append(seq.seat)
        seq.seat = None

    def reset_prefix_cache(self) -> None:
        """Forget all prefixes; running sequences keep their blocks. For when their K/V may be wrong or outdated."""
        if self.cache is not None:
            self.cache.reset()

    def check(self) -> None:
        """Recount the whole state from scratch; raises AssertionError on any broken invariant."""
        block_size = self.block_manager.block_size
        keys = [seq.sort_key for seq in self.running]
        assert keys == sorted(keys), "running is not in the policy's order"
        seats = [seq.seat for seq in self.running]
        assert sorted(seats + self._seats) == list(range(self.max_num_seqs)), "seats are lost or taken twice"
        for seq in self.running:
            assert seq.status is SequenceStatus.RUNNING
            assert 0 <= seq.num_computed_tokens <= seq.num_tokens <= seq.max_num_tokens
            assert len(seq.block_table) * block_size >= seq.num_tokens - 1, "the next block comes when it is scheduled"
            assert all(token == PENDING for token in seq.token_ids[seq.num_known_tokens :])
        waiting = self.waiting
        assert len(waiting) == self.num_waiting
        assert len({seq.seq_id for seq in (*waiting, *self.running)}) == len(waiting) + len(self.running)
        for seq in waiting:
            assert seq.status in (SequenceStatus.WAITING, SequenceStatus.PREEMPTED)
            assert not seq.block_table
            assert seq.num_computed_tokens == 0
        owned: list[Iterable[int]] = [seq.block_table for seq in self.running]
        if self.cache is not None:
            users: list[Node] = [seq.cache_node for seq in self.running]
            self.cache.check(users)
            for seq in self.running:
                path = seq.cache_node.path_block_ids()
                assert path == seq.block_table[: len(path)], "a sequence's path holds other blocks than its own"
            owned.append(self.cache.owned_blocks())
            if self.cache.host is not None:
                self.cache.host.check([self.cache.owned_host_blocks()])
        self.block_manager.check(owned)
