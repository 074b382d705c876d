"""The decode loop: one forward a step, tokens committed after each.

Each step forwards the content rows of what was just committed together with the query rows that this step's `Scheduler`
ask for, then decides what to commit. Keys and values are stored in generation order and never touched again, so the
log-probabilities equal those of one parallel forward over the finished text (`cached == parallel`).

This module knows token ids, ranks and the cache. Which positions come next is a policy's business (`policies`), what is
put there `draw`'s, what ends a row `stopping`'s; requests and results are `request`'s and `generate`'s.

Shapes: B batch, T columns, Q query rows asked for, N evaluated positions, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anyorder.core.factorization import ABSENT, Factorization
from anyorder.core.layout import Arrangement, compact, join
from anyorder.decoding.draw import NOT_FORCED, Distribution, Drafts, Drawer, Evaluated, Visible
from anyorder.decoding.groups import Drawn, First, coupled_by, drafted_by, draw_at_once, draw_in_turn
from anyorder.decoding.stopping import EndRule
from anyorder.model.kv_cache import KeyValueStore
from anyorder.runtime.processor import torch_threads
from anyorder.runtime.runner import ModelRunner

COMMON = 16
"""From so many tokens on, a start that all rows of a batch share gets a forward of its own, over one row."""
DROP_BELOW = 0.75
"""Rows that are full leave the forward when no more than this part of those in it is still open."""


@dataclass(frozen=True)
class Step:
    """What one step committed; `row`, `column`, `token`, `log_prob` are (N,), on the CPU."""

    row: Tensor
    column: Tensor
    token: Tensor
    log_prob: Tensor
    step: int


@dataclass(frozen=True)
class Queries:
    """Positions to evaluate in one forward. All (B, Q)."""

    columns: Tensor
    used: Tensor
    """False: padding."""
    hi: Tensor
    """The rank up to which each reads."""

    def only(self, chosen: Tensor) -> Queries:
        """Those of the used ones, counted row by row, where (N,) bool `chosen`."""
        used = self.used.clone()
        used[self.used] = chosen
        return Queries(self.columns, used, self.hi)


@dataclass(frozen=True)
class Uniforms:
    """Random numbers, one of each kind a position, (B, T) float64 in [0, 1): drawn before decoding begins, so that a
    row's result depends neither on its batch mates nor on the steps that its batch takes."""

    draw: Tensor
    selection: Tensor
    """For policies that select positions at random."""
    draft: Tensor
    accept: Tensor


class Scheduler(ABC):
    """A policy at work on one run: what to evaluate, and what to commit of it."""

    def __init__(self, run: Run):
        self.run = run

    @abstractmethod
    def queries(self) -> Queries:
        """What the next forward evaluates, at least one open position of every row that has any."""

    @abstractmethod
    def advance(self, queries: Queries, hidden: Tensor, source: Tensor) -> Step:
        """Commit at least one token of every row with open positions.

        Args:
            queries: from `queries`.
            hidden: (B, R, E) of the forward.
            source: (B, Q) int64: the row of `hidden` that predicts each queried position.
        """


