"""Means over items with bootstrap intervals, and paired tests between two runs. Knows numbers alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RESAMPLES = 2000
AT_ONCE = 1 << 24
"""Numbers of a resample that are held at the same time."""


@dataclass(frozen=True)
class Estimate:
    """A mean over items with its 95% interval (percentile bootstrap over items, Efron 1979)."""

    value: float
    low: float
    high: float
    items: int


def ratio_of_sums(numerator: Tensor, denominator: Tensor, seed: int = 0) -> Estimate:
    """sum(numerator) / sum(denominator) over items, such as nats a token; a mean if the denominator is ones.

    Args:
        numerator, denominator: (N,) float64.
        seed: of the resamples.

    Raises:
        ValueError: without items.
    """
    if not len(numerator):
        raise ValueError("no items to take a mean of")
    resampled = torch.cat([_ratio(numerator[some], denominator[some]) for some in _resamples(len(numerator), seed)])
    low, high = resampled.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(float(_ratio(numerator[None], denominator[None])), low, high, len(numerator))


@dataclass(frozen=True)
class Difference:
    """How much greater a mean is in one run than in another over the same items."""

    value: float
    low: float
    high: float
    p_value: float
    """Of a permutation test that swaps the two runs item by item, two-sided."""
    items: int


def paired(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], seed: int = 0) -> Difference:
    """second - first, each a ratio of sums over the same items in the same order.

    Args:
        first, second: numerators and denominators, (N,) float64 each.
        seed: of resamples and permutations.
    """
    (a, m), (b, n) = first, second

    def difference(rows: Tensor) -> Tensor:
        return _ratio(b[rows], n[rows]) - _ratio(a[rows], m[rows])

    observed = float(_ratio(b[None], n[None]) - _ratio(a[None], m[None]))
    resampled = torch.cat([difference(some) for some in _resamples(len(a), seed)])
    low, high = resampled.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    generator = torch.Generator().manual_seed(seed)
    extreme = 0
    for _ in range(RESAMPLES):
        swap = torch.rand(len(a), generator=generator) < 0.5
        one = _ratio(torch.where(swap, b, a)[None], torch.where(swap, n, m)[None])
        other = _ratio(torch.where(swap, a, b)[None], torch.where(swap, m, n)[None])
        extreme += int(abs(float(other - one)) >= abs(observed) - 1e-12)
    return Difference(observed, low, high, (extreme + 1) / (RESAMPLES + 1), len(a))


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return numerator.sum(dim=1) / denominator.sum(dim=1)


def _resamples(items: int, seed: int) -> list[Tensor]:
    """(RESAMPLES, N) numbers of items drawn with replacement, in parts."""
    generator = torch.Generator().manual_seed(seed)
    part = max(1, min(RESAMPLES, AT_ONCE // items))
    sizes = [part] * (RESAMPLES // part) + ([RESAMPLES % part] if RESAMPLES % part else [])
    return [torch.randint(items, (size, items), generator=generator) for size in sizes]
