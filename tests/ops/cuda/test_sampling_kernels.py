"""Sampling and log probabilities on the GPU against NumpyOps.

Scores and thresholds are computed in float32 on both sides, with logarithms, exponentials and sums that may differ in
the last bits. A drawn token may therefore differ from NumPy's only where float64 cannot tell the two apart within the
rounding errors that `Definition` derives.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

cupy = pytest.importorskip("cupy")

from mini_vllm.ops.base import BANNED, SamplingBatch, map_arrays  # noqa: E402
from mini_vllm.ops.cuda import sampling  # noqa: E402
from mini_vllm.ops.cuda.device import DeviceInfo, GPUAllocator  # noqa: E402
from mini_vllm.ops.numpy_ops import NumpyOps  # noqa: E402
from mini_vllm.ops.philox import exponential_noise  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned_memory")
EPS32 = 2.0**-23
NUMPY = NumpyOps()
VOCAB_SIZES = (1, 5, 111, 2048, 32003, 151936)


def make_sampler(max_cluster_rows=None, splits=None) -> sampling.CudaSampler:
    """A sampler with a say in how many blocks a row gets."""
    sampler = sampling.CudaSampler(DeviceInfo.of())
    if max_cluster_rows is not None:
        sampler._max_cluster_rows = max_cluster_rows
    if splits is not None:
        sampler._num_splits = lambda rows, vocab_size: splits
    return sampler


@pytest.fixture
def samplers() -> list[sampling.CudaSampler]:
    """Samplers that search a row by one block, and by a cluster where there are clusters."""
    has_clusters = DeviceInfo.of().compute_capability >= (9, 0)
    return [make_sampler(0), *([make_sampler(1 << 30)] if has_clusters else [])]


def on_device(batch: SamplingBatch) -> SamplingBatch:
    return map_arrays(batch, cupy.asarray)


def draw(sampler, logits: np.ndarray, batch: SamplingBatch) -> np.ndarray:
    return cupy.asnumpy(sampler.sample(cupy.asarray(logits), on_device(batch)))


def random_logits(rows, vocab_size, seed=0, scale=3.0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, vocab_size), np.float32) * np.float32(scale)


def plain_batch(rows, seed=0, **columns) -> SamplingBatch:
    rng = np.random.default_rng(seed)
    defaults = {
        "temperature": np.ones(rows, np.float32),
        "top_k": np.zeros(rows, np.int32),
        "top_p": np.ones(rows, np.float32),
        "min_p": np.zeros(rows, np.float32),
        "seeds": rng.integers(0, 2**64, rows, np.uint64),
        "positions": rng.integers(0, 1 << 20, rows).astype(np.int32),
        "any_filter": False,
    }
    return SamplingBatch(**{**defaults, **columns})


def csr(rng, rows, vocab_size, longest) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and ids, distinct within a row; about half of the rows have none."""
    lists = [
        rng.choice(vocab_size, min(vocab_size, int(rng.integers(1, longest))) if rng.random() < 0.5 else 0, False)
        for _ in range(rows)
    ]
    offsets = np.cumsum([0, *map(len, lists)]).astype(np.int32)
    return offsets, np.concatenate(lists).astype(np.int32)


def mixed_batch(rows, vocab_size, seed) -> SamplingBatch:
    """Every rule, in some rows each."""
    rng = np.random.default_rng(seed)

    def some(values, off, dtype):
        return np.where(rng.random(rows) < 0.5, rng.choice(values, rows), off).astype(dtype)

    allowed_offsets, allowed_ids = csr(rng, rows, vocab_size, 3000)
    bias_offsets, bias_ids = csr(rng, rows, vocab_size, 300)
    penalty_offsets, penalty_ids = csr(rng, rows, vocab_size, 5000)
    return plain_batch(
        rows,
        seed,
        temperature=some([0.01, 0.3, 0.7, 1.0, 1.5, 2.0], 0, np.float32),
        top_k=some([1, 2, 5, 20, 50, 200, 1000, 40000, 1 << 30], 0, np.int32),
        top_p=some([1e-6, 0.1, 0.5, 0.9, 0.95, 0.999], 1, np.float32),
        min_p=some([0.001, 0.05, 0.3, 1.0], 0, np.float32),
        any_filter=True,
        allowed_offsets=allowed_offsets,
        allowed_ids=allowed_ids,
        bias_offsets=bias_offsets,
        bias_ids=bias_ids,
        bias_values=np.where(
            rng.random(len(bias_ids)) < 0.2, BANNED, rng.uniform(-5, 5, len(bias_ids)).astype(np.float32)
        ),
        penalty_offsets=penalty_offsets,
        penalty_ids=penalty_ids,
        penalty_counts=rng.integers(0, 4, len(penalty_ids)).astype(np.int32),
        repetition_penalty=rng.choice([0.8, 1.0, 1.3], rows).astype(np.float32),
        presence_penalty=rng.choice([-0.5, 0.0, 1.5], rows).astype(np.float32),
        frequency_penalty=rng.choice([-0.2, 0.0, 0.3], rows).astype(np.float32),
    )


