"""Exact speculative decoding in any order: several tokens a forward, drawn as if one at a time.

Any-order speculative decoding is from arXiv 2504.20456, which needs two forwards a round; here one forward verifies
the drafts of this round and makes those of the next. It holds the content rows of the last token and of the drafts,
each reading up to itself; a query row for each draft's position, reading all drafts before it, whose distribution pi is
the model's own; and, for each number of drafts that may turn out accepted, query rows that draft what follows.

Which drafts are accepted, and what is drawn behind them, is `draw.Drawer.verify`'s business: what is committed is
distributed as pi, whatever the drafts are drawn from; they change the number of forwards alone.

Shapes: B batch, T columns, K drafts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from anyorder.core.factorization import Factorization
from anyorder.decoding.draw import Drafts
from anyorder.decoding.engine import Queries, Run, Scheduler, Step
from anyorder.decoding.policies.base import Policy
from anyorder.decoding.policies.drafts import (
    FREE_ROW_COST,
    GATE_COST,
    ROW_COST,
    BestDrafts,
    DraftSource,
    NgramDrafts,
    QueryDrafts,
    Round,
    StateDrafts,
)

_LATER = torch.iinfo(torch.int64).max
SOURCES: dict[str, Callable[[], DraftSource]] = {"state": StateDrafts, "query": QueryDrafts, "ngram": NgramDrafts}
"""What makes a source of drafts for a run, by name; a name that is added here is known to `draft=` and `--policy`."""
LIKELY = 0.2
"""How likely a number of accepted drafts must be for the rows that prepare for it, where rows cost time: K rows of some
3 ms against a forward of some 60 (SmolLM2-135M, two cores with AVX2) that half a draft or more saves."""
LONGEST_AUTO = 8
"""Drafts a round at most with draft_length="auto"."""


@dataclass(frozen=True)
class Speculative(Policy):
    """The factorization's order, one token at a time in distribution, in as many forwards as tokens or fewer.

    Args:
        draft: "ngram": what followed the same tokens elsewhere in the text, which costs next to nothing and pays on
            code and repetition; "state": a small network of the state that predicted the last token, for models whose
            coupling has one; "query": the model's own query rows guess, which makes a forward about twice as dear and
            pays if the model is good at groups; "auto": of those that the model has, for each row and round the one
            that has given this row most tokens for what its rows cost on this kind of device.
        draft_length: guesses a round; or "auto": each row one more after all of its guesses were accepted, one fewer
            after less than half of them were.

    The greedy result is that of one at a time, token for token. The steps of the result count forwards: tokens of one
    step were not drawn independently; the likelihood is that of the order, one token at a time.

    Raises:
        ValueError: naming the setting and its value.
    """

    keeps_order: ClassVar[bool] = True
    draft: str = "ngram"
    draft_length: int | Literal["auto"] = 2

    def __post_init__(self) -> None:
        if self.draft not in ("auto", *SOURCES):
            raise ValueError(f"draft must be one of auto, {', '.join(SOURCES)}, got {self.draft!r}")
        length = self.draft_length
        if length != "auto" and (not isinstance(length, int) or isinstance(length, bool) or length < 1):
            raise ValueError(f"draft_length must be a whole number, at least 1, or 'auto', got {length!r}")

    def prepare(self, factorization: Factorization) -> Factorization:
        return factorization.regroup(1)

    def scheduler(self, run: Run) -> Scheduler:
        if self.draft == "state" and not _drafts_states(run):
            raise ValueError(
                "draft='state' needs a model whose coupling drafts: train one with `anyorder adapt --coupling-only`, "
                "or use draft='ngram'"
            )
        return SpeculativeScheduler(self, run)


def _drafts_states(run: Run) -> bool:
    coupling = run.runner.model.coupling
    return coupling is not None and coupling.drafts is not None


def _source(draft: str, run: Run) -> DraftSource:
    """The source of a run's drafts."""
    if draft != "auto":
        return SOURCES[draft]()
    sources = [kind() for name, kind in SOURCES.items() if name != "state" or _drafts_states(run)]
    model = run.runner.model
    device = model.query_embedding.device.type
    gate_cost = GATE_COST.get(device, 0.0) if model.config.is_gated else 0.0
    return BestDrafts(sources, len(run.ids), ROW_COST.get(device, FREE_ROW_COST), gate_cost)


