"""The evidence for lengths: how likely the first known token behind a gap is, so many tokens on.

A text is walked from left to right. Where a gap of unknown length is met, one forward holds the known tokens in front
of it that no forward held yet, and a query row for every place at which the token behind the gap might stand. All of
them read the same tokens, so a length costs one row, the start of a text is encoded once for all its gaps, and the
texts of a batch share their forwards. The length found is a fact for the gaps further on; what stands in a gap is never
read.

Where gaps follow each other with nothing known between them, the first is asked about their sum: the lengths of the
others count with what the prior says of them.

This module knows positions, tokens and a model; which string stands for what it does not know.

Shapes: B texts, A of them that still ask, T columns, C new tokens of a text, Q places asked about, E hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from anyorder.core.factorization import GIVEN, Factorization
from anyorder.core.layout import Arrangement, join
from anyorder.infill.encoding import pad
from anyorder.infill.lengths import LengthPrior, Tries, chosen
from anyorder.model.base import AnyOrderPreTrainedModel
from anyorder.model.kv_cache import KeyValueStore
from anyorder.model.lm_head import Predictions

BATCH_ROWS = 4096
"""Rows of one forward, padding included, that texts are put together up to."""


@dataclass(frozen=True)
class Gap:
    """Where tokens are missing."""

    blank: int
    tried: tuple[int, ...]
    """How many there may be, in ascending order; one number where it is known."""
    opens: bool
    """Whether it stands where a sentence begins."""


Part = list[int] | Gap
"""Known tokens, at least one, or a gap."""


@dataclass
class Found:
    """Of the gaps of one text, by the numbers of their blanks."""

    lengths: dict[int, int] = field(default_factory=dict)
    log_shares: dict[int, dict[int, float]] = field(default_factory=dict)
    """The log-probability of each length that fits, in nats."""
    tries: dict[int, Tries] = field(default_factory=dict)
    """What spoke for them, where more than one fits."""


@torch.inference_mode()
def look_ahead(
    model: AnyOrderPreTrainedModel, texts: Sequence[Sequence[Part]], prior: LengthPrior, limit: int | None
) -> tuple[list[Found], int]:
    """A length for every gap, of those that fit, by evidence and prior.

    Args:
        model: a converted model.
        texts: each begins with known tokens.
        prior: of lengths.
        limit: positions of the model's context; None: any number. Lengths with which a text is longer are left out; if
            all are, the first is taken.

    Returns:
        What was found for each text, and the number of forwards.
    """
    found, forwards = [], 0
    for batch in _batches(texts):
        walks = [_Walk(parts, prior, limit) for parts in batch]
        reader = _Reader(model, walks)
        while True:
            questions = {number: walk.next_question() for number, walk in enumerate(walks)}
            asked = {number: question for number, question in questions.items() if question is not None}
            if not asked:
                break
            for number, log_probs in zip(asked, reader.log_probs(asked), strict=True):
                walks[number].answer(asked[number], log_probs)
        found += [walk.found for walk in walks]
        forwards += reader.forwards
    return found, forwards


def _batches(texts: Sequence[Sequence[Part]]) -> Iterator[list[Sequence[Part]]]:
    """Neighbouring texts whose forwards have at most BATCH_ROWS rows, one text at least."""
    batch: list[Sequence[Part]] = []
    widest = 0
    for parts in texts:
        rows = _known(parts) + max((len(part.tried) for part in parts if isinstance(part, Gap)), default=0)
        if batch and (len(batch) + 1) * max(widest, rows) > BATCH_ROWS:
            yield batch
            batch, widest = [], 0
        batch.append(parts)
        widest = max(widest, rows)
    if batch:
        yield batch


def _known(parts: Sequence[Part]) -> int:
    """Known tokens."""
    return sum(len(part) for part in parts if isinstance(part, list))


@dataclass(frozen=True)
class _Question:
    """How likely a token is at some places behind a gap."""

    gap: Gap
    lengths: tuple[int, ...]
    """Those that fit."""
    beside: dict[int, float]
    """How many tokens the gaps have that follow without a known token between, and the probability of each number."""
    token: int
    start: int
    """The first column of the gap."""
    columns: list[int]
    """The places asked about, in ascending order."""


class _Walk:
    """A text on its way from left to right."""

    def __init__(self, parts: Sequence[Part], prior: LengthPrior, limit: int | None):
        self.parts, self.prior, self.limit = parts, prior, limit
        self.found = Found()
        self.placed: list[tuple[int, int]] = []
        """Columns and ids of the known tokens met so far."""
        self._next, self._end = 0, 0  # the part that comes next, and the column at which it begins

    @property
    def longest(self) -> int:
        """Columns with the longest gaps."""
        return _known(self.parts) + sum(part.tried[-1] for part in self.parts if isinstance(part, Gap))

    def next_question(self) -> _Question | None:
        """What has to be asked next; None at the end."""
        while self._next < len(self.parts):
            part = self.parts[self._next]
            if isinstance(part, list):
                self.placed += enumerate(part, self._end)
                self._end, self._next = self._end + len(part), self._next + 1
                continue
            lengths = self._fitting(part)
            beside, token = self._beyond()
            if len(lengths) > 1 and token is not None:
                columns = sorted({self._end + n + m for n in lengths for m in beside})
                columns = [column for column in columns if self.limit is None or column < self.limit]
                return _Question(part, lengths, beside, token, self._end, columns)
            self._settle(part, _prior_alone(lengths, part.opens))
        return None

    def answer(self, question: _Question, log_probs: Tensor) -> None:
        """Take (Q,) log p of the token at each place."""
        known = dict(zip(question.columns, log_probs.tolist(), strict=True))
        behind = [
            [known.get(question.start + n + m, -torch.inf) for m in question.beside] for n in question.lengths
        ]  # fmt: skip
        beside = torch.tensor(list(question.beside.values()), dtype=torch.float64)
        lengths = torch.tensor(question.lengths)
        self._settle(question.gap, Tries(lengths, torch.tensor(behind), question.gap.opens, beside))

    def _settle(self, gap: Gap, tries: Tries) -> None:
        log_shares = self.prior.log_probabilities(tries)
        length = int(tries.lengths[chosen(log_shares.exp(), tries.opens)])
        self.found.lengths[gap.blank] = length
        self.found.log_shares[gap.blank] = dict(zip(tries.lengths.tolist(), log_shares.tolist(), strict=True))
        if len(tries.lengths) > 1:
            self.found.tries[gap.blank] = tries
        self._end, self._next = self._end + length, self._next + 1

    def _fitting(self, gap: Gap) -> tuple[int, ...]:
        """The lengths with which the text fits into the context, the gaps further on being as short as they can."""
        if self.limit is None:
            return gap.tried
        behind = self.parts[self._next + 1 :]
        rest = _known(behind) + sum(part.tried[0] for part in behind if isinstance(part, Gap))
        return tuple(n for n in gap.tried if self._end + n + rest <= self.limit) or gap.tried[:1]

    def _beyond(self) -> tuple[dict[int, float], int | None]:
        """The numbers of tokens in the gaps that follow at once, and the first known token behind them."""
        beside = {0: 1.0}
        for part in self.parts[self._next + 1 :]:
            if isinstance(part, list):
                return beside, part[0]
            own = self.prior.log_probabilities(_prior_alone(part.tried, part.opens)).exp()
            sums: dict[int, float] = {}
            for total, share in beside.items():
                for n, p in zip(part.tried, own.tolist(), strict=True):
                    sums[total + n] = sums.get(total + n, 0.0) + share * p
            beside = sums
        return beside, None


def _prior_alone(lengths: Sequence[int], opens: bool) -> Tries:
    return Tries(torch.tensor(lengths), torch.zeros(len(lengths)), opens)


class _Reader:
    """The known tokens of a batch of texts, encoded as they are met."""

    def __init__(self, model: AnyOrderPreTrainedModel, walks: Sequence[_Walk]):
        self.model, self.walks = model, walks
        self.forwards = 0
        self._ids = torch.zeros(len(walks), max(walk.longest for walk in walks) + 1, dtype=torch.int64)
        self._capacity = max(_known(walk.parts) for walk in walks)
        self._start_anew()

    def _start_anew(self) -> None:
        given = Factorization(torch.full_like(self._ids, GIVEN))
        self._tokens = Arrangement(self._ids, given, self.model.recipe)
        self._store = KeyValueStore(self._capacity)
        self._stored = list(range(len(self.walks)))

    def log_probs(self, asked: dict[int, _Question]) -> list[Tensor]:
        """For each text that asks: (Q,) float32 log p of its token at each place, given all that has been met."""
        if self.model.recipe == "paper":  # what is given is one group, and reads all of itself
            self._start_anew()
        first = self._tokens.counts
        new = [
            walk.placed[n:] if k in asked else []
            for k, (walk, n) in enumerate(zip(self.walks, first.tolist(), strict=True))
        ]
        counts = torch.tensor([len(tokens) for tokens in new])
        columns = pad([[column for column, _ in tokens] for tokens in new], 0).long()  # of none at all too
        for row, tokens in zip(self._ids, new, strict=True):
            for column, token in tokens:
                row[column] = token
        self._tokens.append(columns, counts)
        places = [asked[k].columns if k in asked else [] for k in range(len(self.walks))]
        used = pad([[1] * len(own) for own in places], 0).bool()
        hi = self._tokens.counts[:, None].expand(used.shape)
        rows = join(self._tokens.content(first, counts), self._tokens.queries(pad(places, 0), used, hi))
        if len(asked) < len(self._stored):  # texts that are through leave
            self._store = self._store.of(torch.tensor([self._stored.index(k) for k in asked]))
            self._stored = list(asked)
        index = torch.tensor(self._stored)
        rows = rows.of(index)
        rows.ranks.clamp_(max=self._capacity)  # the store's spare rank, which is not the columns'
        hidden = self.model.hidden_rows(rows, self._tokens.columns[index, : self._capacity + 1], self._store)
        self.forwards += 1
        there = used[index].to(hidden.device)
        targets = torch.tensor([question.token for question in asked.values()])[:, None].expand(there.shape)
        found = Predictions(hidden[:, rows.content_count :][there], there)
        log_probs = self.model.predictor.log_probs(found, targets).cpu()
        return [row[: len(question.columns)] for row, question in zip(log_probs, asked.values(), strict=True)]
