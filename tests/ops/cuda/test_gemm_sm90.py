"""The products of gemm_sm90.cu, on a Hopper GPU against NumPy: alone in float64, what is fused against what is not."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

cupy = pytest.importorskip("cupy")

from mini_vllm.ops.cuda import gemm_sm90  # noqa: E402
from mini_vllm.ops.cuda.cuda_ops import CudaOps  # noqa: E402
from mini_vllm.ops.cuda.device import DeviceInfo, GPUAllocator  # noqa: E402
from mini_vllm.ops.weight import DenseWeight  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned_memory")
FLOAT16, BFLOAT16 = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
EPS = {FLOAT16: 2.0**-10, BFLOAT16: 2.0**-7}
EPS32 = 2.0**-23
NORM_EPS = 1e-6


@pytest.fixture(params=[FLOAT16, BFLOAT16], ids=str)
def dtype(request):
    return request.param


@pytest.fixture(scope="module")
def info():
    info = DeviceInfo.of()
    if info.compute_capability != gemm_sm90.HOPPER:
        pytest.skip("needs a Hopper GPU")
    return info


def random(shape, dtype, seed, scale=1.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape, np.float32) * np.float32(scale)).astype(dtype)


class Case:
    """x, weight and bias on both sides, and the product with the bound of its error."""

    def __init__(self, rows, out_features, in_features, dtype, *, bias=False, seed=0):
        self.x = random((rows, in_features), dtype, seed + 1)
        self.weight = random((out_features, in_features), dtype, seed + 2, scale=in_features**-0.5)
        self.bias = random(out_features, dtype, seed + 3) if bias else None
        self.factors = np.ones((1, 1))  # [rows, 1], by which products are scaled

    def on_device(self):
        return [None if a is None else cupy.asarray(a) for a in (self.x, self.weight, self.bias)]

    def product(self) -> tuple[np.ndarray, np.ndarray]:
        x, weight = self.x.astype(np.float64), self.weight.astype(np.float64).T
        expected, magnitude = x @ weight * self.factors, np.abs(x) @ np.abs(weight) * self.factors
        if self.bias is not None:
            expected, magnitude = expected + self.bias, magnitude + np.abs(self.bias.astype(np.float64))
        bound = (len(weight) + 4) * EPS32 * magnitude
        return expected, bound + EPS[self.x.dtype] * np.abs(expected) + 2.0**-24

    def swiglu(self) -> tuple[np.ndarray, np.ndarray]:
        product, bound = self.product()
        (gate, up), (gate_off, up_off) = np.split(product, 2, axis=1), np.split(bound, 2, axis=1)
        silu = gate / (1 + np.exp(-gate))
        expected = silu * up
        bound = 1.1 * gate_off * (np.abs(up) + up_off) + np.abs(silu) * up_off  # |silu'| < 1.1
        return expected, bound + (EPS[self.x.dtype] + 8 * EPS32) * np.abs(expected) + 2.0**-24


def assert_within(actual, expected, bound):
    actual = cupy.asnumpy(actual).astype(np.float64)
    assert actual.shape == expected.shape
    worst = np.max(np.abs(actual - expected) / bound)  # NaN stays NaN, and fails
    assert worst <= 1, f"error is {worst:.2f} of the bound"


ROWS = [1, 5, 16, 17, 32, 33, 64, 65, 100, 128, 150, 256]
SHAPES = [
    *[(8, 8), (136, 64), (128, 72), (120, 1000), (1000, 520), (272, 4096)],  # tails of outputs and columns
    *[(1024, 2048), (1024, 3072), (4096, 1024), (2048, 8192)],
]


@pytest.mark.gpu
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_product(dtype, info, rows, shape, bias):
    case = Case(rows, *shape, dtype, bias=bias)
    assert_within(gemm_sm90.gemm(*case.on_device(), info, fused=True), *case.product())


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [33, 64])
@pytest.mark.parametrize("shape", [(6144, 4096), (4096, 12288), (24576, 4096)], ids=str)
def test_product_of_large_weights(info, rows, shape):
    case = Case(rows, *shape, BFLOAT16)
    assert_within(gemm_sm90.gemm(*case.on_device(), info), *case.product())


@pytest.mark.gpu
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", [(16, 8), (144, 64), (256, 72), (2000, 520), (6144, 1024), (1024, 4096)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_swiglu(dtype, info, rows, shape, bias):
    case = Case(rows, *shape, dtype, bias=bias)
    assert_within(gemm_sm90.gemm(*case.on_device(), info, swiglu=True), *case.swiglu())


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("split", "sharers"), [(1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (2, 2), (4, 2), (1, 4), (2, 4)], ids=str
)
@pytest.mark.parametrize("rows", gemm_sm90.ROW_TILES)
@pytest.mark.parametrize("stages", [2, 4])
def test_every_way_to_cut(info, monkeypatch, split, sharers, rows, stages):
    """Rings that are refilled, clusters of all shapes, steps that they do not share evenly, several tiles of rows."""
    if sharers > 1 and rows < gemm_sm90.FEW_ROWS:
        pytest.skip("smaller tiles are for batches that fit into one")
    cut = gemm_sm90.Plan.of(rows, split, sharers, 1600, info.max_shared_memory)
    monkeypatch.setattr(gemm_sm90, "plan", lambda *_: (replace(cut, stages=min(stages, cut.stages)), 1))
    case = Case(min(2 * rows + 3, gemm_sm90.MAX_ROWS), 200, 1600, BFLOAT16)
    assert_within(gemm_sm90.gemm(*case.on_device(), info), *case.product())


@pytest.mark.gpu
def test_a_row_does_not_depend_on_its_neighbours(dtype, info):
    case = Case(40, 1000, 512, dtype)
    full = gemm_sm90.gemm(*case.on_device(), info)
    case.x[:3], case.x[4:] = np.nan, np.inf
    y = gemm_sm90.gemm(*case.on_device(), info)
    assert cupy.asnumpy(y[3]).tobytes() == cupy.asnumpy(full[3]).tobytes()


@pytest.mark.gpu
def test_repeats_bit_for_bit(dtype, info, times):
    operands = Case(60, 1024, 3072, dtype).on_device()
    first = gemm_sm90.gemm(*operands, info).tobytes()
    assert all(gemm_sm90.gemm(*operands, info).tobytes() == first for _ in range(times(20)))


@pytest.mark.gpu
def test_where_it_does_not_serve(info):
    def served(x, weight, bias=None, **how):
        return gemm_sm90.gemm(x, weight, bias, info, **how) is not None

    x, weight = cupy.zeros((20, 64), BFLOAT16), cupy.zeros((72, 64), BFLOAT16)
    assert served(x, weight)
    assert not served(x, weight, swiglu=True)  # gates and ups that are no whole vectors
    assert not served(x[:0], weight)
    assert not served(cupy.zeros((257, 64), BFLOAT16), weight)
    assert not served(x.astype(np.float32), weight.astype(np.float32))
    assert not served(cupy.zeros((20, 60), BFLOAT16), cupy.zeros((72, 60), BFLOAT16))
    assert not served(x, cupy.zeros((70, 64), BFLOAT16))
    assert not served(cupy.zeros(20 * 64 + 1, BFLOAT16)[1:].reshape(20, 64), weight)
    ampere = replace(info, compute_capability=(8, 0))
    assert gemm_sm90.gemm(x, weight, None, ampere) is None


# ---- with a norm between two products -----------------------------------------------------------------------------

NORM_SHAPES = [(1024, 2048), (1024, 3072), (136, 64), (8, 1000), (4096, 512)]


def sums_of_squares(total: np.ndarray) -> np.ndarray:
    padded = np.pad(total.astype(np.float64), ((0, 0), (0, -total.shape[1] % 128)))
    return (padded.reshape(len(total), -1, 128) ** 2).sum(-1)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", NORM_SHAPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_product_that_adds_the_residual(info, rows, shape, bias):
    case = Case(rows, *shape, BFLOAT16, bias=bias)
    residual, norm_weight = random((rows, shape[0]), BFLOAT16, 7), random(shape[0], BFLOAT16, 8)
    y, added = gemm_sm90.gemm_add(*case.on_device(), cupy.asarray(residual), cupy.asarray(norm_weight), info)
    product, bound = case.product()
    expected = product + residual.astype(np.float64)
    assert_within(added.total, expected, bound + EPS[BFLOAT16] * (np.abs(expected) + bound))
    total = cupy.asnumpy(added.total)
    scaled = (total.astype(np.float32) * norm_weight.astype(np.float32)).astype(BFLOAT16)
    assert cupy.asnumpy(y).tobytes() == scaled.tobytes()
    squares = sums_of_squares(total)
    assert_within(added.squares, squares, 128 * EPS32 * squares + 2.0**-126)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", [(4096, 1024), (6144, 1024), (144, 64), (1008, 520)], ids=str)
@pytest.mark.parametrize("swiglu", [False, True])
def test_product_of_rows_that_are_scaled(info, rows, shape, swiglu):
    case = Case(rows, *shape, BFLOAT16, bias=True)
    case.x *= np.asarray(3, BFLOAT16)
    total = random((rows, shape[1]), BFLOAT16, 11, scale=5)
    squares = cupy.asarray(sums_of_squares(total).astype(np.float32))
    y = gemm_sm90.gemm(*case.on_device(), info, swiglu, fused=True, squares=squares, eps=NORM_EPS)
    factors = 1 / np.sqrt((total.astype(np.float64) ** 2).mean(-1, keepdims=True) + NORM_EPS)
    case.factors = factors
    assert_within(y, *(case.swiglu() if swiglu else case.product()))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [4, 5, 40, 100, 256, 257])
@pytest.mark.parametrize("swiglu", [False, True])
def test_ops_with_a_norm_between_them(dtype, rows, swiglu):
    """Whichever way they go, on whatever GPU, they are the composition that `Ops` says they are."""
    ops = CudaOps(dtype)
    first, second = Case(rows, 1024, 2048, dtype), Case(1, 4096, 1024, dtype, seed=5)
    weights = [DenseWeight(cupy.asarray(case.weight)) for case in (first, second)]
    x, residual, norm_weight = (
        cupy.asarray(random(shape, dtype, seed)) for seed, shape in enumerate([(rows, 2048), (rows, 1024), (1024,)])
    )
    behind = ops.add_norm_swiglu if swiglu else ops.add_norm_linear
    state = ops.linear_before_norm(x, weights[0], residual.copy(), norm_weight)
    y, total = behind(*state, norm_weight, NORM_EPS, weights[1])

    apart = ops.linear(x, weights[0]), residual.copy()
    expected, expected_total = behind(*apart, norm_weight, NORM_EPS, weights[1])
    totals = total.astype(np.float64), expected_total.astype(np.float64)
    cupy.testing.assert_allclose(*totals, EPS[dtype], 8 * EPS[dtype])
    normed = np.abs(cupy.asnumpy(ops.rms_norm(expected_total, norm_weight, NORM_EPS)).astype(np.float64))
    off = 2 * EPS[dtype] * (normed @ np.abs(second.weight.astype(np.float64)).T)  # of what is not rounded alike
    expected = cupy.asnumpy(expected).astype(np.float64)
    if swiglu:
        apart = ops.linear(x, weights[0]), residual.copy()  # the ones before may have been written over
        y_apart, _ = ops.add_norm_linear(*apart, norm_weight, NORM_EPS, weights[1])
        gate, up = np.split(np.abs(cupy.asnumpy(y_apart).astype(np.float64)), 2, axis=1)
        gate_off, up_off = np.split(off, 2, axis=1)
        off = 1.1 * gate_off * (up + up_off) + gate * up_off
    assert_within(y, expected, off + 2 * EPS[dtype] * np.abs(expected) + 2.0**-24)


@pytest.mark.gpu
def test_residuals_that_do_not_fit_are_refused():
    ops = CudaOps(BFLOAT16)
    x, weight = cupy.zeros((20, 64), BFLOAT16), DenseWeight(cupy.zeros((16, 64), BFLOAT16))
    with pytest.raises(ValueError, match=r"residual bfloat16\(19, 16\) does not fit x \(20, 64\), weight \(16, 64\)"):
        ops.linear_before_norm(x, weight, cupy.zeros((19, 16), BFLOAT16), cupy.ones(16, BFLOAT16))
    with pytest.raises(ValueError, match=r"norm weight bfloat16\(15,\)"):
        ops.linear_before_norm(x, weight, cupy.zeros((20, 16), BFLOAT16), cupy.ones(15, BFLOAT16))


# ---- in a chain ---------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [12, 64])
def test_early_launches_wait_for_their_predecessors(dtype, info, rows, monkeypatch, times):
    ops = CudaOps(dtype)
    gate_up, down = Case(1, 6144, 1024, dtype), Case(1, 1024, 3072, dtype, seed=9)
    weights = [DenseWeight(cupy.asarray(case.weight)) for case in (gate_up, down)]
    norm = cupy.asarray(random(1024, dtype, 3))

    def chain() -> bytes:
        x, residual = (cupy.asarray(random((rows, 1024), dtype, seed)) for seed in (1, 2))
        for i in range(times(30)):
            gated, residual = ops.add_norm_swiglu(x, residual, norm, NORM_EPS, weights[0])
            x, residual = ops.linear_before_norm(gated, weights[1], residual, None if i == times(30) - 1 else norm)
        return x.tobytes() + residual.tobytes()

    overlapped = chain()
    launch = type(gemm_sm90.instances([dtype])[0]).__call__

    def launch_and_wait(kernel, *args, **kwargs):
        launch(kernel, *args, **kwargs)
        cupy.cuda.get_current_stream().synchronize()

    monkeypatch.setattr("mini_vllm.ops.cuda.kernel.Kernel.__call__", launch_and_wait)
    assert chain() == overlapped


@pytest.mark.gpu
def test_capture_replays_on_new_inputs(dtype, info):
    cases = [Case(40, 208, 96, dtype, seed=seed) for seed in (0, 10, 20)]
    for case in cases:
        case.weight = cases[0].weight
    x, weight, _ = cases[0].on_device()
    gemm_sm90.gemm(x, weight, None, info, swiglu=True)  # compiled and loaded before the capture
    stream, allocator = cupy.cuda.Stream(non_blocking=True), GPUAllocator()
    cupy.cuda.get_current_stream().synchronize()
    with stream, allocator.use():
        stream.begin_capture()
        y = gemm_sm90.gemm(x, weight, None, info, swiglu=True)
        graph = stream.end_capture()
        for case in cases[1:]:
            x.set(case.x, stream)
            y.view(np.uint8).fill(0xFF)
            graph.launch(stream)
            stream.synchronize()
            assert_within(y, *case.swiglu())


# ---- plans, without a GPU -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 16, 17, 64, 65, 96, 97, 128, 129, 200, 256])
@pytest.mark.parametrize("shape", [*SHAPES, (6144, 4096), (24576, 4096), (4096, 12288), (151936, 1024)], ids=str)
def test_plans_fit(rows, shape):
    cut, steps = gemm_sm90.plan(rows, *shape, 132, 227 << 10)
    columns = -(-shape[1] // 64)
    assert cut.split in (1, 2, 4, 8)
    assert cut.split * cut.sharers <= 8
    assert cut.split <= columns
    assert min(2, -(-columns // cut.split)) <= cut.stages <= min(16, -(-columns // cut.split))
    assert cut.shared_memory + 1024 <= 227 << 10
    assert cut.rows >= min(rows, 64)
    assert (cut.sharers - 1) * cut.rows < rows, "no block of a cluster is there for nothing"
    assert steps >= -(-columns // cut.split)


def test_who_multiplies():
    """Few rows by this kernel; more of them where it ends soon, or spares another one something."""
    hopper = DeviceInfo(0, "H200", gemm_sm90.HOPPER, 132, 141 << 30, 50 << 20, 1024, 48 << 10, 227 << 10, 13000)

    def serves(rows, shape, most_steps=gemm_sm90.MOST_STEPS):
        return gemm_sm90.plan_for(rows, *shape, hopper, most_steps) is not None

    adding, fused = gemm_sm90.MOST_STEPS_ADDING, gemm_sm90.MOST_STEPS_FUSED
    assert serves(64, (4096, 12288))
    assert not serves(96, (4096, 12288), fused)
    assert serves(192, (1024, 2048))
    assert not serves(256, (1024, 2048))
    assert serves(256, (1024, 3072), adding)
    assert not serves(96, (4096, 4096), adding)
    assert serves(96, (4096, 4096), fused)
    assert not serves(257, (1024, 2048), fused)
    assert not serves(0, (1024, 2048))
    assert not serves(16, (1024, 2044))
    assert gemm_sm90.plan_for(16, 1024, 2048, replace(hopper, compute_capability=(8, 0))) is None
