"""Dense products y = x W^T + b: own kernels (fused_gemv.cu, gemv.cu, gemm_sm90.cu) for few rows, cuBLASLt for many.

With few rows the time is that of reading the weight once; our kernels do so at nearly the memory's bandwidth. cuBLASLt
is called through ctypes because CuPy refuses its own cuBLAS calls while a graph is captured.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import cupy
import numpy as np

from mini_vllm.ops.base import Array
from mini_vllm.ops.cuda import fused_gemv, gemm_sm90
from mini_vllm.ops.cuda.cublaslt import VECTOR_BYTES, CublasLt
from mini_vllm.ops.cuda.device import DeviceInfo
from mini_vllm.ops.cuda.fused_gemv import Norm
from mini_vllm.ops.cuda.gemm_sm90 import AddedResidual
from mini_vllm.ops.cuda.kernel import DTYPES, Kernel, type_name
from mini_vllm.ops.weight import DenseWeight

WARP = 32


# ---- few rows -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GemvTile:
    """What a block of gemv_mma does: 8 tiles outputs, by `warps` warps that load `unroll` steps ahead."""

    tiles: int
    warps: int
    unroll: int


FEW_OUTPUTS = GemvTile(1, 16, 4)
LONG_ROWS = GemvTile(2, 16, 2)
SHORT_ROWS = GemvTile(2, 8, 4)
MANY_OUTPUTS = GemvTile(1, 8, 2)
GEMV_TILES = (FEW_OUTPUTS, LONG_ROWS, SHORT_ROWS, MANY_OUTPUTS)

MAX_GEMV_ROWS = 16  # of gemv_mma
MAX_ADDING_WEIGHT = 8 << 20
"""Elements of a weight up to which a product adds the residual and begins the norm; gemm_sm90.cu's card says why."""
_GEMV_THREADS = 256


def gemv_tile(num_rows: int, out_features: int, in_features: int) -> GemvTile:
    """The tile for a product of 16-bit types; gemv.cu's card has the measurements."""
    if out_features <= 2048:
        return FEW_OUTPUTS
    if in_features > 2048:
        if out_features <= 4096:
            return LONG_ROWS
        return MANY_OUTPUTS if out_features <= 16384 else FEW_OUTPUTS
    return SHORT_ROWS if out_features <= 4096 or num_rows > 8 else MANY_OUTPUTS


def prefers_gemv(num_rows: int, out_features: int, in_features: int, dtype: np.dtype) -> bool:
    """Whether gemv.cu is faster than cuBLASLt; its card has the measurements."""
    small = out_features <= 16384 and min(out_features, in_features) <= 2048
    return num_rows <= 8 or (dtype != np.float32 and num_rows <= MAX_GEMV_ROWS and small)


@functools.cache
def _kernel(name: str, *arguments: object) -> Kernel:
    return Kernel("gemv.cu", f"{name}<{', '.join(map(str, arguments))}>", pdl=True)


def _mma_kernel(dtype: np.dtype, out_dtype: np.dtype, tile: GemvTile, wide: bool) -> Kernel:
    types = type_name(dtype), type_name(out_dtype)
    return _kernel("gemv_mma", *types, tile.tiles, tile.warps, tile.unroll, str(wide).lower())


def breaks_with_bias(x: Array, weight: Array, out_dtype: np.dtype) -> bool:
    """Whether cuBLASLt cannot be trusted with a bias.

    It refuses one where the result has another type, and where operands do not lie at multiples of 16 bytes it rounds
    the product to 16 bits before it adds the bias.
    """
    unaligned = (x.data.ptr | weight.data.ptr | x.shape[1] * x.itemsize) % VECTOR_BYTES != 0
    return out_dtype != x.dtype or (x.itemsize == 2 and unaligned)


def _plain_kernel(dtype: np.dtype, out_dtype: np.dtype, rows: int, vector: bool) -> Kernel:
    return _kernel(
        "gemv", type_name(dtype), type_name(out_dtype), rows, VECTOR_BYTES // dtype.itemsize if vector else 1
    )


