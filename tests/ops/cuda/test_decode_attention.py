"""Rotary embedding, cache write and attention in one launch, against NumPy.

The new key and value must be what rope_store_kv writes, within its own bound. Attention is then compared with NumPy on
the keys and values that the kernel left in the cache, within the bound of test_attention_kernels.py. The query never
leaves the kernel: where its roundings are close calls, the scores may differ by what the other choice makes of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
import pytest

cupy = pytest.importorskip("cupy")

from mini_vllm.ops.base import AttentionMetadata, map_arrays  # noqa: E402
from mini_vllm.ops.cuda import attention  # noqa: E402
from mini_vllm.ops.cuda.cuda_ops import CudaOps  # noqa: E402
from mini_vllm.ops.cuda.device import GPUAllocator  # noqa: E402
from mini_vllm.ops.cuda.kernel import DTYPES  # noqa: E402
from mini_vllm.ops.numpy_ops import NumpyOps  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned_memory")
EPS = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
EPS32 = EPS["float32"]
BF16 = np.dtype(ml_dtypes.bfloat16)
NORM_EPS = 1e-6


@pytest.fixture(params=DTYPES[1:], ids=str)
def dtype16(request):
    return request.param


@dataclass
class Case:
    """A decode step: sequence i sees seq_lens[i] keys, the last of which it brings; cache slots of no key are NaN."""

    qkv: np.ndarray
    positions: np.ndarray
    rope: np.ndarray
    norms: tuple[np.ndarray | None, np.ndarray | None]
    k: np.ndarray
    v: np.ndarray
    meta: AttentionMetadata
    window: int | None

    @staticmethod
    def make(seq_lens, dtype, heads=(4, 2), head_dim=64, *, norms=True, block_size=16, window=None, seed=0) -> Case:
        rng = np.random.default_rng(seed)
        num_heads, num_kv_heads = heads
        seq_lens = np.array(seq_lens, np.int32)
        blocks_of = -(-seq_lens // block_size)
        max_blocks, num_blocks = max(int(blocks_of.max()), 1), int(blocks_of.sum()) + 1
        tables = np.zeros((len(seq_lens), max_blocks), np.int32)
        tables[np.arange(max_blocks) < blocks_of[:, None]] = 1 + rng.permutation(num_blocks - 1)
        k, v = (np.full((num_blocks, block_size, num_kv_heads, head_dim), np.nan, dtype) for _ in range(2))
        slots = np.full(len(seq_lens), -1, np.int32)
        for i, (table, seq_len) in enumerate(zip(tables, seq_lens, strict=True)):
            keys = np.arange(seq_len)
            of_keys = table[keys // block_size] * block_size + keys % block_size
            if seq_len:
                slots[i] = of_keys[-1]
            visible = of_keys[0 if window is None else max(0, seq_len - window) : -1]
            for cache in (k, v):
                values = rng.standard_normal((len(visible), num_kv_heads, head_dim), np.float32)
                cache.reshape(-1, num_kv_heads, head_dim)[visible] = values.astype(dtype)
        angles = rng.uniform(-4, 4, (int(seq_lens.max()) + 1, head_dim // 2)).astype(np.float32)
        width = (num_heads + 2 * num_kv_heads) * head_dim
        weights = [rng.uniform(0.5, 1.5, head_dim).astype(dtype) for _ in range(2)] if norms else [None, None]
        return Case(
            qkv=rng.standard_normal((len(seq_lens), width), np.float32).astype(dtype),
            positions=np.maximum(seq_lens - 1, 0),
            rope=np.concatenate([np.cos(angles), np.sin(angles)], axis=1),
            norms=(weights[0], weights[1]),
            k=k,
            v=v,
            meta=AttentionMetadata(
                slot_mapping=slots,
                cu_seqlens_q=np.arange(len(seq_lens) + 1, dtype=np.int32),
                seq_lens=seq_lens,
                block_tables=tables,
                max_seqlen_q=1,
                max_seqlen_k=int(seq_lens.max()),
            ),
            window=window,
        )

    @property
    def scale(self) -> float:
        return self.k.shape[-1] ** -0.5

    def on_device(self) -> tuple:
        arrays = [None if a is None else cupy.asarray(a) for a in (self.qkv, self.positions, self.rope, *self.norms)]
        caches = cupy.asarray(self.k), cupy.asarray(self.v)
        return *arrays, NORM_EPS, *caches, map_arrays(self.meta, cupy.asarray), self.scale, self.window

    def check(self, run=None) -> None:
        """Run the fused kernel (`run`, by default `Attention.with_rope`), and compare everything it wrote."""
        run = run or CudaOps(self.qkv.dtype)._attention.with_rope
        arguments = self.on_device()
        out = run(*arguments)
        assert out is not None, "the fused kernel should serve this"
        self.compare(out, arguments[6], arguments[7])

    def compare(self, out, k_cache, v_cache) -> None:
        dtype, head_dim = self.qkv.dtype, self.k.shape[-1]
        k_cache, v_cache = cupy.asnumpy(k_cache), cupy.asnumpy(v_cache)
        k, v = self.k.copy(), self.v.copy()
        q = NumpyOps(dtype).rope_store_kv(
            self.qkv, self.positions, self.rope, *self.norms, NORM_EPS, k, v, self.meta.slot_mapping
        )
        assert v_cache.tobytes() == v.tobytes()
        k32, expected_k = k_cache.astype(np.float32), k.astype(np.float32)
        np.testing.assert_array_equal(np.isnan(k32), np.isnan(expected_k))
        # As in test_elementwise_kernels.py: two normed values, each perhaps an eps off, rotated and rounded again.
        largest = np.nanmax(np.abs(expected_k), initial=0.0) * np.sqrt(2)
        assert np.nanmax(np.abs(k32 - expected_k), initial=0.0) <= 3 * EPS[dtype.name] * largest
        written = np.isin(np.arange(k32[..., 0, 0].size), self.meta.slot_mapping).reshape(k32.shape[:2])
        np.testing.assert_array_equal(k32[~written], expected_k[~written])

        keys32, values32 = np.nan_to_num(k32), np.nan_to_num(v_cache.astype(np.float32))
        real = self.meta.seq_lens > 0
        rows, lens, tables = q[real].astype(np.float32), self.meta.seq_lens[real], self.meta.block_tables[real]
        meta = replace(
            self.meta, cu_seqlens_q=np.arange(len(rows) + 1), seq_lens=lens, block_tables=tables, slot_mapping=None
        )

        def attend(values):
            return NumpyOps().attention(rows, keys32, values, meta, self.scale, self.window)

        norms = [np.linalg.norm(x, axis=-1).max() for x in (rows, keys32)]
        score = norms[0] * norms[1] * self.scale
        relative = EPS[dtype.name] + 4 * (score * head_dim**0.5 + self.meta.max_seqlen_k**0.5) * EPS32
        # Twice what the scores may be off, since numerator and denominator have it: [sequences, heads, head_dim].
        close_calls = self.query_slack()[real].sum(-1, keepdims=True) * np.abs(keys32).max() * self.scale
        relative = (relative + 2 * close_calls).repeat(head_dim, axis=-1).reshape(len(rows), -1)
        actual = cupy.asnumpy(out).astype(np.float32)
        np.testing.assert_array_equal(actual[~real], 0)
        worst = np.max(np.abs(actual[real] - attend(values32)) / (relative * attend(np.abs(values32)) + 2.0**-24))
        assert worst <= 1, f"error is {worst:.2f} of the bound"

    def query_slack(self) -> np.ndarray:
        """How far each element of the rotated q may be off because a rounding on its way was a close call."""
        dtype, (_, num_kv_heads, head_dim) = self.qkv.dtype, self.k.shape[1:]
        x = self.qkv.reshape(len(self.qkv), -1, head_dim)[:, : -2 * num_kv_heads].astype(np.float64)

        def rounded(values):
            return values.astype(dtype).astype(np.float64)

        slack = np.zeros_like(x)
        if self.norms[0] is not None:
            exact = x / np.sqrt((x**2).mean(-1, keepdims=True) + NORM_EPS) * self.norms[0].astype(np.float64)
            x, slack = rounded(exact), np.abs(rounded(exact * (1 + 40 * EPS32)) - rounded(exact * (1 - 40 * EPS32)))
        cos, sin = np.split(self.rope[self.positions].astype(np.float64)[:, None], 2, axis=-1)
        cos, sin = np.concatenate([cos, cos], -1), np.concatenate([-sin, sin], -1)
        exact = x * cos + np.roll(x, head_dim // 2, axis=-1) * sin
        size = np.abs(x * cos) + np.abs(np.roll(x, head_dim // 2, axis=-1) * sin)
        off = slack * np.abs(cos) + np.roll(slack, head_dim // 2, axis=-1) * np.abs(sin) + 4 * EPS32 * size
        return np.abs(rounded(exact + off) - rounded(exact - off))


FEW = [1, 16, 17, 64, 333, 1000]
SHAPES = [
    *attention.FEW_SEQUENCES.values(), *attention.MORE_SEQUENCES.values(),
    "paged_attention_sm90.cu", "paged_attention.cu",
]  # fmt: skip


def use(shape, monkeypatch):
    """This shape of decode_attention.cu for all batches, or this other kernel, as far as it serves."""
    shapes = {1 << 20: shape} if isinstance(shape, attention.ClusterTile) else {}
    for name in ("FEW_SEQUENCES", "MORE_SEQUENCES"):
        monkeypatch.setattr(attention, name, shapes)
    least = {"paged_attention_sm90.cu": 0}.get(shape, 1 << 30)
    monkeypatch.setattr(attention.BoxTile, "MIN_SEQUENCE_HEADS", least)


@pytest.fixture(params=["decode_attention.cu", "paged_attention_sm90.cu", "paged_attention.cu"])
def each_kernel(request, monkeypatch):
    """What the engine takes for so many sequences, then the kernels that serve others."""
    if request.param != "decode_attention.cu":
        use(request.param, monkeypatch)


@pytest.mark.gpu
@pytest.mark.usefixtures("each_kernel")
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 96, 112, 128])
def test_head_dims(dtype16, head_dim, norms):
    Case.make(FEW, dtype16, head_dim=head_dim, norms=norms).check()


@pytest.mark.gpu
@pytest.mark.usefixtures("each_kernel")
@pytest.mark.parametrize(
    "heads", [(1, 1), (2, 1), (3, 1), (8, 1), (14, 2), (16, 8), (32, 8), (6, 6), (18, 2), (40, 1)], ids=str
)
@pytest.mark.parametrize("seq_lens", [[700], [30, 513]], ids=str)
def test_heads(dtype16, heads, seq_lens):
    Case.make(seq_lens, dtype16, heads, head_dim=128).check()


@pytest.mark.gpu
@pytest.mark.usefixtures("each_kernel")
@pytest.mark.parametrize("num_sequences", [1, 2, 3, 4, 5, 8, 16, 32, 100, 300])
def test_batch_sizes(dtype16, num_sequences):
    """Each shape of the kernel that is in use."""
    seq_lens = [(37 * i * i + 100) % 900 + 1 for i in range(num_sequences)]
    Case.make(seq_lens, dtype16, heads=(4, 2), head_dim=128).check()


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("length", [2047, 2048, 2049, 8192, 32767, 32768])
def test_one_long_sequence(dtype16, length, shape, monkeypatch):
    use(shape, monkeypatch)
    Case.make([length], dtype16, heads=(4, 1), head_dim=128).check()


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_short_length(dtype16, shape, monkeypatch):
    use(shape, monkeypatch)
    Case.make(range(1, 300), dtype16, heads=(2, 1), head_dim=64).check()


@pytest.mark.gpu
@pytest.mark.usefixtures("each_kernel")
@pytest.mark.parametrize("block_size", [1, 7, 16, 32, 256])
def test_block_sizes(dtype16, block_size):
    Case.make(FEW, dtype16, block_size=block_size).check()


@pytest.mark.gpu
@pytest.mark.usefixtures("each_kernel")
@pytest.mark.parametrize("window", [1, 2, 17, 64, 65, 200, 10_000])
def test_sliding_window(dtype16, window):
    Case.make(FEW, dtype16, window=window).check()


@pytest.mark.gpu
@pytest.mark.usefixtures("each_kernel")
def test_padding_sequences(dtype16):
    # As in a captured graph whose batch is not full: they write nothing, and get zeros.
    Case.make([100, 30, 0, 0], dtype16, head_dim=128).check()


@pytest.mark.gpu
@pytest.mark.usefixtures("each_kernel")
def test_repeats_bit_for_bit(dtype16, times):
    case = Case.make([30_000, 5], dtype16)
    arguments = case.on_device()
    run = CudaOps(dtype16)._attention.with_rope
    first = run(*arguments).tobytes()
    assert all(run(*arguments).tobytes() == first for _ in range(times(20)))


@pytest.mark.gpu
@pytest.mark.usefixtures("each_kernel")
def test_graph_replay_on_new_lengths_and_tables(dtype16):
    batch, max_len = 4, 2048
    cases = [
        Case.make(lens, dtype16, (8, 2), head_dim=128, seed=i)
        for i, lens in enumerate([[max_len] * batch, [1, 2048, 17, 800], [1000, 1, 3, 0]])
    ]
    num_blocks = max(len(case.k) for case in cases)
    for case in cases:  # the shapes of the largest
        more = ((0, num_blocks - len(case.k)), *((0, 0),) * 3)
        case.k, case.v = (np.pad(x.astype(np.float32), more).astype(dtype16) for x in (case.k, case.v))
        tables = np.zeros((batch, max_len // 16), np.int32)
        tables[:, : case.meta.block_tables.shape[1]] = case.meta.block_tables
        case.meta = replace(case.meta, block_tables=tables)
        case.rope = cases[0].rope
        case.norms = cases[0].norms
    static = cases[0].on_device()
    run = CudaOps(dtype16).rope_attention
    run(*static)  # compiled and loaded before the capture
    stream, allocator = cupy.cuda.Stream(non_blocking=True), GPUAllocator()
    cupy.cuda.get_current_stream().synchronize()
    with stream, allocator.use():
        stream.begin_capture()
        out = run(*static)
        graph = stream.end_capture()
        for case in cases[1:] + cases[:1]:
            fresh = case.on_device()
            stream.synchronize()
            for target, source in zip(static[:2] + static[6:8], fresh[:2] + fresh[6:8], strict=True):
                target[...] = source
            for name in ("slot_mapping", "seq_lens", "block_tables"):
                getattr(static[8], name)[...] = getattr(fresh[8], name)
            graph.launch(stream)
            stream.synchronize()
            case.compare(out, static[6], static[7])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", ["chunk", "large head", "shared"])
def test_where_it_does_not_serve_two_kernels_do(dtype, batch):
    heads, head_dim, seq_lens = (4, 2), 64, [50, 60, 70]
    if batch == "large head":
        head_dim = 256
    case = Case.make(seq_lens, dtype, heads, head_dim)
    if batch == "chunk":  # one sequence brings all three tokens
        case.meta = replace(case.meta, cu_seqlens_q=np.array([0, 3, 3, 3], np.int32), max_seqlen_q=3)
    if batch == "shared":
        case.meta = replace(case.meta, max_seqlen_q=2)
    ops = CudaOps(dtype)
    fused, apart = case.on_device(), case.on_device()
    assert ops._attention.with_rope(*case.on_device()) is None
    out = ops.rope_attention(*fused)
    qkv, positions, rope, q_norm, k_norm, eps, k, v, meta, scale, window = apart
    q = ops.rope_store_kv(qkv, positions, rope, q_norm, k_norm, eps, k, v, meta.slot_mapping)
    expected = ops.attention(q, k, v, meta, scale, window)
    assert out.tobytes() == expected.tobytes()
    assert fused[6].tobytes() == k.tobytes()
    assert fused[7].tobytes() == v.tobytes()


@pytest.mark.gpu
def test_arguments_that_do_not_fit_are_refused():
    run = CudaOps(BF16).rope_attention
    qkv, positions, rope, q_norm, k_norm, *rest = Case.make([5, 6], BF16).on_device()
    with pytest.raises(ValueError, match="q_norm and k_norm must both be given, or neither"):
        run(qkv, positions, rope, q_norm, None, *rest)
    with pytest.raises(ValueError, match="rope_store_kv: shapes do not fit"):
        run(qkv, positions[:1], rope, q_norm, k_norm, *rest)
    with pytest.raises(ValueError, match="window is 0"):
        run(qkv, positions, rope, q_norm, k_norm, *rest[:-1], 0)


def test_every_shape_is_among_the_instances():
    names = {kernel.name for kernel in attention.instances([BF16], [128], (9, 0))}
    for num_sequences in (1, 2, 4, 5, 8):
        for num_kv_heads in (1, 2, 8, 32):
            tile = attention.ClusterTile.of(num_sequences, num_kv_heads)
            assert tile is None or tile.kernel(BF16, 128).name in names
    assert attention.ClusterTile.of(100, 8) is None
    for instances in (attention.instances([BF16], [128], (8, 9)), attention.instances([np.float32], [128], (9, 0))):
        assert all(kernel.file != "decode_attention.cu" for kernel in instances)
