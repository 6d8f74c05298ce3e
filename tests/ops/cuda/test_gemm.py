"""Dense products on the GPU against float64.

A sum of K products in float32, in any order, is off by at most K eps sum |x w| (tensor cores truncate, so eps is that
of a whole unit in the last place), and the result is rounded once to its type.
"""

from __future__ import annotations

import ctypes

import ml_dtypes
import numpy as np
import pytest

cupy = pytest.importorskip("cupy")

from mini_vllm.ops.cuda import CudaUnavailable, cublaslt, gemm  # noqa: E402
from mini_vllm.ops.cuda.device import GPUAllocator  # noqa: E402
from mini_vllm.ops.cuda.kernel import DTYPES  # noqa: E402
from mini_vllm.ops.weight import DenseWeight  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned_memory")
EPS32 = 2.0**-23
EPS = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
FLOAT32 = np.dtype(np.float32)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


@pytest.fixture(scope="module")
def multiply():
    return gemm.Gemm()


def random(shape, dtype, seed) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32).astype(dtype)


def operands(rows, out_features, in_features, dtype, has_bias):
    x, weight = random((rows, in_features), dtype, 1), random((out_features, in_features), dtype, 2)
    return x, weight, random(out_features, dtype, 3) if has_bias else None


def assert_product(y, x, weight, bias):
    x, weight = x.astype(np.float64), weight.astype(np.float64)
    expected, magnitude = x @ weight.T, np.abs(x) @ np.abs(weight).T
    if bias is not None:
        expected, magnitude = expected + bias.astype(np.float64), magnitude + np.abs(bias.astype(np.float64))
    actual = cupy.asnumpy(y).astype(np.float64)
    assert actual.shape == expected.shape
    bound = (x.shape[1] + 1) * EPS32 * magnitude + EPS[y.dtype.name] * np.abs(expected) + 1e-30
    worst = np.max(np.abs(actual - expected) / bound, initial=0.0)  # NaN stays NaN, and fails
    assert worst <= 1, f"error is {worst:.2f} of the bound"


def on_device(x, weight, bias):
    return cupy.asarray(x), DenseWeight(cupy.asarray(weight), None if bias is None else cupy.asarray(bias))


SHAPES = [
    *[(rows, out, k) for rows in (1, 2, 3, 8) for out in (1, 17, 129) for k in (1, 3, 8, 17, 129)],
    *[(rows, out, k) for rows in (1, 3, 4, 7, 16, 17) for out, k in ((111, 500), (500, 1000), (1000, 111))],
    *[(rows, out, k) for rows in (1, 5, 8, 9, 13, 16) for out, k in ((8, 64), (1024, 2048), (2056, 520), (4104, 96))],
    *[(rows, out, k) for rows in (2, 16) for out, k in ((2500, 2080), (5000, 2080), (16392, 2056))],
    *[(rows, out, k) for rows in (17, 64, 129, 300) for out, k in ((17, 129), (129, 17), (512, 256), (4096, 1024))],
]


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "out_features", "in_features"), SHAPES)
def test_linear(multiply, dtype, rows, out_features, in_features):
    for has_bias in (False, True):
        x, weight, bias = operands(rows, out_features, in_features, dtype, has_bias)
        y = multiply.linear(*on_device(x, weight, bias))
        assert y.dtype == dtype
        assert_product(y, x, weight, bias)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 8, 16, 40])
@pytest.mark.parametrize("has_bias", [False, True])
def test_logits_are_float32(multiply, dtype, rows, has_bias):
    x, weight, bias = operands(rows, 5003, 256, dtype, has_bias)
    y = multiply.logits(*on_device(x, weight, bias))
    assert y.dtype == np.float32
    assert_product(y, x, weight, bias)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 7, 8, 9, 16, 17, 50])
@pytest.mark.parametrize("in_features", [64, 61])
def test_gemv_takes_any_number_of_rows(dtype, rows, in_features):
    x, weight, bias = operands(rows, 333, in_features, dtype, True)
    y = cupy.empty((rows, 333), dtype)
    gemm.gemv(y, cupy.asarray(x), cupy.asarray(weight), cupy.asarray(bias))
    assert_product(y, x, weight, bias)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [2, 12, 40])
def test_operands_need_not_be_aligned(multiply, dtype, rows):
    x, weight, bias = operands(rows, 96, 64, dtype, True)
    shifted = [cupy.empty(array.size + 1, dtype)[1:].reshape(array.shape) for array in (x, weight, bias)]
    for device, host in zip(shifted, (x, weight, bias), strict=True):
        device[...] = cupy.asarray(host)
    assert_product(multiply.linear(shifted[0], DenseWeight(*shifted[1:])), x, weight, bias)


@pytest.mark.gpu
def test_float32_is_not_tf32(multiply):
    # 1 + 2^-12 is not a tf32 number: its square would be 1.
    x, weight = np.full((32, 64), 1 + 2.0**-12, np.float32), np.full((128, 64), 1 + 2.0**-12, np.float32)
    for rows in (1, 32):
        y = cupy.asnumpy(multiply.linear(*on_device(x[:rows], weight, None)))
        assert np.abs(y / 64 - (1 + 2.0**-12) ** 2).max() < 2.0**-18


@pytest.mark.gpu
def test_no_rows(multiply, dtype):
    x, weight, _ = operands(0, 33, 64, dtype, False)
    assert multiply.linear(*on_device(x, weight, None)).shape == (0, 33)


