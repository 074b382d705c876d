"""Policies: which positions are predicted and committed next.

The decode loop asks a policy twice a step: which open positions to evaluate, and which of those to commit. A policy
may read logits, never the tokens drawn in the same step: choosing positions by what was drawn would change the joint
distribution, and the product of group probabilities would no longer be the likelihood.

Shapes: B batch, T columns, N evaluated positions, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from anyorder.factorization import Factorization

_LATER = torch.iinfo(torch.int64).max


class Policy(ABC):
    """Which positions next. Immutable: all state of a run is in what the loop passes in."""

    def prepare(self, factorization: Factorization) -> Factorization:
        """The factorization that the run starts from; its given positions must stay the same."""
        return factorization

    @abstractmethod
    def ask(self, factorization: Factorization, is_open: Tensor) -> Tensor:
        """(B, T) bool: the open positions to evaluate in this step, at least one in every row that has any.

        Args:
            factorization: from `prepare`.
            is_open: (B, T) bool, positions without a token yet.
        """

    def choose(self, logits: Tensor, row: Tensor, column: Tensor) -> Tensor:
        """(N,) bool: which of the evaluated positions to commit, at least one a row. Default: all.

        Args:
            logits: (N, V) float32, unprocessed.
            row, column: (N,) int64, where each belongs.
        """
        return torch.ones_like(row, dtype=torch.bool)


@dataclass(frozen=True)
class GroupWise(Policy):
    """Group-wise autoregressive sampling (A3, arXiv 2601.13228): each step commits the next group."""

    size: int | None = None

    def __post_init__(self) -> None:
        if self.size is not None and (not isinstance(self.size, int) or self.size < 1):
            raise ValueError(f"size must be a whole number, at least 1, got {self.size!r}")

    def prepare(self, factorization: Factorization) -> Factorization:
        return factorization if self.size is None else factorization.regroup(self.size)

    def ask(self, factorization: Factorization, is_open: Tensor) -> Tensor:
        group = torch.where(is_open, factorization.group_ids, _LATER)
        return is_open & (group == group.amin(dim=1, keepdim=True))


def groupwise(size: int | None = None) -> GroupWise:
    """Commit the factorization's groups one after the other.

    Args:
        size: cut the factorization's order anew into groups of this size; None keeps its own groups.
    """
    return GroupWise(size)
