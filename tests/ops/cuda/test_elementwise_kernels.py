"""Norms, activation, embedding, rotary embedding and cache writes on the GPU against NumpyOps.

Kernel and NumPy compute in float32, with sums in another order, and round once to the dtype: results may differ
by one rounding of the dtype (its eps) and by the float32 error before it. Sums of squares have no cancellation,
so that error is below (terms a thread adds + levels of the reduction) eps, half of it after the square root.
"""

from __future__ import annotations

import numpy as np
import pytest

cupy = pytest.importorskip("cupy")

from mini_vllm.ops.cuda import elementwise  # noqa: E402
from mini_vllm.ops.cuda.device import GPUAllocator, pinned_zeros  # noqa: E402
from mini_vllm.ops.cuda.kernel import DTYPES, LaunchError  # noqa: E402
from mini_vllm.ops.numpy_ops import NumpyOps  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory")]
EPS32 = float(np.finfo(np.float32).eps)
NORM_EPS = 1e-6


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


def eps_of(dtype) -> float:
    return {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}[np.dtype(dtype).name]


def random(shape, dtype, seed=0, scale=1.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape, np.float32) * np.float32(scale)).astype(dtype)


def f32(x) -> np.ndarray:
    return (x if isinstance(x, np.ndarray) else cupy.asnumpy(x)).astype(np.float32)


def assert_close(actual, expected, dtype, steps, magnitude=None):
    """|actual - expected| <= (eps of dtype + steps eps of float32) * magnitude, which is |expected| by default."""
    actual, expected = f32(actual), f32(expected)
    assert actual.shape == expected.shape
    magnitude = np.abs(expected) if magnitude is None else magnitude
    # float16 has subnormals, whose spacing is absolute.
    bound = (eps_of(dtype) + steps * EPS32) * magnitude + (2.0**-24 if dtype == np.float16 else 1e-37)
    worst = np.max(np.abs(actual - expected) / bound, initial=0.0)  # NaN stays NaN, and fails
    assert worst <= 1, f"error is {worst:.2f} of the bound"


# ---- norms ----------------------------------------------------------------------------------------------------

HIDDEN_SIZES = (1, 7, 8, 64, 111, 500, 1024, 2560, 4096, 5120, 8192, 16384, 16400, 20001)


@pytest.mark.parametrize("rows", [0, 1, 19, 1025])
@pytest.mark.parametrize("hidden_size", HIDDEN_SIZES)
def test_rms_norm(dtype, rows, hidden_size):
    x, weight = random((rows, hidden_size), dtype, 1, scale=3), random(hidden_size, dtype, 2)
    out = elementwise.rms_norm(cupy.asarray(x), cupy.asarray(weight), NORM_EPS)
    assert_close(out, NumpyOps(dtype).rms_norm(x, weight, NORM_EPS), dtype, steps=40)


def test_rms_norm_takes_any_leading_axes_and_offsets(dtype):
    x, weight = random((3, 5, 64), dtype, 1), random(64, dtype, 2)
    expected = NumpyOps(dtype).rms_norm(x, weight, NORM_EPS)
    assert_close(elementwise.rms_norm(cupy.asarray(x), cupy.asarray(weight), NORM_EPS), expected, dtype, 40)
    shifted = cupy.empty(x.size + 1, dtype)[1:]  # contiguous, but not at a multiple of 16 bytes
    shifted[:] = cupy.asarray(x).ravel()
    out = elementwise.rms_norm(shifted.reshape(x.shape), cupy.asarray(weight), NORM_EPS)
    assert_close(out, expected, dtype, 40)


def test_rms_norm_of_tiny_and_huge_rows():
    tiny, weight = np.full((2, 64), 1e-20, np.float32), np.ones(64, np.float32)
    out = elementwise.rms_norm(cupy.asarray(tiny), cupy.asarray(weight), NORM_EPS)  # eps rules: 1e-20 / 1e-3
    assert_close(out, NumpyOps().rms_norm(tiny, weight, NORM_EPS), np.float32, 40)
    huge = np.full((2, 64), 1e18, np.float32)
    out = elementwise.rms_norm(cupy.asarray(huge), cupy.asarray(weight), NORM_EPS)
    assert_close(out, NumpyOps().rms_norm(huge, weight, NORM_EPS), np.float32, 40)


