"""Products of some rows in 16-bit types on Hopper, alone or with SwiGLU behind them: gemm_sm90.cu.

Between the few rows of fused_gemv.cu and the many of cuBLASLt a product takes some microseconds, most of them latency:
of starting, of fetching x, of writing y. This kernel overlaps the first with the kernel in front of it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import cupy
import numpy as np

from mini_vllm.ops.base import Array
from mini_vllm.ops.cuda.device import DeviceInfo
from mini_vllm.ops.cuda.kernel import Kernel, TensorMap, type_name

HOPPER = (9, 0)
ROW_TILES = (16, 32, 64)

# The constants of gemm_sm90.cu.
_OUTPUTS, _HALF_OUTPUTS, _COLUMNS = 128, 64, 64
_THREADS, _MAX_STAGES, _SUM_ROW = 288, 16, 132
_ROW_BYTES = 2 * _COLUMNS
_STATIC_SHARED_MEMORY = 1024  # and some more, per block


@dataclass(frozen=True)
class Plan:
    """How a product is cut: blocks of 128 outputs by `rows` rows, `split` of them sharing the columns."""

    rows: int
    split: int
    stages: int
    shared_memory: int


@functools.cache
def plan(num_rows: int, out_features: int, in_features: int, max_shared_memory: int) -> Plan | None:
    """The plan for a product; None where cuBLASLt is faster. The card of gemm_sm90.cu has the measurements."""
    if num_rows > (128 if min(out_features, in_features) <= 2048 else 64):
        return None
    rows = next((rows for rows in ROW_TILES if rows >= num_rows), ROW_TILES[-1])
    tiles = -(-out_features // _OUTPUTS) * -(-num_rows // rows)
    steps = -(-in_features // _COLUMNS)
    # Half the multiprocessors are enough to keep the memory busy, and leave the others to the kernel behind.
    most = 96 if in_features > 2048 else 64
    split = 1
    while split < (4 if rows == 64 else 8) and 2 * split * tiles <= most and 8 * split <= steps:
        split *= 2
    stage_bytes, other_bytes = (_OUTPUTS + rows) * _ROW_BYTES, rows * _SUM_ROW * 4 + 2 * _STATIC_SHARED_MEMORY
    stages = min(-(-steps // split), _MAX_STAGES, (max_shared_memory - other_bytes) // stage_bytes)
    return Plan(rows, split, stages, other_bytes - _STATIC_SHARED_MEMORY + stages * stage_bytes)


@functools.cache
def _kernel(name: str, dtype: np.dtype, rows: int) -> Kernel:
    return Kernel("gemm_sm90.cu", f"{name}<{type_name(dtype)}, {rows}>", pdl=True)


def instances(dtypes: Iterable[np.dtype]) -> list[Kernel]:
    """Every kernel that this module launches for these data types."""
    names = "gemm_sm90", "gemm_swiglu_sm90"
    types = [dtype for dtype in map(np.dtype, dtypes) if dtype.itemsize == 2]
    return [_kernel(name, dtype, rows) for name in names for dtype in types for rows in ROW_TILES]


@functools.lru_cache(maxsize=4096)
def _weight_map(address: int, rows: int, columns: int) -> TensorMap:
    return TensorMap(address, rows, columns, _HALF_OUTPUTS)


def serves(num_rows: int, out_features: int, in_features: int, info: DeviceInfo) -> bool:
    """Whether `gemm` is the way to multiply 16-bit operands of these sizes, which lie at multiples of 16 bytes."""
    fits = num_rows > 0 and in_features % 8 == out_features % 8 == 0
    return (
        info.compute_capability == HOPPER
        and fits
        and plan(num_rows, out_features, in_features, info.max_shared_memory) is not None
    )


def gemm(x: Array, weight: Array, bias: Array | None, info: DeviceInfo, swiglu: bool = False) -> Array | None:
    """x [T, in] weight [out, in]^T + bias in x's data type; with `swiglu`, silu(first half of it) times the second.

    None where the kernel does not serve: other types and GPUs, many rows, rows that are not whole vectors.
    """
    (num_rows, in_features), out_features = x.shape, len(weight)
    num_outputs = out_features // 2 if swiglu else out_features
    addresses = x.data.ptr | weight.data.ptr | (0 if bias is None else bias.data.ptr)
    if x.itemsize != 2 or addresses % 16 or num_outputs % 8 or not serves(num_rows, out_features, in_features, info):
        return None
    cut = plan(num_rows, out_features, in_features, info.max_shared_memory)
    y = cupy.empty((num_rows, num_outputs), x.dtype)
    tiles = -(-num_outputs // (_HALF_OUTPUTS if swiglu else _OUTPUTS))
    maps = TensorMap(x.data.ptr, *x.shape, cut.rows), _weight_map(weight.data.ptr, *weight.shape)
    sizes = map(np.int32, (num_rows, out_features, in_features, cut.stages))
    _kernel("gemm_swiglu_sm90" if swiglu else "gemm_sm90", x.dtype, cut.rows)(
        (tiles * cut.split, -(-num_rows // cut.rows)),
        (_THREADS,),
        (y, *maps, bias, *sizes),
        cut.shared_memory,
        cluster=cut.split,
    )
    return y