class Definition:
    """One row of `NumpyOps.sample` in float64, with what float32 may get wrong.

    Errors: x = logit / temperature is half an eps off; thresholds and scores add rounding of logarithms (values up to
    33) and of a sum: 8 eps (|x| + 33) is more than all together. A mass is off by eps |x - max| and eps a term, and
    NumPy adds V of them one by one: V eps is the classical bound of its error.
    """

    def __init__(self, ruled: np.ndarray, batch: SamplingBatch, row: int) -> None:
        temperature = batch.temperature[row]
        x = ruled.astype(np.float64)
        self.x = x / (float(temperature) if temperature > 0 else 1.0)
        finite = np.isfinite(self.x)
        self.slack = np.where(finite, 8 * EPS32 * (np.abs(np.where(finite, self.x, 0)) + 33), 0)
        self.scores = self.x
        self.possible = finite
        self.certain = finite
        if temperature > 0:
            noise = exponential_noise(batch.seeds[row : row + 1], batch.positions[row : row + 1], len(x))[0]
            with np.errstate(divide="ignore"):
                self.scores = self.x - np.log(noise.astype(np.float64))
            if batch.any_filter:
                self._filter(int(batch.top_k[row]), float(batch.top_p[row]), float(batch.min_p[row]))

    def _filter(self, k: int, p: float, min_p: float) -> None:
        best = self.x.max()
        order = np.argsort(-self.x, kind="stable")
        with np.errstate(divide="ignore"):
            floor = best + np.log(min_p)
        if 0 < k < len(self.x):
            floor = max(floor, self.x[order[k - 1]])
        self.certain = self.x >= floor + self.slack
        self.certain |= self.x >= (best if min_p == 1 else np.inf)
        if 0 < k < len(self.x) and floor == self.x[order[k - 1]]:
            self.certain |= self.x == floor
        self.possible = self.x >= floor - self.slack
        if p < 1:
            masses = np.where(self.possible, np.exp(self.x - best), 0)[order]
            above = np.cumsum(masses) - masses
            tied = np.flatnonzero(np.diff(self.x[order], prepend=np.inf))  # first of each group of equals
            above = above[tied[np.searchsorted(tied, np.arange(len(order)), side="right") - 1]]
            total = masses.sum()
            unsure = (len(self.x) + 40) * EPS32 * total + np.where(self.possible & ~self.certain, 1, 0).sum()
            within = np.empty((2, len(order)), bool)
            within[0, order] = above < p * total - unsure
            within[1, order] = above < p * total + unsure
            within[:, order[0]] = True
            self.certain, self.possible = self.certain & within[0], self.possible & within[1]

    def accepts(self, token: int) -> bool:
        if not self.possible.any():
            return token == 0
        best = np.max(self.scores - self.slack, initial=-np.inf, where=self.certain)
        return bool(self.possible[token] and self.scores[token] + self.slack[token] >= best)


def assert_draws_numpys_tokens(samplers, logits, batch) -> None:
    expected = NUMPY.sample(logits, batch)
    for sampler in samplers:
        assert_same_tokens(draw(sampler, logits, batch), expected, logits, batch)


