"""Attention kernels against NumpyOps in float32 on the same inputs (already rounded to the dtype).

Bound of the error, relative to sum_j p_j |v_j|: the 16-bit kernels round each probability and the result once, half
an eps each. float32 errors of the scores (sums of head_dim products, of size |q| |k| scale) act as relative errors
of the probabilities, and the sums over keys add theirs; both grow like the square root of the number of terms,
with a factor 4 for the luck of the draw.
"""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

cupy = pytest.importorskip("cupy")

from mini_vllm.ops.base import AttentionMetadata, map_arrays  # noqa: E402
from mini_vllm.ops.cuda.attention import HEAD_DIMS, Attention  # noqa: E402
from mini_vllm.ops.cuda.device import DeviceInfo, GPUAllocator  # noqa: E402
from mini_vllm.ops.cuda.kernel import DTYPES  # noqa: E402
from mini_vllm.ops.numpy_ops import NumpyOps  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory")]

EPS = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
BF16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture(scope="module", params=[False, True], ids=["mma", "wgmma"])
def attention(request) -> Attention:
    """With the prefill kernel of every GPU, and with Hopper's."""
    info = DeviceInfo.of()
    if request.param and info.compute_capability != (9, 0):
        pytest.skip("wgmma needs compute capability 9.0")
    return Attention(info, wgmma=request.param)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