@pytest.mark.parametrize("rows", [0, 1, 19, 1025])
@pytest.mark.parametrize("hidden_size", HIDDEN_SIZES)
def test_add_rms_norm(dtype, rows, hidden_size):
    x, residual = random((rows, hidden_size), dtype, 1), random((rows, hidden_size), dtype, 2, scale=5)
    weight = random(hidden_size, dtype, 3)
    out, total = elementwise.add_rms_norm(*map(cupy.asarray, (x, residual, weight)), NORM_EPS)
    expected_out, expected_total = NumpyOps(dtype).add_rms_norm(x, residual, weight, NORM_EPS)
    np.testing.assert_array_equal(f32(total), f32(expected_total))  # one addition, rounded the same way
    assert_close(out, expected_out, dtype, steps=40)


# ---- activation and embedding -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, 1, 19, 989])
@pytest.mark.parametrize("intermediate_size", [1, 7, 111, 500, 3072, 4864, 12288])
def test_silu_and_mul(dtype, rows, intermediate_size):
    gate_up = random((rows, 2 * intermediate_size), dtype, 1, scale=4)
    out = elementwise.silu_and_mul(cupy.asarray(gate_up))
    assert_close(out, NumpyOps(dtype).silu_and_mul(gate_up), dtype, steps=8)  # exp 2, add, divide, multiply: ulps


def test_silu_and_mul_at_the_ends(dtype):
    gate = np.array([-60000, -100, -80, -0.0, 0.0, 80, 60000], np.float32)
    gate_up = np.concatenate([gate, np.ones(7)]).astype(dtype)[None]
    out = elementwise.silu_and_mul(cupy.asarray(gate_up))
    assert_close(out, NumpyOps(dtype).silu_and_mul(gate_up), dtype, steps=8)


@pytest.mark.parametrize("hidden_size", [1, 7, 111, 1024, 4096])
def test_embedding(dtype, hidden_size):
    table = random((997, hidden_size), dtype)
    ids = np.random.default_rng(1).integers(0, 997, 300).astype(np.int32)
    ids[:2] = 0, 996
    out = elementwise.embedding(cupy.asarray(ids), cupy.asarray(table))
    np.testing.assert_array_equal(f32(out), f32(table[ids]))
    assert elementwise.embedding(cupy.asarray(ids[:0]), cupy.asarray(table)).shape == (0, hidden_size)


def test_embedding_of_tokens_of_the_step_before(dtype):
    table = random((997, 64), dtype)
    ids, previous = np.array([5, -1, -3, 0, -1], np.int32), np.array([7, 996, 0], np.int32)
    out = elementwise.embedding(cupy.asarray(ids), cupy.asarray(table), cupy.asarray(previous))
    np.testing.assert_array_equal(f32(out), f32(NumpyOps(dtype).embedding(ids, table, previous)))
    np.testing.assert_array_equal(f32(out), f32(table[[5, 7, 0, 0, 7]]))


def test_embedding_table_beyond_32_bits():
    table = cupy.empty((2_200_000, 1024), np.float16)  # 4.5 GB: offsets do not fit 32 bits
    table[-1] = 2
    assert (elementwise.embedding(cupy.asarray([2_199_999], np.int32), table) == 2).all()


# ---- rotary embedding and cache -----------------------------------------------------------------------------------