class Run:
    """The state of one decoding run, and the loop over it.

    Args:
        runner: executes the forwards.
        input_ids: (B, T) int64 on the CPU; ids at predicted positions are ignored.
        factorization: which positions are given, and the order of the others; of a policy's `prepare`.
        drawer: draws the tokens.
        uniforms: what it draws them with.
        end_rule: which tokens end a row.
        encoded: of each row, the keys and values of its first given tokens, each having read those before it alone, as
            in the exact recipe; None: of none.

    Attributes:
        ids: (B, T) int64, filled in place.
        known: (B, T) bool: given or committed.
        is_open: (B, T) bool: still to be filled.
        tokens: the arrangement in generation order.
        forwards: of the steps.
        common_forwards: 1 if what all rows begin with had one of its own.
        stored: (A,) int64: the rows of the batch that forwards still go over: those that have open positions.
        first, count: (B,) ranks whose content rows the next forward has to compute.
    """

    def __init__(
        self,
        runner: ModelRunner,
        input_ids: Tensor,
        factorization: Factorization,
        drawer: Drawer,
        uniforms: Uniforms,
        end_rule: EndRule,
        encoded: Sequence[KeyValueStore | None] | None = None,
    ):
        self.runner, self.drawer, self.uniforms, self.end_rule = runner, drawer, uniforms, end_rule
        self.factorization, self.forced = factorization, drawer.forced
        self.ids = input_ids.masked_fill(self.factorization.is_predicted, 0)
        self.is_open = self.factorization.is_predicted
        self.known = self.factorization.is_given
        self.steps = self.factorization.group_ids.clamp(max=-1).masked_fill(self.is_open, ABSENT)
        self.log_probs = torch.zeros(self.ids.shape)
        self.every = torch.arange(self.ids.shape[1]).expand_as(self.ids)
        self.last_given = (self.every * self.known).amax(dim=1)
        self.end = torch.full_like(self.last_given, self.ids.shape[1])  # column of the earliest committed end
        self.forwards = 0
        self.common_forwards = 0
        self.capacity = runner.capacity(self.ids.shape[1])
        self.is_coupled = runner.model.coupling is not None
        self.encode_anew()
        if encoded is not None:
            self._take_over(encoded)

    def encode_anew(self) -> None:
        """Start from an empty cache: all that is known becomes one group, in the order of positions."""
        self.tokens = Arrangement(self.ids, self.factorization, self.runner.model.recipe)
        self.store = self.runner.new_store(len(self.ids), self.capacity)
        self.stored = torch.arange(len(self.ids))
        self.first = self.count = torch.zeros_like(self.tokens.counts)
        self.append(self.known)

    def _take_over(self, encoded: Sequence[KeyValueStore | None]) -> None:
        """What has been encoded elsewhere is not due."""
        self.store.begin_with(encoded)
        done = torch.tensor([0 if row is None else row.capacity for row in encoded])
        self.first = self.first + done
        self.count = self.count - done

    def append(self, committed: Tensor) -> None:
        """(B, T) bool: columns that come next in generation order, as one group; their content rows are due."""
        self.first, self.count = self.tokens.counts, committed.sum(dim=1)
        self.tokens.append(compact(committed)[0], self.count)

    def steps_of(self, scheduler: Scheduler) -> Iterator[Step]:
        """The loop. Inference mode is entered step by step: a loop that is left half way has nothing to leave."""
        while bool(self.is_open.any()):
            yield self._step(scheduler)

    @torch.inference_mode()  # a few per cent faster than no_grad; what leaves is made outside of it
    def _step(self, scheduler: Scheduler) -> Step:
        with torch_threads(self.runner.torch_threads):
            if not self.forwards:
                self._encode_common_start()
            queries = scheduler.queries()
            hidden, source = self._forward(queries)
            return scheduler.advance(queries, hidden, source)

    def _encode_common_start(self) -> None:
        """Encode once for all what every row of the batch begins with."""
        rows = self.tokens.content(self.first, self.count)
        counts = self.count
        n = rows.same_start(counts) - 1  # the last one's content row may predict: it is left to the first step
        if len(counts) == 1 or n < COMMON or int(rows.hi[0, :n].max()) > n:
            return
        store = KeyValueStore(self.capacity)
        self.runner.hidden(rows.first_row(n), self.tokens.columns[:1], store)
        self.store = store.of(torch.zeros_like(counts))
        self.first, self.count = self.first + n, counts - n
        self.common_forwards = 1

    def _forward(self, queries: Queries) -> tuple[Tensor, Tensor]:
        """(B, R, E) hidden states, and (B, Q) which of them predicts each queried position."""
        # The content row of the last token that a position reads may predict it, if it is in this very forward.
        free = queries.used & self.tokens.free(queries.columns, queries.hi) & (queries.hi > self.first[:, None])
        index, used, place = compact(queries.used & ~free)
        content = self.tokens.content(self.first, self.count)
        query = self.tokens.queries(queries.columns.gather(1, index), used, queries.hi.gather(1, index))
        rows = join(content, query)
        self._drop_full_rows()
        if len(self.stored) == len(self.ids):
            hidden = self.runner.hidden(rows, self.tokens.columns, self.store)
        else:
            hidden = self.runner.hidden(rows.of(self.stored), self.tokens.columns[self.stored], self.store)
        self.forwards += 1
        return hidden, torch.where(free, queries.hi - 1 - self.first[:, None], rows.content_count + place)

    def _drop_full_rows(self) -> None:
        """Forwards no longer go over rows that are full, once there are enough of them to pay for copying the store.

        Some runners keep theirs: another batch would be another shape to compile.
        """
        going = self.is_open[self.stored].any(dim=1)
        if not self.runner.keeps_batch and int(going.sum()) <= DROP_BELOW * len(going):
            self.stored = self.stored[going]
            self.store = self.store.of(going.nonzero()[:, 0])

    def logits(self, hidden: Tensor, row: Tensor, source: Tensor) -> Tensor:
        """(N, V) float32 of some rows of a forward, the model's own."""
        return self.runner.logits(self._rows_of(hidden, row, source)).float()

    def _rows_of(self, hidden: Tensor, row: Tensor, source: Tensor) -> Tensor:
        row = torch.searchsorted(self.stored, row)
        return hidden[row.to(hidden.device), source.to(hidden.device)]

    def evaluate(self, queries: Queries, hidden: Tensor, source: Tensor) -> Evaluated:
        """The positions that are asked for, with the model's logits.

        Args:
            queries: what was asked.
            hidden: (B, R, E) of the forward.
            source: (B, Q) int64: the row of `hidden` that predicts each of them.
        """
        at = queries.used.nonzero(as_tuple=True)
        states = self._rows_of(hidden, at[0], source[at])
        logits = self.runner.logits(states).float()
        coupled = states if self.is_coupled else None
        return Evaluated(at[0], queries.columns[at], queries.hi[at], logits, coupled)

    def draw(self, found: Evaluated, uniforms: Tensor, first: First | None = None) -> Drawn:
        """Tokens with (B, T) random numbers, of one group a row; see `groups` for `first`."""
        uniform, visible = uniforms[found.row, found.column], Visible(self.ids, self.tokens.ranks)
        alone = first is None and not bool((found.row[1:] == found.row[:-1]).any())  # each in its group
        if alone or not len(found.row) or not (self.is_coupled or self.drawer.looks_at_tokens):
            return draw_at_once(self.drawer, found, uniform, visible)
        return draw_in_turn(coupled_by(self.runner), self.drawer, found, uniform, visible, first)

    def draft(self, queries: Queries, hidden: Tensor, source: Tensor, uniforms: Tensor, first: First) -> Drawn:
        """Tokens of positions that have no rows, from that of the first member of their group, with (B, T) numbers.

        Args:
            queries: the positions behind the first, one group a row.
            hidden: (B, R, E) of the forward.
            source: (B,) int64: the row of `hidden` that predicted the first.
            uniforms, first: as for `draw`.
        """
        at = queries.used.nonzero(as_tuple=True)
        states = self._rows_of(hidden, at[0], source[at[0]])
        nothing = states.new_zeros(len(states), 0)
        found = Evaluated(at[0], queries.columns[at], queries.hi[at], nothing, states)
        visible = Visible(self.ids, self.tokens.ranks)
        uniform = uniforms[found.row, found.column]
        vocabulary = self.runner.model.vocabulary_size if self.drawer.names_tokens else None
        return draw_in_turn(drafted_by(self.runner, vocabulary), self.drawer, found, uniform, visible, first)

    def verify(self, found: Evaluated, queries: Queries, drafts: Drafts) -> tuple[Tensor, Tensor, Distribution]:
        """(B,) how many drafts are accepted, (B,) the token behind them, and what it comes from: see `draw.Drawer`."""
        uniforms = self.uniforms.accept, self.uniforms.draw
        visible = Visible(self.ids, self.tokens.ranks)
        return self.drawer.verify(found, queries.used, queries.columns, drafts, uniforms, visible)

    def commit(self, row: Tensor, column: Tensor, token: Tensor, log_prob: Tensor) -> Step:
        """Write the tokens down; what lies behind a new end is no longer open."""
        self.ids[row, column] = token
        self.log_probs[row, column] = log_prob
        self.steps[row, column] = self.forwards - 1
        committed = torch.zeros_like(self.is_open)
        committed[row, column] = True
        self.known = self.known | committed
        self.is_open = self.is_open & ~committed
        ends = self.is_end(row, column, token)
        if bool(ends.any()):
            self.end.scatter_reduce_(0, row[ends], column[ends], "amin")
            self.is_open &= self.every < self.end[:, None]
        return Step(row, column, token, log_prob, self.forwards - 1)

    @property
    def revisable(self) -> Tensor:
        """(B, T) bool: tokens that were drawn, in front of the end."""
        drawn = (self.steps >= 0) & self.known & (self.every < self.end[:, None])
        return drawn if self.forced is None else drawn & (self.forced == NOT_FORCED)

    def reopen(self, taken_back: Tensor) -> None:
        """(B, T) bool: tokens that are to be filled once more. What has been cached still holds them: `encode_anew`."""
        self.known, self.is_open = self.known & ~taken_back, self.is_open | taken_back

    def is_end(self, row: Tensor, column: Tensor, token: Tensor) -> Tensor:
        """(N,) bool: whether tokens that are committed together end their rows: behind the last given one, unforced."""
        ends = self.end_rule(self.ids, row, column, token) & (column > self.last_given[row])
        return ends if self.forced is None else ends & (self.forced[row, column] == NOT_FORCED)
