"""From the scheduler's plan to the arrays of one step. Pure NumPy: tested without a GPU or a model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mini_vllm.engine.batch_state import BatchState
from mini_vllm.models.decoder import LastTokens
from mini_vllm.ops.base import Array, AttentionMetadata
from mini_vllm.scheduling.scheduler import ScheduledSequence, SchedulerOutput


@dataclass(frozen=True)
class ModelInput:
    """What the model reads in one step."""

    input_ids: Array  # [T] int32; -1 - r is the token that the step before drew in row r
    positions: Array  # [T] int32
    attn: AttentionMetadata
    last: LastTokens | None  # None: each token is drawn from, or there are prompt tokens to score
    # [S + P] int32, rows of the hidden states, which are those of `last` if that is given: the last token of each
    # sampling sequence, then the prompt tokens to score.
    logits_indices: Array


def num_scored_tokens(scheduled: ScheduledSequence) -> int:
    """Prompt tokens that this chunk predicts, for prompt_logprobs: the token at p predicts the one at p + 1."""
    if scheduled.seq.sampling_params.prompt_logprobs is None:
        return 0
    end = min(scheduled.start + scheduled.num_tokens, scheduled.seq.num_prompt_tokens - 1)
    return max(0, end - scheduled.start)


def build_model_input(output: SchedulerOutput, state: BatchState) -> ModelInput:
    """Flatten the scheduled chunks, one sequence after the other.

    A chunk whose sequence asks for prompt_logprobs adds the rows that predict its next prompt tokens. `state` has taken
    over the plan; it then learns in which rows this step draws whose token.
    """
    scheduled = output.scheduled
    seqs, starts, query_lens, samples = zip(*scheduled, strict=True)
    seats = np.array([seq.seat for seq in seqs], np.intp)
    starts, query_lens = np.array(starts, np.int32), np.array(query_lens, np.int32)
    seq_lens = starts + query_lens
    max_seqlen_q, max_seqlen_k = int(query_lens.max()), int(seq_lens.max())
    if output.admitted:  # they may see keys that others bring in this step, which 1 would deny
        max_seqlen_q = max(max_seqlen_q, 2)
    block_size = state.block_size
    block_tables = state.block_tables[seats, : -(-max_seqlen_k // block_size)]
    cu_seqlens_q = np.zeros(len(scheduled) + 1, np.int32)
    np.cumsum(query_lens, out=cu_seqlens_q[1:])

    if max_seqlen_q == 1:
        rows, positions = np.arange(len(scheduled), dtype=np.int32), starts
        input_ids = np.array([s[0].token_ids[s[1]] for s in scheduled], np.int32)
    else:
        rows = np.repeat(np.arange(len(scheduled), dtype=np.int32), query_lens)
        positions = np.arange(len(rows), dtype=np.int32) - (cu_seqlens_q[:-1] - starts)[rows]
        tokens: list[int] = []
        for seq, start, num_tokens, _ in scheduled:
            tokens += seq.token_ids[start : start + num_tokens]
        input_ids = np.array(tokens, np.int32)
    pending = input_ids < 0
    if pending.any():
        input_ids[pending] = -1 - state.sampled_row[seats[rows[pending]]]
    slot_mapping = block_tables[rows, positions // block_size] * block_size + positions % block_size

    samples = np.array(samples)
    state.sampled_row[seats[samples]] = np.arange(np.count_nonzero(samples), dtype=np.int32)
    last_rows = cu_seqlens_q[1:] - 1
    score_indices = [
        cu_seqlens_q[row] + np.arange(count, dtype=np.int32)
        for row, s in enumerate(scheduled)
        if s.seq.sampling_params.prompt_logprobs is not None and (count := num_scored_tokens(s))
    ]
    last = None
    if score_indices:
        logits_indices = np.concatenate([last_rows[samples], *score_indices], dtype=np.int32)
    else:  # one row of hidden states for each sequence
        logits_indices = np.flatnonzero(samples).astype(np.int32)
        if max_seqlen_q > 1 or not samples.all():
            last = LastTokens(last_rows, np.arange(len(scheduled) + 1, dtype=np.int32))
    return ModelInput(
        input_ids=input_ids,
        positions=positions,
        attn=AttentionMetadata(
            slot_mapping=slot_mapping,
            cu_seqlens_q=cu_seqlens_q,
            seq_lens=seq_lens,
            block_tables=block_tables,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
        ),
        last=last,
        logits_indices=logits_indices,
    )