@pytest.mark.gpu
def test_a_row_does_not_depend_on_its_neighbours(multiply, dtype):
    x, weight, bias = operands(8, 1000, 512, dtype, True)
    device_x, device_weight = on_device(x, weight, bias)
    full = cupy.asnumpy(multiply.linear(device_x, device_weight))
    x[:3], x[4:] = np.nan, np.inf
    assert np.array_equal(cupy.asnumpy(multiply.linear(cupy.asarray(x), device_weight))[3], full[3])


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 12, 64])
def test_capture_replays_on_new_inputs(multiply, dtype, rows):
    x, weight, bias = operands(rows, 1000, 512, dtype, True)
    device_x, device_weight = on_device(np.zeros_like(x), weight, bias)
    multiply.linear(device_x, device_weight)  # planned, compiled and loaded before the capture
    stream, allocator = cupy.cuda.Stream(non_blocking=True), GPUAllocator()
    cupy.cuda.get_current_stream().synchronize()
    with stream, allocator.use():
        stream.begin_capture()
        y = multiply.linear(device_x, device_weight)
        graph = stream.end_capture()
        for seed in (5, 6):
            x = random(x.shape, dtype, seed)
            device_x.set(x, stream)
            y.view(np.uint8).fill(0xFF)
            graph.launch(stream)
            stream.synchronize()
            assert_product(y, x, weight, bias)


@pytest.mark.gpu
def test_operands_that_do_not_fit_are_refused(multiply):
    x, weight = cupy.zeros((2, 8), np.float32), cupy.zeros((4, 8), np.float32)
    bias = cupy.zeros(4, np.float32)
    for wrong in (
        (x[0], DenseWeight(weight)),
        (x[:, :4], DenseWeight(weight)),
        (x.T, DenseWeight(weight)),
        (x, DenseWeight(weight.astype(np.float16))),
        (x, DenseWeight(weight, bias[:3])),
        (x, DenseWeight(weight, bias.astype(np.float16))),
        (cupy.zeros((2, 0), np.float32), DenseWeight(cupy.zeros((4, 0), np.float32))),
    ):
        with pytest.raises(ValueError, match=r"linear needs contiguous x \[rows, in\].*got float"):
            multiply.linear(*wrong)


def test_few_rows_go_to_gemv():
    assert gemm.prefers_gemv(1, 151936, 1024, BFLOAT16)
    assert gemm.prefers_gemv(16, 4096, 1024, BFLOAT16)
    assert not gemm.prefers_gemv(9, 24576, 4096, BFLOAT16)
    assert not gemm.prefers_gemv(9, 151936, 1024, BFLOAT16)
    assert not gemm.prefers_gemv(9, 1024, 1024, FLOAT32)
    assert not gemm.prefers_gemv(17, 1024, 1024, BFLOAT16)
    assert not gemm.prefers_gemv(64, 1024, 1024, FLOAT32)


@pytest.mark.parametrize("rows", [1, 8, 16])
def test_every_tile_is_among_the_instances(rows):
    tiles = {gemm.gemv_tile(rows, out, k) for out in (1, 2049, 4097, 16385, 151936) for k in (8, 2048, 2056, 12288)}
    assert tiles <= set(gemm.GEMV_TILES)
    names = {kernel.name for kernel in gemm.instances([BFLOAT16])}
    assert len(names) == len(gemm.instances([BFLOAT16]))
    for tile in tiles:
        wide = str(rows > 8).lower()
        assert f"gemv_mma<bf16, float, {tile.tiles}, {tile.warps}, {tile.unroll}, {wide}>" in names


@pytest.mark.gpu
def test_tuning_is_right_and_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    multiply = gemm.Gemm()
    cases = [operands(300, out, k, BFLOAT16, has_bias) for out, k, has_bias in ((512, 256, True), (256, 512, False))]
    weights = [on_device(*case)[1] for case in cases]
    x, head, _ = operands(300, 5000, 256, BFLOAT16, False)
    multiply.tune([2, 300], weights, DenseWeight(cupy.asarray(head)))
    for (x_host, weight, bias), device_weight in zip(cases, weights, strict=True):
        assert_product(multiply.linear(cupy.asarray(x_host), device_weight), x_host, weight, bias)
    assert_product(multiply.logits(cupy.asarray(x), DenseWeight(cupy.asarray(head))), x, head, None)

    monkeypatch.setattr(cublaslt, "_times", lambda functions: pytest.fail("it was measured before"))
    gemm.Gemm().tune([2, 300], weights, DenseWeight(cupy.asarray(head)))


def test_choices_survive_the_process(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    problem = cublaslt._Problem(40, 5, 3, BFLOAT16, FLOAT32, True, 16)
    choices = cublaslt._Choices("one GPU")
    assert choices.get(problem) is None
    choices.put(problem, (ctypes.c_uint64 * 8)(*range(8)))
    choices.save()
    assert list(cublaslt._Choices("one GPU").get(problem)) == list(range(8))
    assert cublaslt._Choices("another GPU").get(problem) is None


def test_errors_name_status_and_shapes():
    problem = cublaslt._Problem(2, 5, 3, BFLOAT16, FLOAT32, True, 16)
    message = (
        r"CUBLAS_STATUS_INVALID_VALUE from cuBLASLt for bfloat16 x \[2, 3\] times weight \[5, 3\] \+ bias to float32"
    )
    with pytest.raises(cublaslt.CublasError, match=message):
        cublaslt._check(7, f"for {problem}")


def test_a_missing_library_is_said_clearly(monkeypatch):
    pathfinder = pytest.importorskip("cuda.pathfinder")

    def not_found(name):
        raise pathfinder.DynamicLibNotFoundError(name)

    monkeypatch.setattr(pathfinder, "load_nvidia_dynamic_lib", not_found)
    with pytest.raises(CudaUnavailable, match=r"cuBLAS \(libcublasLt\) is not installed; install .* pip install"):
        cublaslt._library.__wrapped__()
