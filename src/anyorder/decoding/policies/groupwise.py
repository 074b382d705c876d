"""Group-wise autoregressive sampling: the factorization's groups, one after the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from anyorder.core.factorization import Factorization
from anyorder.decoding.policies.base import GroupPolicy

_LATER = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class GroupWise(GroupPolicy):
    """Each step commits the next group (A3, arXiv 2601.13228).

    Args:
        size: cut the factorization's order anew into groups of this size; None keeps its own groups.
    """

    keeps_order: ClassVar[bool] = True
    size: int | None = None

    def __post_init__(self) -> None:
        if self.size is not None and (not isinstance(self.size, int) or isinstance(self.size, bool) or self.size < 1):
            raise ValueError(f"size must be a whole number, at least 1, got {self.size!r}")

    def prepare(self, factorization: Factorization) -> Factorization:
        return factorization if self.size is None else factorization.regroup(self.size)

    def candidates(self, factorization: Factorization, is_open: Tensor) -> Tensor:
        group = torch.where(is_open, factorization.group_ids, _LATER)
        return is_open & (group == group.amin(dim=1, keepdim=True))
