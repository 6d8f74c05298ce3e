"""The KV cache: shapes, and the bytes that the planner reckons with."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from mini_vllm.config import ModelConfig
from mini_vllm.models.kv_cache import KVCache
from mini_vllm.ops.numpy_ops import NumpyOps

CONFIG = ModelConfig.from_hf(
    {
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 16,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "max_position_embeddings": 64,
    }
)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("block_size", [1, 16])
def test_shape_and_bytes(dtype, block_size):
    kv = KVCache(CONFIG, num_blocks=5, block_size=block_size, ops=NumpyOps(dtype))
    assert (kv.num_blocks, kv.block_size) == (5, block_size)
    arrays = kv.keys + kv.values
    assert len(kv.keys) == len(kv.values) == 3
    assert {array.shape for array in arrays} == {(5, block_size, 2, 6)}
    assert {array.dtype for array in arrays} == {np.dtype(dtype)}
    assert len({array.ctypes.data for array in arrays}) == 6  # no two share memory
    assert sum(array.nbytes for array in arrays) == 5 * KVCache.bytes_per_block(CONFIG, block_size, np.dtype(dtype))
