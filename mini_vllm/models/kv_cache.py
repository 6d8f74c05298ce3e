"""The paged KV cache: one K and one V array per layer, addressed by block id and offset."""

from __future__ import annotations

import numpy as np

from mini_vllm.config import ModelConfig
from mini_vllm.ops.base import Array, Ops


class KVCache:
    """keys[layer] and values[layer]: [num_blocks, block_size, num_kv_heads, head_dim] in the engine's dtype.

    Token p of a sequence lives in block block_table[p // block_size] at offset p % block_size, in every
    layer. A cache may hold more than 2^31 elements: kernels index it with 64 bits.
    """

    def __init__(self, config: ModelConfig, num_blocks: int, block_size: int, ops: Ops, on_host: bool = False) -> None:
        """`on_host`: in host memory, for blocks that wait there; the model reads only caches on the device."""
        self.num_blocks = num_blocks
        self.block_size = block_size
        shape = (num_blocks, block_size, config.num_key_value_heads, config.head_dim)
        zeros = ops.host_zeros if on_host else ops.zeros
        self.keys: list[Array] = [zeros(shape, ops.dtype) for _ in range(config.num_hidden_layers)]
        self.values: list[Array] = [zeros(shape, ops.dtype) for _ in range(config.num_hidden_layers)]

    def copy_blocks_from(self, source: KVCache, pairs: Array, ops: Ops) -> None:
        """In every layer, own block t = block s of `source` (perhaps this cache) for each (s, t) of pairs [N, 2]."""
        for k_source, v_source, keys, values in zip(source.keys, source.values, self.keys, self.values, strict=True):
            ops.copy_blocks(k_source, v_source, keys, values, pairs)

    @staticmethod
    def bytes_per_block(config: ModelConfig, block_size: int, dtype: np.dtype) -> int:
        """Bytes of one block over all layers, keys and values."""
        per_token = config.num_key_value_heads * config.head_dim * np.dtype(dtype).itemsize
        return 2 * config.num_hidden_layers * block_size * per_token
