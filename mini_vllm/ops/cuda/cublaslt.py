"""cuBLASLt through ctypes: CuPy refuses its own cuBLAS calls while a graph is captured.

For each product the library proposes algorithms, the best first by its own estimate. `CublasLt.tune` measures them on
the weights in question instead, once for each shape and GPU; the choice is kept on disk beside the compiled kernels.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass

import cupy
import ml_dtypes
import numpy as np

from mini_vllm.ops.base import Array
from mini_vllm.ops.cuda import CudaUnavailable, install_hint
from mini_vllm.ops.cuda.cubin_cache import CubinCache
from mini_vllm.ops.cuda.device import DeviceInfo, GPUAllocator, GPUTimer
from mini_vllm.ops.cuda.graph import CapturedGraph

WORKSPACE_BYTES = 32 << 20  # what cuBLAS advises for Hopper
VECTOR_BYTES = 16


class CublasError(RuntimeError):
    """A call that cuBLASLt refused; the message holds its status and the shapes."""


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
    """Descriptors of one problem, the algorithms that the library proposes, and the one that is used."""

    def __init__(self, handle: ctypes.c_void_p, problem: _Problem, num_proposals: int = 1) -> None:
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
        results, found = (_Heuristic * num_proposals)(), ctypes.c_int()
        status = self._lt.cublasLtMatmulAlgoGetHeuristic(
            handle, self.operation, self.a, self.b, self.d, self.d, preference, num_proposals, results,
            ctypes.byref(found),
        )  # fmt: skip
        self._lt.cublasLtMatmulPreferenceDestroy(preference)
        if status != _STATUS_NOT_SUPPORTED:
            _check(status, what)
        self.proposals = [result.algo for result in results[: found.value] if result.state == 0]
        self.algorithm = self.proposals[0] if self.proposals else None

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

    def __init__(self, info: DeviceInfo) -> None:
        self._lt = _library()
        self._handle = ctypes.c_void_p()
        _check(self._lt.cublasLtCreate(ctypes.byref(self._handle)), "while it was created")
        self._workspace = cupy.cuda.alloc(WORKSPACE_BYTES)
        self._one, self._zero = ctypes.c_float(1), ctypes.c_float(0)
        self._plans: dict[_Problem, _Plan] = {}
        self._choices = _Choices(f"{self._lt.cublasLtGetVersion()} {info.name}")

    def matmul(self, y: Array, x: Array, weight: Array, bias: Array | None) -> bool:
        """Write the product into y; False if cuBLASLt has no algorithm for these sizes, and nothing was done."""
        problem = self._problem(len(x), weight, y.dtype, bias, x, y)
        plan = self._plans.get(problem)
        if plan is None:
            plan = self._plans[problem] = _Plan(self._handle, problem)
            plan.algorithm = self._choices.get(problem) or plan.algorithm
        if plan.algorithm is None:
            return False
        self._run(plan, plan.algorithm, y, x, weight, bias)
        return True

    def tune(self, num_rows: int, weights: Sequence[Array], bias: Array | None, out_dtype: np.dtype) -> None:
        """Choose the algorithm for x [num_rows, in] times weights of one shape by measuring them on all of these.

        They should be more than the GPU's L2 cache holds, as they are when a model runs. `bias` stands for theirs. Does
        nothing for a shape that was measured before, here or in an earlier process.
        """
        problem = self._problem(num_rows, weights[0], out_dtype, bias)  # x and y will be aligned
        if self._choices.get(problem) is not None:
            return
        out_features, in_features = weights[0].shape
        x = cupy.asarray(_RANDOM.standard_normal((num_rows, in_features), np.float32).astype(weights[0].dtype))
        y = cupy.empty((num_rows, out_features), out_dtype)
        plan = _Plan(self._handle, problem, NUM_PROPOSALS)

        def all_products(algorithm: ctypes.Array) -> Callable[[], None]:
            def run() -> None:
                for weight in weights:
                    self._run(plan, algorithm, y, x, weight, bias)

            return run

        if plan.proposals:
            times = _times([all_products(algorithm) for algorithm in plan.proposals])
            plan.algorithm = plan.proposals[times.index(min(times))]
            self._choices.put(problem, plan.algorithm)
        self._plans[problem] = plan

    def save_tuning(self) -> None:
        """Keep what was measured for later processes."""
        self._choices.save()

    @staticmethod
    def _problem(num_rows: int, weight: Array, out_dtype: np.dtype, bias: Array | None, *others: Array) -> _Problem:
        pointers = [array.data.ptr for array in (weight, bias, *others) if array is not None]
        alignment = functools.reduce(lambda a, b: a | b, pointers)
        return _Problem(
            num_rows,
            *weight.shape,
            weight.dtype,
            out_dtype,
            bias is not None,
            min(alignment & -alignment, VECTOR_BYTES),
        )

    def _run(self, plan: _Plan, algorithm: ctypes.Array, y: Array, x: Array, weight: Array, bias: Array | None) -> None:
        if bias is not None:
            plan.set_bias(bias)
        status = self._lt.cublasLtMatmul(
            self._handle, plan.operation, ctypes.byref(self._one), weight.data.ptr, plan.a, x.data.ptr, plan.b,
            ctypes.byref(self._zero), y.data.ptr, plan.d, y.data.ptr, plan.d, algorithm,
            self._workspace.ptr, WORKSPACE_BYTES, cupy.cuda.get_current_stream().ptr,
        )  # fmt: skip
        _check(status, f"for {plan.problem}")


# ---- tuning -------------------------------------------------------------------------------------------------------

NUM_PROPOSALS = 8
_REPLAYS = 5
_RANDOM = np.random.default_rng(0)


def _times(functions: Sequence[Callable[[], None]]) -> list[float]:
    """Milliseconds of what each function launches, replayed as a graph.

    In turns, not one after the other: large products bring the GPU to its power limit, and the later ones would be
    measured at a lower clock.
    """
    graphs = [CapturedGraph(function, GPUAllocator()) for function in functions]
    samples: list[list[float]] = [[] for _ in graphs]
    for _ in range(_REPLAYS):
        for graph, of_graph in zip(graphs, samples, strict=True):
            with GPUTimer() as timer:
                graph.replay()
            of_graph.append(timer.elapsed_ms())
    return [statistics.median(of_graph) for of_graph in samples]


class _Choices:
    """The algorithm chosen for each problem, in memory and as one entry of the kernel cache.

    The library's documentation allows an algorithm to be stored as it is, for the same version of the library.
    """

    def __init__(self, setting: str) -> None:
        self._key = f"cublaslt-{hashlib.sha256(setting.encode()).hexdigest()}"
        self._is_new = False
        entry = CubinCache().get(self._key)
        self._choices: dict[str, str] = {} if entry is None else json.loads(entry)

    def get(self, problem: _Problem) -> ctypes.Array | None:
        choice = self._choices.get(self._name(problem))
        return None if choice is None else (ctypes.c_uint64 * 8).from_buffer_copy(bytes.fromhex(choice))

    def put(self, problem: _Problem, algorithm: ctypes.Array) -> None:
        self._choices[self._name(problem)] = bytes(algorithm).hex()
        self._is_new = True

    def save(self) -> None:
        if self._is_new:
            CubinCache().put(self._key, json.dumps(self._choices).encode())
            self._is_new = False

    @staticmethod
    def _name(problem: _Problem) -> str:
        return " ".join(map(str, astuple(problem)))
