"""Where the drafts of speculative decoding come from: query rows of the same forward, the state of the row that
predicted the last token, repetition in the text, or whichever of them has paid best.

Shapes: B batch, T columns, K drafts, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from anyorder.decoding.draw import Drafts
from anyorder.decoding.engine import Queries, Run
from anyorder.decoding.groups import Drawn, First

LONGEST_NGRAM = 3
"""Tokens in front of a position that are looked up; shorter ones follow where these are not found."""
ROW_COST = {"cpu": 0.045}
"""What one more row adds to a forward, in forwards of one row: SmolLM2-135M in bfloat16 takes 37.5 ms for one and 63
for sixteen on two cores. Other devices: `FREE_ROW_COST`."""
FREE_ROW_COST = 0.005
GATE_COST = {"cpu": 0.5}
"""What the first row with an open gate adds besides, in forwards of one row, where a model has a gated adapter: that
many small products more. SmolLM2-135M takes 0.26 (AVX2 alone) to 0.53 (AVX-512) more for one such row."""
EXPECTED = 4.0, 2.0
"""Tokens, and forwards that they took, which each source begins with in the record of each row: so hopeful that each is
tried, so little that a few rounds outweigh it."""


@dataclass(frozen=True)
class Round:
    """A round whose drafts have been verified."""

    rows: list[Queries]
    """What the source had asked for."""
    hidden: Tensor
    """(B, R, E) of the forward."""
    sources: list[Tensor]
    """For each of `rows` which of `hidden` predicts what."""
    source: Tensor
    """(B,) int64: which of `hidden` has predicted the token that was drawn behind the accepted drafts."""
    accepted: Tensor
    """(B,) how many drafts were accepted; -1: this row gets no new drafts."""
    order: Queries
    """The next open positions after the round, as many as are wanted."""


class DraftSource(ABC):
    """Makes the drafts of the next round."""

    @abstractmethod
    def rows(self, order: Queries, drafts: Drafts, wanted: Tensor, worth: Tensor) -> list[Queries]:
        """What it needs evaluated in the forward that verifies `drafts`, however many of them will be accepted.

        Args:
            order: the next open positions, in the order of the run; `hi`: the rank up to which each reads when it is
                verified (one more from position to position).
            drafts: those that are verified.
            wanted: (B,) how many each row should get next.
            worth: (B, K + 1) bool: numbers of accepted drafts that are likely enough to prepare for.
        """

    @abstractmethod
    def propose(self, run: Run, verified: Round) -> Drafts:
        """Drafts for the positions behind the token that a round has drawn."""


class QueryDrafts(DraftSource):
    """The query stream's own predictions: for numbers of drafts that may well be accepted, what it would predict for
    the positions behind the next token. The rows cannot see it yet; coupled drafts know it, and each other."""

    def rows(self, order: Queries, drafts: Drafts, wanted: Tensor, worth: Tensor) -> list[Queries]:
        most = int(wanted.max())
        out = []
        for accepted in range(drafts.tokens.shape[1] + 1):
            place = slice(accepted + 1, accepted + 1 + most)
            columns = order.columns[:, place]
            offset = torch.arange(columns.shape[1])
            prepared = (accepted <= drafts.counts) & worth[:, accepted]
            used = order.used[:, place] & (offset < wanted[:, None]) & prepared[:, None]
            out.append(Queries(columns, used, order.hi[:, accepted : accepted + 1].expand_as(columns)))
        return out

    def propose(self, run: Run, verified: Round) -> Drafts:
        rows, sources, accepted, order = verified.rows, verified.sources, verified.accepted, verified.order
        B = len(accepted)
        most = max(queries.columns.shape[1] for queries in rows)
        columns, hi, source = (torch.zeros(B, most, dtype=torch.int64) for _ in range(3))
        used = torch.zeros(B, most, dtype=torch.bool)
        for number, (queries, found) in enumerate(zip(rows, sources, strict=True)):
            own, width = accepted == number, queries.columns.shape[1]
            for whole, part in ((columns, queries.columns), (hi, queries.hi), (source, found), (used, queries.used)):
                whole[own, :width] = part[own]
        # An end may have closed some of the positions that were prepared for: drafts go up to the first of them.
        width = min(most, order.columns.shape[1])
        columns, hi, source = columns[:, :width], hi[:, :width], source[:, :width]
        used = used[:, :width] & order.used[:, :width] & (columns == order.columns[:, :width])
        used = used.long().cumprod(dim=1).bool()
        if not bool(used.any()):
            return Drafts.none(B)
        evaluated = run.evaluate(Queries(columns, used, hi), verified.hidden, source)
        return _drafts(run, used, run.draw(evaluated, run.uniforms.draft, _last(run)))


class StateDrafts(DraftSource):
    """What a small network makes of the row that predicted the round's own token; costs no row of the forward, and
    needs no adapter."""

    def rows(self, order: Queries, drafts: Drafts, wanted: Tensor, worth: Tensor) -> list[Queries]:
        return []

    def propose(self, run: Run, verified: Round) -> Drafts:
        order = verified.order
        used = order.used & (verified.accepted >= 0)[:, None]
        if not bool(used.any()):
            return Drafts.none(len(used))
        first = (run.tokens.counts - 1)[:, None].expand_as(order.columns)
        queries = Queries(order.columns, used, first)
        return _drafts(run, used, run.draft(queries, verified.hidden, verified.source, run.uniforms.draft, _last(run)))


class BestDrafts(DraftSource):
    """For each row and round the source that has given this row most tokens for what its rows cost.

    A row's choice depends on its own record alone: it is the same in any batch.

    Args:
        sources: to choose from; earlier ones are tried earlier.
        rows: B.
        row_cost: what one more row adds to a forward, in forwards.
        gate_cost: what rows add besides, if a source asks for any.
    """

    def __init__(self, sources: list[DraftSource], rows: int, row_cost: float, gate_cost: float = 0.0):
        self.sources, self.row_cost, self.gate_cost = sources, row_cost, gate_cost
        tokens, forwards = EXPECTED
        self.tokens = torch.full((rows, len(sources)), tokens, dtype=torch.float64)
        self.forwards = torch.full((rows, len(sources)), forwards, dtype=torch.float64)
        self.asked = torch.zeros(rows, dtype=torch.int64)  # rows of this round's forward that are for the next drafts
        self.spent: Tensor | None = None  # (B,) forwards that the drafts which are verified now took; None: no drafts
        self.chosen = self.drafted_by = torch.zeros(rows, dtype=torch.int64)

    def rows(self, order: Queries, drafts: Drafts, wanted: Tensor, worth: Tensor) -> list[Queries]:
        self.chosen = (self.tokens / self.forwards).argmax(dim=1)
        self.parts = [
            source.rows(order, drafts, wanted * (self.chosen == number), worth)
            if bool((self.chosen == number).any())
            else []
            for number, source in enumerate(self.sources)
        ]
        every = [queries for part in self.parts for queries in part]
        self.asked = sum((queries.used.sum(dim=1) for queries in every), torch.zeros_like(self.chosen))
        return every

    def propose(self, run: Run, verified: Round) -> Drafts:
        self._record(verified.accepted)
        proposals, first = [], 0
        for number, (source, part) in enumerate(zip(self.sources, self.parts, strict=True)):
            own, last = self.chosen == number, first + len(part)
            if bool(own.any()):
                share = replace(
                    verified,
                    rows=verified.rows[first:last],
                    sources=verified.sources[first:last],
                    accepted=verified.accepted.where(own, -1),
                )
                proposals.append(source.propose(run, share))
            first = last
        drafts = _together(proposals, run)
        self.drafted_by, self.spent = self.chosen, self._price(drafts.counts)
        return drafts

    def _price(self, drafted: Tensor) -> Tensor:
        """(B,) float64: forwards that (B,) drafts take, with the rows that were asked for to make them."""
        return self.row_cost * (drafted + self.asked).double() + self.gate_cost * (self.asked > 0)

    def _record(self, accepted: Tensor) -> None:
        """What the drafts that were verified have brought and cost, where a token was drawn behind them."""
        if self.spent is None:
            return
        (row,) = (accepted >= 0).nonzero(as_tuple=True)
        source = self.drafted_by[row]
        self.tokens[row, source] += (accepted[row] + 1).double()
        self.forwards[row, source] += 1 + self.spent[row]


def _together(proposals: list[Drafts], run: Run) -> Drafts:
    """Drafts of different rows as those of all; a source that is certain of its guess has drawn it from that alone."""
    B, K = len(run.ids), max(drafts.tokens.shape[1] for drafts in proposals)
    tokens, counts = torch.zeros(B, K, dtype=torch.int64), torch.zeros(B, dtype=torch.int64)
    device = run.runner.model.query_embedding.device
    probs = torch.zeros(B, K, run.runner.model.vocabulary_size, device=device) if run.drawer.sampler.do_sample else None
    for drafts in proposals:
        (row,), width = drafts.counts.nonzero(as_tuple=True), drafts.tokens.shape[1]
        tokens[row, :width], counts[row] = drafts.tokens[row], drafts.counts[row]
        if probs is not None and drafts.probs is not None:
            probs[row.to(device), :width, : drafts.probs.shape[2]] = drafts.probs[row.to(device)]
        elif probs is not None:
            probs[row.to(device), :width] = torch.nn.functional.one_hot(drafts.tokens[row], probs.shape[2]).to(probs)
    return Drafts(tokens, counts, probs).trimmed()


def _last(run: Run) -> First:
    """The token that the round has drawn, the last one appended: the first member of the group that drafts are of."""
    column = run.tokens.columns.gather(1, (run.tokens.counts - 1)[:, None])[:, 0]
    return First(column, run.ids.gather(1, column[:, None])[:, 0])


def _drafts(run: Run, used: Tensor, drawn: Drawn) -> Drafts:
    """Tokens that were drawn for (B, K) used positions, each row's first ones, with what they were drawn from."""
    tokens = torch.zeros(used.shape, dtype=torch.int64)
    tokens[used] = drawn.token
    own, probs = drawn.probs, None
    if own is not None:
        probs = own.new_zeros(*used.shape, own.shape[1])
        probs[used.to(probs.device)] = own
    return Drafts(tokens, used.sum(dim=1), probs).trimmed()


