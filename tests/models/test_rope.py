"""RoPE tables against the papers' formulas in plain Python floats."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mini_vllm.config import RopeConfig
from mini_vllm.models.rope import inverse_frequencies, rope_table

HEAD_DIMS = [2, 10, 64, 128]


def default(theta: float, head_dim: int) -> list[float]:
    return [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]


def llama3(rope: RopeConfig, head_dim: int) -> list[float]:
    """By wavelength: short ones stay, long ones are stretched, and between the two a linear blend."""
    long_wave = rope.original_max_position_embeddings / rope.low_freq_factor
    short_wave = rope.original_max_position_embeddings / rope.high_freq_factor
    out = []
    for frequency in default(rope.theta, head_dim):
        wavelength = 2 * math.pi / frequency
        if wavelength < short_wave:
            out.append(frequency)
        elif wavelength > long_wave:
            out.append(frequency / rope.factor)
        else:
            turns = rope.original_max_position_embeddings / wavelength
            share = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
            out.append(share * frequency + (1 - share) * frequency / rope.factor)
    return out


def yarn(rope: RopeConfig, head_dim: int) -> list[float]:
    """By the number of turns over the original context, the ramp being linear in the pair's index."""
    length = rope.original_max_position_embeddings

    def index_of(turns: float) -> float:
        # The i with length * theta^(-2 i / d) / (2 pi) == turns.
        return head_dim / 2 * math.log(length / (2 * math.pi * turns), rope.theta)

    low, high = index_of(rope.beta_fast), index_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    out = []
    for i, frequency in enumerate(default(rope.theta, head_dim)):
        ramp = float(i > low) if low == high else (i - low) / (high - low)
        stretched = min(max(ramp, 0.0), 1.0)
        out.append(stretched * frequency / rope.factor + (1 - stretched) * frequency)
    return out


def expected_frequencies(rope: RopeConfig, head_dim: int) -> list[float]:
    if rope.type == "llama3":
        return llama3(rope, head_dim)
    if rope.type == "yarn":
        return yarn(rope, head_dim)
    return [f / rope.factor for f in default(rope.theta, head_dim)]


ROPES = [
    RopeConfig(),
    RopeConfig(theta=1e6),
    RopeConfig("linear", 10000.0, factor=4.0),
    RopeConfig("llama3", 500000.0, 8.0, 8192),
    RopeConfig("llama3", 500000.0, 32.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0),
    RopeConfig("llama3", 10000.0, 2.0, 512, low_freq_factor=0.5, high_freq_factor=8.0),
    RopeConfig("yarn", 1e6, 4.0, 32768, attention_factor=0.1 * math.log(4) + 1),
    RopeConfig("yarn", 10000.0, 16.0, 4096, beta_fast=16.0, beta_slow=2.0, truncate=False),
    RopeConfig("yarn", 500.0, 4.0, 32),
]


