"""Exact likelihoods: one forward, any order, any subset given any other.

Logits of a long text would be text x vocabulary floats; they are made in chunks, and only for predicted positions.

Shapes: B batch, T columns, N predictions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from anyorder.core.factorization import Factorization
from anyorder.core.rng import Generators
from anyorder.core.validation import left_to_right
from anyorder.model.base import AnyOrderPreTrainedModel
from anyorder.model.lm_head import Predictions


@torch.no_grad()
def log_likelihood(model: AnyOrderPreTrainedModel, input_ids: Tensor, factorization: Factorization) -> Tensor:
    """log p of each predicted token given what its group may read (design section 1).

    Args:
        model: a converted model.
        input_ids: (B, T) int64.
        factorization: of the same shape.

    Returns:
        (B, T) float32 in nats; 0 at positions that are not predicted. A row's sum is log P(predicted | given).

    Raises:
        ValueError: if ids and factorization do not fit each other or the model.
    """
    found = model.predictions(input_ids, factorization)
    return model.predictor.log_probs(found, input_ids).to(input_ids.device)


def conditional_log_likelihood(
    model: AnyOrderPreTrainedModel,
    input_ids: Tensor,
    targets: Sequence[int],
    given: Sequence[int],
    group_size: int = 1,
) -> Tensor:
    """log P(targets | given) for any two sets of positions; all other tokens are neither read nor predicted.

    Args:
        model: a converted model.
        input_ids: (B, T) int64; the same positions are scored in every row.
        targets: positions to predict, from left to right, in groups of `group_size`.
        given: positions to read; at least one.

    Returns:
        (B,) float32, in nats.
    """
    one = Factorization.conditional(targets, given, input_ids.shape[1], group_size)
    return log_likelihood(model, input_ids, Factorization.stack([one] * input_ids.shape[0])).sum(dim=1)


@dataclass(frozen=True)
class TeacherForced:
    """What the model says of known tokens, each given what its row may read."""

    log_probs: Tensor
    """(B, T) float32, in nats; 0 where nothing is predicted."""
    is_best: Tensor
    """(B, T) bool: whether greedy decoding in this order takes the token; False where nothing is predicted."""
    best_log_probs: Tensor
    """(B, T) float32, in nats: of what greedy decoding takes; 0 where nothing is predicted."""


@torch.no_grad()
def teacher_forced(model: AnyOrderPreTrainedModel, input_ids: Tensor, factorization: Factorization) -> TeacherForced:
    """`log_likelihood`, whether each token is the most likely one, and how likely that one is."""
    found = model.predictions(input_ids, factorization)
    return TeacherForced(*(t.to(input_ids.device) for t in model.predictor.log_probs_and_best(found, input_ids)))


def is_its_base(model: AnyOrderPreTrainedModel, order: str, group_size: int) -> bool:
    """Whether every prediction in such an order is the wrapped causal LM's own: see the exact recipe."""
    return model.recipe == "exact" and order == "left_to_right" and group_size == 1


@torch.no_grad()
def teacher_forced_by_base(model: AnyOrderPreTrainedModel, input_ids: Tensor, predicted: Tensor) -> TeacherForced:
    """The same by the wrapped causal LM, where `is_its_base`: one row a token, and as in any causal LM the last token
    needs no row, so that it may stand one behind the context.

    Args:
        model: a converted model.
        input_ids: (B, T) int64, padded on the right.
        predicted: (B, T) bool, nowhere in the first column.

    Raises:
        ValueError: for an id outside the vocabulary.
    """
    if int(input_ids.max()) >= model.vocabulary_size:
        raise ValueError(f"token id {int(input_ids.max())} is outside the vocabulary 0..{model.vocabulary_size - 1}")
    hidden = model.decoder(input_ids=input_ids[:, :-1].to(model.query_embedding.device), use_cache=False)[0]
    where = predicted.to(hidden.device)
    found = Predictions(hidden[where[:, 1:]], where)
    return TeacherForced(*(t.to(input_ids.device) for t in model.predictor.log_probs_and_best(found, input_ids)))


