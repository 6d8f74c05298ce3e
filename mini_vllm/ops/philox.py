"""The engine's random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

Counter-based: the number for (seed, position, token id) is a pure function of the three, so a draw does not
depend on the batch, the slot, the backend or on preemption. `cuda_src/sampling.cu` implements the same.

    key     = (low word of seed, high word of seed)
    counter = (token_id // 4, position, 0, 0)        output word token_id % 4 belongs to token_id
"""

from __future__ import annotations

import numpy as np

_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], np.uint64)
_WEYL = np.array([0x9E3779B9, 0xBB67AE85], np.uint64)
_ROUNDS = np.arange(10, dtype=np.uint64)
_LOW, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)


def philox4x32(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Ten rounds on 32-bit words held as uint64: counter [4, ...], key [2, ...] to words [4, ...]."""
    column = (2,) + (1,) * (counter.ndim - 1)
    multipliers = _MULTIPLIERS.reshape(column)
    round_keys = (key + _ROUNDS.reshape(10, *(1,) * counter.ndim) * _WEYL.reshape(column)) & _LOW
    even, odd = counter[0::2], counter[1::2]  # words 0 and 2 are multiplied, words 1 and 3 are mixed in
    for round_key in round_keys:
        product = even * multipliers
        even, odd = (product >> _SHIFT)[::-1] ^ odd ^ round_key, (product & _LOW)[::-1]
    return np.stack([even[0], odd[0], even[1], odd[1]])


def exponential_noise(seeds: np.ndarray, positions: np.ndarray, vocab_size: int) -> np.ndarray:
    """Exp(1) noise for every token of every row: seeds [S] uint64, positions [S] to [S, vocab_size] float32.

    A word x becomes u = (x + 0.5) / 2^32 and then -log1p(-u): precise for small u, which is where the
    winners of the exponential race lie, and never zero.
    """
    num_groups = -(-vocab_size // 4)
    counter = np.zeros((4, len(seeds), num_groups), np.uint64)
    counter[0] = np.arange(num_groups, dtype=np.uint64)
    counter[1] = positions[:, None]
    seeds = seeds.astype(np.uint64)[:, None]
    words = philox4x32(counter, np.stack([seeds & _LOW, seeds >> _SHIFT]))
    x = words.transpose(1, 2, 0).reshape(len(seeds), -1)[:, :vocab_size]
    u = (x.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)
    with np.errstate(divide="ignore"):  # u may round to 1: infinite noise, a token that loses
        return -np.log1p(-u)
