"""Statistics over items with bootstrap intervals, and paired tests between two runs. Knows numbers alone.

A statistic is a function of what its columns add up to over items: a mean, a ratio, a calibration error. So a resample
of the items is a weighted sum, and one bootstrap serves them all.

Shapes: N items, C columns of each, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

RESAMPLES = 2000
AT_ONCE = 1 << 24
"""Numbers of a resample that are held at the same time."""

Statistic = Callable[[Tensor], Tensor]
"""(..., C) sums over items -> (...)."""


def ratio(sums: Tensor) -> Tensor:
    """The first column over the second, such as nats a token; a mean where the second is ones."""
    return sums[..., 0] / sums[..., 1]


def calibration_error(sums: Tensor) -> Tensor:
    """Expected calibration error (arXiv 1706.04599): how far confidence is from accuracy, mean over predictions.

    Args:
        sums: (..., 3 x bins): predictions in each bin, then the sums of their confidences, then how many were right.
    """
    predictions, confidence, right = sums.unflatten(-1, (3, -1)).unbind(-2)
    return (confidence - right).abs().sum(dim=-1) / predictions.sum(dim=-1)


@dataclass(frozen=True)
class Estimate:
    """A statistic over items with its 95% interval (percentile bootstrap over items, Efron 1979)."""

    value: float
    low: float
    high: float
    items: int


def estimate(columns: Tensor, statistic: Statistic = ratio, seed: int = 0) -> Estimate:
    """A statistic of all items.

    Args:
        columns: (N, C) float64.
        statistic: of their sums.
        seed: of the resamples.

    Raises:
        ValueError: without items.
    """
    if not len(columns):
        raise ValueError("no items to take a mean of")
    resampled = torch.cat([statistic(_sums(some, columns)) for some in _resamples(len(columns), seed)])
    low, high = resampled.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(float(statistic(columns.sum(dim=0))), low, high, len(columns))


@dataclass(frozen=True)
class Difference:
    """How much greater a statistic is in one run than in another over the same items."""

    value: float
    low: float
    high: float
    p_value: float
    """Of a permutation test that swaps the two runs item by item, two-sided."""
    items: int


def paired(first: Tensor, second: Tensor, statistic: Statistic = ratio, seed: int = 0) -> Difference:
    """The statistic of the second less that of the first, over the same items in the same order.

    Args:
        first, second: (N, C) float64 each.
        statistic: of their sums.
        seed: of resamples and permutations.
    """

    def difference(one: Tensor, other: Tensor) -> Tensor:
        return statistic(other) - statistic(one)

    observed = float(difference(first.sum(dim=0), second.sum(dim=0)))
    resamples = _resamples(len(first), seed)
    resampled = torch.cat([difference(_sums(some, first), _sums(some, second)) for some in resamples])
    low, high = resampled.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    generator = torch.Generator().manual_seed(seed)
    extreme = 0
    for _ in range(RESAMPLES):
        swap = torch.rand(len(first), generator=generator)[:, None] < 0.5
        one, other = torch.where(swap, second, first), torch.where(swap, first, second)
        extreme += int(abs(float(difference(one.sum(dim=0), other.sum(dim=0)))) >= abs(observed) - 1e-12)
    return Difference(observed, low, high, (extreme + 1) / (RESAMPLES + 1), len(first))


def _sums(items: Tensor, columns: Tensor) -> Tensor:
    """(R, C): what the columns add up to over each resample."""
    counts = torch.zeros(len(items), len(columns), dtype=columns.dtype)
    return counts.scatter_add_(1, items, torch.ones_like(items, dtype=columns.dtype)) @ columns


def _resamples(items: int, seed: int) -> list[Tensor]:
    """(RESAMPLES, N) numbers of items drawn with replacement, in parts."""
    generator = torch.Generator().manual_seed(seed)
    part = max(1, min(RESAMPLES, AT_ONCE // items))
    sizes = [part] * (RESAMPLES // part) + ([RESAMPLES % part] if RESAMPLES % part else [])
    return [torch.randint(items, (size, items), generator=generator) for size in sizes]
