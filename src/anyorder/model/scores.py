"""How a layer's attention scores keys: what transformers hands an attention function besides tensors.

This module knows one layer's numbers, and neither rows nor intervals.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """Of products of queries and keys."""

    scaling: float | None = None
    """Their factor; None: D ** -0.5, D being the size of a head."""
    dropout: float = 0.0
    """Of the weights that are made of them."""
    window: int | None = None
    """Positions that a row looks at, its own included; None: no sliding window."""
    softcap: float | None = None
    """What they stay below (Gemma 2); None: nothing."""

    def factor(self, size: int) -> float:
        """`scaling`, for heads of a size."""
        return float(size**-0.5) if self.scaling is None else self.scaling

    def capped(self, scores: Tensor) -> Tensor:
        """Scores of any shape, kept below `softcap` if there is one."""
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)