class SpeculativeScheduler(Scheduler):
    """Drafts at work: each round verifies those of the last and makes those of the next."""

    def __init__(self, policy: Speculative, run: Run):
        super().__init__(run)
        B = len(run.ids)
        self.auto = policy.draft_length == "auto"
        length = 2 if policy.draft_length == "auto" else policy.draft_length
        self.source = _source(policy.draft, run)
        self.wanted = torch.full((B,), length)
        self.drafts = Drafts.none(B)
        self.passed, self.tried = torch.full((B,), 3.0), torch.full((B,), 4.0)  # drafts, as if these had been before

    def _worth(self, most: int) -> Tensor:
        """(B, most + 1) bool: how many drafts a row may accept, by what passed of its own, that are likely enough for
        the rows that prepare for it; on accelerators rows cost little. The likeliest number always is."""
        rate = (self.passed / self.tried)[:, None]
        number = torch.arange(most + 1)
        held = self.drafts.counts[:, None]
        likely = torch.where(number < held, rate**number * (1 - rate), rate**held) * (number <= held)
        enough = LIKELY if self.run.runner.model.query_embedding.device.type == "cpu" else 0.0
        return (likely >= enough) | (likely == likely.amax(dim=1, keepdim=True))

    def _next(self, count: int, visible: Tensor) -> Queries:
        """The next `count` open positions of each row, in order; each reads one rank more than the one before."""
        run = self.run
        group = torch.where(run.is_open, run.factorization.group_ids, _LATER)
        value, columns = group.topk(min(count, group.shape[1]), dim=1, largest=False)
        return Queries(columns, value != _LATER, visible[:, None] + torch.arange(columns.shape[1]))

    def queries(self) -> Queries:
        run, drafts = self.run, self.drafts
        K = drafts.tokens.shape[1]
        self.visible = run.tokens.counts
        self.order = self._next(K + 1 + int(self.wanted.max()), self.visible)
        row, place = (torch.arange(K) < drafts.counts[:, None]).nonzero(as_tuple=True)
        run.ids[row, self.order.columns[row, place]] = drafts.tokens[row, place]
        run.tokens.append(self.order.columns[:, :K], drafts.counts, together=False)
        run.count = run.count + drafts.counts
        columns, used, hi = (part[:, : K + 1] for part in (self.order.columns, self.order.used, self.order.hi))
        used = used & (torch.arange(columns.shape[1]) <= drafts.counts[:, None])
        self.verified = Queries(columns, used, hi)
        self.rows = self.source.rows(self.order, drafts, self.wanted, self._worth(K))
        every = [self.verified, *self.rows]
        columns, used, hi = (
            torch.cat([getattr(queries, name) for queries in every], dim=1) for name in ("columns", "used", "hi")
        )
        return Queries(columns, used, hi.where(used, 1))

    def advance(self, queries: Queries, hidden: Tensor, source: Tensor) -> Step:
        run, drafts = self.run, self.drafts
        widths = [part.columns.shape[1] for part in (self.verified, *self.rows)]
        own, *others = source.split(widths, dim=1)
        found = run.evaluate(self.verified, hidden, own)
        accepted, token, distribution = run.verify(found, self.verified, drafts)

        # Row b commits its first accepted[b] drafts and, where a position is left, the token drawn behind them.
        tokens = torch.nn.functional.pad(drafts.tokens, (0, 1))[:, : self.verified.columns.shape[1]]
        offset = torch.arange(tokens.shape[1])
        tokens = torch.where(offset == accepted[:, None], token[:, None], tokens)
        committed = self.verified.used & (offset <= accepted[:, None])
        committed &= self._not_behind_an_end(tokens, committed)
        kept = committed.sum(dim=1).minimum(accepted)
        drew = committed.sum(dim=1) > accepted
        log_probs = distribution.log_probs(tokens[self.verified.used])[committed[self.verified.used]]
        row, place = committed.nonzero(as_tuple=True)
        step = run.commit(row, self.verified.columns[row, place], tokens[row, place], log_probs)

        run.tokens.retract(self.visible + kept)
        run.first, run.count = run.tokens.counts, drew.long()
        drawn = self.order.columns.gather(1, accepted[:, None].clamp(max=self.order.columns.shape[1] - 1))
        run.tokens.append(drawn, run.count)
        self.passed = self.passed + accepted
        self.tried = self.tried + (accepted + 1).minimum(drafts.counts)
        if self.auto:
            self._adapt(accepted)
        order = self._next(int(self.wanted.max()), run.tokens.counts)
        wanted = torch.arange(order.columns.shape[1]) < self.wanted[:, None]
        order = Queries(order.columns, order.used & wanted, order.hi)
        drawn_by = own.gather(1, accepted[:, None].clamp(max=own.shape[1] - 1))[:, 0]
        verified = Round(self.rows, hidden, others, drawn_by, accepted.where(drew, -1), order)
        self.drafts = self.source.propose(run, verified)
        return step

    def _not_behind_an_end(self, tokens: Tensor, committed: Tensor) -> Tensor:
        """(B, K + 1) bool: True up to the first position that an end committed before it in this round closes."""
        run, columns = self.run, self.verified.columns
        T = run.ids.shape[1]
        row, _ = committed.nonzero(as_tuple=True)
        ends = torch.zeros_like(committed)
        ends[committed] = run.is_end(row, columns[committed], tokens[committed])
        end = torch.where(ends, columns, T).cummin(dim=1).values
        before = torch.nn.functional.pad(end[:, :-1], (1, 0), value=T)
        return (columns <= before).long().cumprod(dim=1).bool()

    def _adapt(self, accepted: Tensor) -> None:
        held = self.drafts.counts
        more, fewer = (accepted == held) & (held > 0), 2 * accepted < held
        self.wanted = (self.wanted + more.long() - fewer.long()).clamp(1, LONGEST_AUTO)
