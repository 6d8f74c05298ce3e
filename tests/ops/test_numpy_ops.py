"""Every op of the specification against its formula, written plainly in float64.

Tolerances: u = eps / 2 is the relative error of one rounding. Inputs are exact in their dtype, sums of n terms
are accumulated in float32 (n u32 of the sum of magnitudes) and the result is rounded once to the dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest

from mini_vllm.ops import numpy_ops
from mini_vllm.ops.base import BANNED, AttentionMetadata, SamplingBatch
from mini_vllm.ops.numpy_ops import NumpyOps
from mini_vllm.ops.philox import exponential_noise
from mini_vllm.ops.weight import DenseWeight

DTYPES = [np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
U32 = 2.0**-24
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_shape = pytest.mark.parametrize(("rows", "columns"), [(1, 111), (19, 500), (989, 111), (1, 1), (3, 2)])


def unit_roundoff(dtype: np.dtype) -> float:
    return float(ml_dtypes.finfo(dtype).eps) / 2


def random(seed: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def f64(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float64)


def assert_close(got: np.ndarray, expected: np.ndarray, atol: np.ndarray | float, dtype: np.dtype) -> None:
    """|got - expected| within `atol` and one rounding of the result."""
    assert got.dtype == dtype
    assert got.shape == expected.shape
    # Below the smallest normal number the spacing no longer shrinks.
    rounding = unit_roundoff(dtype) * np.abs(expected) + float(ml_dtypes.finfo(dtype).smallest_subnormal) / 2
    allowed = atol + rounding
    excess = np.abs(f64(got) - expected) - allowed
    assert (excess <= 0).all(), f"off by {excess.max():.3g} more than allowed at {np.argwhere(excess > 0)[:5].tolist()}"


# ---- transformer ------------------------------------------------------------------------------------------


@each_dtype
def test_load_weight(dtype):
    """Parts in any dtype become one matrix, or vector, in the engine's."""
    for shapes in ([(5, 7), (1, 7), (3, 7)], [(4, 6)], [(3,), (2,)]):
        parts = [random(i, shape, DTYPES[i % 3]) for i, shape in enumerate(shapes)]
        got = NumpyOps(dtype).load_weight(parts)
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, np.concatenate([f64(part) for part in parts]).astype(dtype))


@each_dtype
def test_embedding(dtype):
    table = random(0, (37, 111), dtype)
    ids = np.array([36, 0, 5, 5, 1], np.int32)
    out = NumpyOps(dtype).embedding(ids, table)
    assert out.dtype == dtype
    for row, token in enumerate(ids):
        np.testing.assert_array_equal(out[row], table[token])
    previous = np.array([7, 9], np.int32)
    pending = NumpyOps(dtype).embedding(np.array([3, -1, -2], np.int32), table, previous)
    np.testing.assert_array_equal(pending, table[[3, 7, 9]])


@each_dtype
@each_shape
def test_rms_norm(dtype, rows, columns):
    x, weight = random(1, (rows, columns), dtype), random(2, (columns,), dtype)
    eps = 0.1  # large enough to be seen
    expected = f64(x) / np.sqrt((f64(x) ** 2).sum(axis=-1, keepdims=True) / columns + eps) * f64(weight)
    got = NumpyOps(dtype).rms_norm(x, weight, eps)
    assert_close(got, expected, (columns / 2 + 4) * U32 * np.abs(expected), dtype)


def test_rms_norm_of_heads():
    x, weight = random(1, (5, 3, 16), DTYPES[0]), random(2, (16,), DTYPES[0])
    ops = NumpyOps()
    for head in range(3):
        np.testing.assert_array_equal(ops.rms_norm(x, weight, 1e-6)[:, head], ops.rms_norm(x[:, head], weight, 1e-6))


@each_dtype
@each_shape
def test_add_rms_norm(dtype, rows, columns):
    x, residual, weight = (random(i, shape, dtype) for i, shape in enumerate([(rows, columns)] * 2 + [(columns,)]))
    got, total = NumpyOps(dtype).add_rms_norm(x, residual, weight, 0.1)
    np.testing.assert_array_equal(total, (f64(x) + f64(residual)).astype(dtype))
    expected = f64(total) / np.sqrt((f64(total) ** 2).mean(axis=-1, keepdims=True) + 0.1) * f64(weight)
    assert_close(got, expected, (columns / 2 + 4) * U32 * np.abs(expected), dtype)