@pytest.mark.parametrize("rope", ROPES, ids=lambda r: f"{r.type}-{r.theta:g}-{r.factor:g}")
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_frequencies(rope, head_dim):
    got = inverse_frequencies(rope, head_dim)
    assert got.dtype == np.float32
    assert got.shape == (head_dim // 2,)
    # float32 roundings: of the exponent, where x^y turns a relative error u into u y ln x, and of six operations.
    rtol = 2.0**-24 * (math.log(rope.theta) + 6)
    if rope.type in ("llama3", "yarn"):
        rtol *= rope.factor  # in a blend, where an error of the ramp moves between f and f / factor
    np.testing.assert_allclose(got, expected_frequencies(rope, head_dim), rtol=rtol)


def test_scalings_have_all_three_parts():
    """The configs above exercise kept, blended and stretched pairs: a formula that drops one cannot pass."""
    for rope, head_dim in ((ROPES[3], 128), (ROPES[5], 64), (ROPES[6], 128), (ROPES[7], 128), (ROPES[8], 64)):
        ratio = np.array(expected_frequencies(rope, head_dim)) / default(rope.theta, head_dim)
        assert (ratio == 1).any()
        assert np.isclose(ratio, 1 / rope.factor, rtol=1e-9).any()
        assert ((ratio < 0.999) & (ratio > 1.001 / rope.factor)).any()


@pytest.mark.parametrize("rope", ROPES, ids=lambda r: f"{r.type}-{r.theta:g}-{r.factor:g}")
def test_table(rope):
    head_dim, length = 64, 50
    table = rope_table(rope, head_dim, length)
    assert table.dtype == np.float32
    assert table.shape == (length, head_dim)
    frequencies = expected_frequencies(rope, head_dim)
    for position in range(length):
        for i, frequency in enumerate(frequencies):
            angle = position * frequency
            expected = rope.attention_factor * math.cos(angle), rope.attention_factor * math.sin(angle)
            # An angle is off by its own roundings; cos and sin pass that on, and round once more.
            atol = 2.0**-24 * (angle * (math.log(rope.theta) + 8) * max(1, rope.factor) + 4)
            assert table[position, i] == pytest.approx(expected[0], abs=atol)
            assert table[position, i + head_dim // 2] == pytest.approx(expected[1], abs=atol)


def test_position_zero_does_not_turn():
    for rope in ROPES:
        table = rope_table(rope, 8, 1)
        np.testing.assert_array_equal(table[0], np.float32([rope.attention_factor] * 4 + [0] * 4))


def test_long_contexts_turn_as_in_training():
    """Angles are products of float32, as where the weights were trained, not the more precise ones of float64."""
    position, frequencies = 100_000, inverse_frequencies(RopeConfig(), 64)
    table = rope_table(RopeConfig(), 64, position + 1)
    angles = np.float32(position) * frequencies
    np.testing.assert_array_equal(table[position], np.concatenate([np.cos(angles), np.sin(angles)]))
    exact = np.array([position * f for f in default(10000.0, 64)])
    assert 1e-4 < np.abs(np.cos(exact) - table[position, :32]).max() < 1e-2


def test_llama3_with_every_wave_on_one_side():
    everything_short = RopeConfig("llama3", 10000.0, 8.0, 10**9)
    np.testing.assert_allclose(inverse_frequencies(everything_short, 64), default(10000.0, 64), rtol=1e-6)
    everything_long = RopeConfig("llama3", 10000.0, 8.0, 1)
    stretched = [f / 8 for f in default(10000.0, 64)]
    np.testing.assert_allclose(inverse_frequencies(everything_long, 64), stretched, rtol=1e-6)


def test_yarn_ramp_of_width_zero_is_a_step():
    """Where both ends fall on the same pair, 0 / 0 would be NaN."""
    rope = RopeConfig("yarn", 10000.0, 4.0, 4096, beta_fast=8.0, beta_slow=8.0, truncate=False)
    ratio = inverse_frequencies(rope, 64) / np.float32(default(10000.0, 64))
    assert np.isfinite(ratio).all()
    np.testing.assert_allclose(
        ratio, [f / d for f, d in zip(yarn(rope, 64), default(10000.0, 64), strict=True)], rtol=1e-5
    )
    assert set(np.round(ratio, 3).tolist()) == {1.0, 0.25}


def test_yarn_ramp_is_cut_at_the_ends():
    """With few turns its start lies before the first pair, with a long context its end behind the last."""
    for rope in (RopeConfig("yarn", 10000.0, 4.0, 64), RopeConfig("yarn", 100.0, 4.0, 10**6)):
        np.testing.assert_allclose(inverse_frequencies(rope, 16), yarn(rope, 16), rtol=1e-5)


def test_unknown_type():
    with pytest.raises(ValueError, match="'dynamic'"):
        inverse_frequencies(RopeConfig("dynamic"), 64)