class Case:
    """A batch: sequence i brings q_lens[i] queries and sees seq_lens[i] keys, in blocks of random order.

    Cache slots that belong to no key are NaN, and so are those that no query of the sequence sees.
    """

    def __init__(
        self, q_lens, seq_lens, dtype, heads=(4, 2), head_dim=64, block_size=16, window=None, seed=0, q_scale=1.0
    ):
        rng = np.random.default_rng(seed)
        num_heads, num_kv_heads = heads
        q_lens, seq_lens = np.array(q_lens, np.int32), np.array(seq_lens, np.int32)
        blocks_of = -(-seq_lens // block_size)
        max_blocks, num_blocks = max(int(blocks_of.max()), 1), int(blocks_of.sum()) + 1
        tables = np.zeros((len(seq_lens), max_blocks), np.int32)
        order = 1 + rng.permutation(num_blocks - 1).astype(np.int32)  # block 0: what unused table entries name
        used = np.arange(max_blocks) < blocks_of[:, None]
        tables[used] = order

        shape = (num_blocks, block_size, num_kv_heads, head_dim)
        self.k, self.v = (np.full(shape, np.nan, dtype) for _ in range(2))
        for table, q_len, seq_len in zip(tables, q_lens, seq_lens, strict=True):
            oldest = 0 if window is None else max(0, seq_len - q_len - window + 1)
            keys = np.arange(oldest, seq_len)
            slots = table[keys // block_size] * block_size + keys % block_size
            for cache in (self.k, self.v):
                values = rng.standard_normal((len(keys), num_kv_heads, head_dim), np.float32)
                cache.reshape(-1, num_kv_heads, head_dim)[slots] = values.astype(dtype)
        q = rng.standard_normal((int(q_lens.sum()), num_heads, head_dim), np.float32)
        self.q = (q * np.float32(q_scale)).astype(dtype)
        self.scale, self.window = head_dim**-0.5, window
        self.meta = AttentionMetadata(
            slot_mapping=np.zeros(len(q), np.int32),  # attention does not read it
            cu_seqlens_q=np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32),
            seq_lens=seq_lens,
            block_tables=tables,
            max_seqlen_q=int(q_lens.max()),
            max_seqlen_k=int(seq_lens.max()),
        )

    def expected(self, absolute_values=False) -> np.ndarray:
        # NumPy multiplies every key by its probability: a NaN would survive a probability of 0.
        k, v = (np.nan_to_num(x.astype(np.float32)) for x in (self.k, self.v))
        v = np.abs(v) if absolute_values else v
        return NumpyOps().attention(self.q.astype(np.float32), k, v, self.meta, self.scale, self.window)

    def run(self, attention: Attention):
        arrays = map(cupy.asarray, (self.q, self.k, self.v))
        return attention(*arrays, map_arrays(self.meta, cupy.asarray), self.scale, self.window)

    def check(self, attention: Attention) -> None:
        actual, expected = cupy.asnumpy(self.run(attention)), self.expected()
        assert actual.dtype == self.q.dtype
        assert actual.shape == expected.shape
        head_dim, keys = self.q.shape[-1], self.meta.max_seqlen_k
        norms = [np.linalg.norm(np.nan_to_num(x.astype(np.float32)), axis=-1).max() for x in (self.q, self.k)]
        score = norms[0] * norms[1] * self.scale
        relative = EPS[self.q.dtype.name] + 4 * (score * head_dim**0.5 + keys**0.5) * EPS["float32"]
        bound = relative * self.expected(absolute_values=True) + 2.0**-24  # float16 has subnormals
        worst = np.max(np.abs(actual.astype(np.float32) - expected) / bound)  # NaN stays NaN, and fails
        assert worst <= 1, f"error is {worst:.2f} of the bound"


DECODE = ([1] * 6, [1, 16, 17, 64, 333, 1000])
MIXED = ([1, 0, 5, 1, 130, 64, 33, 1, 2], [700, 40, 5, 1, 130, 200, 777, 64, 64])


@pytest.mark.parametrize("head_dim", [*HEAD_DIMS, 16, 40, 112])
@pytest.mark.parametrize("lens", [DECODE, MIXED], ids=["decode", "mixed"])
def test_head_dims(attention, dtype, head_dim, lens):
    Case(*lens, dtype, head_dim=head_dim).check(attention)


@pytest.mark.parametrize(
    "heads", [(1, 1), (2, 1), (3, 1), (8, 2), (7, 1), (16, 2), (9, 1), (16, 1), (17, 1), (40, 1), (6, 6)], ids=str
)
@pytest.mark.parametrize("lens", [DECODE, MIXED], ids=["decode", "mixed"])
def test_query_heads_of_a_kv_head(attention, dtype, heads, lens):
    Case(*lens, dtype, heads=heads, head_dim=32).check(attention)


@pytest.mark.parametrize("head_dim", [128, 256])
def test_sixteen_query_heads_of_a_large_kv_head(attention, dtype, head_dim):
    Case(*DECODE, dtype, heads=(32, 2), head_dim=head_dim).check(attention)


@pytest.mark.parametrize("block_size", [1, 7, 16, 32, 256])
@pytest.mark.parametrize("lens", [DECODE, MIXED], ids=["decode", "mixed"])
def test_block_sizes(attention, dtype, block_size, lens):
    Case(*lens, dtype, block_size=block_size).check(attention)


def test_decode_at_every_short_length(attention, dtype):
    lengths = range(1, 200)
    Case([1] * len(lengths), lengths, dtype, heads=(2, 1), head_dim=32).check(attention)


@pytest.mark.parametrize("length", [2047, 2048, 2049, 8192, 32767, 32768])
def test_decode_of_one_long_sequence(attention, dtype, length):
    Case([1], [length], dtype, heads=(8, 2), head_dim=128).check(attention)


def test_decode_of_very_different_lengths(attention, dtype):
    Case([1] * 8, [1, 20_000, 3, 500, 64, 9_999, 65, 128], dtype).check(attention)


@pytest.mark.parametrize("num_sequences", [127, 128, 129, 300, 1000])
def test_many_sequences(attention, dtype, num_sequences):
    rng = np.random.default_rng(num_sequences)
    q_lens = rng.choice([0, 1, 2, 9], num_sequences, p=[0.1, 0.7, 0.1, 0.1])
    Case(q_lens, q_lens + rng.integers(0, 100, num_sequences), dtype, heads=(2, 1), head_dim=32).check(attention)


@pytest.mark.parametrize("q_len", [2, 3, 31, 32, 33, 63, 64, 65, 127, 128, 129, 500])
@pytest.mark.parametrize("context", [0, 1, 63, 64, 100, 1000])
def test_prefill_chunks(attention, q_len, context):
    Case([q_len], [context + q_len], BF16, heads=(4, 1)).check(attention)


@pytest.mark.parametrize("window", [None, 700])
@pytest.mark.parametrize("q_len", [2, 17, 64, 200])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_a_short_chunk_after_a_long_context(attention, dtype, head_dim, q_len, window):
    # Too few queries for all multiprocessors: several may share the keys.
    Case([q_len, 1], [q_len + 6000, 300], dtype, heads=(8, 2), head_dim=head_dim, window=window).check(attention)


def test_a_long_prefill(attention, dtype):
    Case([2000, 1100], [2000, 3100], dtype, heads=(4, 2), head_dim=128).check(attention)


@pytest.mark.parametrize("window", [1, 2, 17, 63, 64, 65, 200, 10_000])
@pytest.mark.parametrize("lens", [DECODE, MIXED], ids=["decode", "mixed"])
def test_sliding_window(attention, dtype, window, lens):
    Case(*lens, dtype, window=window).check(attention)


@pytest.mark.parametrize("lens", [DECODE, MIXED], ids=["decode", "mixed"])
def test_peaked_softmax(attention, dtype, lens):
    # Scores of some hundreds: nearly all weight on one key, and factors of 2^-100 when the maximum rises.
    Case(*lens, dtype, q_scale=60.0).check(attention)


@pytest.mark.parametrize("lens", [([1], [3000]), ([70], [3000])], ids=["decode", "prefill"])
def test_maximum_that_rises_with_every_key(attention, dtype, lens):
    case = Case(*lens, dtype, heads=(4, 1), head_dim=32)
    table, num_keys = case.meta.block_tables[0], case.meta.max_seqlen_k
    keys = np.arange(num_keys)
    case.k.reshape(-1, 32)[table[keys // 16] * 16 + keys % 16] = (keys / num_keys)[:, None].astype(dtype)
    case.q[:] = np.abs(case.q)
    case.check(attention)


def test_padding_sequences_and_tokens(attention, dtype):
    # As in a captured graph whose batch is not full: sequences without keys, and none, behind the real ones.
    case = Case([1, 1], [100, 30], dtype)
    expected = cupy.asnumpy(case.run(attention))
    meta = case.meta
    case.meta = replace(
        meta,
        cu_seqlens_q=np.array([0, 1, 2, 3, 3, 4], np.int32),
        seq_lens=np.array([100, 30, 0, 0, 0], np.int32),
        block_tables=np.concatenate([meta.block_tables, np.zeros((3, meta.block_tables.shape[1]), np.int32)]),
    )
    case.q = np.concatenate([case.q, case.q])
    actual = cupy.asnumpy(case.run(attention))
    np.testing.assert_array_equal(actual[2:].astype(np.float32), 0)
    bound = 2 * EPS[np.dtype(dtype).name] * np.abs(case.v[np.isfinite(case.v)]).max()
    assert np.abs(actual[:2].astype(np.float32) - expected.astype(np.float32)).max() <= bound


@pytest.mark.parametrize("lens", [DECODE, MIXED, ([1], [30_000])], ids=["decode", "mixed", "split"])
def test_repeats_bit_for_bit(attention, dtype, lens, times):
    case = Case(*lens, dtype)
    first = cupy.asnumpy(case.run(attention))
    for _ in range(times(20)):
        np.testing.assert_array_equal(cupy.asnumpy(case.run(attention)), first)


def test_graph_replay_equals_eager(attention, dtype):
    batch, max_len = 5, 4096
    cases = [
        Case([1] * batch, lens, dtype, heads=(8, 2), head_dim=128, seed=i)
        for i, lens in enumerate([[max_len] * batch, [1, 4096, 17, 800, 64], [2000, 1, 1, 1, 3], [5] * batch])
    ]
    num_blocks = max(len(case.k) for case in cases)

    def pad(case: Case):
        """(q, k, v, metadata) on the device, in the shapes of the largest case."""
        k, v = (np.concatenate([x, np.zeros((num_blocks - len(x), *x.shape[1:]), dtype)]) for x in (case.k, case.v))
        tables = np.zeros((batch, max_len // 16), np.int32)
        tables[:, : case.meta.block_tables.shape[1]] = case.meta.block_tables
        meta = replace(case.meta, block_tables=tables, max_seqlen_k=max_len)
        return *map(cupy.asarray, (case.q, k, v)), map_arrays(meta, cupy.asarray)

    static = pad(cases[0])
    attention(*static, cases[0].scale)  # compiled and loaded before the capture
    stream, allocator = cupy.cuda.Stream(non_blocking=True), GPUAllocator()
    with stream, allocator.use():
        stream.begin_capture()
        out = attention(*static, cases[0].scale)
        graph = stream.end_capture()
    for case in cases[1:] + cases[:1]:
        fresh = pad(case)
        eager = attention(*fresh, case.scale)
        for target, source in zip(static[:3], fresh[:3], strict=True):
            target[...] = source
        for name in ("seq_lens", "block_tables"):
            getattr(static[3], name)[...] = getattr(fresh[3], name)
        cupy.cuda.Device().synchronize()
        graph.launch(stream)
        stream.synchronize()
        np.testing.assert_array_equal(cupy.asnumpy(out), cupy.asnumpy(eager))
        case.check(attention)


def test_no_tokens(attention, dtype):
    case = Case([0], [10], dtype)
    assert case.run(attention).shape == (0, 4 * 64)


def test_refuses_what_does_not_fit(attention):
    case = Case([1], [10], BF16)
    with pytest.raises(ValueError, match=r"do not fit; needed are q \[T, Hq, D\]"):
        attention(cupy.zeros((1, 3, 64), BF16), *map(cupy.asarray, (case.k, case.v)), case.meta, 1.0)
    with pytest.raises(ValueError, match="window is 0"):
        Case([1], [10], BF16, window=0).run(attention)
    with pytest.raises(ValueError, match="scale is 0"):
        attention(*map(cupy.asarray, (case.q, case.k, case.v)), case.meta, 0.0)
    with pytest.raises(ValueError, match="head_dim is 512; the CUDA kernels take at most 256"):
        Case([1], [10], BF16, head_dim=512).run(attention)
