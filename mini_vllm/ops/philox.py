"""The engine's random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

Counter-based: the number for (seed, position, token id) is a pure function of the three, so a draw does not
depend on the batch, the slot, the backend or on preemption. `cuda_src/sampling.cu` implements the same.

    key     = (low word of seed, high word of seed)
    counter = (token_id // 4, position, 0, 0)        output word token_id % 4 belongs to token_id
"""

from __future__ import annotations

import numpy as np

_MULTIPLIER_0, _MULTIPLIER_1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_LOW, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)


def philox4x32(counter: tuple[np.ndarray, ...], key: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, ...]:
    """Ten rounds over arrays of 32-bit words held as uint64: four counter words, two key words, four words out."""
    c0, c1, c2, c3 = (np.asarray(c, np.uint64) for c in counter)
    k0, k1 = (np.asarray(k, np.uint64) for k in key)
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = (p1 >> _SHIFT) ^ c1 ^ k0, p1 & _LOW, (p0 >> _SHIFT) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + np.uint64(_WEYL_0)) & _LOW, (k1 + np.uint64(_WEYL_1)) & _LOW
    return c0, c1, c2, c3


def exponential_noise(seeds: np.ndarray, positions: np.ndarray, vocab_size: int) -> np.ndarray:
    """Exp(1) noise for every token of every row: seeds [S] uint64, positions [S] to [S, vocab_size] float32.

    A word x becomes u = (x + 0.5) / 2^32 and then -log1p(-u): precise for small u, which is where the
    winners of the exponential race lie, and never zero.
    """
    groups = np.arange(-(-vocab_size // 4), dtype=np.uint64)[None, :]
    seeds = seeds.astype(np.uint64)[:, None]
    positions = positions.astype(np.uint64)[:, None]
    zero = np.zeros((), np.uint64)
    words = philox4x32((groups, positions, zero, zero), (seeds & _LOW, seeds >> _SHIFT))
    x = np.stack(words, axis=-1).reshape(len(seeds), -1)[:, :vocab_size]
    u = (x.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)
    with np.errstate(divide="ignore"):  # u may round to 1: infinite noise, a token that loses
        return -np.log1p(-u)