@each_dtype
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 111, 500), (19, 500, 111), (989, 111, 3), (1, 1, 1)])
def test_linear_and_logits(dtype, bias, rows, inputs, outputs):
    x, w, b = random(1, (rows, inputs), dtype), random(2, (outputs, inputs), dtype), random(3, (outputs,), dtype)
    weight = DenseWeight(w, b if bias else None)
    expected = np.einsum("ti,oi->to", f64(x), f64(w)) + (f64(b) if bias else 0)
    magnitude = np.einsum("ti,oi->to", np.abs(f64(x)), np.abs(f64(w))) + (np.abs(f64(b)) if bias else 0)
    atol = (inputs + 1) * U32 * magnitude
    ops = NumpyOps(dtype)
    assert_close(ops.linear(x, weight), expected, atol, dtype)
    assert_close(ops.logits(x, weight), expected, atol, DTYPES[0])


@each_dtype
@each_shape
def test_silu_and_mul(dtype, rows, columns):
    gate_up = 4 * random(1, (rows, 2 * columns), dtype)
    gate_up[0, 0] = -200  # exp(200) is infinite in float32
    gate, up = f64(gate_up[:, :columns]), f64(gate_up[:, columns:])
    expected = gate / (1 + np.exp(-gate)) * up
    got = NumpyOps(dtype).silu_and_mul(gate_up)
    assert_close(got, expected, 8 * U32 * np.abs(expected), dtype)


def rope_table(head_dim: int, length: int) -> np.ndarray:
    """Some angles for each position, [length, head_dim] float32."""
    angles = np.random.default_rng(5).uniform(0, 2 * math.pi, (length, head_dim // 2))
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)


def rotate(x: np.ndarray, position: int, table: np.ndarray) -> np.ndarray:
    """One head: element i and element i + D/2 are a complex number that turns by the position's angle. float64."""
    half = len(x) // 2
    turned = [complex(x[i], x[i + half]) * complex(table[position, i], table[position, i + half]) for i in range(half)]
    return np.array([z.real for z in turned] + [z.imag for z in turned])


@each_dtype
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 16), (3, 1, 10), (2, 2, 2)])
def test_rope_store_kv(dtype, qk_norm, heads, kv_heads, head_dim):
    num_tokens, num_blocks, block_size, eps = 19, 9, 3, 0.1
    rng = np.random.default_rng(4)
    qkv = random(1, (num_tokens, (heads + 2 * kv_heads) * head_dim), dtype)
    q_norm, k_norm = (random(seed, (head_dim,), dtype) if qk_norm else None for seed in (2, 3))
    table = rope_table(head_dim, 50)
    positions = rng.integers(0, 50, num_tokens).astype(np.int32)
    # The last row stays free: there Python's index -1, taken for padding, would write.
    slots = rng.permutation(num_blocks * block_size - 1)[:num_tokens].astype(np.int32)
    slots[[0, 7]] = -1
    caches = [np.full((num_blocks, block_size, kv_heads, head_dim), np.nan, dtype) for _ in range(2)]
    before = qkv.copy()
    ops = NumpyOps(dtype)
    q = ops.rope_store_kv(qkv, positions, table, q_norm, k_norm, eps, *caches, slots)

    np.testing.assert_array_equal(qkv, before)
    assert q.shape == (num_tokens, heads, head_dim)
    k_rows, v_rows = (cache.reshape(-1, kv_heads, head_dim) for cache in caches)
    parts = qkv.reshape(num_tokens, heads + 2 * kv_heads, head_dim)

    def check_rotated(got: np.ndarray, head: np.ndarray, position: int, norm: np.ndarray | None) -> None:
        if norm is not None:
            head = ops.rms_norm(head, norm, eps)  # rounded to the dtype between the two, as in the checkpoints' code
        expected = rotate(f64(head), position, table)
        assert_close(got, expected, 3 * U32 * 2 * np.abs(f64(head)).max(), dtype)

    for t in range(num_tokens):
        for h in range(heads):
            check_rotated(q[t, h], parts[t, h], positions[t], q_norm)
        if slots[t] < 0:
            continue
        for h in range(kv_heads):
            check_rotated(k_rows[slots[t], h], parts[t, heads + h], positions[t], k_norm)
            np.testing.assert_array_equal(v_rows[slots[t], h], parts[t, heads + kv_heads + h])
    untouched = np.setdiff1d(np.arange(num_blocks * block_size), slots)
    assert len(untouched) == num_blocks * block_size - (num_tokens - 2)
    for rows in (k_rows, v_rows):
        assert np.isnan(f64(rows[untouched])).all()


