"""Tables of cosines and sines for rotary position embedding, with the scalings that checkpoints use."""

from __future__ import annotations

import math

import numpy as np

from mini_vllm.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Radians a position turns each pair of elements: [head_dim / 2] float32.

    Computed in float32 like the checkpoints' own training code: at position 100,000 float64 would turn
    a pair by up to 0.006 radians differently.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    base = (1.0 / np.float32(rope.theta) ** exponents).astype(np.float32)
    if rope.type == "default":
        return base
    if rope.type == "linear":
        return base / np.float32(rope.factor)
    if rope.type == "llama3":
        return _llama3(base, rope)
    if rope.type == "yarn":
        return _yarn(base, rope, head_dim)
    raise ValueError(f"rope type {rope.type!r} has no table")


def _llama3(base: np.ndarray, rope: RopeConfig) -> np.ndarray:
    """Keep wavelengths the model saw many times in training, stretch those it never completed, blend between."""
    turns = np.float32(rope.original_max_position_embeddings) * base / np.float32(2 * math.pi)
    keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = np.clip(keep, 0, 1).astype(np.float32)
    return keep * base + (1 - keep) * base / np.float32(rope.factor)


def _yarn(base: np.ndarray, rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Interpolate pairs that turn less than beta_slow times over the original context, keep those above beta_fast."""

    def pair_with_turns(turns: float) -> float:
        length = rope.original_max_position_embeddings
        return head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_with_turns(rope.beta_fast), pair_with_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a step instead of a ramp; avoids 0 / 0
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low), 0, 1).astype(np.float32)
    return base / np.float32(rope.factor) * ramp + base * (1 - ramp)


def rope_table(rope: RopeConfig, head_dim: int, max_position: int) -> np.ndarray:
    """cos and sin for positions 0 to max_position - 1: [max_position, head_dim] float32, cosines first."""
    angles = np.arange(max_position, dtype=np.float32)[:, None] * inverse_frequencies(rope, head_dim)
    scale = np.float32(rope.attention_factor)
    return np.concatenate([np.cos(angles) * scale, np.sin(angles) * scale], axis=-1)
