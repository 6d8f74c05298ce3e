"""Decode steps as CUDA graphs: one pair of graphs per padded batch size, fed through static buffers.

A decode step of a small model is some three hundred launches of a few microseconds each; launched one by one
they would take the host longer than the GPU. A graph replays them all in one call. It can only read what
lies at fixed addresses, so every value that changes from step to step is written into static buffers first:
one small copy for the columns, one for the block tables.
"""

from __future__ import annotations

import numpy as np

from mini_vllm.engine.batch_state import SAMPLING_COLUMNS
from mini_vllm.engine.model_input import ModelInput
from mini_vllm.models.decoder import CausalLM
from mini_vllm.models.kv_cache import KVCache
from mini_vllm.ops.base import Array, AttentionMetadata, SamplingBatch
from mini_vllm.ops.cuda.cuda_ops import CudaOps
from mini_vllm.ops.cuda.device import GPUAllocator, GPUBuffer
from mini_vllm.ops.cuda.graph import CapturedGraph

_COLUMNS = {
    # What the model reads, with the value of a padding row: it writes no K/V and sees no key.
    "input_ids": (np.int32, 0),
    "positions": (np.int32, 0),
    "slot_mapping": (np.int32, -1),
    "seq_lens": (np.int32, 0),
    # What the sampler reads; padding rows are greedy.
    **{name: (dtype, 1 if name == "top_p" else 0) for name, dtype in SAMPLING_COLUMNS.items()},
    "draw_positions": (np.int32, 0),
}


def padded_batch_sizes(max_num_seqs: int) -> list[int]:
    """1, 2, 4, 8, then in steps of about a quarter, which keeps their number small; max_num_seqs is always the last."""
    sizes, size = [1, 2, 4], 8
    while size < max_num_seqs:
        sizes.append(size)
        size += max(8, 1 << (size.bit_length() - 3))
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


class DecodeGraphRunner:
    """Replays decode steps of up to `max_num_seqs` sequences, without waiting for them.

    The model and the sampler are separate graphs, because a batch with penalties, biases or log
    probabilities wants the logits and samples eagerly.
    """

    def __init__(
        self, model: CausalLM, kv: KVCache, ops: CudaOps, drawn: Array, *, max_num_seqs: int, max_model_len: int
    ) -> None:
        self._model, self._kv, self._ops, self._drawn = model, kv, ops, drawn
        self._max_model_len = max_model_len
        self._sizes = padded_batch_sizes(max_num_seqs)
        self._columns = StaticColumns(max_num_seqs)
        max_blocks = -(-max_model_len // kv.block_size)
        self._block_tables = GPUBuffer((max_num_seqs, max_blocks), np.int32, num_hosts=2)
        self._block_tables.fill(0)
        self._indices = ops.to_device(np.arange(max_num_seqs + 1, dtype=np.int32))
        self._allocator = GPUAllocator()
        self._graphs: dict[int, tuple[CapturedGraph, CapturedGraph]] = {}
        self._columns.upload(0, {})
        ops.tune(self._sizes, model.projections, model.lm_head)
        for size in reversed(self._sizes):  # the largest first: the smaller ones then reuse its memory
            forward = CapturedGraph(lambda size=size: self._forward(size), self._allocator)
            sample = CapturedGraph(lambda size=size, logits=forward.result: self._sample(size, logits), self._allocator)
            self._graphs[size] = forward, sample

    @property
    def num_graphs(self) -> int:
        return len(self._graphs)

    @property
    def reserved_bytes(self) -> int:
        return self._allocator.get_reserved()

    def _forward(self, size: int) -> Array:
        """Logits [size, V] of a padded decode step that reads the static buffers."""
        column = self._columns.device
        meta = AttentionMetadata(
            slot_mapping=column["slot_mapping"][:size],
            cu_seqlens_q=self._indices[: size + 1],
            seq_lens=column["seq_lens"][:size],
            block_tables=self._block_tables.data[:size],
            max_seqlen_q=1,
            max_seqlen_k=self._max_model_len,
        )
        hidden = self._model.forward(
            column["input_ids"][:size], column["positions"][:size], meta, self._kv, self._indices[:size], self._drawn
        )
        return self._model.logits(hidden)

    def _sample(self, size: int, logits: Array) -> None:
        """Draw from the logits into the buffer that the next step may read its input from."""
        column = self._columns.device
        columns = {name: column[name][:size] for name in SAMPLING_COLUMNS}
        batch = SamplingBatch(**columns, positions=column["draw_positions"][:size])
        self._drawn[:size] = self._ops.sample(logits, batch)

    def forward(self, host: ModelInput, batch: SamplingBatch) -> Array:
        """Run the model on a decode step given as host arrays. Returns its logits [B, V], valid until the next step.

        The step before may still run, the one before that must have been waited for.
        """
        num_seqs = len(host.input_ids)
        self._size = next(size for size in self._sizes if size >= num_seqs)
        values = {name: getattr(batch, name) for name in SAMPLING_COLUMNS}
        values |= {
            "input_ids": host.input_ids,
            "positions": host.positions,
            "slot_mapping": host.attn.slot_mapping,
            "seq_lens": host.attn.seq_lens,
            "draw_positions": batch.positions,
        }
        self._columns.upload(num_seqs, values)
        self._block_tables.flip()
        self._block_tables.upload_rows(host.attn.block_tables)
        graph = self._graphs[self._size][0]
        graph.replay()
        return graph.result[:num_seqs]

    def sample(self) -> None:
        """Draw from the logits of the last `forward`."""
        self._graphs[self._size][1].replay()


class StaticColumns:
    """All per-sequence values of a step in one buffer, so that one small copy brings them to the GPU.

    device: {column name: [rows] on the GPU}.
    """

    def __init__(self, rows: int) -> None:
        row_bytes = sum(np.dtype(dtype).itemsize for dtype, _ in _COLUMNS.values())
        self._buffer = GPUBuffer(rows * row_bytes + 8 * len(_COLUMNS), np.uint8, num_hosts=2)
        *self._hosts, self.device = (self._views(array, rows) for array in (*self._buffer.hosts, self._buffer.data))

    @staticmethod
    def _views(buffer: Array, rows: int) -> dict[str, Array]:
        views, offset = {}, 0
        for name, (dtype, _) in _COLUMNS.items():
            num_bytes = rows * np.dtype(dtype).itemsize
            views[name] = buffer[offset : offset + num_bytes].view(dtype)
            offset += -(-num_bytes // 8) * 8
        return views

    def upload(self, count: int, values: dict[str, np.ndarray]) -> None:
        """Enqueue the first `count` rows; the rest become padding."""
        host = self._hosts[self._buffer.flip()]
        for name, (_, padding) in _COLUMNS.items():
            if count:
                host[name][:count] = values[name]
            host[name][count:] = padding
        self._buffer.copy_from_host()