# ---- attention --------------------------------------------------------------------------------------------


@dataclass
class Paged:
    """Sequences with random K/V scattered over random blocks of a cache that is NaN everywhere else."""

    query_lens: list[int]
    seq_lens: list[int]
    block_size: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: np.dtype
    keys: list[np.ndarray] = field(init=False)  # per sequence [seq_len, kv_heads, head_dim]
    values: list[np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(11)
        shape = (self.kv_heads, self.head_dim)
        needed = [-(-n // self.block_size) for n in self.seq_lens]
        num_blocks = sum(needed) + 3
        self.k_cache, self.v_cache = np.full((2, num_blocks, self.block_size, *shape), np.nan, self.dtype)
        # Unused entries name block 0, as build_model_input leaves them: here it is never written.
        free = iter(1 + rng.permutation(num_blocks - 1))
        self.block_tables = np.zeros((len(needed), max(needed) + 1), np.int32)
        self.keys, self.values = [], []
        for row, (count, length) in enumerate(zip(needed, self.seq_lens, strict=True)):
            self.block_tables[row, :count] = [next(free) for _ in range(count)]
            for cache, host in ((self.k_cache, self.keys), (self.v_cache, self.values)):
                host.append(rng.standard_normal((length, *shape)).astype(self.dtype))
                for position in range(length):
                    block = self.block_tables[row, position // self.block_size]
                    cache[block, position % self.block_size] = host[-1][position]
        self.q = rng.standard_normal((sum(self.query_lens), self.heads, self.head_dim)).astype(self.dtype)

    @property
    def meta(self) -> AttentionMetadata:
        return AttentionMetadata(
            slot_mapping=np.full(sum(self.query_lens), -1, np.int32),
            cu_seqlens_q=np.cumsum([0, *self.query_lens]).astype(np.int32),
            seq_lens=np.array(self.seq_lens, np.int32),
            block_tables=self.block_tables,
            max_seqlen_q=max(self.query_lens),
            max_seqlen_k=max(self.seq_lens),
        )

    def check(self, scale: float, window: int | None, ops: NumpyOps | None = None) -> None:
        """Compare `NumpyOps.attention` with one softmax a query and head over the contiguous keys."""
        ops = ops or NumpyOps(self.dtype)
        out = ops.attention(self.q, self.k_cache, self.v_cache, self.meta, scale, window)
        out = out.reshape(self.q.shape)
        row = 0
        for query_len, seq_len, keys, values in zip(
            self.query_lens, self.seq_lens, self.keys, self.values, strict=True
        ):
            for position in range(seq_len - query_len, seq_len):
                visible = [j for j in range(position + 1) if window is None or position - j < window]
                for head in range(self.heads):
                    kv_head = head // (self.heads // self.kv_heads)
                    q = f64(self.q[row, head])
                    k, v = f64(keys[visible, kv_head]), f64(values[visible, kv_head])
                    scores = k @ q * scale
                    weights = np.exp(scores - scores.max())
                    expected = weights @ v / weights.sum()
                    # A score is off by at most (D + 1) u of its terms' magnitudes, a weight relatively by twice that.
                    score_error = (self.head_dim + 1) * U32 * (np.abs(k) @ np.abs(q)).max() * scale
                    atol = (2 * score_error + (2 * len(visible) + 8) * U32) * np.abs(v).max()
                    assert_close(out[row, head], expected, atol, self.dtype)
                row += 1


MIXED = {"query_lens": [1, 7, 1, 0, 19, 1, 2], "seq_lens": [1, 7, 33, 4, 40, 16, 50]}


@each_dtype
@pytest.mark.parametrize("window", [None, 1, 5, 1000])
@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_attention_of_mixed_steps(dtype, window, block_size):
    Paged(**MIXED, block_size=block_size, heads=4, kv_heads=2, head_dim=8, dtype=dtype).check(0.35, window)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize("head_dim", [2, 10, 64])
def test_attention_heads(heads, kv_heads, head_dim):
    Paged([1, 5, 1], [9, 6, 17], 4, heads, kv_heads, head_dim, DTYPES[0]).check(head_dim**-0.5, None)


@pytest.mark.parametrize(
    ("query_lens", "seq_lens"),
    [
        ([1], [1]),
        ([1, 1, 1], [1, 1, 1]),
        ([1] * 5, [16, 17, 15, 32, 1]),
        ([1, 0, 1, 0], [5, 9, 3, 0]),
        ([0, 2], [4, 5]),
    ],
)
def test_attention_of_short_steps(query_lens, seq_lens):
    Paged(query_lens, seq_lens, 16, 2, 1, 8, DTYPES[0]).check(1.0, None)


@each_dtype
def test_attention_without_keys_is_zero(dtype):
    """As in the padding of a step; beside it, nothing changes."""
    case = Paged([1, 1, 1], [3, 0, 2], 2, 2, 1, 8, dtype)
    ops = NumpyOps(dtype)
    out = ops.attention(case.q, case.k_cache, case.v_cache, case.meta, 1.0)
    assert not out[1].any()
    meta = replace(
        case.meta,
        cu_seqlens_q=np.arange(3, dtype=np.int32),
        seq_lens=case.meta.seq_lens[::2],
        block_tables=case.block_tables[::2],
    )
    assert out[::2].tobytes() == ops.attention(case.q[::2].copy(), case.k_cache, case.v_cache, meta, 1.0).tobytes()


@pytest.mark.parametrize("tile", [1, 4, 5])
@pytest.mark.parametrize("window", [None, 3, 6])
def test_attention_of_long_chunks_in_tiles(tile, window, monkeypatch):
    monkeypatch.setattr(numpy_ops, "QUERY_TILE", tile)
    Paged([5, 20, 1, 4], [5, 31, 8, 12], 4, 2, 2, 8, DTYPES[0]).check(0.35, window)


@each_dtype
def test_attention_does_not_depend_on_earlier_calls(dtype):
    """Whatever memory the backend keeps between steps: large, small and mixed steps in turn."""
    ops = NumpyOps(dtype)
    shape = {"block_size": 4, "heads": 2, "kv_heads": 1, "head_dim": 8, "dtype": dtype}
    for query_lens, seq_lens in (([1] * 6, [60, 3, 9, 4, 33, 1]), ([1, 1], [2, 7]), ([4, 1], [6, 70]), ([1], [1])):
        for window in (None, 3):
            Paged(query_lens, seq_lens, **shape).check(0.35, window, ops)


def test_attention_leaves_its_inputs_as_they_are():
    case = Paged(**MIXED, block_size=4, heads=4, kv_heads=2, head_dim=8, dtype=DTYPES[0])
    before = [array.copy() for array in (case.q, case.k_cache, case.v_cache)]
    NumpyOps().attention(case.q, case.k_cache, case.v_cache, case.meta, 0.35)
    for array, copy in zip((case.q, case.k_cache, case.v_cache), before, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_attention_survives_large_scores():
    """exp of a raw score would overflow."""
    case = Paged([3, 1], [3, 5], 4, 2, 2, 8, DTYPES[0])
    case.q *= 100
    case.check(1.0, None)


# ---- compositions -----------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("with_residual", [False, True])
def test_add_norm_linear_and_swiglu(dtype, with_residual):
    """By the formulas, rounded wherever the single ops round."""
    ops, rows, inputs, outputs = NumpyOps(dtype), 5, 111, 58
    x, residual, norm_weight = (random(i, shape, dtype) for i, shape in enumerate([(rows, inputs)] * 2 + [(inputs,)]))
    w, b = random(3, (outputs, inputs), dtype), random(4, (outputs,), dtype)
    total = (f64(x) + f64(residual)).astype(dtype) if with_residual else x
    normed = f64(ops.rms_norm(total, norm_weight, 0.1))
    expected, magnitude = normed @ f64(w).T + f64(b), np.abs(normed) @ np.abs(f64(w)).T + np.abs(f64(b))
    arguments = x, residual if with_residual else None, norm_weight, 0.1, DenseWeight(w, b)

    got, new_residual = ops.add_norm_linear(*arguments)
    np.testing.assert_array_equal(new_residual, total)
    assert_close(got, expected, (inputs + 1) * U32 * magnitude, dtype)

    gate, up = np.split(f64(got), 2, axis=1)
    gated, new_residual = ops.add_norm_swiglu(*arguments)
    np.testing.assert_array_equal(new_residual, total)
    expected = gate / (1 + np.exp(-gate)) * up
    assert_close(gated, expected, 8 * U32 * np.abs(expected), dtype)


@each_dtype
@pytest.mark.parametrize("window", [None, 4])
def test_rope_attention_sees_the_keys_that_it_writes(dtype, window):
    case = Paged([1, 3, 1], [9, 6, 17], 4, heads=4, kv_heads=2, head_dim=8, dtype=dtype)
    # Each token's slot, so that it overwrites the key and value that the case has put there.
    lens = enumerate(zip(case.query_lens, case.seq_lens, strict=True))
    rows = [(i, p) for i, (query_len, seq_len) in lens for p in range(seq_len - query_len, seq_len)]
    slots = np.array([case.block_tables[i, p // 4] * 4 + p % 4 for i, p in rows], np.int32)
    positions = np.array([p for _, p in rows], np.int32)
    qkv, q_norm, k_norm = random(1, (len(rows), 64), dtype), random(2, (8,), dtype), random(3, (8,), dtype)
    rope = positions, rope_table(8, 20), q_norm, k_norm, 0.1
    meta = replace(case.meta, slot_mapping=slots)
    ops, k_cache, v_cache = NumpyOps(dtype), case.k_cache.copy(), case.v_cache.copy()

    got = ops.rope_attention(qkv, *rope, k_cache, v_cache, meta, 0.35, window)
    case.q = ops.rope_store_kv(qkv, *rope, case.k_cache, case.v_cache, slots)
    assert k_cache.tobytes() == case.k_cache.tobytes()  # NaN in slots of no key included
    assert v_cache.tobytes() == case.v_cache.tobytes()
    for (i, p), slot in zip(rows, slots, strict=True):  # what `check` takes for the keys and values
        case.keys[i][p], case.values[i][p] = k_cache.reshape(-1, 2, 8)[slot], v_cache.reshape(-1, 2, 8)[slot]
    case.check(0.35, window)
    np.testing.assert_array_equal(got, ops.attention(case.q, k_cache, v_cache, meta, 0.35, window))


# ---- sampling ---------------------------------------------------------------------------------------------


@dataclass
class Rules:
    """The sampling rules of one row, in plain Python."""

    seed: int = 0
    position: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    counts: dict[int, int] = field(default_factory=dict)  # of the tokens seen; 0: only in the prompt
    bias: dict[int, float] = field(default_factory=dict)
    allowed: list[int] = field(default_factory=list)

    def ruled(self, logits: list[float]) -> list[float]:
        """What greedy decoding takes the maximum of."""
        out = []
        for token, logit in enumerate(logits):
            if self.allowed and token not in self.allowed:
                logit = -math.inf
            logit += self.bias.get(token, 0.0)
            if token in self.counts:
                r = self.repetition_penalty
                logit = logit / r if logit > 0 else logit * r
                logit -= self.frequency_penalty * self.counts[token]
                logit -= self.presence_penalty if self.counts[token] > 0 else 0.0
            out.append(logit)
        return out

    def probabilities(self, logits: list[float]) -> list[float]:
        """The distribution that is drawn from: 0 for a token that a filter removes."""
        scaled = [x / self.temperature for x in self.ruled(logits)]
        peak = max(scaled)
        p = [math.exp(x - peak) for x in scaled]
        p = [x if x >= self.min_p else 0.0 for x in p]
        if self.top_k:
            kth = sorted(p, reverse=True)[min(self.top_k, len(p)) - 1]
            p = [x if x >= kth else 0.0 for x in p]
        if self.top_p < 1:
            limit = self.top_p * sum(p)
            p = [x if sum(y for y in p if y > x) < limit else 0.0 for x in p]
        return [x / sum(p) for x in p]


def csr(rows: list[dict[int, float]], dtype: type) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    offsets = np.cumsum([0] + [len(row) for row in rows]).astype(np.int32)
    ids = np.array([token for row in rows for token in row], np.int32)
    return offsets, ids, np.array([value for row in rows for value in row.values()], dtype)


def batch_of(rules: list[Rules]) -> SamplingBatch:
    def column(name: str, dtype: type) -> np.ndarray:
        return np.array([getattr(r, name) for r in rules], dtype)

    batch = SamplingBatch(
        **{name: column(name, np.float32) for name in ("temperature", "top_p", "min_p")},
        top_k=column("top_k", np.int32),
        seeds=column("seed", np.uint64),
        positions=column("position", np.int32),
        any_random=any(r.temperature > 0 for r in rules),
        any_filter=any(r.top_k or r.top_p < 1 or r.min_p for r in rules),
    )
    if any(r.counts for r in rules):
        offsets, ids, counts = csr([r.counts for r in rules], np.int32)
        names = ("repetition_penalty", "presence_penalty", "frequency_penalty")
        penalties = {name: column(name, np.float32) for name in names}
        batch = replace(batch, penalty_offsets=offsets, penalty_ids=ids, penalty_counts=counts, **penalties)
    if any(r.bias for r in rules):
        offsets, ids, values = csr([r.bias for r in rules], np.float32)
        batch = replace(batch, bias_offsets=offsets, bias_ids=ids, bias_values=values)
    if any(r.allowed for r in rules):
        offsets, ids, _ = csr([dict.fromkeys(r.allowed, 0) for r in rules], np.int32)
        batch = replace(batch, allowed_offsets=offsets, allowed_ids=ids)
    return batch


def sample(logits: np.ndarray, rules: list[Rules]) -> list[int]:
    tokens = NumpyOps().sample(logits, batch_of(rules))
    assert tokens.dtype == np.int32
    assert tokens.shape == (len(rules),)
    return tokens.tolist()


def drawn_tokens(logits: list[float], rules: Rules, count: int = 2000) -> list[int]:
    """Many draws of one row, each with a seed of its own: how often each token came."""
    rows = [replace(rules, seed=seed) for seed in range(count)]
    tokens = sample(np.tile(np.array(logits, np.float32), (count, 1)), rows)
    return np.bincount(tokens, minlength=len(logits)).tolist()


def support(logits: list[float], rules: Rules) -> set[int]:
    return {token for token, count in enumerate(drawn_tokens(logits, rules)) if count}


def random_rules(rng: np.random.Generator, vocab_size: int, row: int) -> Rules:
    def sometimes(value, otherwise):
        return value if rng.random() < 0.5 else otherwise

    def tokens(most: int) -> list[int]:
        return rng.choice(vocab_size, rng.integers(0, min(most, vocab_size) + 1), replace=False).tolist()

    # Multiples of 1/64 are exact in float32: the bias and the penalties then add without a rounding.
    return Rules(
        seed=int(rng.integers(0, 2**63)),
        position=row,
        temperature=[0.0, 0.25, 1.0, 2.0][rng.integers(4)],
        top_k=sometimes(int(rng.integers(1, vocab_size + 5)), 0),
        top_p=sometimes(float(np.float32(rng.uniform(0.05, 1))), 1.0),
        min_p=sometimes(float(np.float32(rng.uniform(0, 0.5))), 0.0),
        repetition_penalty=sometimes(2.0, 1.0),
        presence_penalty=sometimes(0.75, 0.0),
        frequency_penalty=sometimes(-0.5, 0.0),
        counts=sometimes({t: int(rng.integers(0, 4)) for t in tokens(20)}, {}),
        bias=sometimes({t: float(rng.integers(-200, 200)) / 64 for t in tokens(10)}, {}),
        allowed=sometimes(tokens(vocab_size), []),
    )


@pytest.mark.parametrize("vocab_size", [1, 2, 61])
def test_sample_of_random_rules_against_brute_force(vocab_size):
    rng = np.random.default_rng(vocab_size)
    rules = [random_rules(rng, vocab_size, row) for row in range(400)]
    logits = (rng.integers(-300, 300, (len(rules), vocab_size)) / 64).astype(np.float32)
    got = sample(logits, rules)
    unclear = 0
    for row, r in enumerate(rules):
        values = logits[row].tolist()
        if r.temperature == 0:
            ruled = r.ruled(values)
            assert got[row] == ruled.index(max(ruled))  # the first of equals
            continue
        noise = exponential_noise(np.array([r.seed], np.uint64), np.array([r.position]), vocab_size)[0].tolist()

        def race(rule, values=values, noise=noise):
            p = rule.probabilities(values)
            arrival = [math.inf if q == 0 else n / q for q, n in zip(p, noise, strict=True)]
            first, second, *_ = [*sorted(arrival), math.inf]
            return arrival.index(first), second / first

        winner, lead = race(r)
        # Where a rounding can decide, in the race or at a filter's edge, the row says nothing.
        nudges = [(name, factor) for name in ("top_p", "min_p") for factor in (1 - 1e-5, 1 + 1e-5)]
        if lead < 1 + 1e-4 or any(race(replace(r, **{n: getattr(r, n) * f}))[0] != winner for n, f in nudges):
            unclear += 1
            continue
        assert got[row] == winner, r
    assert unclear <= 8


@pytest.mark.parametrize(
    "rules",
    [
        Rules(),
        Rules(temperature=0.5),
        Rules(temperature=2.0, top_k=12),
        Rules(top_p=0.8),
        Rules(min_p=0.1, counts={0: 1, 3: 2, 5: 0}, repetition_penalty=1.5, presence_penalty=0.5),
        Rules(allowed=[1, 4, 9, 16], bias={4: 1.0}),
    ],
    ids=lambda rules: "-".join(k for k, v in vars(rules).items() if v != getattr(Rules(), k)) or "plain",
)
def test_drawn_distribution(rules):
    logits = np.random.default_rng(1).standard_normal(30).tolist()
    count = 20_000
    observed = np.array(drawn_tokens(logits, rules, count))
    expected = np.array(rules.probabilities(logits)) * count
    assert (observed[expected == 0] == 0).all()
    kept = expected > 0
    statistic = ((observed - expected)[kept] ** 2 / expected[kept]).sum()
    freedom = kept.sum() - 1  # chi-square: mean `freedom`, variance twice that
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)


def test_draws_at_different_positions_of_one_seed_are_independent():
    logits = np.zeros((4000, 10), np.float32)
    tokens = sample(logits, [Rules(seed=9, position=i) for i in range(4000)])
    pairs = np.bincount([10 * a + b for a, b in pairwise(tokens)], minlength=100)
    expected = 3999 / 100
    assert ((pairs - expected) ** 2 / expected).sum() < 99 + 4 * math.sqrt(2 * 99)


def test_a_row_does_not_depend_on_slot_or_batch():
    rng = np.random.default_rng(3)
    rules = [random_rules(rng, 40, row) for row in range(50)]
    logits = rng.standard_normal((50, 40)).astype(np.float32)
    together = sample(logits, rules)
    assert [sample(logits[i : i + 1], [r])[0] for i, r in enumerate(rules)] == together
    order = rng.permutation(50)
    assert sample(logits[order], [rules[i] for i in order]) == [together[i] for i in order]


def test_sample_leaves_the_batch_as_it_is():
    rng = np.random.default_rng(3)
    batch = batch_of([random_rules(rng, 40, row) for row in range(20)])
    before = {name: np.copy(value) for name, value in vars(batch).items() if isinstance(value, np.ndarray)}
    NumpyOps().sample(rng.standard_normal((20, 40)).astype(np.float32), batch)
    for name, value in before.items():
        np.testing.assert_array_equal(getattr(batch, name), value)


def test_greedy_takes_the_first_of_equals():
    logits = np.array([[0, 2, 1, 2], [3, 3, 3, 3], [-1, -2, -1, -2]], np.float32)
    assert sample(logits, [Rules(temperature=0)] * 3) == [1, 0, 0]


def test_equal_logits_share_their_fate():
    logits = [1.0, 3.0, 2.0, 3.0, 2.0]
    assert support(logits, Rules(top_k=1)) == {1, 3}
    assert support(logits, Rules(top_k=2)) == {1, 3}
    assert support(logits, Rules(top_k=3)) == {1, 2, 3, 4}
    assert support(logits, Rules(top_p=0.01)) == {1, 3}
    assert support(logits, Rules(min_p=1.0)) == {1, 3}


def test_edges_of_the_filters():
    logits = [math.log(x) for x in (0.4, 0.3, 0.2, 0.1)]
    assert support(logits, Rules(top_p=0.39)) == {0}
    assert support(logits, Rules(top_p=0.41)) == {0, 1}  # the token that crosses top_p is kept
    assert support(logits, Rules(top_p=0.71)) == {0, 1, 2}
    assert support(logits, Rules(min_p=0.74)) == {0, 1}  # 0.3 / 0.4 = 0.75
    assert support(logits, Rules(min_p=0.76)) == {0}
    assert support(logits, Rules(top_k=4)) == support(logits, Rules(top_k=2**31 - 1)) == {0, 1, 2, 3}
    halves = [0.0, math.log(0.5), math.log(0.5)]
    assert np.exp(np.float32(halves[1])) == 0.5
    assert support(halves, Rules(top_p=0.5)) == {0}  # exactly reached
    # top_p counts the mass that top_k and min_p leave: 0.4 of 0.7 is 0.57.
    assert support(logits, Rules(top_k=2, top_p=0.56)) == {0}
    assert support(logits, Rules(top_k=2, top_p=0.58)) == {0, 1}
    # The temperature comes before the filters: at 0.5 the ratio is 0.75 squared.
    assert support(logits, Rules(temperature=0.5, min_p=0.57)) == {0}
    assert support(logits, Rules(temperature=0.5, min_p=0.55)) == {0, 1}


def test_penalties_see_the_biased_logit():
    """bias, then repetition penalty: -1 + 2 = 1 is divided; the other way round it would be -2 + 2 = 0."""
    rules = Rules(temperature=0, bias={0: 2.0}, counts={0: 0}, repetition_penalty=2.0)
    assert sample(np.array([[-1.0, 0.25]], np.float32), [rules]) == [0]
    assert sample(np.array([[-1.0, 0.75]], np.float32), [rules]) == [1]


def test_prompt_tokens_feel_only_the_repetition_penalty():
    logits = np.array([[2.0, 1.5]], np.float32)
    for counts, token in (({0: 0}, 0), ({0: 1}, 1)):
        for penalty in ("presence_penalty", "frequency_penalty"):
            assert sample(logits, [Rules(temperature=0, counts=counts, **{penalty: 1.0})]) == [token]
        assert sample(logits, [Rules(temperature=0, counts=counts, repetition_penalty=2.0)]) == [1]


def test_rows_that_ban_every_token_still_answer():
    """bad_words may forbid all that is allowed: the answer is defined, and an allowed token."""
    logits = random(0, (3, 8), DTYPES[0])
    bans = dict.fromkeys(range(8), float(BANNED))
    rules = [
        Rules(temperature=0, bias=bans),
        Rules(bias=bans, top_k=3, top_p=0.5, min_p=0.1),
        Rules(bias=bans, allowed=[5], counts={5: 2}, repetition_penalty=1.5),
    ]
    with np.errstate(all="raise"):
        tokens = sample(logits, rules)
    assert tokens[0] == 0
    assert 0 <= tokens[1] < 8
    assert tokens[2] == 5


def test_low_temperatures_do_not_overflow():
    logits = np.array([[30000.0, 29999.0, -30000.0]] * 2, np.float32)
    assert sample(logits, [Rules(temperature=0.01), Rules(temperature=0.01, top_p=0.9, min_p=0.1)]) == [0, 0]


# ---- logprobs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "vocab_size"), [(1, 111), (19, 500), (989, 61), (2, 1)])
@pytest.mark.parametrize("num_top", [0, 1, 7])
def test_logprobs(rows, vocab_size, num_top):
    rng = np.random.default_rng(0)
    logits = (5 * rng.permuted(np.tile(np.linspace(-1, 1, vocab_size), (rows, 1)), axis=1)).astype(np.float32)
    tokens = rng.integers(0, vocab_size, rows).astype(np.int32)
    got = NumpyOps().logprobs(logits.copy(), tokens, num_top)
    num_top = min(num_top, vocab_size)
    assert got.top_ids.shape == got.top_logprobs.shape == (rows, num_top)
    assert (got.logprobs.dtype, got.top_logprobs.dtype) == (np.float32, np.float32)
    assert (got.ranks.dtype, got.top_ids.dtype) == (np.int32, np.int32)
    for row in range(rows):
        values = f64(logits[row])
        exact = values - math.log(np.exp(values).sum())
        atol = (vocab_size + 8) * U32 + 20 * U32  # of the sum, and of values up to 10
        assert abs(got.logprobs[row] - exact[tokens[row]]) <= atol
        assert got.ranks[row] == 1 + (values > values[tokens[row]]).sum()
        order = sorted(range(vocab_size), key=lambda token: -exact[token])[:num_top]
        assert got.top_ids[row].tolist() == order
        assert np.abs(got.top_logprobs[row] - exact[order]).max(initial=0) <= atol


def test_logprobs_of_equal_and_huge_logits():
    got = NumpyOps().logprobs(np.array([[1, 5, 5, 5], [1e5, -1e5, 0, 1e5]], np.float32), np.array([2, 0]), 2)
    assert got.top_ids.tolist() == [[1, 2], [0, 3]]  # ties go to the lower id
    assert got.ranks.tolist() == [1, 1]
    np.testing.assert_allclose(got.logprobs, [math.log(1 / (3 + math.exp(-4))), math.log(0.5)], rtol=1e-6)

    many = np.random.default_rng(0).integers(0, 3, 500)  # a sort that is stable for a few need not be for many
    got = NumpyOps().logprobs(many[None].astype(np.float32), np.array([0]), 300)
    assert got.top_ids[0].tolist() == sorted(range(500), key=lambda token: -many[token])[:300]
