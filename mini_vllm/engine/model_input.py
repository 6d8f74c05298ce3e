"""From the scheduler's plan to the arrays of one step. Pure NumPy: tested without a GPU or a model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mini_vllm.ops.base import Array, AttentionMetadata
from mini_vllm.scheduling.scheduler import ScheduledSequence, SchedulerOutput


@dataclass(frozen=True)
class ModelInput:
    """What the model reads in one step."""

    input_ids: Array  # [T] int32
    positions: Array  # [T] int32
    attn: AttentionMetadata
    logits_indices: Array  # [S + P] int32: the last token of each sampling sequence, then the prompt tokens to score


def num_scored_tokens(scheduled: ScheduledSequence) -> int:
    """Prompt tokens that this chunk predicts, for prompt_logprobs: the token at p predicts the one at p + 1."""
    if scheduled.seq.sampling_params.prompt_logprobs is None:
        return 0
    end = min(scheduled.start + scheduled.num_tokens, scheduled.seq.num_prompt_tokens - 1)
    return max(0, end - scheduled.start)


def build_model_input(output: SchedulerOutput, block_size: int) -> ModelInput:
    """Flatten the scheduled chunks, one sequence after the other.

    A chunk whose sequence asks for prompt_logprobs adds the rows that predict its next prompt tokens.
    """
    scheduled = output.scheduled
    starts = np.array([s.start for s in scheduled], np.int32)
    query_lens = np.array([s.num_tokens for s in scheduled], np.int32)
    input_ids: list[int] = []
    for s in scheduled:
        input_ids += s.seq.token_ids[s.start : s.start + s.num_tokens]

    cu_seqlens_q = np.zeros(len(scheduled) + 1, np.int32)
    np.cumsum(query_lens, out=cu_seqlens_q[1:])
    rows = np.repeat(np.arange(len(scheduled), dtype=np.int32), query_lens)
    positions = np.arange(len(input_ids), dtype=np.int32) - (cu_seqlens_q[:-1] - starts)[rows]

    block_tables = np.zeros((len(scheduled), max(len(s.seq.block_table) for s in scheduled)), np.int32)
    for row, s in enumerate(scheduled):
        block_tables[row, : len(s.seq.block_table)] = s.seq.block_table
    slot_mapping = block_tables[rows, positions // block_size] * block_size + positions % block_size

    seq_lens = starts + query_lens
    sample_indices = cu_seqlens_q[1:][[s.samples for s in scheduled]] - 1
    score_indices = [
        cu_seqlens_q[row] + np.arange(count, dtype=np.int32)
        for row, s in enumerate(scheduled)
        if (count := num_scored_tokens(s))
    ]
    return ModelInput(
        input_ids=np.array(input_ids, np.int32),
        positions=positions,
        attn=AttentionMetadata(
            slot_mapping=slot_mapping,
            cu_seqlens_q=cu_seqlens_q,
            seq_lens=seq_lens,
            block_tables=block_tables,
            max_seqlen_q=int(query_lens.max()),
            max_seqlen_k=int(seq_lens.max()),
        ),
        logits_indices=np.concatenate([sample_indices, *score_indices]).astype(np.int32),
    )
