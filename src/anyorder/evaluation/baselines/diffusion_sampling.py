"""Sampling from a masked diffusion model: all masked tokens are evaluated at every step, some are kept.

Knows token ids only, no text. Tokens of one step are drawn independently of each other, which is what many steps avoid:
with as many steps as blanks one token is drawn a forward. Nothing that was drawn is masked again.

Shapes: B batch, T columns, N masked tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anyorder.core.factorization import GIVEN, Factorization
from anyorder.core.rng import Generators, row_generators, uniforms
from anyorder.decoding.sampling import AllowedTokens, Sampler
from anyorder.evaluation.baselines.masked_diffusion import MaskedDiffusionLM
from anyorder.evaluation.baselines.noise import blanks

ORDERS = ("confidence", "random")


@dataclass(frozen=True)
class Filled:
    """What `fill` returns."""

    ids: Tensor
    """(B, T) int64 on the device of the ids that came in: given and absent tokens as they were."""
    forwards: int
    """Of the batch: the blanks of the row that has most, or `steps` if these are fewer."""


@torch.no_grad()
def fill(
    model: MaskedDiffusionLM,
    input_ids: Tensor,
    given: Tensor,
    steps: int,
    order: str = "confidence",
    temperature: float = 1.0,
    generator: Generators = None,
    attention_mask: Tensor | None = None,
    banned: Sequence[int] = (),
) -> Filled:
    """Fill what is not given, an equal number of blanks a step (the first steps one more where it does not divide).

    Args:
        model: in evaluation mode.
        input_ids: (B, T) int64; what stands in the blanks is not read.
        given: (B, T) bool, False at the blanks.
        steps: forwards at most.
        order: "confidence": those whose most likely token has the highest probability, by the model's own logits and
            never by the drawn tokens; "random": a random order, in which with as many steps as blanks samples have
            exactly the distribution that `negative_elbo` bounds.
        temperature: 0 takes the most likely tokens.
        generator: one a row, or one that seeds them: a row's result does not depend on its batch mates.
        attention_mask: (B, T), 0 marks tokens that take no part.
        banned: ids that are not drawn, special tokens for example.

    Raises:
        ValueError: naming the argument that cannot be meant.
    """
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a whole number of at least 1 (one a blank is the most), got {steps!r}")
    wanted = blanks(input_ids, given, attention_mask)
    allowed = AllowedTokens.all(model.vocabulary_size, input_ids.shape).without(banned, wanted.is_predicted)
    sampler = Sampler(do_sample=True, temperature=temperature, allowed=allowed)
    keys, chances = _randomness(wanted, generator)
    ids, masked, forwards = input_ids.cpu().masked_fill(wanted.is_predicted, 0), wanted.is_predicted, 0
    while bool(masked.any()):
        number = (masked.sum(dim=1) / (steps - forwards)).ceil().to(torch.int64)
        forwards += 1
        still = torch.where(wanted.is_predicted & ~masked, GIVEN, wanted.group_ids)
        found = model.predictions(ids, Factorization(still))
        row, column = masked.nonzero(as_tuple=True)
        nothing = row.new_zeros(len(row), 0)  # no setting here looks at the text
        logits = model.predictor.logits(found.hidden).float()
        if order == "confidence":
            plain = Sampler(allowed=allowed).process(logits, nothing, row, column)
            keys[row, column] = plain.softmax(dim=-1).amax(dim=-1).double().cpu()
        chosen = _largest(keys.masked_fill(~masked, -math.inf), number) & masked
        now = chosen[row, column]
        processed = sampler.process(logits[now.to(logits.device)], nothing[now], row[now], column[now])
        ids[chosen] = sampler.draw(processed, chances[chosen]).cpu()
        masked = masked & ~chosen
    return Filled(torch.where(wanted.is_predicted, ids, input_ids.cpu()).to(input_ids.device), forwards)


def _randomness(wanted: Factorization, generator: Generators) -> tuple[Tensor, Tensor]:
    """(B, T) float64 keys of a random order and (B, T) float64 chances of the tokens, drawn before anything is."""
    sources, lengths = row_generators(generator, wanted.batch_size), wanted.lengths.tolist()
    keys, chances = (uniforms(lengths, wanted.length, sources) for _ in range(2))
    return keys, chances


def _largest(keys: Tensor, number: Tensor) -> Tensor:
    """(B, T) bool: the `number[b]` largest keys of each row; the left one of equal ones."""
    rank = keys.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return rank < number[:, None]
