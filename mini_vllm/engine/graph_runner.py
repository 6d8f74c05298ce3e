"""Steps as CUDA graphs, padded to a few sizes and fed through static buffers.

A step of a small model is some two hundred launches; one by one they take the host longer than the GPU. A graph replays
them all in one call. It can only read what lies at fixed addresses, so every value that changes from step to step is
written into static buffers first: by one small copy for the columns, and another one if block tables have changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mini_vllm.engine.batch_state import SAMPLING_COLUMNS
from mini_vllm.engine.model_input import ModelInput
from mini_vllm.engine.padding import (
    DECODE_SIZES,
    PROMPT_SIZES,
    Column,
    Mirror,
    buffer_size,
    column_views,
    decode_columns,
    decode_values,
    fill_columns,
    padded_attention,
    padded_size,
    padded_sizes,
    prompt_columns,
    prompt_values,
)
from mini_vllm.models.decoder import CausalLM, LastTokens
from mini_vllm.models.kv_cache import KVCache
from mini_vllm.ops.base import Array, AttentionMetadata, SamplingBatch
from mini_vllm.ops.cuda.cuda_ops import CudaOps
from mini_vllm.ops.cuda.device import GPUAllocator, GPUBuffer, StreamPool
from mini_vllm.ops.cuda.graph import CapturedGraph


@dataclass(frozen=True)
class GraphContext:
    """What the graphs of both runners work with.

    drawn: the tokens of the newest step; one_token_each: 0, 1, 2, ... to the number of block tables.
    """

    model: CausalLM
    kv: KVCache
    ops: CudaOps
    drawn: Array
    block_tables: BlockTables
    one_token_each: Array
    max_model_len: int

    def forward(
        self, column: Mapping[str, Array], size: int, meta: AttentionMetadata, last: LastTokens | None = None
    ) -> Array:
        """Run the model on static columns, padded to `size` tokens: the hidden states of all of them, or of `last`."""
        ids, positions = column["input_ids"][:size], column["positions"][:size]
        return self.model.forward(ids, positions, meta, self.kv, self.drawn, last)


class DecodeGraphRunner:
    """Replays decode steps of up to `max_num_seqs` sequences, without waiting for them."""

    def __init__(self, context: GraphContext, max_num_seqs: int) -> None:
        self._context, ops, model = context, context.ops, context.model
        self._sizes = padded_sizes(DECODE_SIZES, max_num_seqs)
        self._inputs = StaticInputs(decode_columns(max_num_seqs))
        self._allocator = GraphAllocator()
        ops.tune(self._sizes, model.projections, model.lm_head)
        self._graphs = {  # the largest first: the smaller ones then reuse its memory
            size: CapturedGraph(lambda size=size: self._step(size), self._allocator) for size in reversed(self._sizes)
        }

    @property
    def reserved_bytes(self) -> int:
        return self._allocator.get_reserved()

    def _step(self, size: int) -> Array:
        """A step padded to `size` sequences that reads the static buffers: its logits, after drawing from them."""
        column = self._inputs.columns
        meta = AttentionMetadata(
            slot_mapping=column["slot_mapping"][:size],
            cu_seqlens_q=self._context.one_token_each[: size + 1],
            seq_lens=column["seq_lens"][:size],
            block_tables=self._context.block_tables.data[:size],
            max_seqlen_q=1,
            max_seqlen_k=self._context.max_model_len,
        )
        logits = self._context.model.logits(self._context.forward(column, size, meta))
        columns = {name: column[name][:size] for name in SAMPLING_COLUMNS}
        batch = SamplingBatch(**columns, positions=column["draw_positions"][:size])
        self._context.drawn[:size] = self._context.ops.sample(logits, batch)
        return logits

    def run(self, host: ModelInput, batch: SamplingBatch) -> Array:
        """Run a decode step given as host arrays. Returns its logits [B, V], valid until the next step.

        Tokens are drawn by the fixed-size columns of `batch` alone, which is not all there is to it unless it
        `is_simple`. The step before may still run, the one before that must have been waited for.
        """
        num_seqs = len(host.input_ids)
        size = padded_size(self._sizes, num_seqs)
        self._inputs.upload(decode_values(host, batch))
        self._context.block_tables.upload(host.attn.block_tables)
        self._graphs[size].replay()
        return self._graphs[size].result[:num_seqs]


class PromptGraphRunner:
    """Replays steps with prompt tokens, alone or among decoding sequences, of up to `max_num_tokens` tokens.

    Only the model is in the graph: whose logits are wanted, and what for, differs from step to step. A graph is
    captured when the first step of its size comes, which takes as long as two or three eager ones; steps that want the
    hidden states of all tokens, to score prompts, have graphs of their own.
    """

    def __init__(self, context: GraphContext, max_num_tokens: int) -> None:
        self._context, self.max_num_tokens = context, max_num_tokens
        model, ops, max_num_seqs = context.model, context.ops, len(context.block_tables.data)
        self._sizes = padded_sizes(PROMPT_SIZES, max_num_tokens)
        self._inputs = StaticInputs(prompt_columns(max_num_tokens, max_num_seqs))
        # All graphs leave their result here: none keeps memory of its own, and so they all fit into the same.
        self._hidden = ops.zeros((max_num_tokens, model.config.hidden_size), ops.dtype)
        self._allocator = GraphAllocator()
        self._graphs: dict[tuple[int, bool], CapturedGraph] = {}  # by size, and whether all hidden states are wanted
        with self._allocator.use():  # a step of padding only, to take that memory as long as there is some
            self._forward(max_num_tokens, wants_all=True)

    @property
    def captured_sizes(self) -> list[int]:
        return sorted({size for size, _ in self._graphs})

    @property
    def reserved_bytes(self) -> int:
        return self._allocator.get_reserved()

    def _forward(self, size: int, wants_all: bool) -> None:
        """Run the model on the static buffers, padded to `size` tokens, and leave the hidden states in `_hidden`."""
        column = self._inputs.columns
        meta = padded_attention(column, self._context.block_tables.data, size, self._context.max_model_len)
        last, num_seqs = None, len(meta.seq_lens)
        if not wants_all:
            last = LastTokens(column["last_rows"][:num_seqs], self._context.one_token_each[: num_seqs + 1])
        hidden = self._context.forward(column, size, meta, last)
        self._hidden.data.copy_from_device_async(hidden.data, hidden.nbytes)

    def forward(self, host: ModelInput) -> Array:
        """Run the model on a step given as host arrays. Returns its hidden states, as `CausalLM.forward` does.

        They are valid until the next step. The step before may still run, the one before that must have been waited
        for.
        """
        num_tokens, wants_all = len(host.input_ids), host.last is None
        size = padded_size(self._sizes, num_tokens)
        self._inputs.upload(prompt_values(host))
        self._context.block_tables.upload(host.attn.block_tables)
        graph = self._graphs.get((size, wants_all))
        if graph is not None:
            graph.replay()
        else:  # what is captured is run, too
            graph = CapturedGraph(lambda: self._forward(size, wants_all), self._allocator)
            self._graphs[size, wants_all] = graph
        return self._hidden[: num_tokens if wants_all else len(host.last.rows)]


class BlockTables:
    """The block tables that graphs read. They are copied where the GPU holds others: when a sequence joins, or begins
    with a block.

    Attributes:
        data: [max_num_seqs, max_blocks] int32 on the GPU, two rows at least, see `padded_attention`.
    """

    def __init__(self, max_num_seqs: int, max_blocks: int) -> None:
        shape = max(max_num_seqs, 2), max_blocks
        self._buffer, self._mirror = GPUBuffer(shape, np.int32, num_hosts=2), Mirror(shape)
        self._buffer.fill(0)
        self.data = self._buffer.data

    def upload(self, tables: np.ndarray) -> None:
        """Have a step's tables [B, blocks in use] on the GPU before what is enqueued from now on."""
        if self._mirror.update(tables):
            self._buffer.flip()
            self._buffer.upload_rows(tables)


class StaticInputs:
    """The columns that graphs read a step from, all in one buffer.

    Attributes:
        columns: {name: [rows]} on the GPU.
    """

    def __init__(self, columns: Mapping[str, Column]) -> None:
        self._layout = columns
        self._buffer = GPUBuffer(buffer_size(columns), np.uint8, num_hosts=2)
        arrays = *self._buffer.hosts, self._buffer.data
        *self._hosts, self.columns = (column_views(columns, array) for array in arrays)
        self.upload({})

    def upload(self, values: Mapping[str, np.ndarray]) -> None:
        """Enqueue a step's values, with padding behind them."""
        fill_columns(self._layout, self._hosts[self._buffer.flip()], values)
        self._buffer.copy_from_host()


class GraphAllocator(GPUAllocator):
    """For graphs that run one after the other, and may use the same memory.

    CuPy's pool keeps what was freed on one stream for that stream, and each capture has a stream of its own: here all
    memory is asked for in the name of one.
    """

    def __init__(self) -> None:
        super().__init__()
        self._stream = StreamPool(1).get(0)

    def allocate(self, num_bytes: int) -> Any:  # a cupy.cuda.MemoryPointer
        with self._stream:
            return super().allocate(num_bytes)
