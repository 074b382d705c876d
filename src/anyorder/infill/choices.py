"""Blanks that are one of several strings: which one, by exact likelihood, before the other blanks are filled.

The strings of a choice may have different lengths in tokens, so each makes a text of its own; all are scored in one
batch, given the fixed text and the choices to their left. The blanks that are not filled yet are absent.

This module knows blanks and likelihoods; how the other blanks are filled is `infilling`'s business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from anyorder.core.factorization import ABSENT, GIVEN, Factorization
from anyorder.decoding.constraints import Choice, Constraint
from anyorder.infill.encoding import Blanks, Encoded, check_context, pad
from anyorder.infill.template import Template
from anyorder.model.compatibility import context_length
from anyorder.modeling import AnyOrderForCausalLM


@dataclass(frozen=True)
class Decision:
    """What a choice came to."""

    text: str
    ids: list[int]
    log_prob: float
    """log p of its tokens given the fixed text, in nats."""
    probabilities: dict[str, float]
    """Of each string: exact up to one factor, which makes their sum 1."""


def decide(
    model: AnyOrderForCausalLM,
    blanks: Blanks,
    template: Template,
    lengths: Sequence[int],
    constraints: Sequence[Constraint | None],
    generator: torch.Generator | None,
    temperature: float | None,
) -> dict[int, Decision]:
    """The choices of one text by the numbers of their blanks, decided from left to right.

    Without a temperature the likeliest string, else one that is drawn.

    Raises:
        ValueError: if a text is longer than the model's context.
    """
    decisions: dict[int, Decision] = {}
    for k, constraint in enumerate(constraints):
        if not isinstance(constraint, Choice):
            continue
        before = {j: decision.ids for j, decision in decisions.items()}
        own = [blanks.encode_fill(template, k, text) for text in constraint.options]
        tried = [blanks.encode(template, lengths, before | {k: ids}) for ids in own]
        check_context(tried, context_length(model.causal_lm.config))
        order = Factorization.stack([_one_blank(e, k) for e in tried])
        scores = model.log_likelihood(pad([e.ids for e in tried], 0), order).double().sum(dim=1).cpu()
        best = int(scores.argmax())
        if temperature is not None:
            best = int(torch.multinomial((scores / temperature).softmax(dim=0), 1, generator=generator))
        named = dict(zip(constraint.options, scores.softmax(dim=0).tolist(), strict=True))
        decisions[k] = Decision(constraint.options[best], own[best], float(scores[best]), named)
    return decisions


def _one_blank(encoded: Encoded, k: int) -> Factorization:
    """Blank k from left to right, given the fixed text and what is decided; other blanks are absent."""
    step = iter(range(len(encoded.ids)))
    state = [ABSENT if b not in {-1, *encoded.decided} else next(step) if b == k else GIVEN for b in encoded.blank]
    return Factorization(torch.tensor([state]))