class NgramDrafts(DraftSource):
    """What followed the same few tokens elsewhere in the visible text; costs no row of the forward."""

    def rows(self, order: Queries, drafts: Drafts, wanted: Tensor, worth: Tensor) -> list[Queries]:
        return []

    def propose(self, run: Run, verified: Round) -> Drafts:
        order, accepted = verified.order, verified.accepted
        B, K = order.columns.shape
        ids, known = run.ids.clone(), run.known.clone()
        going, counts = accepted >= 0, torch.zeros(B, dtype=torch.int64)
        tokens, every = torch.zeros(B, K, dtype=torch.int64), torch.arange(B)
        for k in range(K):
            column = order.columns[:, k]
            found, token = _continuation(ids, known, column)
            if run.forced is not None:
                forced = run.forced[every, column]
                token = torch.where(forced >= 0, forced, token)
            going = going & order.used[:, k] & found
            tokens[:, k] = torch.where(going, token, 0)
            counts += going
            row = every[going]
            ids[row, column[going]], known[row, column[going]] = token[going], True
        return Drafts(tokens, counts, None).trimmed()


def _continuation(ids: Tensor, known: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) whether what stands in front of (B,) `column` stands elsewhere too, and (B,) the last token that follows."""
    B, T = ids.shape
    every, rows = torch.arange(T), torch.arange(B)
    found, token = torch.zeros(B, dtype=torch.bool), torch.zeros(B, dtype=torch.int64)
    same = known & (every != column[:, None])  # where the continuation itself can stand
    for n in range(1, LONGEST_NGRAM + 1):
        own = column - n
        here = own >= 0
        wanted, wanted_known = ids[rows, own.clamp(min=0)], known[rows, own.clamp(min=0)]
        equal = torch.zeros_like(same)
        equal[:, n:] = known[:, : T - n] & (ids[:, : T - n] == wanted[:, None])
        same = same & equal & (here & wanted_known)[:, None]
        if n == 1:
            continue  # one token says too little
        last = (same * (every + 1)).amax(dim=1)
        token = torch.where(last > 0, ids[rows, (last - 1).clamp(min=0)], token)
        found = found | (last > 0)
    return found, token
