"""The tiles of the attention kernels fit the GPUs they are for. Needs CuPy, but no GPU."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("cupy")

from mini_vllm.ops.cuda.attention import HOPPER, BoxTile, DecodeTile, HopperTile, PrefillTile, instances

BF16 = np.dtype(ml_dtypes.bfloat16)
SMALLEST_SHARED_MEMORY = 99 << 10  # of a block: compute capability 8.6, 8.9 and 12.0
HOPPERS_SHARED_MEMORY = 227 << 10
BOXES_STATIC = 1024  # of paged_attention_sm90
STATIC = 64  # more than the static shared memory of paged_attention and flash_attention, which counts too


@pytest.mark.parametrize("head_dim", range(16, 257, 16))
def test_shared_memory(head_dim):
    assert PrefillTile.of(head_dim).shared_memory(head_dim, 2) + STATIC <= SMALLEST_SHARED_MEMORY
    assert HopperTile.of(head_dim).shared_memory <= HOPPERS_SHARED_MEMORY
    for group_size in (1, 8, 9, 16, 100):
        assert DecodeTile.of(head_dim, group_size).shared_memory(head_dim, 2) + STATIC <= SMALLEST_SHARED_MEMORY


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 16, 32, 40])
def test_boxes(num_kv_heads, head_dim):
    tile = BoxTile.of(num_kv_heads, head_dim)
    assert num_kv_heads % tile.heads == 0
    assert 2 < tile.slots <= BoxTile.MAX_SLOTS
    assert tile.per_sm * (tile.heads + 1) <= BoxTile.MAX_WARPS
    # A multiprocessor has a KiB more than a block may take, and each block costs one besides its own.
    smallest, largest = (
        tile.shared_memory(head_dim, group_size) + BOXES_STATIC + 1024 for group_size in (1, BoxTile.MAX_GROUP_SIZE)
    )
    assert tile.per_sm * largest <= HOPPERS_SHARED_MEMORY + 1024 < (tile.per_sm + 1) * smallest
    shorter = replace(tile, slots=tile.slots - 1).shared_memory(head_dim, 1) + BOXES_STATIC + 1024
    assert (tile.per_sm + 1) * shorter <= HOPPERS_SHARED_MEMORY + 1024  # no longer than it must be


def test_instances_of_one_gpu():
    everything = {kernel.file for kernel in instances([BF16], [128])}
    assert everything == {
        "flash_attention.cu", "flash_attention_sm90.cu", "paged_attention.cu", "paged_attention_sm90.cu",
        "decode_attention.cu",
    }  # fmt: skip
    hopper = {kernel.file for kernel in instances([BF16], [128], HOPPER)}
    assert hopper == everything - {"flash_attention.cu"}
    ampere = {kernel.file for kernel in instances([BF16], [128], (8, 0))}
    assert ampere == {"flash_attention.cu", "paged_attention.cu"}


def test_float32_and_unusual_head_sizes_use_the_plain_kernel():
    for dtype, head_dim in ((np.float32, 128), (BF16, 40)):
        (kernel,) = instances([dtype], [head_dim])
        assert kernel.name.startswith("plain_attention<")
