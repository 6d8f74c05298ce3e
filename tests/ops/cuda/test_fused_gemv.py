"""Projections fused with norm and SwiGLU, on the GPU against NumPy in float64.

A normed value is rounded to its type before the product. Where float32 errors may tip that rounding, either value is
right, and the bound grows by their difference times the weight; everywhere else the bound is that of test_gemm.py.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

cupy = pytest.importorskip("cupy")

from mini_vllm.ops.cuda import fused_gemv  # noqa: E402
from mini_vllm.ops.cuda.cuda_ops import CudaOps  # noqa: E402
from mini_vllm.ops.cuda.device import DeviceInfo, GPUAllocator  # noqa: E402
from mini_vllm.ops.cuda.fused_gemv import Norm  # noqa: E402
from mini_vllm.ops.cuda.kernel import DTYPES  # noqa: E402
from mini_vllm.ops.numpy_ops import NumpyOps  # noqa: E402
from mini_vllm.ops.weight import DenseWeight  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned_memory")
EPS32 = 2.0**-23
EPS = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
FLOAT32, FLOAT16, BFLOAT16 = np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
NORM_EPS = 1e-6


@pytest.fixture(params=[FLOAT16, BFLOAT16], ids=str)
def dtype16(request):
    return request.param


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


@pytest.fixture(scope="module")
def info():
    return DeviceInfo.of()


@pytest.fixture
def eight_rows(monkeypatch):
    """What the kernel can do, and not only what it is used for."""
    monkeypatch.setattr(fused_gemv, "MAX_ROWS", 8)


def random(shape, dtype, seed, scale=1.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape, np.float32) * np.float32(scale)).astype(dtype)


class Case:
    """Inputs on both sides, and what comes out within which bound."""

    def __init__(self, rows, out_features, in_features, dtype, *, residual=True, bias=False, seed=0):
        self.dtype = np.dtype(dtype)
        self.x = random((rows, in_features), dtype, seed + 1)
        self.residual = random((rows, in_features), dtype, seed + 2, scale=3) if residual else None
        self.norm_weight = random(in_features, dtype, seed + 3)
        self.weight = random((out_features, in_features), dtype, seed + 4, scale=in_features**-0.5)
        self.bias = random(out_features, dtype, seed + 5) if bias else None

    def on_device(self):
        """(x, residual, norm weight, weight)"""
        arrays = (None if a is None else cupy.asarray(a) for a in (self.x, self.residual, self.norm_weight))
        bias = None if self.bias is None else cupy.asarray(self.bias)
        return *arrays, DenseWeight(cupy.asarray(self.weight), bias)

    def total(self) -> np.ndarray:
        if self.residual is None:
            return self.x
        return (self.x.astype(np.float32) + self.residual.astype(np.float32)).astype(self.dtype)

    def normed(self) -> tuple[np.ndarray, np.ndarray]:
        """The normed rows, and how far each element may be off because its rounding is a close call."""
        total = self.total().astype(np.float64)
        exact = total / np.sqrt((total**2).mean(-1, keepdims=True) + NORM_EPS) * self.norm_weight.astype(np.float64)
        # Sums of squares do not cancel: 40 eps cover them, the square root and two products.
        low, high = ((exact * (1 + sign * 40 * EPS32)).astype(self.dtype).astype(np.float64) for sign in (-1, 1))
        return exact.astype(self.dtype).astype(np.float64), np.abs(high - low)

    def product(self, norm: bool, out_dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        """The exact product and the bound of its error."""
        x, slack = self.normed() if norm else (self.x.astype(np.float64), 0 * self.x.astype(np.float64))
        weight = self.weight.astype(np.float64).T
        expected, magnitude = x @ weight, np.abs(x) @ np.abs(weight)
        if self.bias is not None:
            expected, magnitude = expected + self.bias, magnitude + np.abs(self.bias.astype(np.float64))
        bound = (len(weight) + 1) * EPS32 * magnitude + slack @ np.abs(weight)
        return expected, bound + EPS[out_dtype.name] * np.abs(expected) + 2.0**-24

    def swiglu(self) -> tuple[np.ndarray, np.ndarray]:
        """silu(gate) up of the normed product, and the bound: that of gate and up carried over."""
        product, bound = self.product(True, self.dtype)
        (gate, up), (gate_off, up_off) = np.split(product, 2, axis=1), np.split(bound, 2, axis=1)
        sigmoid = 1 / (1 + np.exp(-gate))
        silu, expected = gate * sigmoid, gate * sigmoid * up
        bound = 1.1 * gate_off * (np.abs(up) + up_off) + np.abs(silu) * up_off  # |silu'| < 1.1
        return expected, bound + (EPS[self.dtype.name] + 8 * EPS32) * np.abs(expected) + 2.0**-24


def assert_within(actual, expected, bound):
    actual = cupy.asnumpy(actual).astype(np.float64)
    assert actual.shape == expected.shape
    worst = np.max(np.abs(actual - expected) / bound)  # NaN stays NaN, and fails
    assert worst <= 1, f"error is {worst:.2f} of the bound"


SHAPES = [
    *[(out, k) for out in (1, 17, 129) for k in (8, 24, 136)],
    *[(111, 504), (500, 1000), (1000, 112), (8, 64), (2056, 520), (2560, 2560)],  # tiles of 8 and of 16 outputs
    *[(1024, 2048), (1024, 3072), (4096, 1024), (2120, 4096), (520, 12288), (8200, 1032), (40000, 64)],
]


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8])
@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_product(dtype16, info, eight_rows, rows, out_features, in_features):
    for bias in (False, True):
        case = Case(rows, out_features, in_features, dtype16, bias=bias)
        x, _, _, weight = case.on_device()
        for out_dtype in (dtype16, FLOAT32):
            result = fused_gemv.fused_gemv(x, weight.weight, weight.bias, out_dtype, info)
            if result is None:  # x does not fit into shared memory
                assert rows * in_features > 48_000
                continue
            assert result[0].dtype == out_dtype
            assert_within(result[0], *case.product(False, out_dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("out_features", "in_features"), [s for s in SHAPES if s[1] <= 4096])
def test_norm_in_front(dtype16, info, eight_rows, rows, residual, out_features, in_features):
    for bias in (False, True):
        case = Case(rows, out_features, in_features, dtype16, residual=residual, bias=bias)
        x, residual_, norm_weight, weight = case.on_device()
        norm = Norm(norm_weight, NORM_EPS, residual_)
        y, total = fused_gemv.fused_gemv(x, weight.weight, weight.bias, x.dtype, info, norm)
        assert cupy.asnumpy(total).tobytes() == case.total().tobytes()  # one addition, rounded the same way
        assert_within(y, *case.product(True, case.dtype))
        assert cupy.asnumpy(x).tobytes() == case.x.tobytes()  # other blocks may still read it


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize(
    ("intermediate_size", "in_features"), [(1, 8), (7, 64), (111, 504), (3072, 1024), (6001, 2560)]
)
def test_norm_and_swiglu(dtype16, info, eight_rows, rows, intermediate_size, in_features):
    for bias in (False, True):
        case = Case(rows, 2 * intermediate_size, in_features, dtype16, residual=rows % 2 == 0, bias=bias)
        x, residual, norm_weight, weight = case.on_device()
        norm = Norm(norm_weight, NORM_EPS, residual)
        y, total = fused_gemv.fused_gemv(x, weight.weight, weight.bias, x.dtype, info, norm, swiglu=True)
        assert cupy.asnumpy(total).tobytes() == case.total().tobytes()
        assert_within(y, *case.swiglu())


@pytest.mark.gpu
@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize("stages", [0, 1])
def test_rings(dtype16, info, halves, stages, monkeypatch):
    """Both depths of the ring, on products that go around it."""
    monkeypatch.setattr(fused_gemv, "RINGS", {halves: fused_gemv.RINGS[halves][stages:] for halves in (1, 2)})
    fused_gemv.plan.cache_clear()
    case = Case(2, 1024 if halves == 1 else 40000, 12288 if halves == 1 else 256, dtype16)
    x, _, _, weight = case.on_device()
    y, _ = fused_gemv.fused_gemv(x, weight.weight, None, x.dtype, info)
    fused_gemv.plan.cache_clear()
    assert_within(y, *case.product(False, case.dtype))


@pytest.mark.gpu
def test_what_does_not_serve(info):
    def attempt(rows=2, in_features=64, dtype=BFLOAT16, offset=0, norm_offset=None):
        x = cupy.zeros(rows * in_features + 8, dtype)[offset : rows * in_features + offset].reshape(rows, in_features)
        norm = None
        if norm_offset is not None:
            weight = cupy.ones(in_features + 8, dtype)[norm_offset : in_features + norm_offset]
            norm = Norm(weight, NORM_EPS, None)
        return fused_gemv.fused_gemv(x, cupy.zeros((16, in_features), dtype), None, x.dtype, info, norm)

    assert attempt() is not None
    assert attempt(offset=8) is not None
    assert attempt(norm_offset=0) is not None
    assert attempt(rows=5) is attempt(rows=0) is attempt(in_features=60) is attempt(dtype=FLOAT32) is None
    assert attempt(offset=1) is attempt(norm_offset=4) is attempt(rows=4, in_features=1 << 16) is None


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [*range(17), 40])
@pytest.mark.parametrize("residual", [False, True])
def test_ops_of_any_number_of_rows(dtype, rows, residual):
    """Fused or not, the ops are the compositions that NumpyOps defines."""
    ops, reference = CudaOps(dtype), NumpyOps(dtype)
    case = Case(max(rows, 1), 208, 96, dtype, residual=residual, bias=True)
    case.x, case.residual = case.x[:rows], case.residual[:rows] if residual else None
    x, residual_, norm_weight, weight = case.on_device()

    copies = [None if array is None else array.copy() for array in (x, residual_)]  # the op may write over them
    y, total = ops.add_norm_linear(*copies, norm_weight, NORM_EPS, weight)
    host_weight = DenseWeight(case.weight, case.bias)
    expected, expected_total = reference.add_norm_linear(case.x, case.residual, case.norm_weight, NORM_EPS, host_weight)
    assert cupy.asnumpy(total).tobytes() == expected_total.tobytes()
    assert y.dtype == expected.dtype
    if rows == 0:
        assert y.shape == expected.shape
        return
    assert_within(y, *case.product(True, case.dtype))

    y, total = ops.add_norm_swiglu(x, residual_, norm_weight, NORM_EPS, weight)
    assert cupy.asnumpy(total).tobytes() == expected_total.tobytes()
    assert_within(y, *case.swiglu())


@pytest.mark.gpu
def test_a_row_does_not_depend_on_its_neighbours(dtype16, info, eight_rows):
    case = Case(8, 1000, 512, dtype16)
    x, residual, norm_weight, weight = case.on_device()
    full, _ = fused_gemv.fused_gemv(x, weight.weight, None, x.dtype, info, Norm(norm_weight, NORM_EPS, residual))
    case.x[:3], case.x[4:] = np.nan, np.inf
    x = cupy.asarray(case.x)
    y, _ = fused_gemv.fused_gemv(x, weight.weight, None, x.dtype, info, Norm(norm_weight, NORM_EPS, residual))
    assert cupy.asnumpy(y[3]).tobytes() == cupy.asnumpy(full[3]).tobytes()


def chain(ops, x, residual, norm_weight, wide, down, length):
    """Each op reads what the one before wrote, and starts before that one has ended."""
    for _ in range(length):
        gated, residual = ops.add_norm_swiglu(x, residual, norm_weight, NORM_EPS, wide)
        x = ops.linear(gated, down)
        y, residual = ops.add_norm_linear(x, residual, norm_weight, NORM_EPS, wide)
        x = ops.linear(y, DenseWeight(wide.weight.reshape(len(down.weight), -1)))
    return x, residual


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 4])
def test_early_launches_wait_for_their_predecessors(dtype16, rows, monkeypatch, times):
    ops = CudaOps(dtype16)
    case = Case(rows, 6144, 1024, dtype16)
    x, residual, norm_weight, wide = case.on_device()
    down = DenseWeight(cupy.asarray(random((1024, 3072), dtype16, 9, scale=3072**-0.5)))
    results = []
    for synchronise in (True, False):
        with monkeypatch.context() as patch:
            if synchronise:
                launch = type(fused_gemv.instances([dtype16])[0]).__call__

                def launch_and_wait(kernel, *args, **kwargs):
                    launch(kernel, *args, **kwargs)  # noqa: B023
                    cupy.cuda.get_current_stream().synchronize()

                patch.setattr("mini_vllm.ops.cuda.kernel.Kernel.__call__", launch_and_wait)
            outputs = chain(ops, x, residual, norm_weight, wide, down, times(30))
            results.append(b"".join(a.tobytes() for a in outputs))
    assert results[0] == results[1]


@pytest.mark.gpu
def test_capture_replays_on_new_inputs(dtype16):
    ops = CudaOps(dtype16)
    cases = [Case(3, 208, 96, dtype16, seed=seed) for seed in (0, 10, 20)]
    for case in cases:
        case.weight, case.norm_weight = cases[0].weight, cases[0].norm_weight
    x, residual, norm_weight, weight = cases[0].on_device()
    ops.add_norm_swiglu(x, residual, norm_weight, NORM_EPS, weight)  # compiled and loaded before the capture
    stream, allocator = cupy.cuda.Stream(non_blocking=True), GPUAllocator()
    cupy.cuda.get_current_stream().synchronize()
    with stream, allocator.use():
        stream.begin_capture()
        y, total = ops.add_norm_swiglu(x, residual, norm_weight, NORM_EPS, weight)
        graph = stream.end_capture()
        for case in cases[1:]:
            x.set(case.x, stream)
            residual.set(case.residual, stream)
            y.view(np.uint8).fill(0xFF)
            graph.launch(stream)
            stream.synchronize()
            assert_within(y, *case.swiglu())
            assert cupy.asnumpy(total).tobytes() == case.total().tobytes()


@pytest.mark.gpu
def test_operands_that_do_not_fit_are_refused():
    ops = CudaOps(BFLOAT16)
    x, weight = cupy.zeros((2, 64), BFLOAT16), DenseWeight(cupy.zeros((16, 64), BFLOAT16))
    ones = cupy.ones(64, BFLOAT16)
    with pytest.raises(ValueError, match=r"norm weight \(63,\) and residual None do not fit x \(2, 64\)"):
        ops.add_norm_linear(x, None, ones[:63], NORM_EPS, weight)
    with pytest.raises(ValueError, match=r"residual \(1, 64\) do not fit"):
        ops.add_norm_linear(x, x[:1], ones, NORM_EPS, weight)
    with pytest.raises(ValueError, match="linear needs contiguous x"):
        ops.add_norm_swiglu(x, None, ones, NORM_EPS, DenseWeight(cupy.zeros((16, 32), BFLOAT16)))
    with pytest.raises(ValueError, match=r"swiglu needs an even number of outputs, gate and up, got 15"):
        ops.add_norm_swiglu(x, None, ones, NORM_EPS, DenseWeight(cupy.zeros((15, 64), BFLOAT16)))


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("num_sms", [1, 46, 132, 148])
def test_plans_cover_all_outputs_with_busy_blocks(norm, swiglu, num_sms):
    for out_features in (2, 16, 34, 1024, 2560, 4096, 6144, 24576, 151936):
        cut = fused_gemv.plan(1, out_features, 1024, norm, swiglu, num_sms, 227 << 10)
        tile = 8 if swiglu else 8 * cut.halves
        tiles = -(-(out_features // 2 if swiglu else out_features) // tile)
        assert cut.blocks <= num_sms
        assert (cut.blocks - 1) * cut.tiles_per_block < tiles <= cut.blocks * cut.tiles_per_block
        assert cut.shared_memory <= 226 << 10


def test_plans_fit_into_shared_memory():
    assert fused_gemv.plan(1, 4096, 12288, False, False, 132, 227 << 10).stages == 5
    assert fused_gemv.plan(4, 4096, 12288, False, False, 132, 227 << 10).stages == 3
    assert fused_gemv.plan(8, 4096, 12288, False, False, 132, 227 << 10) is None
    assert fused_gemv.plan(1, 24576, 4096, True, True, 82, 99 << 10) is None  # compute capability 8.6


def test_plans_use_known_kernels():
    names = {kernel.name for kernel in fused_gemv.instances([BFLOAT16])}
    assert len(names) == len(fused_gemv.instances([BFLOAT16]))
    for norm, swiglu in ((False, False), (True, False), (True, True)):
        for out_features in (16, 1024, 4096, 151936):
            cut = fused_gemv.plan(1, out_features, 1024, norm, swiglu, 132, 227 << 10)
            assert fused_gemv._kernel(BFLOAT16, BFLOAT16, cut.halves, cut.stages, norm, swiglu).name in names
    assert fused_gemv.instances([FLOAT32]) == []
