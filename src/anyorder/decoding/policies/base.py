"""What a policy is: which positions are predicted and committed next.

A policy may read logits, never the tokens drawn in the same step: choosing positions by what was drawn would change the
joint distribution, and the product of group probabilities would no longer be the likelihood. What a step commits is one
group; its members are drawn from left to right.

Shapes: B batch, T columns, N evaluated positions, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from anyorder.core.factorization import Factorization
from anyorder.core.layout import compact
from anyorder.decoding.draw import Evaluated
from anyorder.decoding.engine import Queries, Run, Scheduler, Step

LOGITS_AT_ONCE = 2**22
"""Logits, positions times vocabulary, that are measured at a time: 16 MiB, and a few times that in between."""


class Policy(ABC):
    """Which positions next. Immutable: all state of a run is in its `Scheduler`."""

    selects_at_random: ClassVar[bool] = False
    """Whether `select` uses its random numbers."""
    keeps_order: ClassVar[bool] = False
    """Whether positions are committed in the order of `prepare`'s factorization."""

    def prepare(self, factorization: Factorization) -> Factorization:
        """The factorization that the run starts from; its given positions must stay the same."""
        return factorization

    @abstractmethod
    def scheduler(self, run: Run) -> Scheduler:
        """This policy at work on a run."""


class GroupPolicy(Policy):
    """A policy whose every step commits some of the positions that it has evaluated, as one group."""

    reencode: bool = False
    """Whether all finished tokens are encoded anew before each step, as one group; else each keeps its first encoding.
    """

    def scheduler(self, run: Run) -> Scheduler:
        return GroupScheduler(self, run)

    @abstractmethod
    def candidates(self, factorization: Factorization, is_open: Tensor) -> Tensor:
        """(B, T) bool: the open positions to evaluate in this step, at least one in every row that has any.

        Args:
            factorization: from `prepare`.
            is_open: (B, T) bool, positions without a token yet.
        """

    def select(self, logits: Tensor, row: Tensor, column: Tensor, uniform: Tensor) -> Tensor:
        """(N,) bool: which of the evaluated positions to commit, at least one a row. Default: all.

        Args:
            logits: (N, V) float32, unprocessed.
            row, column: (N,) int64, where each belongs.
            uniform: (N,) float64 in [0, 1): a random number for each position, the same in every step.
        """
        return torch.ones_like(row, dtype=torch.bool)


class MeasuringPolicy(GroupPolicy):
    """A `GroupPolicy` to which a few numbers of each position say enough: it never holds the logits of all of them."""

    @abstractmethod
    def measure(self, logits: Tensor) -> Tensor:
        """(N, M) on the CPU: what `choose` needs of (N, V) float32 logits, each row by itself."""

    @abstractmethod
    def choose(self, measured: Tensor, row: Tensor, column: Tensor, uniform: Tensor) -> Tensor:
        """As `select`, from (N, M) of `measure`."""

    def select(self, logits: Tensor, row: Tensor, column: Tensor, uniform: Tensor) -> Tensor:
        return self.choose(self.measure(logits), row, column, uniform)


class GroupScheduler(Scheduler):
    """A `GroupPolicy` at work: evaluate what it asks for, commit what it chooses."""

    policy: GroupPolicy

    def __init__(self, policy: GroupPolicy, run: Run):
        super().__init__(run)
        self.policy = policy

    def queries(self) -> Queries:
        run = self.run
        if self.policy.reencode and run.forwards:
            run.encode_anew()
        columns, used, _ = compact(self.policy.candidates(run.factorization, run.is_open))
        return Queries(columns, used, run.tokens.counts[:, None].expand_as(columns))

    def advance(self, queries: Queries, hidden: Tensor, source: Tensor) -> Step:
        run, found = self.run, self._chosen(queries, hidden, source)
        drawn = run.draw(found, run.uniforms.draw)
        before = run.known
        step = run.commit(found.row, found.column, drawn.token, drawn.log_prob)
        run.append(run.known & ~before)
        return step

    def _chosen(self, queries: Queries, hidden: Tensor, source: Tensor) -> Evaluated:
        """What to commit of what was asked for, with its logits."""
        found = self.run.evaluate(queries, hidden, source)
        return found.take(self._checked(self._select(found), found.row))

    def _select(self, found: Evaluated) -> Tensor:
        uniform = self.run.uniforms.selection[found.row, found.column]
        return self.policy.select(found.logits, found.row, found.column, uniform)

    def _checked(self, chosen: Tensor, row: Tensor) -> Tensor:
        idle = sorted(set(row.tolist()) - set(row[chosen].tolist()))
        if idle:
            raise ValueError(f"{self.policy!r} committed nothing in row {idle[0]}: at least one position a step")
        return chosen


class MeasuringScheduler(GroupScheduler):
    """A `MeasuringPolicy` at work: some positions' logits at a time are measured, then those of the chosen made."""

    policy: MeasuringPolicy

    def _chosen(self, queries: Queries, hidden: Tensor, source: Tensor) -> Evaluated:
        run = self.run
        row, _ = queries.used.nonzero(as_tuple=True)
        at_once = max(1, LOGITS_AT_ONCE // run.runner.model.vocabulary_size)
        if len(row) <= at_once:
            return super()._chosen(queries, hidden, source)
        parts = zip(row.split(at_once), source[queries.used].split(at_once), strict=True)
        measured = torch.cat([self.policy.measure(run.logits(hidden, *part)) for part in parts])
        column = queries.columns[queries.used]
        chosen = self.policy.choose(measured, row, column, run.uniforms.selection[row, column])
        return run.evaluate(queries.only(self._checked(chosen, row)), hidden, source)