def assert_same_tokens(actual, expected, logits, batch) -> None:
    different = np.flatnonzero(actual != expected)
    assert len(different) <= max(1, len(logits) // 8), f"{len(different)} of {len(logits)} tokens differ from NumPy's"
    ruled = NUMPY._apply_rules(logits.copy(), batch) if len(different) else None
    for row in different:
        definition = Definition(ruled[row], batch, row)
        assert definition.accepts(int(actual[row])), f"row {row}: {actual[row]} instead of {expected[row]}"
        assert definition.accepts(int(expected[row])), "the test's own definition is wrong"


# ---- the same tokens as NumPy -----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_all_rules_mixed(samplers, vocab_size, rows):
    for seed in range(2 if rows == 64 else 8):
        assert_draws_numpys_tokens(samplers, random_logits(rows, vocab_size, seed), mixed_batch(rows, vocab_size, seed))


@pytest.mark.gpu
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("scale", [0.1, 1.0, 8.0])
@pytest.mark.parametrize("order", ["random", "descending", "ascending", "coarse"])
def test_filters_over_any_row(samplers, vocab_size, scale, order):
    rows = 12
    logits = random_logits(rows, vocab_size, 1, scale)
    if order == "coarse":  # many equal values, as from weights with few bits
        logits = np.round(logits * 4) / 4
    elif order != "random":
        logits = np.ascontiguousarray(np.sort(logits, axis=1)[:, :: 1 if order == "ascending" else -1])
    ks = np.resize([0, 1, 7, 50, 100, 256, 257, 1000, 30000], rows).astype(np.int32)
    ps = np.resize([0.9, 1, 0.5, 0.99, 1, 0.05, 0.95], rows).astype(np.float32)
    for columns in ({"top_k": ks}, {"top_p": ps}, {"top_k": ks, "top_p": ps}):
        temperature = np.resize([1, 0.5, 2, 0.05], rows).astype(np.float32)
        batch = plain_batch(rows, 2, temperature=temperature, any_filter=True, **columns)
        assert_draws_numpys_tokens(samplers, logits, batch)


@pytest.mark.gpu
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("splits", [None, 1, 2, 7, 150])
def test_plain_sampling_by_any_number_of_blocks(vocab_size, splits):
    sampler = make_sampler(splits=splits)
    for rows in (1, 40):
        logits = random_logits(rows, vocab_size, rows)
        batch = plain_batch(rows, 3, temperature=np.resize([1, 0, 0.2, 2], rows).astype(np.float32))
        assert_draws_numpys_tokens([sampler], logits, batch)
        greedy = replace(batch, any_random=False)
        assert np.array_equal(draw(sampler, logits, greedy), logits.argmax(axis=1))


@pytest.mark.gpu
def test_rules_are_exact():
    logits, batch = random_logits(64, 32003, 5), mixed_batch(64, 32003, 6)
    ruled = cupy.asarray(logits)
    make_sampler()._apply_rules(ruled, on_device(batch))
    assert np.array_equal(cupy.asnumpy(ruled), NUMPY._apply_rules(logits.copy(), batch))


@pytest.mark.gpu
def test_more_rows_than_reserved():
    sampler, rows = make_sampler(splits=3), 3000
    logits, batch = random_logits(rows, 500, 7), plain_batch(rows, 8)
    for _ in range(2):  # what one launch leaves behind, the next one finds
        assert np.array_equal(draw(sampler, logits, batch), NUMPY.sample(logits, batch))


# ---- ties, and rows that are not numbers --------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("vocab_size", [1, 6, 4099, 151936])
def test_ties_go_to_the_lowest_id(samplers, vocab_size):
    rng = np.random.default_rng(9)
    logits = rng.integers(-2, 2, (16, vocab_size)).astype(np.float32)
    logits[0], logits[1] = 0, -0.0
    logits[2, ::2] = -0.0  # equal to 0
    batch = plain_batch(16, temperature=np.zeros(16, np.float32), any_random=False)
    assert np.array_equal(draw(samplers[0], logits, batch), logits.argmax(axis=1))
    mixed = replace(batch, any_random=True, any_filter=True, top_k=np.ones(16, np.int32))
    for sampler in samplers:
        assert np.array_equal(draw(sampler, logits, mixed), logits.argmax(axis=1))


ODD_BATCHES = {
    "greedy": {"temperature": np.zeros(6, np.float32)},
    "plain": {},
    "top_k": {"top_k": np.full(6, 3, np.int32), "any_filter": True},
    "large top_k": {"top_k": np.full(6, 700, np.int32), "any_filter": True},
    "top_p": {"top_p": np.full(6, 0.7, np.float32), "any_filter": True},
    "all": {
        "temperature": np.full(6, 0.01, np.float32),
        "top_k": np.full(6, 3, np.int32),
        "top_p": np.full(6, 0.7, np.float32),
        "min_p": np.full(6, 0.1, np.float32),
        "any_filter": True,
    },
}


@pytest.mark.gpu
@pytest.mark.parametrize("vocab_size", [1, 1000, 32003])
@pytest.mark.parametrize("rules", ODD_BATCHES)
def test_rows_without_a_choice(samplers, vocab_size, rules):
    logits = np.full((6, vocab_size), -np.inf, np.float32)
    logits[1, -1] = -5.0  # the only token
    logits[2] = BANNED
    logits[3, vocab_size // 2 :] = BANNED
    logits[4, vocab_size // 3] = 3e38
    logits[5] = -3e38
    expected = [0, vocab_size - 1, 0, vocab_size // 2, vocab_size // 3]
    for sampler in samplers:
        tokens = draw(sampler, logits, plain_batch(6, **ODD_BATCHES[rules]))
        assert tokens[:5].tolist() == expected
        assert 0 <= tokens[5] < vocab_size


@pytest.mark.gpu
@pytest.mark.parametrize("vocab_size", [1, 1000, 32003])
@pytest.mark.parametrize("rules", ODD_BATCHES)
def test_nan_gives_a_token_of_the_vocabulary(samplers, vocab_size, rules):
    logits = random_logits(6, vocab_size)
    logits[0] = np.nan
    logits[1, vocab_size // 2 :] = np.nan
    logits[2, -1] = -np.nan
    logits[3, 0] = np.inf
    logits[4, : vocab_size // 2] = np.inf
    logits[4, -1] = np.nan
    logits[5, ::2] = -np.inf
    batch = plain_batch(6, **ODD_BATCHES[rules])
    for sampler in samplers:
        tokens = draw(sampler, logits, batch)
        assert ((tokens >= 0) & (tokens < vocab_size)).all()
        if not batch.any_filter:  # the first NaN, as in NumPy
            with np.errstate(invalid="ignore"):
                assert np.array_equal(tokens[:3], NUMPY.sample(logits, batch)[:3])


# ---- the distribution, and what a token does not depend on ----------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("filtered", [False, True])
def test_tokens_follow_the_distribution(filtered, times):
    vocab_size, draws = 64, times(128) << 9
    row = random_logits(1, vocab_size, 10, 1.5)
    logits = np.repeat(row, draws, axis=0)
    batch = plain_batch(draws, 11, temperature=np.full(draws, 0.8, np.float32))
    scaled = row[0].astype(np.float64) / np.float32(0.8)
    if filtered:
        batch = replace(batch, any_filter=True, min_p=np.full(draws, 0.02, np.float32))
        scaled[scaled < scaled.max() + np.log(0.02)] = -np.inf
    probability = np.exp(scaled - scaled.max())
    probability /= probability.sum()
    counts = np.bincount(draw(make_sampler(), logits, batch), minlength=vocab_size)
    assert not counts[probability == 0].any()
    likely = probability * draws >= 5  # the rest are one class, as the chi-square test wants
    observed = np.append(counts[likely], counts[~likely].sum())
    expected = np.append(probability[likely], probability[~likely].sum()) * draws
    observed, expected = observed[expected > 0], expected[expected > 0]
    freedom = len(expected) - 1
    chi_square = ((observed - expected) ** 2 / expected).sum()
    assert abs(chi_square - freedom) < 5 * np.sqrt(2 * freedom)  # five standard deviations


@pytest.mark.gpu
def test_a_token_depends_on_nothing_but_its_row(samplers, times):
    rows, vocab_size = times(24), 32003
    logits, batch = random_logits(rows, vocab_size, 12), mixed_batch(rows, vocab_size, 13)
    order = np.random.default_rng(14).permutation(rows)

    def rows_of(batch, rows):
        columns = {}
        for group, names in {
            "allowed": ("allowed_ids",),
            "bias": ("bias_ids", "bias_values"),
            "penalty": ("penalty_ids", "penalty_counts"),
        }.items():
            offsets = getattr(batch, f"{group}_offsets")
            entries = [np.arange(offsets[row], offsets[row + 1]) for row in rows]
            columns[f"{group}_offsets"] = np.cumsum([0, *map(len, entries)]).astype(np.int32)
            columns |= {name: getattr(batch, name)[np.concatenate(entries)] for name in names}
        for name in ("temperature", "top_k", "top_p", "min_p", "seeds", "positions", "repetition_penalty"):
            columns[name] = getattr(batch, name)[rows]
        columns |= {name: getattr(batch, name)[rows] for name in ("presence_penalty", "frequency_penalty")}
        return replace(batch, **columns)

    together = draw(make_sampler(), logits, batch)
    for sampler in samplers:
        assert np.array_equal(draw(sampler, logits[order], rows_of(batch, order)), together[order])
        for row in range(rows):
            assert draw(sampler, logits[row : row + 1], rows_of(batch, [row])) == together[row]


@pytest.mark.gpu
@pytest.mark.parametrize("max_cluster_rows", [0, 1 << 30])
def test_capture_replays_on_new_columns(max_cluster_rows):
    sampler = make_sampler(min(max_cluster_rows, make_sampler()._max_cluster_rows))
    rows, vocab_size = 16, 32003
    cases = [(random_logits(rows, vocab_size, seed), mixed_batch(rows, vocab_size, seed)) for seed in (20, 21, 22)]
    capacity = max(len(ids) for _, b in cases for ids in (b.allowed_ids, b.bias_ids, b.penalty_ids))

    def padded(column, name):
        return np.resize(column, capacity) if name.endswith(("_ids", "_values", "_counts")) else column

    names = [name for name, value in vars(cases[0][1]).items() if isinstance(value, np.ndarray)]
    static = {name: cupy.asarray(padded(getattr(cases[0][1], name), name)) for name in names}
    batch, logits = replace(cases[0][1], **static), cupy.asarray(cases[0][0])
    sampler.sample(logits, batch)  # compiled and loaded, and its memory allocated, before the capture
    stream, allocator = cupy.cuda.Stream(non_blocking=True), GPUAllocator()
    cupy.cuda.get_current_stream().synchronize()
    with stream, allocator.use():
        stream.begin_capture()
        top = sampler.logprobs(logits, batch.positions, 5)  # any ids will do: those outside have no probability
        tokens = sampler.sample(logits, batch)
        graph = stream.end_capture()
        for host_logits, host_batch in cases:
            logits.set(host_logits, stream)
            for name in names:
                static[name].set(padded(getattr(host_batch, name), name), stream)
            graph.launch(stream)
            stream.synchronize()
            drawn = NUMPY.sample(host_logits, host_batch)
            assert_same_tokens(cupy.asnumpy(tokens), drawn, host_logits, host_batch)
            expected = np.argsort(-host_logits, axis=1, kind="stable")[:, :5]
            assert np.array_equal(cupy.asnumpy(top.top_ids), expected)


@pytest.mark.gpu
def test_memory_cannot_grow_under_capture():
    sampler, rows = make_sampler(), sampling._RESERVED_ROWS + 1
    logits, batch = cupy.zeros((rows, 8), np.float32), on_device(plain_batch(rows))
    stream, allocator = cupy.cuda.Stream(non_blocking=True), GPUAllocator()
    cupy.cuda.get_current_stream().synchronize()
    with stream, allocator.use():
        stream.begin_capture()
        with pytest.raises(RuntimeError, match="run this batch once before capturing it"):
            sampler.sample(logits, batch)
        stream.end_capture()


# ---- log probabilities --------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("num_top", [0, 1, 20, 32])
@pytest.mark.parametrize("order", ["random", "descending", "ascending", "coarse"])
def test_logprobs(samplers, vocab_size, num_top, order):
    logits = random_logits(5, vocab_size, 30)
    if order == "coarse":
        logits = np.round(logits)
    elif order != "random":
        logits = np.ascontiguousarray(np.sort(logits, axis=1)[:, :: 1 if order == "ascending" else -1])
    token_ids = np.random.default_rng(31).integers(0, vocab_size, 5).astype(np.int32)
    expected = NUMPY.logprobs(logits, token_ids, num_top)
    exact = logits.astype(np.float64)
    exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
    chosen = np.take_along_axis(exact, token_ids[:, None], axis=1)
    # NumPy sums V terms in a tree, log2 V deep; the logarithm, two subtractions and values up to 60 add roundings.
    bound = EPS32 * (60 + 2 * np.log2(vocab_size + 1))
    for sampler in samplers:
        actual = map_to_host(sampler.logprobs(cupy.asarray(logits), cupy.asarray(token_ids), num_top))
        assert np.abs(actual.logprobs - expected.logprobs).max() <= bound
        assert np.abs(actual.top_logprobs - expected.top_logprobs).max(initial=0) <= bound
        # Distinct logits may round to equal log probabilities on one side and not on the other.
        assert (actual.ranks >= 1 + (exact > chosen + bound).sum(axis=1)).all()
        assert (actual.ranks <= 1 + ((exact > chosen - bound) & (exact != chosen)).sum(axis=1)).all()
        different = actual.top_ids != expected.top_ids
        theirs, ours = (np.take_along_axis(exact, ids, axis=1) for ids in (expected.top_ids, actual.top_ids))
        assert (np.abs(theirs - ours)[different] <= bound).all()
        assert (np.diff(actual.top_ids)[ours[:, 1:] == ours[:, :-1]] > 0).all()  # ties: the lower id first


def map_to_host(value):
    return replace(value, **{name: cupy.asnumpy(array) for name, array in vars(value).items()})


@pytest.mark.gpu
@pytest.mark.parametrize("vocab_size", [40, 5000, 151936])
def test_top_tokens_of_equal_logits_are_the_lowest_ids(samplers, vocab_size):
    logits = np.zeros((2, vocab_size), np.float32)
    logits[1, -1] = 1.0
    for sampler in samplers:
        result = map_to_host(sampler.logprobs(cupy.asarray(logits), cupy.asarray(np.array([3, 3], np.int32)), 20))
        assert result.top_ids[0].tolist() == list(range(20))
        assert result.top_ids[1].tolist() == [vocab_size - 1, *range(19)]
        assert result.ranks.tolist() == [1, 2]
        assert np.allclose(result.top_logprobs[0], -np.log(vocab_size), rtol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("vocab_size", [33, 32003])
def test_logprobs_of_rows_that_are_not_numbers(samplers, vocab_size):
    logits = random_logits(4, vocab_size, 32)
    logits[0] = np.nan
    logits[1, 7] = np.nan
    logits[2] = -np.inf
    logits[3, ::2] = -np.inf
    token_ids = cupy.asarray(np.array([0, 1, 2, 3], np.int32))
    for sampler in samplers:
        result = map_to_host(sampler.logprobs(cupy.asarray(logits), token_ids, 20))
        assert np.isnan(result.logprobs[:3]).all()
        assert np.isnan(result.top_logprobs[:3]).all()
        assert ((result.top_ids >= 0) & (result.top_ids < vocab_size)).all()
        assert np.array_equal(result.top_ids[3], np.argsort(-logits[3], kind="stable")[:20])


@pytest.mark.gpu
def test_logprobs_leave_the_logits_alone(samplers):
    logits = random_logits(3, 32003, 33)
    device = cupy.asarray(logits)
    for sampler in samplers:
        sampler.logprobs(device, cupy.zeros(3, np.int32), 20)
        assert np.array_equal(cupy.asnumpy(device), logits)


# ---- refusals, and what needs no GPU ------------------------------------------------------------------------------


@pytest.mark.gpu
def test_arguments_that_do_not_fit_are_refused():
    sampler, batch = make_sampler(), on_device(plain_batch(2))
    logits, token_ids = cupy.zeros((2, 8), np.float32), cupy.zeros(2, np.int32)
    for wrong in (logits[:1], logits[0], logits[:, :0]):
        with pytest.raises(ValueError, match=r"logits must be \[rows, vocab_size\] and temperature \[rows\]"):
            sampler.sample(wrong, batch)
    with pytest.raises(ValueError, match="float32"):
        sampler.sample(logits.astype(np.float16), batch)
    with pytest.raises(ValueError, match="int32"):
        sampler.logprobs(logits, token_ids.astype(np.int64), 0)
    for num_top in (-1, sampling.MAX_TOP + 1):
        with pytest.raises(ValueError, match=f"num_top must be between 0 and {sampling.MAX_TOP}, got {num_top}"):
            sampler.logprobs(logits, token_ids, num_top)


@pytest.mark.gpu
def test_no_rows():
    sampler = make_sampler()
    assert sampler.sample(cupy.zeros((0, 8), np.float32), on_device(plain_batch(0))).shape == (0,)
    assert sampler.logprobs(cupy.zeros((0, 8), np.float32), cupy.zeros(0, np.int32), 3).top_ids.shape == (0, 3)


def test_the_tests_definition_accepts_numpys_tokens():
    for seed in range(4):
        logits, batch = random_logits(16, 500, seed), mixed_batch(16, 500, seed)
        ruled = NUMPY._apply_rules(logits.copy(), batch)
        tokens = NUMPY.sample(logits, batch)
        definitions = [Definition(ruled[row], batch, row) for row in range(16)]
        assert all(d.accepts(int(token)) for d, token in zip(definitions, tokens, strict=True))
        # Hardly any other token would be accepted: the exceptions do not swallow the rule.
        accepted = sum(d.accepts(token) for d in definitions for token in range(500))
        assert accepted <= 16 + 2
