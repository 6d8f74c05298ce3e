"""build_model_input against a loop over tokens, and what BatchState keeps from one plan to the next."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mini_vllm.engine.batch_state import BatchState
from mini_vllm.engine.model_input import build_model_input, num_scored_tokens
from mini_vllm.sampling_params import SamplingParams
from mini_vllm.scheduling.block_manager import BlockManager
from mini_vllm.scheduling.radix_tree import RadixTree
from mini_vllm.scheduling.scheduler import ScheduledSequence, Scheduler, SchedulerOutput
from mini_vllm.scheduling.sequence import PENDING, FinishReason, Sequence


@st.composite
def plans(draw) -> tuple[SchedulerOutput, BatchState, dict[int, int]]:
    """Any chunks of any sequences on any seats with blocks in any order, more of them than needed at times.

    The last token of some was drawn by the step before: (plan, state, {seat: its row there}).
    """
    block_size = draw(st.integers(1, 5))
    free = draw(st.permutations(range(60)))
    output, drawn = SchedulerOutput(), {}
    state = BatchState(max_num_seqs=7, max_blocks=16, block_size=block_size)
    state.block_tables[:] = 999  # of those who sat there before
    state.sampled_row[:] = 999
    seats = draw(st.permutations(range(7)))
    for seq_id in range(draw(st.integers(1, 5))):
        prompt_len, output_len = draw(st.integers(1, 12)), draw(st.integers(0, 4))
        length = prompt_len + output_len
        params = SamplingParams(max_tokens=None, prompt_logprobs=draw(st.sampled_from([None, 0, 2])))
        seq = Sequence(seq_id, range(100 * seq_id, 100 * seq_id + prompt_len), params, max_num_tokens=100)
        seq.token_ids += range(100 * seq_id + 50, 100 * seq_id + 50 + output_len)
        start = draw(st.integers(0, length - 1))
        num_tokens = draw(st.integers(1, length - start))
        seq.num_computed_tokens = start
        num_blocks = -(-length // block_size) - draw(st.integers(0, 1))  # the last block may not be needed yet
        num_blocks = max(num_blocks, -(-(start + num_tokens) // block_size))
        seq.block_table, free = list(free[:num_blocks]), free[num_blocks:]
        seq.seat = seats[seq_id]
        if output_len and draw(st.booleans()):
            seq.token_ids[-1] = PENDING
            seq.num_pending_tokens = 1
            drawn[seq.seat] = state.sampled_row[seq.seat] = draw(st.integers(0, 6))
        output.scheduled.append(ScheduledSequence(seq, start, num_tokens, samples=start + num_tokens == length))
    state.apply(SchedulerOutput(admitted=[s.seq for s in output.scheduled]))
    return output, state, drawn


@settings(deadline=None)
@given(plans())
def test_against_a_loop_over_tokens(plan):
    output, state, drawn = plan
    block_size = state.block_size
    input_ids, positions, slots, last_rows, scored_rows = [], [], [], [], []
    for s in output.scheduled:
        for position in range(s.start, s.start + s.num_tokens):
            row, token = len(input_ids), s.seq.token_ids[position]
            input_ids.append(-1 - drawn[s.seq.seat] if token == PENDING else token)
            positions.append(position)
            slots.append(s.seq.block_table[position // block_size] * block_size + position % block_size)
            if s.seq.sampling_params.prompt_logprobs is not None and position + 1 < s.seq.num_prompt_tokens:
                scored_rows.append(row)  # it predicts the next prompt token
        if s.samples:
            last_rows.append(len(input_ids) - 1)

    got = build_model_input(output, state)
    assert got.input_ids.tolist() == input_ids
    assert got.positions.tolist() == positions
    assert got.attn.slot_mapping.tolist() == slots
    wanted = got.logits_indices if got.last is None else got.last.rows[got.logits_indices]
    assert wanted.tolist() == last_rows + scored_rows
    if got.last is None:
        assert scored_rows or len(last_rows) == len(input_ids)
    else:
        assert not scored_rows
        assert got.last.rows.tolist() == (got.attn.cu_seqlens_q[1:] - 1).tolist()
        assert got.last.cu_seqlens_q.tolist() == list(range(len(output.scheduled) + 1))
    bounds = got.attn.cu_seqlens_q.tolist()
    assert bounds[0] == 0
    assert bounds[-1] == len(input_ids)
    for i, s in enumerate(output.scheduled):
        assert bounds[i + 1] - bounds[i] == s.num_tokens
        assert got.attn.seq_lens[i] == s.start + s.num_tokens
        count = -(-(s.start + s.num_tokens) // block_size)  # the entries after them mean nothing
        assert got.attn.block_tables[i, :count].tolist() == s.seq.block_table[:count]
    longest = max(s.start + s.num_tokens for s in output.scheduled)
    assert got.attn.block_tables.shape == (len(output.scheduled), -(-longest // block_size))
    sampling = [s.seq.seat for s in output.scheduled if s.samples]
    assert state.sampled_row[sampling].tolist() == list(range(len(sampling)))
    assert got.attn.max_seqlen_q == max(s.num_tokens for s in output.scheduled)
    assert got.attn.max_seqlen_k == longest

    for value in (got, got.attn, got.last) if got.last else (got, got.attn):
        for f in fields(value):
            array = getattr(value, f.name)
            if isinstance(array, np.ndarray):
                assert array.dtype == np.int32, f.name
                assert array.flags.c_contiguous, f.name
    # Host ints, so that a backend can choose its kernel by them.
    assert type(got.attn.max_seqlen_q) is type(got.attn.max_seqlen_k) is int


@pytest.mark.parametrize(
    ("start", "num_tokens", "scored"),
    [(0, 1, 1), (0, 4, 4), (0, 5, 4), (0, 7, 4), (3, 1, 1), (3, 2, 1), (4, 1, 0), (4, 3, 0), (6, 1, 0)],
)
def test_scored_prompt_tokens(start, num_tokens, scored):
    """A prompt of 5 has 4 tokens to predict, by the tokens at 0 to 3."""
    seq = Sequence(0, range(5), SamplingParams(prompt_logprobs=1), max_num_tokens=20)
    seq.token_ids += [5, 6]
    assert num_scored_tokens(ScheduledSequence(seq, start, num_tokens, False)) == scored
    seq.sampling_params = SamplingParams()
    assert num_scored_tokens(ScheduledSequence(seq, start, num_tokens, False)) == 0


def make_scheduler(num_blocks=20, block_size=4, max_num_seqs=4, max_num_batched_tokens=7, cached=False):
    blocks = BlockManager(num_blocks, block_size)
    cache = RadixTree(blocks) if cached else None
    limits = {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": max_num_batched_tokens}
    return Scheduler(blocks, **limits, cache=cache), BatchState(max_num_seqs, num_blocks, block_size)


def add(scheduler, seq_id, prompt, max_tokens=6):
    seq = Sequence(seq_id, prompt, SamplingParams(max_tokens=None), max_num_tokens=len(prompt) + max_tokens)
    scheduler.add(seq)
    return seq


def test_plans_of_the_scheduler_write_every_slot_once():
    """Whole life of a few sequences: in each step the slots differ, and decoding extends what prefill wrote."""
    scheduler, state = make_scheduler()
    for seq_id, length in enumerate([1, 4, 5, 11]):
        add(scheduler, seq_id, [seq_id] * length)
    written: dict[int, list[int]] = {}  # by sequence: the slot of each position
    while scheduler.has_unfinished():
        plan = scheduler.schedule()
        state.apply(plan)
        inp = build_model_input(plan, state)
        slots = inp.attn.slot_mapping.tolist()
        assert len(set(slots)) == len(slots)
        for s in plan.scheduled:
            mine, slots = slots[: s.num_tokens], slots[s.num_tokens :]
            history = written.setdefault(s.seq.seq_id, [])
            assert len(history) == s.start
            history += mine
            expected = [s.seq.block_table[p // 4] * 4 + p % 4 for p in range(len(history))]
            assert history == expected
        scheduler.update(plan, [9] * sum(s.samples for s in plan.scheduled))
    assert [len(history) for history in written.values()] == [6, 9, 10, 16]


def input_ids(scheduler, state):
    """Plan a step and return it with the tokens that the model reads."""
    plan = scheduler.schedule()
    state.apply(plan)
    return plan, build_model_input(plan, state).input_ids.tolist()


def test_a_token_that_is_still_being_drawn_is_named_by_its_row_in_the_step_before():
    scheduler, state = make_scheduler(max_num_batched_tokens=8)
    add(scheduler, 0, [1, 2])
    add(scheduler, 1, [3, 4, 5])
    first, ids = input_ids(scheduler, state)
    assert ids == [1, 2, 3, 4, 5]
    add(scheduler, 2, [6, 7, 8])
    second, ids = input_ids(scheduler, state)
    assert ids == [-1, -2, 6, 7, 8]
    scheduler.finish(scheduler.running[0], FinishReason.ABORT)  # the rows of the others move up
    scheduler.update(first, [10, 11])
    third, ids = input_ids(scheduler, state)
    assert ids == [-1 - 1, -1 - 2]
    scheduler.update(second, [12, 13, 14])
    scheduler.update(third, [15, 16])
    _, ids = input_ids(scheduler, state)
    assert ids == [15, 16], "what the host knows it says itself"


def test_who_takes_a_seat_over_has_nothing_of_the_one_before():
    scheduler, state = make_scheduler(max_num_seqs=1, max_num_batched_tokens=20)
    add(scheduler, 0, [1] * 9)
    plan, _ = input_ids(scheduler, state)
    scheduler.update(plan, [2])
    scheduler.finish(scheduler.running[0], FinishReason.STOP)
    seq = add(scheduler, 1, [3] * 5)
    plan = scheduler.schedule()
    state.apply(plan)
    attn = build_model_input(plan, state).attn
    assert attn.block_tables.tolist() == [seq.block_table]
    assert attn.slot_mapping.tolist() == [seq.block_table[p // 4] * 4 + p % 4 for p in range(5)]


def test_a_step_that_admits_promises_nothing_about_the_keys_of_others():
    """max_seqlen_q == 1 would say that no sequence sees what another one brings in the same step."""
    scheduler, state = make_scheduler(block_size=1, cached=True)
    first, second = add(scheduler, 0, [1]), add(scheduler, 1, [1, 2])
    plan = scheduler.schedule()
    state.apply(plan)
    assert [s.num_tokens for s in plan.scheduled] == [1, 1]
    assert second.block_table[0] == first.block_table[0]
    assert build_model_input(plan, state).attn.max_seqlen_q == 2
    plan = scheduler.schedule()
    state.apply(plan)
    assert build_model_input(plan, state).attn.max_seqlen_q == 1
