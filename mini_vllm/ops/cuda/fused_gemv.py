"""Projections of few rows in 16-bit types, alone or with a norm in front and SwiGLU behind: fused_gemv.cu.

The kernel is made for decode steps: it loads its weights, all of them if they fit, into shared memory while the kernel
before it still runs. So its blocks are few, one a multiprocessor, and large.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import cupy
import numpy as np

from mini_vllm.ops.base import Array
from mini_vllm.ops.cuda.device import DeviceInfo
from mini_vllm.ops.cuda.kernel import Kernel, type_name

MAX_ROWS = 4
"""The kernel takes 8, but from 5 on norm, product and activation are faster apart; the card has the times."""

VECTOR_BYTES = 16

# The constants of fused_gemv.cu.
_WARPS, _CHUNKS, _CHUNK, _BUFFERS = 16, 2, 32, 4
_THREADS = 32 * _WARPS
_STATIC_SHARED_MEMORY = 1024  # and some more, per block
RINGS = {1: (10, 6), 2: (5, 3)}
"""Steps in the ring, by half tiles: 160 KiB, and 96 where x takes much room."""


@dataclass(frozen=True)
class Plan:
    """How a product is cut: tiles of 8 `halves` outputs, walked over by `blocks` blocks."""

    halves: int
    blocks: int
    tiles_per_block: int
    steps: int  # of a warp, for one tile
    stages: int
    shared_memory: int


@functools.cache
def plan(
    rows: int, out_features: int, in_features: int, norm: bool, swiglu: bool, num_sms: int, max_shared_memory: int
) -> Plan | None:
    """The plan for a product on a GPU with such multiprocessors; None if x does not fit into shared memory."""
    num_outputs = out_features // 2 if swiglu else out_features
    half_tiles = -(-num_outputs // (4 if swiglu else 8))

    def share(halves: int) -> int:  # tiles of a block
        return -(-half_tiles // (halves * num_sms))

    halves = 1 if not swiglu and not norm and share(1) < 2 * share(2) else 2
    tiles, tiles_per_block = -(-half_tiles // halves), share(halves)
    steps = -(-in_features // (_WARPS * _CHUNKS * _CHUNK))
    row_slots = 1 << (rows - 1).bit_length()
    x_bytes = steps * _WARPS * _CHUNKS * _CHUNK * 2 * (row_slots + norm)
    sums_bytes = _BUFFERS * _WARPS * row_slots * 8 * halves * 4
    for stages in RINGS[halves]:
        ring_bytes = min(stages, tiles_per_block * steps) * _CHUNKS * halves * _THREADS * VECTOR_BYTES
        shared_memory = ring_bytes + x_bytes + sums_bytes
        if shared_memory + _STATIC_SHARED_MEMORY <= max_shared_memory:
            return Plan(halves, -(-tiles // tiles_per_block), tiles_per_block, steps, stages, shared_memory)
    return None


@functools.cache
def _kernel(dtype: np.dtype, out_dtype: np.dtype, halves: int, stages: int, norm: bool, swiglu: bool) -> Kernel:
    types, flags = f"{type_name(dtype)}, {type_name(out_dtype)}", f"{str(norm).lower()}, {str(swiglu).lower()}"
    name = f"fused_gemv<{types}, {halves}, {stages}, {flags}>"
    return Kernel("fused_gemv.cu", name, pdl=True, prefers_shared_memory=True)


def instances(dtypes: Iterable[np.dtype]) -> list[Kernel]:
    """Every kernel that this module launches for these data types."""
    kernels = []
    for dtype in map(np.dtype, dtypes):
        if dtype.itemsize == 2:
            for halves, rings in RINGS.items():
                for stages in rings:
                    outputs = (dtype, np.dtype(np.float32))
                    kernels += [_kernel(dtype, out, halves, stages, False, False) for out in outputs]
            kernels += [
                _kernel(dtype, dtype, 2, stages, True, swiglu) for stages in RINGS[2] for swiglu in (False, True)
            ]
    return kernels


@dataclass(frozen=True)
class Norm:
    """The RMSNorm in front of a product: of x, or of x + residual."""

    weight: Array
    eps: float
    residual: Array | None


def fused_gemv(
    x: Array,
    weight: Array,
    bias: Array | None,
    out_dtype: np.dtype,
    info: DeviceInfo,
    norm: Norm | None = None,
    swiglu: bool = False,
) -> tuple[Array, Array] | None:
    """(y, new residual), or None where the kernel does not serve: other types, more rows, rows that are not vectors.

    y = x W^T + b, of the normed x if there is a `norm`; with `swiglu`, silu(first half of y) times the second half.
    """
    (rows, in_features), out_features = x.shape, len(weight)
    if swiglu and out_features % 2:
        raise ValueError(f"swiglu needs an even number of outputs, gate and up, got {out_features}")
    if not 0 < rows <= MAX_ROWS or x.itemsize != 2 or in_features * x.itemsize % VECTOR_BYTES:
        return None
    residual = norm and norm.residual
    addresses = x.data.ptr | weight.data.ptr
    for array in (norm and norm.weight, residual):
        if array is not None:
            addresses |= array.data.ptr
    has_norm = norm is not None
    cut = plan(rows, out_features, in_features, has_norm, swiglu, info.num_sms, info.max_shared_memory)
    if addresses % VECTOR_BYTES or cut is None:
        return None
    y = cupy.empty((rows, out_features // 2 if swiglu else out_features), out_dtype)
    total = x if residual is None else cupy.empty_like(x)
    _kernel(x.dtype, y.dtype, cut.halves, cut.stages, has_norm, swiglu)(
        (cut.blocks,),
        (_THREADS,),
        (
            y, total, x, residual, norm and norm.weight, weight, bias, np.int32(rows),
            np.int32((rows - 1).bit_length()), np.int32(out_features), np.int32(in_features), np.int32(cut.steps),
            np.int32(cut.tiles_per_block), np.float32(norm.eps if norm else 0),
        ),
        cut.shared_memory,
    )  # fmt: skip
    return y, total
