"""Continuous batching: which sequences run in the next step, and with how many tokens.

There is no prefill or decode phase. A step has a budget of tokens; a decoding sequence wants one, a prompt
wants as many as are left of it (chunked prefill), and both mix freely.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import NamedTuple

from mini_vllm.scheduling.block_manager import BlockManager
from mini_vllm.scheduling.sequence import FinishReason, Sequence, SequenceStatus


class ScheduledSequence(NamedTuple):
    """`num_tokens` tokens of `seq`, from position `start` on, run in this step.

    The plan is fixed when it is made: an abort may reset the sequence while the step runs.
    """

    seq: Sequence
    start: int
    num_tokens: int
    samples: bool  # the step reaches the sequence's last token, so that a new one is drawn


@dataclass
class SchedulerOutput:
    """One step: who runs, and who lost its blocks to make that possible."""

    scheduled: list[ScheduledSequence] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(s.num_tokens for s in self.scheduled)

    def add(self, seq: Sequence, num_tokens: int) -> None:
        samples = num_tokens == seq.num_uncomputed_tokens
        self.scheduled.append(ScheduledSequence(seq, seq.num_computed_tokens, num_tokens, samples))


class Scheduler:
    """First come, first served, under a token budget and a pool of blocks.

    `running` and `waiting` are both in order of arrival, and everything running arrived before everything
    waiting: a preempted sequence goes back to the head of the queue. A sequence owns blocks for all its
    tokens from admission on, so only decoding can run out of them. The engine guarantees that each sequence
    fits into the pool alone; the oldest one can therefore always run, and every request ends.
    """

    def __init__(self, block_manager: BlockManager, *, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        assert max_num_batched_tokens >= max_num_seqs, "every running sequence must get its token in every step"
        self.block_manager = block_manager
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, seq: Sequence) -> None:
        self.waiting.append(seq)

    def has_unfinished(self) -> bool:
        return bool(self.waiting or self.running)

    def schedule(self) -> SchedulerOutput:
        """Plan the next step. Call `update` with its tokens before planning another one."""
        output = SchedulerOutput()
        self._schedule_decodes(output)
        budget = self.max_num_batched_tokens - len(output.scheduled)
        budget = self._continue_prefills(output, budget)
        # A victim of this step heads the queue and needs at least the blocks it gave back, so it stays there.
        self._admit(output, budget)
        return output

    def _schedule_decodes(self, output: SchedulerOutput) -> None:
        """One token for each sequence whose prompt is done, oldest first; the newest make room for them."""
        for seq in [s for s in self.running if s.num_uncomputed_tokens == 1]:
            missing = self.block_manager.num_blocks_for(seq.num_tokens) - len(seq.block_table)
            while missing > self.block_manager.num_free_blocks and seq.status is SequenceStatus.RUNNING:
                output.preempted.append(self._preempt_newest())
            if seq.status is SequenceStatus.RUNNING:
                seq.block_table += self.block_manager.allocate(missing)
                output.add(seq, 1)

    def _continue_prefills(self, output: SchedulerOutput, budget: int) -> int:
        """The next chunk of each admitted sequence that is still being computed; their blocks are there."""
        for seq in self.running:
            if seq.num_uncomputed_tokens > 1 and budget > 0:
                num_tokens = min(seq.num_uncomputed_tokens, budget)
                output.add(seq, num_tokens)
                budget -= num_tokens
        return budget

    def _admit(self, output: SchedulerOutput, budget: int) -> None:
        """Move sequences from the queue into the batch, in order, while tokens, seats and blocks last."""
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            seq = self.waiting[0]
            num_blocks = self.block_manager.num_blocks_for(seq.num_tokens)
            if num_blocks > self.block_manager.num_free_blocks:
                break
            self.waiting.popleft()
            seq.block_table = self.block_manager.allocate(num_blocks)
            seq.status = SequenceStatus.RUNNING
            self.running.append(seq)
            num_tokens = min(seq.num_uncomputed_tokens, budget)
            output.add(seq, num_tokens)
            budget -= num_tokens

    def _preempt_newest(self) -> Sequence:
        """Send the newest running sequence back to the queue; it keeps its tokens and recomputes their K/V."""
        seq = self.running.pop()
        assert self.running, "a sequence that fits into the pool alone is never preempted when it runs alone"
        self._release_blocks(seq)
        seq.status = SequenceStatus.PREEMPTED
        seq.num_preemptions += 1
        self.waiting.appendleft(seq)
        return seq

    def update(self, output: SchedulerOutput, token_ids: SequenceOf[int]) -> list[Sequence]:
        """Book a finished step: `token_ids` holds one token for each scheduled sequence that samples, in order.

        Returns the sequences that got a token. Those that ended with it are FINISHED and own no blocks any
        more; sequences aborted while the step ran are skipped.
        """
        sampling = [s for s in output.scheduled if s.samples]
        assert len(token_ids) == len(sampling), f"{len(token_ids)} tokens for {len(sampling)} sampling sequences"
        tokens = iter(token_ids)
        advanced = []
        for scheduled in output.scheduled:
            seq, token_id = scheduled.seq, next(tokens) if scheduled.samples else None
            if seq.is_finished:
                continue
            seq.num_computed_tokens += scheduled.num_tokens
            if token_id is not None:
                reason = seq.append_token(token_id)
                if reason is not None:
                    self.finish(seq, reason)
                advanced.append(seq)
        return advanced

    def finish(self, seq: Sequence, reason: FinishReason) -> None:
        """End a sequence in any state; its blocks are free at once. A finished one stays as it is."""
        if seq.is_finished:
            return
        if seq.status is SequenceStatus.RUNNING:
            self.running.remove(seq)
            self._release_blocks(seq)
        else:
            self.waiting.remove(seq)
        seq.status = SequenceStatus.FINISHED
        seq.finish_reason = reason

    def _release_blocks(self, seq: Sequence) -> None:
        self.block_manager.release(seq.block_table)
        seq.block_table = []
        seq.num_computed_tokens = 0

    def check(self) -> None:
        """Recount the whole state from scratch; raises AssertionError on any broken invariant."""
        order = [s.seq_id for s in self.running] + [s.seq_id for s in self.waiting]
        assert order == sorted(set(order)), "running and waiting are not in order of arrival"
        assert len(self.running) <= self.max_num_seqs
        for seq in self.running:
            assert seq.status is SequenceStatus.RUNNING
            assert 0 <= seq.num_computed_tokens < seq.num_tokens < seq.max_num_tokens
            covered = len(seq.block_table) * self.block_manager.block_size
            assert covered >= seq.num_tokens - 1, "a decoding sequence gets its next block when it is scheduled"
        for seq in self.waiting:
            assert seq.status in (SequenceStatus.WAITING, SequenceStatus.PREEMPTED)
            assert not seq.block_table
            assert seq.num_computed_tokens == 0
        self.block_manager.check(seq.block_table for seq in self.running)
