"""The random numbers: known answers, the map from (seed, position, token) to a word, and the distribution."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mini_vllm.ops.philox import exponential_noise, philox4x32

PI = 0x243F6A88_85A308D3_13198A2E_03707344, 0xA4093822_299F31D0  # digits of pi


def words(value: int, count: int) -> np.ndarray:
    """The 32-bit words of a number, the leading one first."""
    return np.array([[value >> 32 * i & 0xFFFFFFFF] for i in reversed(range(count))], np.uint64)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        (0, 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (2**128 - 1, 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (*PI, "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers_of_random123(counter, key, expected):
    out = philox4x32(words(counter, 4), words(key, 2))
    assert " ".join(f"{int(word):08x}" for (word,) in out) == expected


def philox_plain(counter: list[int], key: list[int]) -> list[int]:
    """The paper's rounds in Python integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for i in range(10):
        high0, low0 = divmod(c0 * 0xD2511F53, 2**32)
        high1, low1 = divmod(c2 * 0xCD9E8D57, 2**32)
        step0, step1 = (k0 + i * 0x9E3779B9) % 2**32, (k1 + i * 0xBB67AE85) % 2**32
        c0, c1, c2, c3 = high1 ^ c1 ^ step0, low1, high0 ^ c3 ^ step1, low0
    return [c0, c1, c2, c3]


def test_noise_of_a_token_is_a_function_of_seed_position_and_token():
    seeds = np.array([0, 1, 2**32, 2**63 - 1, 2**64 - 1], np.uint64)
    positions = np.array([0, 1, 77, 2**31 - 1, 5], np.int32)
    vocab_size = 11
    noise = exponential_noise(seeds, positions, vocab_size)
    assert noise.shape == (5, 11)
    assert noise.dtype == np.float32
    for row, (seed, position) in enumerate(zip(seeds.tolist(), positions.tolist(), strict=True)):
        for token in range(vocab_size):
            word = philox_plain([token // 4, position, 0, 0], [seed % 2**32, seed >> 32])[token % 4]
            # u = (x + 0.5) / 2^32 has 24 bits in float32; near u = 1 its rounding moves log1p(-u) by eps / (1 - u).
            u = (word + 0.5) / 2**32
            exact = -math.log1p(-u)
            tolerance = 2**-23 * (exact + u / (1 - u))
            assert abs(float(noise[row, token]) - exact) <= tolerance


def test_noise_does_not_depend_on_the_batch_or_the_vocabulary():
    seeds = np.array([3, 4, 5], np.uint64)
    positions = np.array([10, 20, 30], np.int32)
    noise = exponential_noise(seeds, positions, 1001)
    np.testing.assert_array_equal(exponential_noise(seeds[::-1], positions[::-1], 1001), noise[::-1])
    np.testing.assert_array_equal(exponential_noise(seeds[1:2], positions[1:2], 1001), noise[1:2])
    np.testing.assert_array_equal(exponential_noise(seeds, positions, 17), noise[:, :17])
    assert len(np.unique(noise)) > 0.99 * noise.size  # neither rows nor tokens repeat each other


def test_noise_is_exponential():
    noise = np.sort(exponential_noise(np.arange(8, dtype=np.uint64), np.arange(8), 25_000).ravel().astype(np.float64))
    # Kolmogorov-Smirnov: the distance of two distribution functions exceeds 1.95 / sqrt(n) with probability 1e-3.
    n = len(noise)
    cdf = -np.expm1(-noise)
    distance = max((cdf - np.arange(n) / n).max(), (np.arange(1, n + 1) / n - cdf).max())
    assert distance < 1.95 / math.sqrt(n)
    # Neighbouring tokens and positions are uncorrelated: a correlation has the standard deviation 1 / sqrt(n).
    by_position = exponential_noise(np.zeros(2000, np.uint64), np.arange(2000), 50)
    for a, b in ((by_position[:, :-1], by_position[:, 1:]), (by_position[:-1], by_position[1:])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / math.sqrt(a.size)


def test_noise_is_never_zero_or_nan(monkeypatch):
    """The extreme words 0 and 2^32 - 1 give a tiny positive number and infinity: no token wins by a division by 0."""
    extremes = (0, 1, 2**32 - 2, 2**32 - 1)
    monkeypatch.setattr(
        "mini_vllm.ops.philox.philox4x32", lambda counter, key: np.array(extremes, np.uint64).reshape(4, 1, 1)
    )
    noise = exponential_noise(np.zeros(1, np.uint64), np.zeros(1, np.int32), 4)[0]
    np.testing.assert_allclose(noise[:2], [0.5 * 2.0**-32, 1.5 * 2.0**-32], rtol=2**-23)
    assert np.isposinf(noise[2:]).all()
