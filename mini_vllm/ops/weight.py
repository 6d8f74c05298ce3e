"""Weight types: what `Ops.linear` multiplies with. The type decides the arithmetic, here and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class DenseWeight:
    """A dense projection y = x @ weight.T + bias, in the checkpoint's orientation (torch.nn.Linear).

    weight: [out_features, in_features], the engine's dtype.
    bias: [out_features] or None.
    """

    weight: Any
    bias: Any = None


Weight = DenseWeight  # later: DenseWeight | Int8Weight | ...
