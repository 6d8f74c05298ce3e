"""Weight types: what `Ops.linear` multiplies with. The type decides the arithmetic, here and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class DenseWeight:
    """A dense projection y = x @ weight.T + bias, in the checkpoint's orientation (torch.nn.Linear).

    weight: [out_features, in_features], the engine's dtype.
    bias: [out_features] or None.
    """

    weight: Any
    bias: Any = None


Weight = DenseWeight  # later: DenseWeight | Int8Weight | ...


@dataclass(frozen=True, eq=False)
class RepeatedBlock:
    """A tensor that holds `block` over and over from its element `start` on: what `Ops.load_weight` takes as a part.

    A stand-in for large weights, of which a backend can write gigabytes without reading them from the host.
    NumPy takes it as an array.
    """

    block: np.ndarray  # [N]
    start: int
    shape: tuple[int, ...]

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.resize(np.roll(self.block, -self.start), self.shape).astype(dtype or self.block.dtype, copy=False)

    def copies(self) -> Iterator[tuple[int, bool, int, int]]:
        """The tensor in a few copies: (offset, whether from the block or from the tensor itself, its offset, count).

        In elements and in this order. Once a whole period is there, what is there doubles with each copy.
        """
        size, period = math.prod(self.shape), len(self.block)
        head = min(size, period - self.start)
        yield 0, True, self.start, head
        done = min(size, period)
        if done > head:
            yield head, True, 0, done - head
        while done < size:
            count = min(done, size - done)
            yield done, False, 0, count
            done += count
