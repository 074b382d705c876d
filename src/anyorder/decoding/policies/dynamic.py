"""Dynamic resampling: each step commits the open positions that the model is surest of.

Every open position is evaluated (or those of a window), and a criterion of its logits alone picks which are committed:
the tokens are drawn afterwards, so the likelihood of the result is the product of the steps' probabilities.

Shapes: B batch, T columns, N evaluated positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from anyorder.core.factorization import Factorization
from anyorder.decoding.engine import Queries, Run, Scheduler, Step
from anyorder.decoding.policies.base import MeasuringPolicy, MeasuringScheduler
from anyorder.decoding.sampling import check_number

Criterion = Literal["confidence", "entropy", "margin", "random"]


@dataclass(frozen=True)
class Dynamic(MeasuringPolicy):
    """Dynamic resampling (A3, arXiv 2601.13228, Algorithm 2).

    Args:
        criterion: what makes a position sure: "confidence", the probability of its likeliest token; "entropy", little
            of it, in nats; "margin", the probability of its likeliest token less that of the next; "random", nothing.
        step_size: positions that a step commits in each row. Default 1, if nothing else says how many.
        threshold: instead: all positions above it ("entropy": below it), and at least the surest one.
        entropy_budget: instead: the surest positions, as long as the entropies of those in front of each add up to at
            most so many nats: with "entropy", the rule of arXiv 2505.24857.
        spacing: positions that a step commits stand at least so far apart, as long as there are such: tokens of one
            step are drawn independently, and neighbours depend on each other most (a filter of other criteria in arXiv
            2506.19037, too). 1: anywhere.
        window: evaluate only the first so many open positions of each row, which costs less. None: all.
        reencode: encode all finished tokens anew before each step, as one group. In a model of the paper's recipe they
            then read each other on both sides, as published; slower, and no longer one cached pass: the likelihood of
            the result is that of the steps, not that of one factorization.
        max_revisions: once all is filled, draw so many of each row's tokens anew, given all others: those that were
            least likely when they were drawn (as in mask-predict, arXiv 1904.09324, but once). They are taken back, so
            it needs reencode=True.

    Raises:
        ValueError: naming the setting and its value.
    """

    criterion: Criterion = "confidence"
    step_size: int | None = None
    threshold: float | None = None
    entropy_budget: float | None = None
    spacing: int = 1
    window: int | None = None
    reencode: bool = False
    max_revisions: int = 0

    def __post_init__(self) -> None:
        if self.criterion not in get_args(Criterion):
            raise ValueError(f"criterion must be one of {', '.join(get_args(Criterion))}, got {self.criterion!r}")
        how_many = {name: getattr(self, name) for name in ("step_size", "threshold", "entropy_budget")}
        said = [f"{name}={value}" for name, value in how_many.items() if value is not None]
        if len(said) > 1:
            raise ValueError(f"{' and '.join(said)} each say how many positions a step commits: choose one")
        for name in ("step_size", "spacing", "window"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name} must be a whole number, at least 1, got {value!r}")
        if not isinstance(self.max_revisions, int) or isinstance(self.max_revisions, bool) or self.max_revisions < 0:
            raise ValueError(f"max_revisions must be a whole number, at least 0, got {self.max_revisions!r}")
        if self.max_revisions and not self.reencode:
            raise ValueError(
                f"max_revisions={self.max_revisions} takes tokens back, which a cache cannot: add reencode=True"
            )
        for name in ("threshold", "entropy_budget"):
            check_number(name, getattr(self, name))
        if self.entropy_budget is not None and self.entropy_budget < 0:
            raise ValueError(f"entropy_budget must be at least 0, got {self.entropy_budget}")
        if self.threshold is not None and self.criterion == "random":
            raise ValueError(f"threshold={self.threshold} means nothing with criterion='random': use step_size")

    @property
    def selects_at_random(self) -> bool:  # type: ignore[override]
        return self.criterion == "random"

    def scheduler(self, run: Run) -> Scheduler:
        return RevisingScheduler(self, run) if self.max_revisions else MeasuringScheduler(self, run)

    def candidates(self, factorization: Factorization, is_open: Tensor) -> Tensor:
        return is_open if self.window is None else is_open & (is_open.cumsum(dim=1) <= self.window)

    def measure(self, logits: Tensor) -> Tensor:
        """(N, 2) float32: how sure, the greater the sooner, and the entropy in nats; 0 where nothing asks for them."""
        log_probs = logits.log_softmax(dim=-1)
        zero = torch.zeros(len(logits))
        needs_entropy = self.criterion == "entropy" or self.entropy_budget is not None
        entropy = torch.special.entr(log_probs.exp()).sum(dim=-1).cpu() if needs_entropy else zero
        sureness = -entropy if self.criterion == "entropy" else zero
        if self.criterion in ("confidence", "margin"):
            best = log_probs.topk(2, dim=-1).values.exp().cpu()
            sureness = best[:, 0] if self.criterion == "confidence" else best[:, 0] - best[:, 1]
        return torch.stack([sureness, entropy], dim=1)

    def choose(self, measured: Tensor, row: Tensor, column: Tensor, uniform: Tensor) -> Tensor:
        sureness, entropy = measured.unbind(1)
        sureness = uniform if self.criterion == "random" else sureness
        # Surest first within each row; among equals the left one.
        order = sureness.argsort(descending=True, stable=True)
        order = order[row[order].argsort(stable=True)]
        new = torch.ones_like(row, dtype=torch.bool)
        new[1:] = row[order][1:] != row[order][:-1]
        place = torch.arange(len(row))
        surest = new.nonzero()[:, 0][new.cumsum(dim=0) - 1]  # where each one's row begins
        if self.threshold is not None:
            bound = -self.threshold if self.criterion == "entropy" else self.threshold
            within = sureness[order] > bound
        elif self.entropy_budget is not None:
            entropy = entropy[order].double()
            before = entropy.cumsum(dim=0) - entropy
            within = before - before[surest] <= self.entropy_budget
        else:
            within = place - surest < (self.step_size or 1)
        chosen = torch.empty_like(new)
        chosen[order] = within | new
        return chosen if self.spacing == 1 else self._spaced(chosen, sureness, row, column)

    def _spaced(self, chosen: Tensor, sureness: Tensor, row: Tensor, column: Tensor) -> Tensor:
        """(N,) bool: the surest that stand apart.

        With a step size as many as were chosen, others in place of those that stand too near to a surer one, and near
        ones only where no others are left; else those of the chosen that do stand apart.
        """
        B, T = int(row.max()) + 1, int(column.max()) + 1
        places = torch.arange(T)
        left = torch.full((B, T), -torch.inf, dtype=torch.float64)
        counts = torch.zeros(B, dtype=torch.int64).scatter_add_(0, row, chosen.long())
        fill_up = self.threshold is None and self.entropy_budget is None
        candidate = torch.ones_like(chosen) if fill_up else chosen
        left[row[candidate], column[candidate]] = sureness[candidate].double()
        apart, out = left.clone(), torch.zeros(B, T, dtype=torch.bool)
        for k in range(int(counts.max())):
            found = apart.amax(dim=1).isfinite()
            best = torch.where(found, apart.argmax(dim=1), left.argmax(dim=1))
            take = (k < counts) & (found | fill_up)
            out[take, best[take]] = True
            left[take, best[take]] = -torch.inf
            near = (places - best[:, None]).abs() < self.spacing
            apart.masked_fill_(near & take[:, None], -torch.inf)
        return out[row, column]


class RevisingScheduler(MeasuringScheduler):
    """The same, and once more for each row's least likely tokens."""

    policy: Dynamic

    def __init__(self, policy: Dynamic, run: Run):
        super().__init__(policy, run)
        self.is_due = True

    def advance(self, queries: Queries, hidden: Tensor, source: Tensor) -> Step:
        step = super().advance(queries, hidden, source)
        if self.is_due and not bool(self.run.is_open.any()):
            self.is_due = False
            # The numbers that the tokens were drawn with would draw much the same again.
            self.run.uniforms = replace(self.run.uniforms, draw=self.run.uniforms.draft)
            self.run.reopen(self._weakest())
        return step

    def _weakest(self) -> Tensor:
        """(B, T) bool."""
        log_probs = self.run.log_probs.masked_fill(~self.run.revisable, torch.inf)
        places = log_probs.argsort(dim=1, stable=True).argsort(dim=1)
        return (places < self.policy.max_revisions) & self.run.revisable
