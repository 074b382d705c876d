"""Blanks that are one of several strings: which one, before the other blanks are filled.

log p(the tokens of a string | so many positions, the fixed text, the choices to the left) is exact, and says nothing of
how many positions there are: of strings with unequal numbers of tokens the short ones have the advantage. So strings
are compared by

    log P(string) = log P(its number of tokens) + log p(its tokens | so many positions, ...)

with the same evidence and prior of lengths by which the length of any blank is sought (`lengths`). Where all strings
have as many tokens the first term is the same for all, and falls away.

Every string makes a text of its own; those of all texts of a batch share forwards. Blanks that are not decided yet are
absent: neither read nor predicted.

This module knows blanks and likelihoods; how other blanks are filled, and how lengths are sought, it does not know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anyorder.core.factorization import ABSENT, GIVEN, Factorization
from anyorder.decoding.constraints import Choice
from anyorder.infill.encoding import Blanks, Encoded, check_context, pad
from anyorder.infill.template import Template
from anyorder.model.compatibility import context_length
from anyorder.modeling import AnyOrderForCausalLM

BATCH_POSITIONS = 4096
"""Positions of one forward, padding included, that texts are put together up to."""


@dataclass(frozen=True)
class Decision:
    """What a choice came to."""

    text: str
    ids: list[int]
    log_prob: float
    """log p of its tokens given the fixed text and how many there are, in nats."""
    probabilities: dict[str, float]
    """Of each string, its number of tokens included; they sum to 1 over the strings."""
    log_probs_given_length: dict[str, float]
    """log p of each string's tokens given how many there are, in nats: exact, and no measure between strings of unequal
    numbers of tokens."""


@dataclass(frozen=True)
class Undecided:
    """A text with choices.

    Attributes:
        template: the text.
        choices: by the numbers of their blanks.
        lengths: of each blank; those of the choices do not matter.
        log_shares: of each choice whose strings differ in their number of tokens: log P of each number, up to a
            constant.
        generator: of the choices that are drawn.
    """

    template: Template
    choices: dict[int, Choice]
    lengths: list[int]
    log_shares: dict[int, dict[int, float]]
    generator: torch.Generator | None


def decide(
    model: AnyOrderForCausalLM, blanks: Blanks, texts: Sequence[Undecided], temperature: float | None
) -> tuple[list[dict[int, Decision]], int]:
    """The choices of every text by the numbers of their blanks, decided from left to right.

    Without a temperature the likeliest string, else one that is drawn.

    Returns:
        the decisions, and the number of forwards.

    Raises:
        ValueError: if a text is longer than the model's context.
    """
    decisions: list[dict[int, Decision]] = [{} for _ in texts]
    forwards = 0
    for turn in range(max((len(text.choices) for text in texts), default=0)):
        rows = [n for n, text in enumerate(texts) if turn < len(text.choices)]
        blank = {n: sorted(texts[n].choices)[turn] for n in rows}
        own = {n: _token_ids(blanks, texts[n], blank[n]) for n in rows}
        tried = [
            blanks.encode(texts[n].template, texts[n].lengths, _ids(decisions[n]) | {blank[n]: ids})
            for n in rows
            for ids in own[n].values()
        ]
        check_context(tried, context_length(model.causal_lm.config))
        scores, count = _scores(model, tried, [blank[n] for n in rows for _ in own[n]])
        forwards += count
        for n, found in zip(rows, scores.split([len(own[n]) for n in rows]), strict=True):
            decisions[n][blank[n]] = _decision(texts[n], blank[n], own[n], found, temperature)
    return decisions, forwards


def _token_ids(blanks: Blanks, text: Undecided, k: int) -> dict[str, list[int]]:
    return {option: blanks.encode_fill(text.template, k, option) for option in text.choices[k].options}


def token_counts(blanks: Blanks, template: Template, k: int, choice: Choice) -> tuple[int, ...]:
    """The numbers of tokens that the strings of a choice have in blank k, in ascending order."""
    return tuple(sorted({len(blanks.encode_fill(template, k, option)) for option in choice.options}))


def _ids(decided: dict[int, Decision]) -> dict[int, list[int]]:
    return {k: decision.ids for k, decision in decided.items()}


def _decision(
    text: Undecided, k: int, own: dict[str, list[int]], scores: Tensor, temperature: float | None
) -> Decision:
    log_shares = text.log_shares.get(k)
    lengths = [0.0 if log_shares is None else log_shares[len(ids)] for ids in own.values()]
    joint = scores + torch.tensor(lengths, dtype=torch.float64)
    best = int(joint.argmax())
    if temperature is not None:
        best = int(torch.multinomial((joint / temperature).softmax(dim=0), 1, generator=text.generator))
    option, ids = list(own.items())[best]
    return Decision(
        option,
        ids,
        float(scores[best]),
        dict(zip(own, joint.softmax(dim=0).tolist(), strict=True)),
        dict(zip(own, scores.tolist(), strict=True)),
    )


def _scores(model: AnyOrderForCausalLM, tried: list[Encoded], blank: list[int]) -> tuple[Tensor, int]:
    """(N,) float64 log p of the tokens of blank k of each of N texts, and the number of forwards."""
    found = []
    size = max(1, BATCH_POSITIONS // max(len(e.ids) for e in tried))
    for first in range(0, len(tried), size):
        batch = tried[first : first + size]
        order = Factorization.stack(
            [_one_blank(e, k) for e, k in zip(batch, blank[first : first + size], strict=True)]
        )  # fmt: skip
        found.append(model.log_likelihood(pad([e.ids for e in batch], 0), order).cpu().double().sum(dim=1))
    return torch.cat(found), len(found)


def _one_blank(encoded: Encoded, k: int) -> Factorization:
    """Blank k from left to right, given the fixed text and what is decided; other blanks are absent."""
    step = iter(range(len(encoded.ids)))
    state = [ABSENT if b not in {-1, *encoded.decided} else next(step) if b == k else GIVEN for b in encoded.blank]
    return Factorization(torch.tensor([state]))
