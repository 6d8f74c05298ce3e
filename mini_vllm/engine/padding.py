"""Steps padded to the sizes that CUDA graphs are captured for. Pure NumPy: tested without a GPU or a model.

A graph reads arrays of fixed length at fixed addresses. So all that changes from step to step lies in static ones:
the columns of one buffer, which one small copy brings to the GPU, and the block tables, which are copied when they have
changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mini_vllm.config import EngineConfig
from mini_vllm.engine.batch_state import SAMPLING_COLUMNS
from mini_vllm.engine.model_input import ModelInput
from mini_vllm.ops.base import Array, AttentionMetadata, SamplingBatch

DECODE_SIZES = (1, 2, 4, 8)  # sequences
PROMPT_SIZES = (16, 32, 64, 128)  # tokens; products are computed in tiles of up to 128 rows anyway

MAX_PROMPT_TOKENS = 2048
"""Longer steps are not replayed: even with a small model they keep the GPU busy for as long as launching takes."""


def max_prompt_tokens(config: EngineConfig) -> int:
    """The longest step with prompt tokens that is replayed as a graph."""
    return min(config.max_num_batched_tokens, MAX_PROMPT_TOKENS)


def padded_sizes(first: tuple[int, ...], limit: int) -> list[int]:
    """`first`, then in steps of about a quarter, which keeps their number small; `limit` is always the last."""
    sizes = [*first]
    while sizes[-1] < limit:
        sizes.append(sizes[-1] + max(first[-1], 1 << (sizes[-1].bit_length() - 3)))
    return [size for size in sizes if size < limit] + [limit]


def padded_size(sizes: list[int], count: int) -> int:
    """The smallest of the ascending sizes that `count` fits into."""
    return next(size for size in sizes if size >= count)


# ---- columns ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """One value of each sequence or token of a step."""

    rows: int
    dtype: np.dtype | type
    padding: int | None  # what the rows hold that a step leaves; None: its last value again, 0 if it has none


def decode_columns(max_num_seqs: int) -> dict[str, Column]:
    """Of a decode step: what the model reads, then what the sampler reads. Padding is greedy and sees no key."""
    columns = {
        "input_ids": (np.int32, 0),
        "positions": (np.int32, 0),
        "slot_mapping": (np.int32, -1),
        "seq_lens": (np.int32, 0),
        **{name: (dtype, 1 if name == "top_p" else 0) for name, dtype in SAMPLING_COLUMNS.items()},
        "draw_positions": (np.int32, 0),
    }
    return {name: Column(max_num_seqs, *column) for name, column in columns.items()}


def decode_values(host: ModelInput, batch: SamplingBatch) -> dict[str, np.ndarray]:
    """What a step writes into `decode_columns`."""
    return {
        "input_ids": host.input_ids,
        "positions": host.positions,
        "slot_mapping": host.attn.slot_mapping,
        "seq_lens": host.attn.seq_lens,
        **{name: getattr(batch, name) for name in SAMPLING_COLUMNS},
        "draw_positions": batch.positions,
    }


def prompt_columns(max_num_tokens: int, max_num_seqs: int) -> dict[str, Column]:
    """Of a step with prompt tokens. Tokens of padding belong to no sequence, sequences of padding bring no token."""
    return {
        "input_ids": Column(max_num_tokens, np.int32, 0),
        "positions": Column(max_num_tokens, np.int32, 0),
        "slot_mapping": Column(max_num_tokens, np.int32, -1),
        "cu_seqlens_q": Column(max_num_seqs + 1, np.int32, None),
        "seq_lens": Column(max_num_seqs, np.int32, 0),
        "last_rows": Column(max_num_seqs, np.int32, 0),
    }


def prompt_values(host: ModelInput) -> dict[str, np.ndarray]:
    """What a step writes into `prompt_columns`."""
    return {
        "input_ids": host.input_ids,
        "positions": host.positions,
        "slot_mapping": host.attn.slot_mapping,
        "cu_seqlens_q": host.attn.cu_seqlens_q,
        "seq_lens": host.attn.seq_lens,
        **({} if host.last is None else {"last_rows": host.last.rows}),
    }


def buffer_size(columns: Mapping[str, Column]) -> int:
    """Bytes of the buffer that `column_views` divides."""
    return sum(_num_bytes(column) for column in columns.values())


def column_views(columns: Mapping[str, Column], buffer: Array) -> dict[str, Array]:
    """The columns in a buffer [bytes] uint8, on the host or the device: {name: [rows]}."""
    views, offset = {}, 0
    for name, column in columns.items():
        end = offset + column.rows * np.dtype(column.dtype).itemsize
        views[name] = buffer[offset:end].view(column.dtype)
        offset += _num_bytes(column)
    return views


def fill_columns(columns: Mapping[str, Column], views: Mapping[str, np.ndarray], values: Mapping[str, Array]) -> None:
    """Write a step's values into the columns on the host, and padding behind them, or all over those without any."""
    for name, column in columns.items():
        view, new = views[name], values.get(name, ())
        view[: len(new)] = new
        padding = column.padding
        if padding is None:
            padding = new[-1] if len(new) else 0
        view[len(new) :] = padding


def _num_bytes(column: Column) -> int:
    return -(-column.rows * np.dtype(column.dtype).itemsize // 8) * 8  # so that the next one is aligned


# ---- block tables -------------------------------------------------------------------------------------------------


class Mirror:
    """What an int32 array on the device holds, which starts as zeros: tells whether a step has to copy its rows."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self._held = np.zeros(shape, np.int32)

    def update(self, rows: np.ndarray) -> bool:
        """Whether the top left corner differs from `rows` [B, columns]; from now on it holds them."""
        held = self._held[: len(rows), : rows.shape[1]]
        if np.array_equal(held, rows):
            return False
        held[:] = rows
        return True


# ---- metadata -----------------------------------------------------------------------------------------------------


def padded_attention(
    column: Mapping[str, Array], block_tables: Array, num_tokens: int, max_model_len: int
) -> AttentionMetadata:
    """What attention reads in a step with prompt tokens that is padded to `num_tokens`, as views of static arrays.

    column: those of `prompt_columns`; block_tables: [max_num_seqs, max_blocks]. The step has as many sequences as there
    may ever be, and two at least, unless it has one token: a launch for a single one would take it for a prompt, while
    it may bring one token in front of others that are padding.
    """
    num_seqs = min(num_tokens, len(block_tables))
    assert num_seqs > 1 or num_tokens == 1
    return AttentionMetadata(
        slot_mapping=column["slot_mapping"][:num_tokens],
        cu_seqlens_q=column["cu_seqlens_q"][: num_seqs + 1],
        seq_lens=column["seq_lens"][:num_seqs],
        block_tables=block_tables[:num_seqs],
        max_seqlen_q=max(num_tokens, 2),
        max_seqlen_k=max_model_len,
    )
