"""What a policy is: which positions are predicted and committed next.

A policy may read logits, never the tokens drawn in the same step: choosing positions by what was drawn would change the
joint distribution, and the product of group probabilities would no longer be the likelihood.

Shapes: B batch, T columns, N evaluated positions, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from anyorder.factorization import Factorization
from anyorder.layout import compact
from anyorder.loop import Asked, Rounds, Run, Step
from anyorder.sampling import token_log_probs


class Policy(ABC):
    """Which positions next. Immutable: all state of a run is in its `Rounds`."""

    chooses_at_random: ClassVar[bool] = False
    """Whether `choose` uses its random numbers."""
    keeps_order: ClassVar[bool] = False
    """Whether positions are committed in the order of `prepare`'s factorization."""

    def prepare(self, factorization: Factorization) -> Factorization:
        """The factorization that the run starts from; its given positions must stay the same."""
        return factorization

    @abstractmethod
    def rounds(self, run: Run) -> Rounds:
        """This policy at work on a run."""


class GroupPolicy(Policy):
    """A policy whose every step commits some of the positions that it has evaluated, each drawn by itself."""

    reencode: bool = False
    """Whether all finished tokens are encoded anew before each step, as one group; else each keeps its first encoding.
    """

    def rounds(self, run: Run) -> Rounds:
        return Groups(self, run)

    @abstractmethod
    def ask(self, factorization: Factorization, is_open: Tensor) -> Tensor:
        """(B, T) bool: the open positions to evaluate in this step, at least one in every row that has any.

        Args:
            factorization: from `prepare`.
            is_open: (B, T) bool, positions without a token yet.
        """

    def choose(self, logits: Tensor, row: Tensor, column: Tensor, uniform: Tensor) -> Tensor:
        """(N,) bool: which of the evaluated positions to commit, at least one a row. Default: all.

        Args:
            logits: (N, V) float32, unprocessed.
            row, column: (N,) int64, where each belongs.
            uniform: (N,) float64 in [0, 1): a random number for each position, the same in every step.
        """
        return torch.ones_like(row, dtype=torch.bool)


class Groups(Rounds):
    """A `GroupPolicy` at work: evaluate what it asks for, commit what it chooses."""

    def __init__(self, policy: GroupPolicy, run: Run):
        super().__init__(run)
        self.policy = policy

    def ask(self) -> Asked:
        run = self.run
        if self.policy.reencode and run.forwards:
            run.encode_anew()
        columns, used, _ = compact(self.policy.ask(run.factorization, run.is_open))
        return Asked(columns, used, run.tokens.counts[:, None].expand_as(columns))

    def settle(self, asked: Asked, hidden: Tensor, source: Tensor) -> Step:
        run, (row, _) = self.run, asked.used.nonzero(as_tuple=True)
        column, hi = asked.columns[asked.used], asked.hi[asked.used]
        logits = run.logits(hidden, row, source[asked.used])
        chosen = self.policy.choose(logits, row, column, run.uniforms.choice[row, column])
        if not bool(chosen.all()):
            idle = sorted(set(row.tolist()) - set(row[chosen].tolist()))
            if idle:
                raise ValueError(f"{self.policy!r} committed nothing in row {idle[0]}: at least one position a step")
            logits, row, column, hi = logits[chosen.to(logits.device)], row[chosen], column[chosen], hi[chosen]
        drawn = run.sampler.draw(run.processed(logits, row, column, hi), run.uniforms.draw[row, column])
        token = run.or_forced(drawn, row, column)
        before = run.known
        step = run.commit(row, column, token.cpu(), token_log_probs(logits, token).cpu())
        run.append(run.known & ~before)
        return step
