"""Dense products y = x W^T + b: own kernels (gemv.cu) for few rows, cuBLASLt for many.

With few rows the time is that of reading the weight once; gemv.cu does so at nearly the memory's bandwidth. cuBLASLt
is called through ctypes because CuPy refuses its own cuBLAS calls while a graph is captured.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterable
from dataclasses import dataclass

import cupy
import ml_dtypes
import numpy as np

from mini_vllm.ops.base import Array
from mini_vllm.ops.cuda import CudaUnavailable, install_hint
from mini_vllm.ops.cuda.kernel import DTYPES, Kernel, type_name
from mini_vllm.ops.weight import DenseWeight

WORKSPACE_BYTES = 32 << 20  # what cuBLAS advises for Hopper

VECTOR_BYTES = 16
WARP = 32


class CublasError(RuntimeError):
    """A call that cuBLASLt refused; the message holds its status and the shapes."""


# ---- cuBLASLt ---------------------------------------------------------------------------------------------------
#
# The numbers below are those of cublasLt.h and library_types.h; CUDA 12 and 13 agree on them.

_CUDA_TYPES = {np.dtype(np.float32): 0, np.dtype(np.float16): 2, np.dtype(ml_dtypes.bfloat16): 14}
_COMPUTE_32F = 68  # true float32 products and sums: for float32 inputs it does not allow tf32
_DESC_TRANSA, _DESC_EPILOGUE, _DESC_BIAS_POINTER, _DESC_BIAS_DATA_TYPE = 3, 7, 8, 26
_OP_T, _EPILOGUE_BIAS = 1, 4
_PREF_MAX_WORKSPACE_BYTES, _PREF_REDUCTION_SCHEME_MASK, _PREF_MIN_ALIGNMENT = 1, 3, (5, 6, 7, 8)
_REDUCTION_IN_FLOAT = 2  # split-K sums in the compute type, not rounded to the output's
_STATUS_NOT_SUPPORTED = 15


class _Heuristic(ctypes.Structure):  # cublasLtMatmulHeuristicResult_t
    _fields_ = (
        ("algo", ctypes.c_uint64 * 8),
        ("workspace_size", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


@functools.cache
def _library() -> ctypes.CDLL:
    """libcublasLt. Raises CudaUnavailable where it is not installed."""
    from cuda.pathfinder import DynamicLibNotFoundError, load_nvidia_dynamic_lib

    try:
        library = ctypes.CDLL(load_nvidia_dynamic_lib("cublasLt").abs_path)
    except (DynamicLibNotFoundError, OSError) as error:
        raise CudaUnavailable(f"cuBLAS (libcublasLt) is not installed; {install_hint()}") from error
    library.cublasLtGetStatusName.restype = ctypes.c_char_p
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    library.cublasLtMatrixLayoutCreate.argtypes = (
        pointer,
        ctypes.c_int,
        ctypes.c_uint64,
        ctypes.c_uint64,
        ctypes.c_int64,
    )
    library.cublasLtMatmulDescSetAttribute.argtypes = (pointer, ctypes.c_int, pointer, size)
    library.cublasLtMatmulPreferenceSetAttribute.argtypes = (pointer, ctypes.c_int, pointer, size)
    library.cublasLtMatmulAlgoGetHeuristic.argtypes = (*(pointer,) * 7, ctypes.c_int, pointer, pointer)
    library.cublasLtMatmul.argtypes = (*(pointer,) * 14, size, pointer)
    return library


def _check(status: int, what: str) -> None:
    if status:
        raise CublasError(f"{_library().cublasLtGetStatusName(status).decode()} from cuBLASLt {what}")


@dataclass(frozen=True)
class _Problem:
    """What a plan depends on."""

    num_rows: int
    out_features: int
    in_features: int
    dtype: np.dtype
    out_dtype: np.dtype
    has_bias: bool
    alignment: int  # bytes, of all pointers

    def __str__(self) -> str:
        bias = " + bias" if self.has_bias else ""
        return (
            f"{self.dtype.name} x [{self.num_rows}, {self.in_features}] times weight "
            f"[{self.out_features}, {self.in_features}]{bias} to {self.out_dtype.name}"
        )


class _Plan:
    """Descriptors and algorithm of one problem."""

    def __init__(self, handle: ctypes.c_void_p, problem: _Problem) -> None:
        self._lt, self.problem = _library(), problem
        m, n, k = problem.num_rows, problem.out_features, problem.in_features
        what = f"for {problem}"
        # cuBLAS is column-major: our row-major y [m, n] is its D [n, m] = op_T(A [k, n]) B [k, m].
        self.operation = ctypes.c_void_p()
        _check(self._lt.cublasLtMatmulDescCreate(ctypes.byref(self.operation), _COMPUTE_32F, 0), what)
        self._set(_DESC_TRANSA, ctypes.c_int(_OP_T))
        if problem.has_bias:
            self._set(_DESC_EPILOGUE, ctypes.c_int(_EPILOGUE_BIAS))
            self._set(_DESC_BIAS_DATA_TYPE, ctypes.c_int(_CUDA_TYPES[problem.dtype]))
        self.a = self._layout(problem.dtype, k, n)
        self.b = self._layout(problem.dtype, k, m)
        self.d = self._layout(problem.out_dtype, n, m)

        preference = ctypes.c_void_p()
        _check(self._lt.cublasLtMatmulPreferenceCreate(ctypes.byref(preference)), what)
        wishes = {
            _PREF_MAX_WORKSPACE_BYTES: ctypes.c_uint64(WORKSPACE_BYTES),
            _PREF_REDUCTION_SCHEME_MASK: ctypes.c_uint32(_REDUCTION_IN_FLOAT),
            **{attribute: ctypes.c_uint32(problem.alignment) for attribute in _PREF_MIN_ALIGNMENT},
        }
        for attribute, value in wishes.items():
            size = ctypes.sizeof(value)
            _check(
                self._lt.cublasLtMatmulPreferenceSetAttribute(preference, attribute, ctypes.byref(value), size), what
            )
        result, found = _Heuristic(), ctypes.c_int()
        status = self._lt.cublasLtMatmulAlgoGetHeuristic(
            handle, self.operation, self.a, self.b, self.d, self.d, preference, 1, ctypes.byref(result),
            ctypes.byref(found),
        )  # fmt: skip
        self._lt.cublasLtMatmulPreferenceDestroy(preference)
        if status != _STATUS_NOT_SUPPORTED:
            _check(status, what)
        self.algorithm = result.algo if found.value and result.state == 0 else None

    def _set(self, attribute: int, value: ctypes.c_int | ctypes.c_void_p) -> None:
        status = self._lt.cublasLtMatmulDescSetAttribute(
            self.operation, attribute, ctypes.byref(value), ctypes.sizeof(value)
        )
        _check(status, f"for {self.problem}")

    def _layout(self, dtype: np.dtype, rows: int, columns: int) -> ctypes.c_void_p:
        layout = ctypes.c_void_p()
        status = self._lt.cublasLtMatrixLayoutCreate(ctypes.byref(layout), _CUDA_TYPES[dtype], rows, columns, rows)
        _check(status, f"for {self.problem}")
        return layout

    def set_bias(self, bias: Array) -> None:
        self._set(_DESC_BIAS_POINTER, ctypes.c_void_p(bias.data.ptr))


class CublasLt:
    """y = x W^T + b by cuBLASLt, planned once for each shape. For one thread, and one stream at a time."""

    def __init__(self) -> None:
        self._lt = _library()
        self._handle = ctypes.c_void_p()
        _check(self._lt.cublasLtCreate(ctypes.byref(self._handle)), "while it was created")
        self._workspace = cupy.cuda.alloc(WORKSPACE_BYTES)
        self._one, self._zero = ctypes.c_float(1), ctypes.c_float(0)
        self._plans: dict[_Problem, _Plan] = {}

    def matmul(self, y: Array, x: Array, weight: Array, bias: Array | None) -> bool:
        """Write the product into y; False if cuBLASLt has no algorithm for these sizes, and nothing was done."""
        pointers = [array.data.ptr for array in (y, x, weight, bias) if array is not None]
        alignment = functools.reduce(lambda a, b: a | b, pointers)
        problem = _Problem(
            *y.shape, x.shape[1], x.dtype, y.dtype, bias is not None, min(alignment & -alignment, VECTOR_BYTES)
        )
        plan = self._plans.get(problem)
        if plan is None:
            plan = self._plans[problem] = _Plan(self._handle, problem)
        if plan.algorithm is None:
            return False
        if bias is not None:
            plan.set_bias(bias)
        status = self._lt.cublasLtMatmul(
            self._handle, plan.operation, ctypes.byref(self._one), weight.data.ptr, plan.a, x.data.ptr, plan.b,
            ctypes.byref(self._zero), y.data.ptr, plan.d, y.data.ptr, plan.d, plan.algorithm,
            self._workspace.ptr, WORKSPACE_BYTES, cupy.cuda.get_current_stream().ptr,
        )  # fmt: skip
        _check(status, f"for {problem}")
        return True


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


def _plain_kernel(dtype: np.dtype, out_dtype: np.dtype, rows: int, vector: bool) -> Kernel:
    return _kernel(
        "gemv", type_name(dtype), type_name(out_dtype), rows, VECTOR_BYTES // dtype.itemsize if vector else 1
    )


def instances(dtypes: Iterable[np.dtype] = DTYPES) -> list[Kernel]:
    """Every kernel that this module launches for these data types."""
    kernels = []
    for dtype in map(np.dtype, dtypes):
        for out_dtype in dict.fromkeys((dtype, np.dtype(np.float32))):
            kernels += [_plain_kernel(dtype, out_dtype, rows, False) for rows in (1, 8)]
            if dtype == np.float32:
                kernels += [_plain_kernel(dtype, out_dtype, rows, True) for rows in (1, 2, 4, 8)]
            else:
                kernels += [_mma_kernel(dtype, out_dtype, tile, wide) for tile in GEMV_TILES for wide in (False, True)]
    return kernels


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

    Raises:
        CudaUnavailable: cuBLAS is not installed.
    """

    def __init__(self) -> None:
        self._lt = CublasLt()

    def linear(self, x: Array, weight: DenseWeight) -> Array:
        """x [T, in] W^T + b in x's data type: [T, out].

        Raises:
            ValueError: shapes or data types that do not belong together.
            CublasError, LaunchError: what the library or the driver says.
        """
        return self._multiply(x, weight, x.dtype)

    def logits(self, x: Array, weight: DenseWeight) -> Array:
        """`linear` with a float32 result."""
        return self._multiply(x, weight, np.dtype(np.float32))

    def _multiply(self, x: Array, weight: DenseWeight, out_dtype: np.dtype) -> Array:
        w, bias = weight.weight, weight.bias
        _check_operands(x, w, bias)
        y = cupy.empty((len(x), len(w)), out_dtype)
        if y.size and (prefers_gemv(*y.shape, x.shape[1], x.dtype) or not self._lt.matmul(y, x, w, bias)):
            gemv(y, x, w, bias)
        return y


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
