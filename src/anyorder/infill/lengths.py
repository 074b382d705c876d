"""How many tokens a blank holds when nobody says: candidates, and how likely each is.

An any-order model knows a blank's length from what stands behind it: log p(the first known token behind the blank |
what is known in front of it), asked for n tokens further on, is the evidence for n. Nothing has to be filled for it.
Together with a prior of lengths a blank of n tokens is scored by

    a log p + c n + d log n    (where the blank opens a sentence: other c and d)

The weights are fitted on text whose lengths are known (a conditional logit; McFadden 1974), by
`benchmarks/length_prior.py`. Where nothing stands behind the blank, the prior alone speaks.

This module knows numbers; no tokens and no model.

Shapes: C candidates.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

AUTO = (*range(1, 13), 14, 16, 18, 20, 24, 28, 32)
"""The candidates of length="auto"."""
DEFAULT = 8
_FITTED = files("anyorder") / "shipped" / "length_prior.json"

Length = int | tuple[int, int] | Literal["auto"]
"""Tokens of a blank: known, in a range (both ends included), or unknown."""


def candidates(length: Length | Sequence[Length], blanks: int) -> list[tuple[int, ...]]:
    """The lengths to try for each blank; one where it is known.

    Raises:
        ValueError: if something is no length, or there are more or fewer than blanks.
    """
    lengths = length if isinstance(length, list) else [length] * blanks
    if len(lengths) != blanks:
        raise ValueError(f"{len(lengths)} lengths for {blanks} blanks: give one, or one for each blank")
    return [_tried(one) for one in lengths]


def _tried(length: Any) -> tuple[int, ...]:
    if length == "auto":
        return AUTO
    ends = length if isinstance(length, tuple) and len(length) == 2 else (length, length)
    whole = all(isinstance(n, Integral) and not isinstance(n, bool) for n in ends)
    if not whole or not 1 <= ends[0] <= ends[1]:
        raise ValueError(
            "length must be a number of tokens from 1 up, a range (lo, hi), 'auto', or a list with one of these for "
            f"each blank, got {length!r}"
        )
    return tuple(range(int(ends[0]), int(ends[1]) + 1))


def provisional(tried: Sequence[int]) -> int:
    """The length that a blank has while those before it are sought."""
    return min(tried, key=lambda n: abs(n - DEFAULT))


@dataclass(frozen=True)
class Tries:
    """What speaks for each of some lengths of one blank."""

    lengths: Tensor
    """(C,) int64."""
    behind: Tensor
    """(C,) log p of the first known token behind the blank given what is known in front of it, in nats; 0: none is."""
    opens: bool
    """Whether the blank stands where a sentence begins."""

    @property
    def features(self) -> Tensor:
        """(C, 5) float64."""
        n = self.lengths.double()
        prior = torch.stack([n, n.log()], dim=1)
        return torch.cat([self.behind.double()[:, None], prior, prior * self.opens], dim=1)


@dataclass(frozen=True)
class LengthPrior:
    """The weights of the score: a, c and d, and what is added to c and d where the blank opens a sentence."""

    behind: float
    length: float
    log_length: float
    opening_length: float
    opening_log_length: float

    def probabilities(self, tries: Tries) -> Tensor:
        """(C,) float64: of the lengths that were tried."""
        weights = torch.tensor(dataclasses.astuple(self), dtype=torch.float64)
        return (tries.features @ weights).softmax(dim=0)

    @classmethod
    def load(cls, file: Path | None = None) -> LengthPrior:
        """Weights from a JSON file; default: those of the shipped model.

        Raises:
            ValueError: if the file does not hold its weights.
        """
        source = _FITTED if file is None else file
        try:
            return cls(**json.loads(source.read_text())["weights"])
        except (ValueError, KeyError, TypeError) as error:
            names = ", ".join(field.name for field in dataclasses.fields(cls))
            raise ValueError(f"{source} is no length prior: it needs 'weights' with {names}") from error


def median(shares: Tensor) -> int:
    """The index of the middle of a distribution over lengths: off by the fewest tokens on average, where the likeliest
    length would be too short more often than not.

    Args:
        shares: (C,) probabilities, of lengths in ascending order.
    """
    return int((shares.cumsum(dim=0) >= 0.5).nonzero()[0, 0])


def fit(cases: Sequence[tuple[Tries, int]], penalty: float = 1e-3) -> LengthPrior:
    """The weights under which the true lengths are likeliest.

    Args:
        cases: a blank at several lengths, and the index of the true one (or the nearest that was tried).
        penalty: times the squared weights, a case; keeps them finite.

    Raises:
        ValueError: if there are no cases.
    """
    if not cases:
        raise ValueError("no cases to fit a length prior on")
    weights = torch.zeros(len(dataclasses.fields(LengthPrior)), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        losses = [-(tries.features @ weights).log_softmax(dim=0)[true] for tries, true in cases]
        loss = torch.stack(losses).mean() + penalty * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return LengthPrior(*weights.detach().tolist())