def rope_case(dtype, num_tokens, num_q_heads, num_kv_heads, head_dim, seed=0):
    rng = np.random.default_rng(seed)
    num_blocks, block_size = num_tokens // 4 + 3, 5
    angles = rng.uniform(-4, 4, (600, head_dim // 2)).astype(np.float32)
    slots = rng.permutation(num_blocks * block_size)[:num_tokens].astype(np.int32)
    slots[rng.random(num_tokens) < 0.2] = -1
    shape = (num_blocks, block_size, num_kv_heads, head_dim)
    return {
        "qkv": random((num_tokens, (num_q_heads + 2 * num_kv_heads) * head_dim), dtype, seed + 1, scale=2),
        "positions": rng.integers(0, 600, num_tokens).astype(np.int32),
        "rope_table": np.concatenate([np.cos(angles), np.sin(angles)], axis=1),
        "q_norm": random(head_dim, dtype, seed + 2),
        "k_norm": random(head_dim, dtype, seed + 3),
        "eps": NORM_EPS,
        "k_cache": np.full(shape, np.nan, dtype),
        "v_cache": np.full(shape, np.nan, dtype),
        "slot_mapping": slots,
    }


def run_both(case, dtype):
    device = {k: cupy.asarray(v) if isinstance(v, np.ndarray) else v for k, v in case.items()}
    q = elementwise.rope_store_kv(**device)
    host = {k: v.copy() if isinstance(v, np.ndarray) else v for k, v in case.items()}
    expected_q = NumpyOps(dtype).rope_store_kv(**host)
    return (q, device["k_cache"], device["v_cache"]), (expected_q, host["k_cache"], host["v_cache"])


def check_rope(case, dtype):
    (q, k_cache, v_cache), (expected_q, expected_k, expected_v) = run_both(case, dtype)
    assert v_cache.tobytes() == expected_v.tobytes()  # copied, and rows that no slot names are untouched
    written = ~np.isnan(f32(expected_k))
    np.testing.assert_array_equal(~np.isnan(f32(k_cache)), written)
    assert_rotated(q, expected_q, dtype)
    assert_rotated(f32(k_cache)[written], f32(expected_k)[written], dtype)


def assert_rotated(actual, expected, dtype):
    # Two normed values, each perhaps an eps of the dtype off, are rotated and the result is rounded once more.
    # A rotation keeps lengths, so sqrt(2) times the largest result bounds what it was made of.
    largest = np.abs(f32(expected)).max(initial=0.0) * np.sqrt(2)
    assert_close(actual, expected, dtype, steps=40, magnitude=np.full(expected.shape, 3 * largest))


@pytest.mark.parametrize("num_tokens", [1, 19, 257])
@pytest.mark.parametrize("heads", [(1, 1), (14, 2), (16, 8), (32, 8), (71, 1)])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_rope_store_kv(dtype, num_tokens, heads, head_dim):
    check_rope(rope_case(dtype, num_tokens, *heads, head_dim), dtype)


@pytest.mark.parametrize("head_dim", [2, 6, 20, 32, 46, 96, 112, 192, 250, 256])
def test_rope_store_kv_head_dims(dtype, head_dim):
    check_rope(rope_case(dtype, 37, 6, 3, head_dim), dtype)


def test_rope_store_kv_without_norms(dtype):
    case = rope_case(dtype, 37, 6, 3, 64) | dict.fromkeys(("q_norm", "k_norm"))
    check_rope(case, dtype)
    (q, _, _), (expected_q, _, _) = run_both(case, dtype)  # exact inputs: nothing but the rotation is rounded
    heads = np.abs(f32(case["qkv"]).reshape(37, -1, 2, 32))[:, :6].sum(axis=2)  # |first| + |second| half
    magnitude = np.concatenate([heads, heads], axis=-1)
    bound = eps_of(dtype) * np.abs(f32(expected_q)) + 4 * EPS32 * magnitude
    assert (np.abs(f32(q) - f32(expected_q)) <= bound).all()


@pytest.mark.parametrize("missing", ["q_norm", "k_norm"])
def test_rope_store_kv_refuses_one_norm_alone(dtype, missing):
    case = rope_case(dtype, 5, 6, 3, 64) | {missing: None}
    with pytest.raises(ValueError, match="q_norm and k_norm must both be given, or neither"):
        elementwise.rope_store_kv(**{k: cupy.asarray(v) if isinstance(v, np.ndarray) else v for k, v in case.items()})


@pytest.mark.parametrize("head_dim", [20, 128, 256])
def test_rope_store_kv_of_many_tokens(dtype, head_dim):
    check_rope(rope_case(dtype, 989, 14, 2, head_dim), dtype)  # launched in smaller blocks


def test_rope_store_kv_of_nothing(dtype):
    case = {k: cupy.asarray(v) for k, v in rope_case(dtype, 0, 4, 2, 64).items() if k != "eps"}
    assert elementwise.rope_store_kv(**case, eps=NORM_EPS).shape == (0, 4, 64)


def test_rope_store_kv_all_padding(dtype):
    case = rope_case(dtype, 19, 4, 2, 64) | {"slot_mapping": np.full(19, -1, np.int32)}
    check_rope(case, dtype)


@pytest.mark.parametrize("row", [(1, 1), (3, 7), (8, 128), (2, 80)])
def test_store_kv(dtype, row):
    case = rope_case(dtype, 77, 1, row[0], 2 * row[1])
    shape = (*case["k_cache"].shape[:2], *row)
    k, v = random((77, *row), dtype, 1), random((77, *row), dtype, 2)
    k_cache, v_cache = np.full(shape, np.nan, dtype), np.full(shape, np.nan, dtype)
    device = [cupy.asarray(a) for a in (k, v, k_cache, v_cache, case["slot_mapping"])]
    elementwise.store_kv(*device)
    NumpyOps(dtype).store_kv(k, v, k_cache, v_cache, case["slot_mapping"])
    assert device[2].tobytes() == k_cache.tobytes()
    assert device[3].tobytes() == v_cache.tobytes()


def test_store_kv_beyond_32_bits():
    cache = [cupy.empty((20_000, 16, 8, 128), np.float16) for _ in range(2)]  # 2^31 is passed at block 16384
    ones = cupy.ones((1, 8, 128), np.float16)
    elementwise.store_kv(ones, ones, *cache, cupy.asarray([20_000 * 16 - 1], np.int32))
    assert all((c[-1, -1] == 1).all() and cupy.isnan(c[-1, -2]).all() for c in cache)


@pytest.mark.parametrize("row", [(3, 7), (8, 128)])
def test_copy_blocks(dtype, row):
    caches = [random((50, 5, *row), dtype, seed) for seed in (1, 2)]
    pairs = np.random.default_rng(3).permutation(50)[:40].reshape(20, 2).astype(np.int32)
    device = [cupy.asarray(c) for c in caches]
    elementwise.copy_blocks(*device, *device, cupy.asarray(pairs))
    NumpyOps(dtype).copy_blocks(*caches, *caches, pairs)
    for actual, cache in zip(device, caches, strict=True):
        assert actual.tobytes() == cache.tobytes()


@pytest.mark.parametrize("row", [(3, 7), (8, 128)])
def test_copy_blocks_to_pinned_memory_and_back(dtype, row):
    caches = [random((50, 5, *row), dtype, seed) for seed in (1, 2)]
    device, host = [cupy.asarray(c) for c in caches], [pinned_zeros((9, 5, *row), dtype) for _ in caches]
    out = np.array([[49, 0], [3, 8], [7, 5]], np.int32)
    elementwise.copy_blocks(*device, *host, cupy.asarray(out))
    back = np.array([[8, 0], [5, 1], [0, 2], [1, 3]], np.int32)
    elementwise.copy_blocks(*host, *device, cupy.asarray(back))
    for actual, cache in zip(device, caches, strict=True):
        expected = cache.copy()
        expected[:4] = cache[3], cache[7], cache[49], np.zeros_like(cache[0])
        assert actual.tobytes() == expected.tobytes()


# ---- launches -------------------------------------------------------------------------------------------------


def step(x, residual, weight, qkv, rest):
    """A chain in which each kernel reads what the one before wrote."""
    x, residual = elementwise.add_rms_norm(x, residual, weight, NORM_EPS)
    x = elementwise.silu_and_mul(cupy.concatenate([x, residual], axis=1))
    x, residual = elementwise.add_rms_norm(x, residual, weight, NORM_EPS)
    q = elementwise.rope_store_kv(qkv, **rest)
    return elementwise.rms_norm(x, weight, NORM_EPS), residual, q


def chain_inputs(dtype, rows=64):
    case = rope_case(dtype, rows, 8, 4, 128)
    rest = {k: cupy.asarray(v) if isinstance(v, np.ndarray) else v for k, v in case.items()}
    x, residual = cupy.asarray(random((rows, 2048), dtype, 8)), cupy.asarray(random((rows, 2048), dtype, 9))
    return x, residual, cupy.asarray(random(2048, dtype, 10)), rest.pop("qkv"), rest


def test_early_launches_wait_for_their_predecessors(dtype, times):
    """Kernels overlap (pdl): a chain without synchronisation gives bit for bit what a synchronised one gives."""
    results = []
    for synchronise in (True, False):
        x, residual, weight, qkv, rest = chain_inputs(dtype)
        for _ in range(times(50)):
            x, residual, _ = step(x, residual, weight, qkv, rest)
            if synchronise:
                cupy.cuda.Device().synchronize()
        results.append(x.tobytes() + residual.tobytes())
    assert results[0] == results[1]


def test_capture_replays_on_new_inputs(dtype):
    inputs = chain_inputs(dtype)
    expected = step(*(a.copy() if isinstance(a, cupy.ndarray) else a for a in inputs))  # and compiles
    fresh = [a.copy() for a in inputs[:2]]

    cupy.cuda.Device().synchronize()

    stream, memory = cupy.cuda.Stream(non_blocking=True), GPUAllocator()
    with stream, memory.use():
        stream.begin_capture()
        outputs = step(*inputs)
        graph = stream.end_capture()
        for _ in range(3):  # each replay starts from inputs written in place
            for array, value in zip(inputs[:2], fresh, strict=True):
                array[...] = value
            graph.launch(stream)
        stream.synchronize()
    for actual, value in zip(outputs, expected, strict=True):
        assert actual.tobytes() == value.tobytes()


def test_a_refused_launch_names_kernel_and_arguments():
    x = cupy.ones((3, 64), np.float32)
    kernel = elementwise.instances([np.float32], [])[4]
    with pytest.raises(LaunchError, match=r"rms_norm<float, 0>.*INVALID_VALUE.*grid \(3,\), block \(4096,\)") as error:
        kernel((3,), (4096,), (x, x[0], x, np.int32(64), np.float32(1e-6)))
    assert "x=cupy float32[3, 64], weight=cupy float32[64]" in str(error.value)
    assert f32(elementwise.rms_norm(x, x[0], 0.0)).sum() == 192  # the context is as good as before


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        (lambda a: elementwise.rms_norm(a(3, 8), a(9), 1e-6), r"weight \(9,\) does not fit x \(3, 8\)"),
        (lambda a: elementwise.add_rms_norm(a(3, 8), a(2, 8), a(8), 1e-6), r"residual \(2, 8\)"),
        (lambda a: elementwise.silu_and_mul(a(3, 7)), "even last axis"),
        (lambda a: elementwise.store_kv(a(3, 2, 8), a(3, 2, 8), a(4, 5, 2, 9), a(4, 5, 2, 9), a(3)), "store_kv"),
        (lambda a: elementwise.copy_blocks(a(4, 8), a(4, 8), a(5, 8), a(5, 9), a(1, 2)), "copy_blocks"),
        (lambda a: elementwise.rms_norm(a(3, 16)[:, ::2], a(8), 1e-6), "not contiguous"),
        (lambda a: elementwise.rms_norm(a(3, 8), a(8).astype(np.float16), 1e-6), r"argument 1 \(weight\).*float16"),
        (lambda a: elementwise.embedding(a(3), a(4, 8)), r"argument 0 \(ids\).*float32"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(launch, message):
    with pytest.raises(ValueError, match=message):
        launch(lambda *shape: cupy.ones(shape, np.float32))
