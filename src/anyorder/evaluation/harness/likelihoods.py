"""Log-likelihoods of many texts in batches, from left to right or in random orders.

With several orders, what is reported is log (1/k sum_j P_j(text)), the log-likelihood of the even mixture of the
orders: a model that first draws an order and then the text. It is a likelihood, as its exponentials sum to one over all
texts. The mean of the log P_j is none: by Jensen's inequality it is less, and its exponentials sum to less than one.

An order depends on the seed and on the text in front of what is scored, so that the answers to a question are compared
in the same orders, and a result depends neither on its batch nor on what else is scored.

This module knows ids and models; it knows no tokenizer and no harness.

Shapes: B batch, T columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anyorder import scoring
from anyorder.core.factorization import Factorization
from anyorder.core.rng import seed_of
from anyorder.evaluation.batches import batches
from anyorder.evaluation.harness.encoding import Encoded, Window, windows
from anyorder.evaluation.harness.settings import Settings
from anyorder.model.base import AnyOrderPreTrainedModel
from anyorder.scoring import TeacherForced


@dataclass(frozen=True)
class Score:
    """Of one text."""

    log_likelihood: float
    is_greedy: bool
    """Whether greedy decoding in the same order, if there are several in each of them, gives the text."""


@dataclass(frozen=True)
class _Part:
    """A window in one order."""

    text: int
    order: int
    window: Window
    factorization: Factorization | None
    """None: the wrapped causal LM's own order."""
    is_last: bool
    """Of its text."""


class Scorer:
    """Texts to scores.

    Args:
        model: a converted model.
        settings: the order, and how large a batch may be.
        context: tokens that the model can read.
    """

    def __init__(self, model: AnyOrderPreTrainedModel, settings: Settings, context: int):
        self.model, self.settings = model, settings
        self.by_base = settings.scored == "continuation" and scoring.is_its_base(
            model, settings.order, settings.group_size
        )
        # In a causal LM the last token is predicted and never read.
        self.room = context + self.by_base

    def __call__(self, texts: Sequence[Encoded]) -> Iterator[tuple[int, Score]]:
        """The number and the score of each text, as they come: long ones first."""
        by_length = sorted(range(len(texts)), key=lambda i: -len(texts[i].given) - len(texts[i].predicted))
        totals: dict[int, list[float]] = {}
        greedy: dict[int, bool] = {}
        parts = (part for i in by_length for part in self._parts(i, texts[i]))
        limits = self.settings.tokens_at_once, self.settings.most_rows()
        yield from ((i, Score(0.0, True)) for i in by_length if not texts[i].predicted)  # P(nothing) = 1
        for batch in batches(parts, lambda part: len(part.window.ids), *limits):
            found = self._forward(batch)
            sums, best = found.log_probs.double().sum(dim=1).tolist(), self._is_greedy(batch, found)
            for part, log_likelihood, is_best in zip(batch, sums, best, strict=True):
                of_text = totals.setdefault(part.text, [0.0] * self.settings.order_average)
                of_text[part.order] += log_likelihood
                greedy[part.text] = greedy.get(part.text, True) and is_best
                if part.is_last:
                    yield part.text, Score(_mixture(totals.pop(part.text)), greedy.pop(part.text))

    def _parts(self, number: int, text: Encoded) -> Iterator[_Part]:
        generator = torch.Generator().manual_seed(seed_of(self.settings.seed, text.source))
        found = windows(text, self.room)
        for order in range(self.settings.order_average):
            for k, window in enumerate(found):
                is_last = order == self.settings.order_average - 1 and k == len(found) - 1
                yield _Part(number, order, window, self._order(window, generator), is_last)

    def _order(self, window: Window, generator: torch.Generator) -> Factorization | None:
        if self.by_base:
            return None
        length, end = len(window.ids), window.end
        given = [*range(window.given), *range(end, length)]
        plain = Factorization.conditional(range(window.given, end), given, length)
        return plain.regroup(self.settings.group_size, self.settings.order, generator)

    def _forward(self, batch: Sequence[_Part]) -> TeacherForced:
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(part.window.ids) for part in batch], batch_first=True)
        orders = [part.factorization for part in batch if part.factorization is not None]
        if orders:
            return scoring.teacher_forced(self.model, ids, Factorization.stack(orders))
        return scoring.teacher_forced_by_base(self.model, ids, _predicted(batch, ids.shape[1]))

    def _is_greedy(self, batch: Sequence[_Part], found: TeacherForced) -> list[bool]:
        predicted = _predicted(batch, found.is_best.shape[1])
        return (found.is_best.cpu() | ~predicted).all(dim=1).tolist()


def _predicted(batch: Sequence[_Part], columns: int) -> Tensor:
    """(B, T) bool."""
    every = torch.arange(columns)
    first = torch.tensor([part.window.given for part in batch])
    end = torch.tensor([part.window.end for part in batch])
    return (every >= first[:, None]) & (every < end[:, None])


def _mixture(log_likelihoods: list[float]) -> float:
    greatest = max(log_likelihoods)
    if len(log_likelihoods) == 1 or math.isinf(greatest):
        return greatest
    return greatest + math.log(sum(math.exp(one - greatest) for one in log_likelihoods) / len(log_likelihoods))
