"""What the host keeps of each running sequence in arrays, so that a step gathers rows instead of walking sequences.

A row belongs to a seat of the scheduler. It is written when a sequence is admitted; its block table also when it grows.
"""

from __future__ import annotations

import numpy as np

from mini_vllm.scheduling.scheduler import SchedulerOutput
from mini_vllm.scheduling.sequence import Sequence

SAMPLING_COLUMNS = {
    "temperature": np.float32,
    "top_k": np.int32,
    "top_p": np.float32,
    "min_p": np.float32,
    "seeds": np.uint64,
}
"""The columns of `SamplingBatch` that stay the same as long as the sequence runs."""


class BatchState:
    """Rows for `max_num_seqs` seats.

    Attributes:
        block_tables: [seats, max_blocks] int32: physical block of each logical block.
        sampling: the columns of SAMPLING_COLUMNS, each [seats].
        has_rules: [seats] bool: the sequence has penalties, biases, bans or a list of allowed tokens.
        sampled_row: [seats] int32: where in the newest step's tokens the sequence's is.
    """

    def __init__(self, max_num_seqs: int, max_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.block_tables = np.zeros((max_num_seqs, max_blocks), np.int32)
        self.sampling = {name: np.zeros(max_num_seqs, dtype) for name, dtype in SAMPLING_COLUMNS.items()}
        self.has_rules = np.zeros(max_num_seqs, bool)
        self.sampled_row = np.zeros(max_num_seqs, np.int32)

    def apply(self, output: SchedulerOutput) -> None:
        """Take over what a plan changed."""
        for seq in output.admitted:
            self._seat(seq)
        for seq in output.grown:
            self.block_tables[seq.seat, len(seq.block_table) - 1] = seq.block_table[-1]

    def _seat(self, seq: Sequence) -> None:
        seat, params = seq.seat, seq.sampling_params
        self.block_tables[seat, : len(seq.block_table)] = seq.block_table
        columns = self.sampling
        columns["temperature"][seat] = params.temperature
        columns["top_k"][seat] = min(params.top_k, 2**31 - 1)
        columns["top_p"][seat] = params.top_p
        columns["min_p"][seat] = params.min_p
        columns["seeds"][seat] = seq.seed
        self.has_rules[seat] = bool(
            params.has_penalties
            or params.logit_bias
            or params.allowed_token_ids
            or seq.bad_words_token_ids
            or params.min_tokens
        )
