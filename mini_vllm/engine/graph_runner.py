"""Decode steps as CUDA graphs: one pair of graphs per padded batch size, fed through static buffers.

A decode step of a small model is some three hundred launches of a few microseconds each; launched one by one
they would take the host longer than the GPU. A graph replays them all in one call. It can only read what
lies at fixed addresses, so every value that changes from step to step is written into static buffers first:
one small copy for the columns, one for the block tables.
"""

from __future__ import annotations

import numpy as np

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
    "temperature": (np.float32, 0),
    "top_k": (np.int32, 0),
    "top_p": (np.float32, 1),
    "min_p": (np.float32, 0),
    "seeds": (np.uint64, 0),
    "draw_positions": (np.int32, 0),
}


def padded_batch_sizes(max_num_seqs: int) -> list[int]:
    """1, 2, 4, then multiples of 8 up to max_num_seqs, which is always the last."""
    sizes = [1, 2, 4, *range(8, max_num_seqs, 8), max_num_seqs]
    return sorted({size for size in sizes if size <= max_num_seqs})


class DecodeGraphRunner:
    """Replays decode steps of up to `max_num_seqs` sequences.

    The model and the sampler are separate graphs, because a batch with penalties, biases or log
    probabilities wants the logits and samples eagerly.
    """

    def __init__(self, model: CausalLM, kv: KVCache, ops: CudaOps, *, max_num_seqs: int, max_model_len: int) -> None:
        self._model, self._kv, self._ops = model, kv, ops
        self._max_model_len = max_model_len
        self._sizes = padded_batch_sizes(max_num_seqs)
        self._columns = StaticColumns(max_num_seqs)
        max_blocks = -(-max_model_len // kv.block_size)
        self._block_tables = GPUBuffer((max_num_seqs, max_blocks), np.int32)
        self._block_tables.fill(0)
        self._indices = ops.to_device(np.arange(max_num_seqs + 1, dtype=np.int32))
        self._token_ids = GPUBuffer(max_num_seqs, np.int32)
        self._allocator = GPUAllocator()
        self._graphs: dict[int, tuple[CapturedGraph, CapturedGraph]] = {}
        self._columns.fill(0, {})
        self._columns.upload()
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
            column["input_ids"][:size], column["positions"][:size], meta, self._kv, self._indices[:size]
        )
        return self._model.logits(hidden)

    def _sample(self, size: int, logits: Array) -> None:
        """Draw from the logits, with the token ids on their way to the host as the graph's last node."""
        column = self._columns.device
        names = ("temperature", "top_k", "top_p", "min_p", "seeds")
        batch = SamplingBatch(
            **{name: column[name][:size] for name in names}, positions=column["draw_positions"][:size]
        )
        self._token_ids.data[:size] = self._ops.sample(logits, batch)
        self._token_ids.copy_to_host(size)

    def forward(self, host: ModelInput, batch: SamplingBatch) -> Array:
        """Run the model on a decode step given as host arrays. Returns its logits [B, V], valid until the next step."""
        num_seqs = len(host.input_ids)
        self._size = next(size for size in self._sizes if size >= num_seqs)
        names = ("temperature", "top_k", "top_p", "min_p", "seeds")
        values = {name: getattr(batch, name) for name in names}
        values |= {
            "input_ids": host.input_ids,
            "positions": host.positions,
            "slot_mapping": host.attn.slot_mapping,
            "seq_lens": host.attn.seq_lens,
            "draw_positions": batch.positions,
        }
        self._columns.fill(num_seqs, values)
        self._columns.upload()
        self._block_tables.upload_rows(host.attn.block_tables)
        graph = self._graphs[self._size][0]
        graph.replay()
        return graph.result[:num_seqs]

    def sample(self, num_seqs: int) -> list[int]:
        """Draw from the logits of the last `forward`; waits for the tokens."""
        self._graphs[self._size][1].replay()
        self._ops.synchronize()
        return self._token_ids.host[:num_seqs].tolist()


class StaticColumns:
    """All per-sequence values of a step in one buffer, so that one small copy brings them to the GPU."""

    def __init__(self, rows: int) -> None:
        row_bytes = sum(np.dtype(dtype).itemsize for dtype, _ in _COLUMNS.values())
        self._buffer = GPUBuffer(rows * row_bytes + 8 * len(_COLUMNS), np.uint8)
        self.host: dict[str, np.ndarray] = {}
        self.device: dict[str, Array] = {}
        offset = 0
        for name, (dtype, _) in _COLUMNS.items():
            num_bytes = rows * np.dtype(dtype).itemsize
            self.host[name] = self._buffer.host[offset : offset + num_bytes].view(dtype)
            self.device[name] = self._buffer.data[offset : offset + num_bytes].view(dtype)
            offset += -(-num_bytes // 8) * 8

    def fill(self, count: int, values: dict[str, np.ndarray]) -> None:
        """Write the first `count` rows; the rest become padding."""
        for name, (_, padding) in _COLUMNS.items():
            if count:
                self.host[name][:count] = values[name]
            self.host[name][count:] = padding

    def upload(self) -> None:
        self._buffer.copy_from_host()
