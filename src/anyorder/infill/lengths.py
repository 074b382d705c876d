"""How many tokens a blank holds when nobody says: candidates, and how likely each is.

An any-order model knows a blank's length from what stands behind it: log p(the first known token behind the blank |
what is known in front of it), asked for n tokens further on, is the evidence for n (`lookahead`). Together with a prior
of lengths a blank of n tokens is scored by

    a log p + c n + d log n    (where the blank opens a sentence: other c and d)

The weights belong to a model. They are fitted on text whose lengths are known (a conditional logit; McFadden 1974) by
`anyorder fit-lengths`, and stand in the model's config; a model without any gets NEUTRAL. Where nothing stands behind
the blank, the prior alone speaks.

This module knows numbers; no tokens and no model.

Shapes: C candidates, M numbers of tokens beside the blank.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

import torch
from torch import Tensor

AUTO = (*range(1, 13), 14, 16, 18, 20, 24, 28, 32)
"""The candidates of length="auto"."""

Length = int | tuple[int, int] | Literal["auto"]
"""Tokens of a blank: known, in a range (both ends included), or unknown."""

DEFAULT: Length = "auto"


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


@dataclass(frozen=True)
class Tries:
    """What speaks for each of some lengths of one blank."""

    lengths: Tensor
    """(C,) int64."""
    behind: Tensor
    """(C,) log p of the first known token behind the blank given what is known in front of it, in nats; 0: none is.
    Or (C, M): the same, with M numbers of tokens between the blank and that token."""
    opens: bool
    """Whether the blank stands where a sentence begins."""
    beside: Tensor | None = None
    """(M,) the probability of each of these numbers."""

    @property
    def prior_features(self) -> Tensor:
        """(C, 4) float64."""
        n = self.lengths.double()
        plain = torch.stack([n, n.log()], dim=1)
        return torch.cat([plain, plain * self.opens], dim=1)


@dataclass(frozen=True)
class LengthPrior:
    """The weights of the score: a, c and d, and what is added to c and d where the blank opens a sentence.

    Raises:
        ValueError: for a weight that is no finite number.
    """

    behind: float
    length: float
    log_length: float
    opening_length: float
    opening_log_length: float

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
                raise ValueError(f"{name} of a length prior must be a finite number, got {value!r}")

    def log_probabilities(self, tries: Tries) -> Tensor:
        """(C,) float64, in nats: of the lengths that were tried, by evidence and prior."""
        weights = torch.tensor(dataclasses.astuple(self), dtype=torch.float64)
        evidence = weights[0] * tries.behind.double()
        if tries.beside is not None:
            evidence = (evidence + tries.beside.double().log()).logsumexp(dim=1)
        return (evidence + tries.prior_features @ weights[1:]).log_softmax(dim=0)

    @classmethod
    def of(cls, weights: Mapping[str, Any] | None) -> LengthPrior | None:
        """From a config's entry; None where it has none.

        Raises:
            ValueError: if the entry does not hold the weights.
        """
        if weights is None:
            return None
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(weights, Mapping) or set(weights) != set(names):
            raise ValueError(f"a length prior has {', '.join(names)}, got {weights!r}")
        return cls(**weights)


NEUTRAL = LengthPrior(behind=1.0, length=-0.4, log_length=0.5, opening_length=0.1, opening_log_length=1.5)
"""For a model without weights of its own: the evidence as it is, and a mild prior, by which a blank has 4 tokens on
average (n^0.5 e^(-0.4 n)) and one that opens a sentence 10 (n^2 e^(-0.3 n))."""


def chosen(shares: Tensor, opens: bool) -> int:
    """The index of the length that a blank gets.

    Inside a sentence the likeliest: it is met exactly most often, and a token too many has to be padded with something
    ("the door and."). Where the blank opens a sentence, whose length is hardly ever met exactly, the middle of the
    distribution: it is off by the fewest tokens on average, where the likeliest would be too short more often than not.

    Args:
        shares: (C,) probabilities, of lengths in ascending order.
        opens: whether the blank opens a sentence.
    """
    return int((shares.cumsum(dim=0) >= 0.5).nonzero()[0, 0]) if opens else int(shares.argmax())


def fit(cases: Sequence[tuple[Tries, int]], penalty: float = 1e-3) -> LengthPrior:
    """The weights under which the true lengths are likeliest.

    Args:
        cases: a blank at several lengths, none with gaps beside it, and the index of the true one (or the nearest that
            was tried).
        penalty: times the squared weights, a case; keeps them finite.

    Raises:
        ValueError: if there are no cases.
    """
    if not cases:
        raise ValueError("no cases to fit a length prior on")
    features = [torch.cat([tries.behind.double().view(-1, 1), tries.prior_features], dim=1) for tries, _ in cases]
    weights = torch.zeros(len(dataclasses.fields(LengthPrior)), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        losses = [-(own @ weights).log_softmax(dim=0)[true] for own, (_, true) in zip(features, cases, strict=True)]
        loss = torch.stack(losses).mean() + penalty * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return LengthPrior(*weights.detach().tolist())
