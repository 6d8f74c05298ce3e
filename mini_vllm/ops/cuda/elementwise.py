"""Launchers of the small kernels: norms, activation, embedding, rotary embedding and cache writes.

Their time is that of the bytes they move, or in decoding that of a launch; so each reads its row once, 16 bytes a
thread, and may be launched before its predecessor has ended (pdl).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import cupy
import numpy as np

from mini_vllm.ops.base import Array
from mini_vllm.ops.cuda.kernel import DTYPES, Kernel, type_name

HEAD_DIMS = (32, 64, 80, 96, 128, 256)
"""Head sizes of the models in use. rope.cu serves every even one up to 256, compiled when it is met."""

VECTOR_BYTES = 16
WARP, MAX_THREADS = 32, 1024


@functools.cache
def _kernel(file: str, name: str) -> Kernel:
    return Kernel(file, name, pdl=True)


def instances(dtypes: Iterable[np.dtype] = DTYPES, head_dims: Iterable[int] = HEAD_DIMS) -> list[Kernel]:
    """Every kernel that this module launches for these data types and head sizes."""
    kernels = [
        _kernel("kv_cache.cu", f"{name}<{unit}>")
        for name in ("reshape_and_cache", "copy_blocks")
        for unit in ("uint4", "uint16_t")
    ]
    for dtype in map(np.dtype, dtypes):
        t, head_dims = type_name(dtype), list(head_dims)
        for vectors in (0, 1, 2, 4):
            kernels.append(_kernel("rmsnorm.cu", f"rms_norm<{t}, {vectors}>"))
            kernels.append(_kernel("rmsnorm.cu", f"add_rms_norm<{t}, {vectors}>"))
        for size in (1, VECTOR_BYTES // dtype.itemsize):
            kernels.append(_kernel("swiglu.cu", f"silu_and_mul<{t}, {size}>"))
            kernels.append(_kernel("embedding.cu", f"embedding<{t}, {size}>"))
        kernels += [_kernel("rope.cu", f"rope_store_kv<{t}, {head_dim}>") for head_dim in head_dims]
    return kernels


def _aligned(*arrays: Array) -> bool:
    addresses = 0
    for array in arrays:
        addresses |= array.data.ptr
    return addresses % VECTOR_BYTES == 0


def _vector_size(length: int, *arrays: Array) -> int:
    """Elements a thread moves at once: a full vector if rows of `length` elements are whole vectors, else 1."""
    size = VECTOR_BYTES // arrays[0].itemsize
    return size if length % size == 0 and _aligned(*arrays) else 1


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


# ---- norms ----------------------------------------------------------------------------------------------------


MANY_ROWS = 1024  # enough blocks to fill a GPU several times


@functools.cache
def _norm_plan(hidden_size: int, vector_size: int, many_rows: bool) -> tuple[int, int]:
    """(vectors a thread keeps, threads a block) for rows of hidden_size elements."""
    num_vectors = hidden_size // vector_size
    if vector_size == 1 or num_vectors > 2 * MAX_THREADS:
        return 0, min(_round_up(hidden_size, WARP), MAX_THREADS)
    if many_rows:  # more bytes in flight a thread
        vectors = 4 if num_vectors >= 512 else 2 if num_vectors >= 256 else 1
    else:  # the shortest way through a block
        vectors = 1 if num_vectors <= MAX_THREADS else 2
    return vectors, _round_up(-(-num_vectors // vectors), WARP)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """`Ops.rms_norm`."""
    hidden_size = x.shape[-1]
    if weight.shape != (hidden_size,):
        raise ValueError(f"rms_norm: weight {weight.shape} does not fit x {x.shape}")
    out = cupy.empty(x.shape, x.dtype)
    rows = x.size // hidden_size
    vectors, threads = _norm_plan(hidden_size, _vector_size(hidden_size, x, weight, out), rows >= MANY_ROWS)
    kernel = _kernel("rmsnorm.cu", f"rms_norm<{type_name(x.dtype)}, {vectors}>")
    kernel((rows,), (threads,), (x, weight, out, np.int32(hidden_size), np.float32(eps)))
    return out


def add_rms_norm(x: Array, residual: Array, weight: Array, eps: float) -> tuple[Array, Array]:
    """`Ops.add_rms_norm`, with both results written over the inputs."""
    hidden_size = x.shape[-1]
    if weight.shape != (hidden_size,) or residual.shape != x.shape:
        raise ValueError(f"add_rms_norm: residual {residual.shape} and weight {weight.shape} do not fit x {x.shape}")
    rows = x.size // hidden_size
    vectors, threads = _norm_plan(hidden_size, _vector_size(hidden_size, x, residual, weight), rows >= MANY_ROWS)
    kernel = _kernel("rmsnorm.cu", f"add_rms_norm<{type_name(x.dtype)}, {vectors}>")
    kernel((rows,), (threads,), (x, residual, weight, np.int32(hidden_size), np.float32(eps)))
    return x, residual


# ---- activation and embedding -----------------------------------------------------------------------------------


def silu_and_mul(gate_up: Array) -> Array:
    """`Ops.silu_and_mul`."""
    rows, width = gate_up.shape
    if width % 2:
        raise ValueError(f"silu_and_mul: gate_up {gate_up.shape} needs an even last axis, gate and up")
    intermediate_size = width // 2
    out = cupy.empty((rows, intermediate_size), gate_up.dtype)
    size = _vector_size(intermediate_size, gate_up, out)
    threads = 128
    blocks_per_row = -(-intermediate_size // (threads * size))
    kernel = _kernel("swiglu.cu", f"silu_and_mul<{type_name(gate_up.dtype)}, {size}>")
    args = (gate_up, out, np.int32(intermediate_size), np.int32(blocks_per_row))
    kernel((rows * blocks_per_row,), (threads,), args)
    return out


def embedding(ids: Array, table: Array, previous: Array | None = None) -> Array:
    """`Ops.embedding`; ids [T] int32, each below the table's length, previous int32."""
    hidden_size = table.shape[1]
    out = cupy.empty((len(ids), hidden_size), table.dtype)
    size = _vector_size(hidden_size, table, out)
    threads = min(_round_up(-(-hidden_size // size), WARP), 256)
    kernel = _kernel("embedding.cu", f"embedding<{type_name(table.dtype)}, {size}>")
    kernel((len(ids),), (threads,), (ids, previous, table, out, np.int32(hidden_size)))
    return out


# ---- rotary embedding and cache -----------------------------------------------------------------------------------


@functools.cache
def _rope_threads(num_heads: int, head_dim: int, itemsize: int, many_tokens: bool) -> int:
    """Threads a block for rope.cu, which gives each head the lanes counted here."""
    half = head_dim // 2
    size = VECTOR_BYTES // itemsize
    while half % size:
        size //= 2
    lanes = min(1 << (half // size - 1).bit_length(), WARP)
    # Few tokens: all heads at once is the shortest way. Many: small blocks, so that some load while others store.
    return 64 if many_tokens else min(_round_up(num_heads * lanes, WARP), 512)


def check_rope(
    qkv: Array,
    positions: Array,
    rope_table: Array,
    q_norm: Array | None,
    k_norm: Array | None,
    k_cache: Array,
    v_cache: Array,
    slot_mapping: Array,
) -> None:
    """Refuse arguments of `Ops.rope_store_kv` that do not fit together with a ValueError."""
    num_tokens, width = qkv.shape
    num_kv_heads, head_dim = k_cache.shape[2:]
    if head_dim % 2 or head_dim > 256:
        raise ValueError(f"rope_store_kv: head_dim is {head_dim}; it must be even and at most 256")
    if (q_norm is None) != (k_norm is None):
        raise ValueError("rope_store_kv: q_norm and k_norm must both be given, or neither")
    if not (
        width % head_dim == 0
        and width // head_dim > 2 * num_kv_heads
        and v_cache.shape == k_cache.shape
        and rope_table.shape[1] == head_dim
        and positions.shape == slot_mapping.shape == (num_tokens,)
        and (q_norm is None or q_norm.shape == k_norm.shape == (head_dim,))
    ):
        raise ValueError(
            f"rope_store_kv: shapes do not fit: qkv {qkv.shape}, positions {positions.shape}, rope_table "
            f"{rope_table.shape}, k_cache {k_cache.shape}, v_cache {v_cache.shape}, slot_mapping {slot_mapping.shape}"
        )
    if not _aligned(qkv, k_cache, v_cache, rope_table):
        raise ValueError("rope_store_kv: arrays must start at a multiple of 16 bytes")


def rope_store_kv(
    qkv: Array,
    positions: Array,
    rope_table: Array,
    q_norm: Array | None,
    k_norm: Array | None,
    eps: float,
    k_cache: Array,
    v_cache: Array,
    slot_mapping: Array,
) -> Array:
    """`Ops.rope_store_kv`; head sizes are even and at most 256."""
    check_rope(qkv, positions, rope_table, q_norm, k_norm, k_cache, v_cache, slot_mapping)
    num_tokens, width = qkv.shape
    num_kv_heads, head_dim = k_cache.shape[2:]
    num_heads = width // head_dim
    num_q_heads = num_heads - 2 * num_kv_heads
    q = cupy.empty((num_tokens, num_q_heads, head_dim), qkv.dtype)
    kernel = _kernel("rope.cu", f"rope_store_kv<{type_name(qkv.dtype)}, {head_dim}>")
    args = (
        qkv, positions, rope_table, q_norm, k_norm, q, k_cache, v_cache, slot_mapping,
        np.int32(num_q_heads), np.int32(num_kv_heads), np.float32(eps),
    )  # fmt: skip
    threads = _rope_threads(num_heads, head_dim, qkv.itemsize, num_tokens > 512)
    kernel((num_tokens,), (threads,), args)
    return q


def _copy_plan(num_bytes: int, *arrays: Array) -> tuple[str, int, int]:
    """(unit, units, threads) to copy num_bytes, the bytes of a row or block."""
    unit, unit_bytes = ("uint4", 16) if num_bytes % 16 == 0 and _aligned(*arrays) else ("uint16_t", 2)
    units = num_bytes // unit_bytes
    return unit, units, min(_round_up(units, WARP), 256)


def store_kv(k: Array, v: Array, k_cache: Array, v_cache: Array, slot_mapping: Array) -> None:
    """Scatter k and v [T, Hkv, D] into the cache rows slot_mapping [T] int32; -1 is padding."""
    if not (
        k.shape == v.shape == (len(slot_mapping), *k_cache.shape[2:])
        and k_cache.shape == v_cache.shape
        and k.dtype == v.dtype == k_cache.dtype == v_cache.dtype
    ):
        raise ValueError(
            f"store_kv: k {k.dtype}{k.shape} and v {v.dtype}{v.shape} do not fit k_cache "
            f"{k_cache.dtype}{k_cache.shape}, v_cache {v_cache.dtype}{v_cache.shape} and slot_mapping "
            f"{slot_mapping.shape}"
        )
    unit, units, threads = _copy_plan(k.itemsize * k.shape[1] * k.shape[2], k, v, k_cache, v_cache)
    kernel = _kernel("kv_cache.cu", f"reshape_and_cache<{unit}>")
    kernel((len(k), 2), (threads,), (k, v, k_cache, v_cache, slot_mapping, np.int32(units)))


def copy_blocks(k_source: Array, v_source: Array, k_target: Array, v_target: Array, pairs: Array) -> None:
    """`Ops.copy_blocks`; source or target may be pinned host memory (`device.pinned_zeros`)."""
    caches = k_source, v_source, k_target, v_target
    if len({(cache.shape[1:], cache.dtype) for cache in caches}) > 1 or pairs.shape[1:] != (2,):
        shapes = ", ".join(f"{cache.dtype}{cache.shape}" for cache in caches)
        raise ValueError(f"copy_blocks: caches {shapes} and pairs {pairs.shape} do not fit")
    unit, units, threads = _copy_plan(k_source[:1].nbytes, *caches)
    kernel = _kernel("kv_cache.cu", f"copy_blocks<{unit}>")
    kernel((len(pairs), 2), (threads,), (*caches, pairs, np.int32(units)))
