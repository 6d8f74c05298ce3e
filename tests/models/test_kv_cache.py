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


def test_blocks_move_between_device_and_host_in_every_layer():
    ops = NumpyOps(np.float32)
    kv, host = KVCache(CONFIG, 5, 4, ops), KVCache(CONFIG, 3, 4, ops, on_host=True)
    rng = np.random.default_rng(0)
    for array in kv.keys + kv.values:
        array[:] = rng.random(array.shape, np.float32)
    before = [array.copy() for array in kv.keys + kv.values]
    host.copy_blocks_from(kv, np.array([[4, 0], [1, 2]], np.int32), ops)
    kv.copy_blocks_from(host, np.array([[2, 0], [0, 3]], np.int32), ops)
    kv.copy_blocks_from(kv, np.array([[4, 2]], np.int32), ops)  # a fork
    for array, old in zip(kv.keys + kv.values, before, strict=True):
        np.testing.assert_array_equal(array, old[[1, 1, 4, 4, 4]])
