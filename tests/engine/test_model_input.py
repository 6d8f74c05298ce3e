"""build_model_input against a loop over tokens."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mini_vllm.engine.model_input import build_model_input, num_scored_tokens
from mini_vllm.sampling_params import SamplingParams
from mini_vllm.scheduling.block_manager import BlockManager
from mini_vllm.scheduling.scheduler import ScheduledSequence, Scheduler, SchedulerOutput
from mini_vllm.scheduling.sequence import Sequence


@st.composite
def plans(draw) -> tuple[SchedulerOutput, int]:
    """Any chunks of any sequences with blocks in any order, more of them than needed at times, and a block size."""
    block_size = draw(st.integers(1, 5))
    free = draw(st.permutations(range(60)))
    output = SchedulerOutput()
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
        output.scheduled.append(ScheduledSequence(seq, start, num_tokens, samples=start + num_tokens == length))
    return output, block_size


@settings(deadline=None)
@given(plans())
def test_against_a_loop_over_tokens(plan):
    output, block_size = plan
    input_ids, positions, slots, last_rows, scored_rows = [], [], [], [], []
    for s in output.scheduled:
        for position in range(s.start, s.start + s.num_tokens):
            row = len(input_ids)
            input_ids.append(s.seq.token_ids[position])
            positions.append(position)
            slots.append(s.seq.block_table[position // block_size] * block_size + position % block_size)
            if s.seq.sampling_params.prompt_logprobs is not None and position + 1 < s.seq.num_prompt_tokens:
                scored_rows.append(row)  # it predicts the next prompt token
        if s.samples:
            last_rows.append(len(input_ids) - 1)

    got = build_model_input(output, block_size)
    assert got.input_ids.tolist() == input_ids
    assert got.positions.tolist() == positions
    assert got.attn.slot_mapping.tolist() == slots
    assert got.logits_indices.tolist() == last_rows + scored_rows
    bounds = got.attn.cu_seqlens_q.tolist()
    assert bounds[0] == 0
    assert bounds[-1] == len(input_ids)
    for i, s in enumerate(output.scheduled):
        assert input_ids[bounds[i] : bounds[i + 1]] == s.seq.token_ids[s.start : s.start + s.num_tokens]
        assert got.attn.seq_lens[i] == s.start + s.num_tokens
        count = len(s.seq.block_table)
        assert got.attn.block_tables[i, :count].tolist() == s.seq.block_table
        assert not got.attn.block_tables[i, count:].any()
    assert got.attn.block_tables.shape == (len(output.scheduled), max(len(s.seq.block_table) for s in output.scheduled))
    assert got.attn.max_seqlen_q == max(s.num_tokens for s in output.scheduled)
    assert got.attn.max_seqlen_k == max(s.start + s.num_tokens for s in output.scheduled)

    for value in (got, got.attn):
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


def test_plans_of_the_scheduler_write_every_slot_once():
    """Whole life of a few sequences: in each step the slots differ, and decoding extends what prefill wrote."""
    scheduler = Scheduler(BlockManager(20, 4), max_num_seqs=4, max_num_batched_tokens=7)
    for seq_id, length in enumerate([1, 4, 5, 11]):
        scheduler.add(Sequence(seq_id, [seq_id] * length, SamplingParams(max_tokens=None), max_num_tokens=length + 6))
    written: dict[int, list[int]] = {}  # by sequence: the slot of each position
    while scheduler.has_unfinished():
        plan = scheduler.schedule()
        inp = build_model_input(plan, 4)
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