@torch.no_grad()
def compared_by_base(model: AnyOrderPreTrainedModel, input_ids: Tensor, predicted: Tensor) -> Tensor:
    """log p of texts that begin alike by the wrapped causal LM, which reads once what all of them begin with.

    Args:
        model: a converted model in the exact recipe, where this is its own prediction from left to right.
        input_ids: (B, T) int64, padded on the right.
        predicted: (B, T) bool, nowhere in the first column, nor where one text has what another has not before it.

    Returns:
        (B, T) float32 in nats; 0 where nothing is predicted.
    """
    assert model.recipe == "exact"
    first = int(predicted.any(dim=0).long().argmax()) - 1  # the column whose row predicts first
    ids, past = input_ids.to(model.query_embedding.device), None
    if first:
        past = model.decoder(input_ids=ids[:1, :first], use_cache=True).past_key_values
        past.batch_repeat_interleave(len(ids))
    hidden = model.decoder(input_ids=ids[:, first:-1], past_key_values=past, use_cache=past is not None)[0]
    where = predicted.to(hidden.device)
    found = Predictions(hidden[where[:, first + 1 :]], where)
    return model.predictor.log_probs(found, input_ids).to(input_ids.device)


TOKENS_AT_ONCE = 8192
"""Of the forwards of `order_spread`, unless a single text is longer: enough to read the weights for many orders at
once, while the activations stay small beside them."""


@dataclass(frozen=True)
class OrderSpread:
    """How far the likelihood of one text depends on the order in which it is predicted."""

    log_likelihoods: Tensor
    """(B, K) float32, in nats: log P of each row's predicted tokens under each of K orders."""

    @property
    def mean(self) -> Tensor:
        """(B,) float32."""
        return self.log_likelihoods.mean(dim=1)

    @property
    def standard_deviation(self) -> Tensor:
        """(B,) float32: 0 for a perfectly consistent model."""
        return self.log_likelihoods.std(dim=1)


def order_spread(
    model: AnyOrderPreTrainedModel,
    input_ids: Tensor,
    factorization: Factorization | None = None,
    orders: int = 8,
    group_size: int = 1,
    generator: Generators = None,
) -> OrderSpread:
    """Likelihoods of the same tokens under random orders.

    Args:
        model: a converted model.
        input_ids: (B, T) int64.
        factorization: says which positions are given and which are predicted; default: all but the first.
        orders: how many random orders, at least 2.
        group_size: of every order.
        generator: draws the orders.

    Raises:
        ValueError: for fewer than 2 orders, or if ids and factorization do not fit each other or the model.
    """
    if orders < 2:
        raise ValueError(f"a spread needs at least 2 orders, got {orders}")
    if factorization is None:
        factorization = left_to_right(input_ids)
    drawn = [factorization.regroup(group_size, "random", generator) for _ in range(orders)]
    rows, every = len(input_ids), Factorization.stack(drawn)
    total = []
    for some in torch.arange(orders * rows).split(max(1, TOKENS_AT_ONCE // input_ids.shape[1])):
        chosen = some.to(every.device)
        part = Factorization(every.group_ids[chosen], every.documents[chosen])
        total.append(log_likelihood(model, input_ids[(some % rows).to(input_ids.device)], part).sum(dim=1))
    return OrderSpread(torch.cat(total).view(orders, rows).T.contiguous())


class LikelihoodMixin:
    """Likelihoods as methods of a model."""

    def log_likelihood(self, input_ids: Tensor, factorization: Factorization) -> Tensor:
        """Exact log p of each predicted token: see `scoring.log_likelihood`."""
        return log_likelihood(cast(AnyOrderPreTrainedModel, self), input_ids, factorization)
