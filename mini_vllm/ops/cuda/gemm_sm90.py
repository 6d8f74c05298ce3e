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
ROW_TILES = (16, 32, 64, 96, 128)

# The constants of gemm_sm90.cu.
_OUTPUTS, _HALF_OUTPUTS, _COLUMNS = 128, 64, 64
_THREADS, _MAX_STAGES, _SUM_ROW = 288, 16, 132
_ROW_BYTES = 2 * _COLUMNS
_STATIC_SHARED_MEMORY = 1024  # at most, with what aligns the ring
_SM_SHARED_MEMORY = 228 << 10  # of a multiprocessor

FEW_ROWS, MAX_ROWS = 64, 256
"""Up to which the kernel is always the faster one, and up to which it may be."""
MOST_STEPS, MOST_STEPS_ADDING, MOST_STEPS_FUSED = 12, 24, 64
"""With more rows, up to so many steps of 64 columns: of products alone, of those that add the residual and begin the
norm, and of those that save the next kernel some time."""


@dataclass(frozen=True)
class Plan:
    """How a product is cut: blocks of 128 outputs by `rows` rows.

    In a cluster `split` blocks share the columns, times `sharers` that fetch a weight together for as many row tiles.
    """

    rows: int
    split: int
    sharers: int
    stages: int
    shared_memory: int

    @classmethod
    def of(cls, rows: int, split: int, sharers: int, in_features: int, max_shared_memory: int) -> Plan:
        """With a ring as long as shared memory and the columns of a block allow."""
        stage_bytes, sums_bytes = (_OUTPUTS + rows) * _ROW_BYTES, rows * _SUM_ROW * 4
        received_bytes = sums_bytes if split > 1 else 0
        room = max_shared_memory - _STATIC_SHARED_MEMORY - received_bytes
        steps = -(-in_features // _COLUMNS)
        stages = min(-(-steps // split), _MAX_STAGES, room // stage_bytes)
        return cls(rows, split, sharers, stages, max(stages * stage_bytes, sums_bytes) + received_bytes)

    def cost(self, num_rows: int, out_features: int, in_features: int, num_sms: int) -> tuple[float, int]:
        """(estimated microseconds without start and end, steps that a multiprocessor does one after the other).

        The constants are fitted to the measurements in the card of gemm_sm90.cu.
        """
        row_tiles = -(-num_rows // (self.rows * self.sharers)) * self.sharers
        blocks = -(-out_features // _OUTPUTS) * self.split * row_tiles
        per_sm = 2 if 2 * (self.shared_memory + 2 * _STATIC_SHARED_MEMORY) <= _SM_SHARED_MEMORY else 1
        # Clusters lie within groups of 16 or 18 multiprocessors, which large ones do not fill.
        most = per_sm * (num_sms - {1: 0, 2: 0, 4: 12, 8: 20}[self.split * self.sharers])
        active = min(blocks, most)
        columns = -(-in_features // _COLUMNS)
        steps = -(-blocks // most) * -(-columns // self.split)
        multiply = (0.21 + 0.001 * self.rows) * max(1, active / num_sms)
        from_l2 = active * (_OUTPUTS / self.sharers + self.rows) * _ROW_BYTES / 6.6e6
        latency = 1.8 / self.stages
        from_memory = 2 * out_features * in_features / 4.3e6
        sums = 0.046 * self.rows * (self.split - 1) / self.split
        return max(steps * max(multiply, from_l2, latency), from_memory) + sums, steps


@functools.cache
def plan(num_rows: int, out_features: int, in_features: int, num_sms: int, max_shared_memory: int) -> tuple[Plan, int]:
    """The plan of least cost, and its steps."""
    tiles = [rows for rows in ROW_TILES if rows >= num_rows][:1] if num_rows <= FEW_ROWS else (64, 96, 128)
    plans = [
        Plan.of(rows, split, sharers, in_features, memory)
        for rows in tiles
        for split in (1, 2, 4, 8)
        for sharers in (2, 1)  # of equals the first: one that reads less
        for memory in (max_shared_memory, _SM_SHARED_MEMORY // 2 - _STATIC_SHARED_MEMORY)
        if (sharers == 1 or rows * sharers < 2 * num_rows)
        if (split == 1 or split * _COLUMNS <= in_features)
        if split * sharers <= 8
    ]
    # A ring of one stage cannot be refilled.
    plans = [plan for plan in plans if plan.stages > 1 or in_features <= plan.split * _COLUMNS]
    costs = [plan.cost(num_rows, out_features, in_features, num_sms) for plan in plans]
    best = costs.index(min(costs, key=lambda cost: cost[0]))
    return plans[best], costs[best][1]


@functools.cache
def _kernel(name: str, dtype: np.dtype, rows: int) -> Kernel:
    return Kernel("gemm_sm90.cu", f"{name}<{type_name(dtype)}, {rows}>", pdl=True)


def instances(dtypes: Iterable[np.dtype]) -> list[Kernel]:
    """Every kernel that this module launches for these data types."""
    names = "gemm_sm90", "gemm_swiglu_sm90"
    types = [dtype for dtype in map(np.dtype, dtypes) if dtype.itemsize == 2]
    return [_kernel(name, dtype, rows) for name in names for dtype in types for rows in ROW_TILES]


@functools.lru_cache(maxsize=4096)
def _weight_map(address: int, rows: int, columns: int, sharers: int) -> TensorMap:
    return TensorMap.of_matrix(address, rows, columns, min(_HALF_OUTPUTS, _OUTPUTS // sharers))


def plan_for(
    num_rows: int, out_features: int, in_features: int, info: DeviceInfo, most_steps: int = MOST_STEPS
) -> Plan | None:
    """How to multiply 16-bit operands of these sizes, which lie at multiples of 16 bytes; None: not by this kernel."""
    if info.compute_capability != HOPPER or not 0 < num_rows <= MAX_ROWS or in_features % 8 or out_features % 8:
        return None
    cut, steps = plan(num_rows, out_features, in_features, info.num_sms, info.max_shared_memory)
    return cut if num_rows <= FEW_ROWS or steps <= most_steps else None


@dataclass(frozen=True)
class AddedResidual:
    """A residual stream t [T, H] that the product in front of a norm has added up. With it comes t * norm_weight.

    squares: [T, ceil(H / 128)] float32, the sums of squares of each 128 elements of a row.
    """

    total: Array
    squares: Array

    @classmethod
    def empty_like(cls, total: Array) -> AddedResidual:
        return cls(cupy.empty_like(total), cupy.empty((len(total), -(-total.shape[1] // _OUTPUTS)), np.float32))


def gemm(
    x: Array,
    weight: Array,
    bias: Array | None,
    info: DeviceInfo,
    swiglu: bool = False,
    fused: bool = False,
    squares: Array | None = None,
    eps: float = 0.0,
) -> Array | None:
    """x [T, in] weight [out, in]^T + bias in x's data type; with `swiglu`, silu(first half of it) times the second.

    fused: it saves the next kernel some time, as attention, which gains from starting before this one has ended.
    squares: those of an `AddedResidual` t, where x is t * norm_weight: the product is that of t's RMSNorm with `eps`.
    None where the kernel does not serve: other types and GPUs, many rows, rows that are not whole vectors.
    """
    cut = _cut(x, weight, bias, info, MOST_STEPS_FUSED if swiglu or fused else MOST_STEPS, 16 if swiglu else 8)
    if cut is None:
        return None
    y = cupy.empty((len(x), len(weight) // 2 if swiglu else len(weight)), x.dtype)
    added = () if swiglu else (None,) * 4
    _launch("gemm_swiglu_sm90" if swiglu else "gemm_sm90", cut, y, x, weight, (bias, squares, np.float32(eps), *added))
    return y


def gemm_add(
    x: Array, weight: Array, bias: Array | None, residual: Array, norm_weight: Array, info: DeviceInfo
) -> tuple[Array, AddedResidual] | None:
    """(t * norm_weight, t) with t = x weight^T + bias + residual, where the RMSNorm of t is what is wanted.

    Only for bfloat16: without the norm's factor, the product might be beyond float16's range.
    """
    cut = _cut(x, weight, bias, info, MOST_STEPS_ADDING, 8)
    if cut is None or type_name(x.dtype) != "bf16" or (residual.data.ptr | norm_weight.data.ptr) % 16:
        return None
    y, added = cupy.empty_like(residual), AddedResidual.empty_like(residual)
    adds = residual, added.total, norm_weight, added.squares
    _launch("gemm_sm90", cut, y, x, weight, (bias, None, np.float32(0), *adds))
    return y, added


def _cut(
    x: Array, weight: Array, bias: Array | None, info: DeviceInfo, most_steps: int, output_multiple: int
) -> Plan | None:
    addresses = x.data.ptr | weight.data.ptr | (0 if bias is None else bias.data.ptr)
    if x.itemsize != 2 or addresses % 16 or len(weight) % output_multiple:
        return None
    return plan_for(len(x), *weight.shape, info, most_steps)


def _launch(name: str, cut: Plan, y: Array, x: Array, weight: Array, more: tuple) -> None:
    num_rows, num_outputs = y.shape
    tiles = -(-num_outputs // (_HALF_OUTPUTS if name == "gemm_swiglu_sm90" else _OUTPUTS))
    maps = TensorMap.of_matrix(x.data.ptr, *x.shape, cut.rows), _weight_map(weight.data.ptr, *weight.shape, cut.sharers)
    _kernel(name, x.dtype, cut.rows)(
        (tiles * cut.split, -(-num_rows // (cut.rows * cut.sharers)) * cut.sharers),
        (_THREADS,),
        (y, *maps, *more, *map(np.int32, (num_rows, *weight.shape, cut.stages))),
        cut.shared_memory,
        cluster=(cut.split, cut.sharers),
    )