def instances(dtypes: Iterable[np.dtype] = DTYPES) -> list[Kernel]:
    """Every kernel that this module launches for these data types."""
    kernels, dtypes = [], [np.dtype(dtype) for dtype in dtypes]
    for dtype in dtypes:
        for out_dtype in dict.fromkeys((dtype, np.dtype(np.float32))):
            kernels += [_plain_kernel(dtype, out_dtype, rows, False) for rows in (1, 8)]
            if dtype == np.float32:
                kernels += [_plain_kernel(dtype, out_dtype, rows, True) for rows in (1, 2, 4, 8)]
            else:
                kernels += [_mma_kernel(dtype, out_dtype, tile, wide) for tile in GEMV_TILES for wide in (False, True)]
    return [*kernels, *fused_gemv.instances(dtypes), *gemm_sm90.instances(dtypes)]


def gemv(y: Array, x: Array, weight: Array, bias: Array | None) -> None:
    """Write x W^T + b into y by gemv.cu, for any number of rows; the weight is read once for 16 or 8 of them."""
    (rows, out_features), in_features = y.shape, x.shape[1]
    aligned = in_features * x.itemsize % VECTOR_BYTES == 0 and (x.data.ptr | weight.data.ptr) % VECTOR_BYTES == 0
    sizes = np.int32(out_features), np.int32(in_features)
    if x.dtype == np.float32 or not aligned:
        together = next(n for n in ((1, 2, 4, 8) if aligned else (1, 8)) if n >= min(rows, 8))
        _plain_kernel(x.dtype, y.dtype, together, aligned)(
            (-(-out_features * WARP // _GEMV_THREADS), -(-rows // together)),
            (_GEMV_THREADS,),
            (y, x, weight, bias, np.int32(rows), *sizes),
        )
        return
    for start in range(0, rows, MAX_GEMV_ROWS):
        part = slice(start, min(start + MAX_GEMV_ROWS, rows))
        num_rows = part.stop - start
        tile = gemv_tile(num_rows, out_features, in_features)
        _mma_kernel(x.dtype, y.dtype, tile, num_rows > 8)(
            (-(-out_features // (8 * tile.tiles)),),
            (tile.warps * WARP,),
            (y[part], x[part], weight, bias, np.int32(num_rows), *sizes),
        )


# ---- any number of rows -------------------------------------------------------------------------------------------


class Gemm:
    """`Ops.linear` and `Ops.logits` for dense weights. For one thread, and one stream at a time.

    Args:
        info: the GPU; by default the current one.

    Raises:
        CudaUnavailable: cuBLAS is not installed.
    """

    def __init__(self, info: DeviceInfo | None = None) -> None:
        self._info = info or DeviceInfo.of()
        self._lt = CublasLt(self._info)

    def linear(self, x: Array, weight: DenseWeight, fused: bool = False) -> Array:
        """x [T, in] W^T + b in x's data type: [T, out]. fused: see `gemm_sm90.gemm`.

        Raises:
            ValueError: shapes or data types that do not belong together.
            CublasError, LaunchError: what the library or the driver says.
        """
        return self._multiply(x, weight, x.dtype, fused)

    def logits(self, x: Array, weight: DenseWeight) -> Array:
        """`linear` with a float32 result."""
        return self._multiply(x, weight, np.dtype(np.float32))

    def norm_linear(
        self, x: Array, norm: Norm, weight: DenseWeight, swiglu: bool = False
    ) -> tuple[Array, Array] | None:
        """`Ops.add_norm_linear`, or with `swiglu` `Ops.add_norm_swiglu`, in one launch; None where that cannot be."""
        _check_operands(x, weight.weight, weight.bias)
        _check_norm(x, norm)
        return fused_gemv.fused_gemv(x, weight.weight, weight.bias, x.dtype, self._info, norm, swiglu)

    def swiglu(self, x: Array, gate_up: DenseWeight) -> Array | None:
        """`Ops.silu_and_mul` of `linear(x, gate_up)` in one launch; None where that cannot be."""
        _check_operands(x, gate_up.weight, gate_up.bias)
        return gemm_sm90.gemm(x, gate_up.weight, gate_up.bias, self._info, swiglu=True)

    def linear_add(
        self, x: Array, weight: DenseWeight, residual: Array, norm_weight: Array
    ) -> tuple[Array, AddedResidual] | None:
        """`Ops.linear_before_norm` with the sum made and the norm begun; None where that cannot be, or does not pay."""
        w, bias = weight.weight, weight.bias
        _check_operands(x, w, bias)
        if residual.shape != (len(x), len(w)) or residual.dtype != x.dtype:
            raise ValueError(f"residual {residual.dtype}{residual.shape} does not fit x {x.shape}, weight {w.shape}")
        if norm_weight.shape != w.shape[:1] or norm_weight.dtype != x.dtype:
            raise ValueError(f"norm weight {norm_weight.dtype}{norm_weight.shape} does not fit weight {w.shape}")
        # With fewer rows the product behind does all of the norm; beside large weights, one of its own costs nothing.
        if len(x) <= fused_gemv.MAX_ROWS or w.size > MAX_ADDING_WEIGHT:
            return None
        return gemm_sm90.gemm_add(x, w, bias, residual, norm_weight, self._info)

    def scaled(
        self, x: Array, residual: AddedResidual, eps: float, weight: DenseWeight, swiglu: bool = False
    ) -> Array | None:
        """`linear` or `swiglu` of the norm that `linear_add` has begun; None where that cannot be."""
        w, bias = weight.weight, weight.bias
        _check_operands(x, w, bias)
        return gemm_sm90.gemm(x, w, bias, self._info, swiglu, fused=True, squares=residual.squares, eps=eps)

    def _multiply(self, x: Array, weight: DenseWeight, out_dtype: np.dtype, fused: bool = False) -> Array:
        w, bias = weight.weight, weight.bias
        _check_operands(x, w, bias)
        if result := fused_gemv.fused_gemv(x, w, bias, out_dtype, self._info):
            return result[0]
        if out_dtype == x.dtype and (y := gemm_sm90.gemm(x, w, bias, self._info, fused=fused)) is not None:
            return y
        y = cupy.empty((len(x), len(w)), out_dtype)
        if y.size == 0:
            return y
        own = prefers_gemv(*y.shape, x.shape[1], x.dtype) or (bias is not None and breaks_with_bias(x, w, out_dtype))
        if own or not self._lt.matmul(y, x, w, bias):
            gemv(y, x, w, bias)
        return y

    def tune(self, rows: Iterable[int], weights: Iterable[DenseWeight], head: DenseWeight) -> None:
        """Measure which of cuBLASLt's algorithms is fastest for these numbers of rows, and remember it on disk.

        weights: those that `linear` multiplies with; head: the one of `logits`. Only for 16-bit types: in float32 it
        would be a choice between orders of summation, and results should not change with the machine's mood.
        """
        groups: dict[tuple, list[DenseWeight]] = {}
        for weight in weights:
            groups.setdefault((weight.weight.shape, weight.bias is not None), []).append(weight)
        products = [(group, group[0].weight.dtype) for group in groups.values()]
        for group, out_dtype in (*products, ([head], np.dtype(np.float32))):
            first = group[0].weight
            if first.itemsize != 2:
                continue
            for num_rows in rows:
                own = prefers_gemv(num_rows, *first.shape, first.dtype) or (
                    out_dtype == first.dtype and gemm_sm90.plan_for(num_rows, *first.shape, self._info) is not None
                )
                if num_rows > fused_gemv.MAX_ROWS and not own:
                    self._lt.tune(num_rows, [weight.weight for weight in group], group[0].bias, out_dtype)
        self._lt.save_tuning()


def _check_norm(x: Array, norm: Norm) -> None:
    if norm.weight.shape != x.shape[1:] or (norm.residual is not None and norm.residual.shape != x.shape):
        residual = None if norm.residual is None else norm.residual.shape
        raise ValueError(f"norm weight {norm.weight.shape} and residual {residual} do not fit x {x.shape}")


def _check_operands(x: Array, weight: Array, bias: Array | None) -> None:
    arrays = [x, weight] if bias is None else [x, weight, bias]
    fits = (
        x.ndim == weight.ndim == 2
        and x.shape[1] == weight.shape[1] > 0
        and (bias is None or bias.shape == weight.shape[:1])
        and all(array.dtype == x.dtype and array.flags.c_contiguous for array in arrays)
    )
    if not fits:
        given = ", ".join(f"{array.dtype}{list(array.shape)}" for array in arrays)
        raise ValueError(
            f"linear needs contiguous x [rows, in], weight [out, in] and bias [out] of one data type, got {given}"
        )
