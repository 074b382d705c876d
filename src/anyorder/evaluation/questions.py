"""Exact conditional likelihoods of many questions of different lengths, a few forwards for all; and their likeliest
answers.

A question is a text in pieces of which some are given, some predicted and the others absent. This module knows tokens
and factorizations; what questions mean is the tasks' business. `write` and `answer` are generic functions: models that
are no any-order models, the controls, are asked in ways of their own, which register here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import torch

from anyorder.core.factorization import Factorization
from anyorder.decoding.events import GenerateOutput
from anyorder.decoding.policies import Policy
from anyorder.evaluation.batches import batches, padded
from anyorder.infill.pieces import Pieces
from anyorder.modeling import AnyOrderForCausalLM
from anyorder.scoring import TOKENS_AT_ONCE, TeacherForced, teacher_forced


@dataclass(frozen=True)
class Question:
    """log P(targets | given) of one text.

    Args:
        ids: of the whole text, its start token first.
        targets, given: positions; all others are neither read nor predicted.
    """

    ids: tuple[int, ...]
    targets: tuple[int, ...]
    given: tuple[int, ...]

    @classmethod
    def behind(cls, ids: Sequence[int], new_tokens: int) -> Question:
        """So many tokens behind some ids, all of which are given."""
        first = len(ids)
        return cls((*ids, *([0] * new_tokens)), tuple(range(first, first + new_tokens)), tuple(range(first)))

    def order(
        self, group_size: int = 1, order: str = "left_to_right", generator: torch.Generator | None = None
    ) -> Factorization:
        """One row: in which order the targets are predicted, "left_to_right" or "random"."""
        plain = Factorization.conditional(self.targets, self.given, len(self.ids))
        return plain.regroup(group_size, order, generator)


def of_pieces(
    pieces: Pieces, parts: Sequence[str], target: int | Sequence[int], absent: Sequence[int] = ()
) -> Question:
    """A question about one or some of the parts that a text is made of, given the others.

    Args:
        pieces: the tokenizer.
        parts: the text, cut where tokens may be cut: a part brings the space in front of it.
        target: number of the part that is predicted, or numbers.
        absent: numbers of parts that are not read.
    """
    ids, given = [pieces.start_token()], [0]
    targets: list[int] = []
    predicted = {target} if isinstance(target, int) else set(target)
    for number, part in enumerate(parts):
        own = pieces.encode(part, at_start=len(ids) == 1)
        where = range(len(ids), len(ids) + len(own))
        ids += own
        if number in predicted:
            targets += where
        elif number not in absent:
            given += where
    return Question(tuple(ids), tuple(targets), tuple(given))


def suffix_first(before: str, behind: str) -> str:
    """The prompt of a left-to-right model for what stands between two texts: the text behind the blank, then the text
    before it, which it goes on with."""
    return "{}\n\n{}".format(behind.strip("\n"), before) if behind.strip() else before


def to_continue(pieces: Pieces, text: str, new_tokens: int) -> Question:
    """A text and so many tokens behind it, which are to be predicted."""
    return Question.behind([pieces.start_token(), *pieces.encode(text, at_start=True)], new_tokens)


@dataclass(frozen=True)
class Written:
    """Tokens at a question's targets."""

    ids: list[int]
    steps: int
    """In which they were committed."""


@singledispatch
def write(model: AnyOrderForCausalLM, questions: Sequence[Question], policy: Policy, **drawing: Any) -> list[Written]:
    """Fill each question's targets under a policy, in one batch; ends are tokens like others.

    Args:
        drawing: options of `generate`.
    """
    ids, order = padded([q.ids for q in questions]), Factorization.stack([q.order() for q in questions])
    made = model.generate(
        ids, factorization=order, policy=policy, eos_token_id=(), return_dict_in_generate=True, **drawing
    )
    assert isinstance(made, GenerateOutput)
    found = []
    for row, question in enumerate(questions):
        where = list(question.targets)
        found.append(Written(made.sequences[row, where].tolist(), len(made.steps[row, where].unique())))
    return found


def fill(model: AnyOrderForCausalLM, questions: Sequence[Question], policy: Policy) -> list[list[int]]:
    """The likeliest tokens at each question's targets: see `write`."""
    return [one.ids for one in write(model, questions, policy, do_sample=False)]


@singledispatch
def answer(
    model: AnyOrderForCausalLM, questions: Sequence[Question], group_size: int = 1, tokens_at_once: int = TOKENS_AT_ONCE
) -> list[float]:
    """log P of each question's targets, in nats: exact, from left to right in groups of `group_size`.

    Questions of like length share a forward of at most `tokens_at_once` tokens; no result depends on the others'.
    """
    orders = [question.order(group_size) for question in questions]
    found = asked_in(model, questions, orders, tokens_at_once)
    return [float(one.log_probs.double().sum()) for one in found]


def of_like_length(questions: Sequence[Question], tokens_at_once: int) -> Iterator[list[int]]:
    """Numbers of the questions, in batches of at most so many tokens."""
    in_order = sorted(range(len(questions)), key=lambda n: len(questions[n].ids))
    return batches(in_order, lambda n: len(questions[n].ids), tokens_at_once, None)


def asked_in(
    model: AnyOrderForCausalLM,
    questions: Sequence[Question],
    orders: Sequence[Factorization],
    tokens_at_once: int = TOKENS_AT_ONCE,
) -> list[TeacherForced]:
    """What the model says of each question's targets, (N,) each, where every question has an order of its own.

    Questions of like length share a forward of at most `tokens_at_once` tokens; no result depends on the others'.
    """
    found: dict[int, TeacherForced] = {}
    for numbers in of_like_length(questions, tokens_at_once):
        ids = padded([questions[n].ids for n in numbers])
        said = teacher_forced(model, ids, Factorization.stack([orders[n] for n in numbers]))
        for row, n in enumerate(numbers):
            where = list(questions[n].targets)
            found[n] = TeacherForced(
                said.log_probs[row, where], said.is_best[row, where], said.best_log_probs[row, where]
            )
    return [found[n] for n in range(len(questions))]
