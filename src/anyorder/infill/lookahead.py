"""The evidence for lengths: how likely the first known token behind a gap is, so many tokens on.

A text is walked from left to right. Where a gap of unknown length is met, one forward holds the known tokens in front
of it that no forward held yet, and a query row for every place at which the token behind the gap might stand. All of
them read the same tokens, so a length costs one row, the start of a text is encoded once for all its gaps, and the
texts of a batch share their forwards. The length found is a fact for the gaps further on; what stands in a gap is never
read.

A forward of few rows costs nearly what one of some more does. So gaps further on are asked about in the same forward,
as if the lengths in front of them were those that are likeliest beforehand. An answer counts only where that was so;
otherwise the gap is asked about again. Results are those of asking one gap after the other.

What was encoded is handed on: in the exact recipe its keys and values are those that filling the gaps needs.

Where gaps follow each other with nothing known between them, the first is asked about their sum: the lengths of the
others count with what the prior says of them.

This module knows positions, tokens and a model; which string stands for what it does not know.

Shapes: B texts, A of them that still ask, T columns, C new tokens of a text, Q places asked about, E hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
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
from anyorder.runtime.runner import EagerRunner, ModelRunner

BATCH_ROWS = 4096
"""Rows of one forward, padding included, that texts are put together up to."""
WAVE_ROWS = 128
"""Rows of one forward that gaps further on are asked about up to: so many cost less than twice what a quarter does."""
WORTH = 0.4
"""How likely a question must be asked at the right place for it to share the forward of those in front of it."""


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
    known: dict[int, int] = field(default_factory=dict)
    """How many known tokens stand in front of it."""
    encoded: KeyValueStore | None = None
    """Keys and values of the first known tokens, at the lengths found."""


@torch.inference_mode()
def look_ahead(
    model: AnyOrderPreTrainedModel,
    texts: Sequence[Sequence[Part]],
    prior: LengthPrior,
    limit: int | None,
    keep: bool = False,
    runner: ModelRunner | None = None,
) -> tuple[list[Found], int]:
    """A length for every gap, of those that fit, by evidence and prior.

    Args:
        model: a converted model.
        texts: each begins with known tokens.
        prior: of lengths.
        limit: positions of the model's context; None: any number. Lengths with which a text is longer are left out; if
            all are, the first is taken.
        keep: hand on the keys and values that were made, if they are those of given tokens whatever comes behind them:
            in the exact recipe.
        runner: executes the forwards; None: eager PyTorch.

    Returns:
        What was found for each text, and the number of forwards.
    """
    found, forwards, exact = [], 0, model.recipe == "exact"
    for batch in _batches(texts):
        walks = [_Walk(parts, prior, limit) for parts in batch]
        reader = _Reader(model, walks, keep and exact, runner or EagerRunner(model))
        asking = list(range(len(walks)))
        while True:
            waves = {number: walks[number].wave(WAVE_ROWS // len(asking) if exact else 0) for number in asking}
            asked = {number: wave for number, wave in waves.items() if wave.questions}
            if not asked:
                break
            for number, log_probs in zip(asked, reader.log_probs(asked), strict=True):
                walks[number].learn(asked[number], log_probs)
            asking = list(asked)
        reader.leave(range(len(walks)))
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
    known: int
    """Known tokens in front of the gap."""


@dataclass(frozen=True)
class _Wave:
    """What one forward is asked about a text."""

    questions: list[_Question]
    """The first stands where it must; each further one on the guess of the lengths in front of it."""
    placed: list[tuple[int, int]]
    """Columns and ids of the known tokens in front of the last gap, by the same guess."""


class _Walk:
    """A text on its way from left to right."""

    def __init__(self, parts: Sequence[Part], prior: LengthPrior, limit: int | None):
        self.parts, self.prior, self.limit = parts, prior, limit
        self.found = Found()
        self.placed: list[tuple[int, int]] = []
        """Columns and ids of the known tokens met so far."""
        self._next, self._end = 0, 0  # the part that comes next, and the column at which it begins
        self._encoded = 0  # known tokens that forwards have gone over, at the places that they have now
        self._likely: dict[int, int] = {}  # by blank: the length that an answer spoke for which stood at a wrong place
        self._guesses, self._right = 2, 1  # lengths guessed, and how many of them rightly; to begin with, one of two

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
                return _Question(part, lengths, beside, token, self._end, columns, len(self.placed))
            self._settle(part, _prior_alone(lengths, part.opens))
        return None

    def wave(self, rows: int) -> _Wave:
        """What has to be asked next; behind it, as far as guesses are worth it, what probably has to be asked then.

        Args:
            rows: of a forward that it may take; the first question may take more.
        """
        walk, questions, placed, columns, worth = self, list[_Question](), self.placed, 0, 1.0
        while (question := walk.next_question()) is not None:
            columns += len(question.columns)
            if questions and len(walk.placed) - self._encoded + columns > rows:
                break
            questions.append(question)
            placed = list(walk.placed)
            guess, worth = self._guess(question), worth * self._right / self._guesses
            if guess is None or worth < WORTH:
                break
            walk = walk._if(guess)
        return _Wave(questions, placed)

    def learn(self, wave: _Wave, log_probs: Sequence[Tensor]) -> None:
        """Take (Q,) log p of its token at each place of each question: where a guess in front of a question was wrong,
        the answer is good for the next guess alone."""
        right = True
        for question, own in zip(wave.questions, log_probs, strict=True):
            right = right and question == self.next_question() and self.placed == wave.placed[: question.known]
            tries = _tries(question, own)
            length, _ = self._found(tries)
            if right:
                guess = self._guess(question)
                self._guesses, self._right = self._guesses + (guess is not None), self._right + (guess == length)
                self._encoded = question.known
                self._settle(question.gap, tries)
            else:
                self._likely[question.gap.blank] = length

    def _guess(self, question: _Question) -> int | None:
        """The length that a gap probably gets: by an answer that stood at a wrong place, else by the prior. What the
        prior says of a whole sentence is hardly ever met."""
        likely = self._likely.get(question.gap.blank)
        if likely is not None:
            return likely if likely in question.lengths else None
        return None if question.gap.opens else self._found(_prior_alone(question.lengths, False))[0]

    def _if(self, length: int) -> _Walk:
        """A copy that goes on as if the gap that comes next had this length."""
        walk = copy.copy(self)
        walk.found, walk.placed = Found(), list(self.placed)
        walk._end, walk._next = self._end + length, self._next + 1
        return walk

    def _found(self, tries: Tries) -> tuple[int, Tensor]:
        """The length of a gap, and the log-probability of each that was tried."""
        log_shares = self.prior.log_probabilities(tries)
        return int(tries.lengths[chosen(log_shares.exp(), tries.opens)]), log_shares

    def _settle(self, gap: Gap, tries: Tries) -> None:
        length, log_shares = self._found(tries)
        self.found.lengths[gap.blank] = length
        self.found.known[gap.blank] = len(self.placed)
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


def _tries(question: _Question, log_probs: Tensor) -> Tries:
    """What (Q,) log p of the token at each place says for each length."""
    known = dict(zip(question.columns, log_probs.tolist(), strict=True))
    behind = [[known.get(question.start + n + m, -torch.inf) for m in question.beside] for n in question.lengths]
    beside = torch.tensor(list(question.beside.values()), dtype=torch.float64)
    return Tries(torch.tensor(question.lengths), torch.tensor(behind), question.gap.opens, beside)


def _prior_alone(lengths: Sequence[int], opens: bool) -> Tries:
    return Tries(torch.tensor(lengths), torch.zeros(len(lengths)), opens)


class _Reader:
    """The known tokens of a batch of texts, encoded as they are met."""

    def __init__(self, model: AnyOrderPreTrainedModel, walks: Sequence[_Walk], keep: bool, runner: ModelRunner):
        self.model, self.walks = model, walks
        self.forwards = 0
        self._runner, self._keep = runner, keep
        self._ids = torch.zeros(len(walks), max(walk.longest for walk in walks) + 1, dtype=torch.int64)
        self._capacity = runner.capacity(max(_known(walk.parts) for walk in walks))
        self._start_anew()

    def _start_anew(self) -> None:
        given = Factorization(torch.full_like(self._ids, GIVEN))
        self._tokens = Arrangement(self._ids, given, self.model.recipe)
        self._store = self._runner.new_store(len(self.walks), self._capacity)
        self._stored = list(range(len(self.walks)))
        self._placed: list[list[tuple[int, int]]] = [[] for _ in self.walks]  # what the store holds

    def log_probs(self, asked: dict[int, _Wave]) -> list[list[Tensor]]:
        """For each text that asks, and each of its questions: (Q,) float32 log p of its token at each place, given the
        known tokens in front of its gap."""
        if self.model.recipe == "paper":  # what is given is one group, and reads all of itself
            self._start_anew()
        self.leave(k for k in self._stored if k not in asked)
        first, counts = self._place(asked)
        questions = [asked[k].questions if k in asked else [] for k in range(len(self.walks))]
        columns = pad([[column for q in own for column in q.columns] for own in questions], 0)
        targets = pad([[q.token for q in own for _ in q.columns] for own in questions], 0)
        hi = pad([[q.known for q in own for _ in q.columns] for own in questions], 1)
        used = pad([[1 for q in own for _ in q.columns] for own in questions], 0).bool()
        rows = join(self._tokens.content(first, counts), self._tokens.queries(columns, used, hi))
        index = torch.tensor(self._stored)
        rows = rows.of(index)
        rows.ranks.clamp_(max=self._capacity)  # the store's spare rank, which is not the columns'
        hidden = self._runner.hidden(rows, self._tokens.columns[index, : self._capacity + 1], self._store)
        self.forwards += 1
        there = used[index].to(hidden.device)
        found = Predictions(hidden[:, rows.content_count :][there], there)
        log_probs = self.model.predictor.log_probs(found, targets[index]).cpu()
        widths = [[len(q.columns) for q in wave.questions] for wave in asked.values()]
        return [list(row[: sum(own)].split(own)) for row, own in zip(log_probs, widths, strict=True)]

    def _place(self, asked: dict[int, _Wave]) -> tuple[Tensor, Tensor]:
        """Arrange the known tokens of the waves; of each text the first whose content row is due, and how many are."""
        first = self._tokens.counts.tolist()
        new: list[list[tuple[int, int]]] = [[] for _ in self.walks]
        for k, wave in asked.items():
            first[k] = _agreeing(self._placed[k], wave.placed)
            new[k], self._placed[k] = wave.placed[first[k] :], wave.placed
            for column, token in new[k]:
                self._ids[k, column] = token
        counts = torch.tensor([len(tokens) for tokens in new])
        self._tokens.retract(torch.tensor(first))
        self._tokens.append(pad([[column for column, _ in tokens] for tokens in new], 0).long(), counts)  # of none, too
        return torch.tensor(first), counts

    def leave(self, through: Iterable[int]) -> None:
        """Forwards no longer go over texts that are through; their keys and values are handed on."""
        leaving = set(through)
        if not leaving:
            return
        for place, k in enumerate(self._stored):
            walk = self.walks[k]
            if k in leaving and self._keep:
                walk.found.encoded = self._store.first_of(place, _agreeing(self._placed[k], walk.placed))
        going = [place for place, k in enumerate(self._stored) if k not in leaving]
        self._store = self._store.of(torch.tensor(going, dtype=torch.int64))
        self._stored = [self._stored[place] for place in going]


def _agreeing(one: Sequence[tuple[int, int]], other: Sequence[tuple[int, int]]) -> int:
    """How many entries two sequences begin with alike."""
    unlike = (n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(unlike, min(len(one), len(other)))
