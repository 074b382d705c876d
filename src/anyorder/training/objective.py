"""Cross-entropy of the query stream, without the logits of all predictions at the same time.

Shapes: N predictions, E hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from anyorder.factorization import Factorization
    from anyorder.modeling import AnyOrderForCausalLM

CHUNK = 512
"""Predictions whose logits exist at the same time."""


def negative_log_likelihoods(
    model: AnyOrderForCausalLM, input_ids: Tensor, factorization: Factorization
) -> tuple[Tensor, Tensor]:
    """(N,) float32 negative log-likelihoods of the predicted tokens, row by row, and (B, T) bool where they belong.

    Each chunk's logits are made again in the backward pass, so at most CHUNK x V floats are kept.
    """
    hidden, predicted = model.predictions(input_ids, factorization)
    targets = input_ids.to(hidden.device)[predicted.to(hidden.device)]

    def chunk(states: Tensor, ids: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model.head(states).float(), ids, reduction="none")

    losses = [
        checkpoint(chunk, states, ids, use_reentrant=False) if torch.is_grad_enabled() else chunk(states, ids)
        for states, ids in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
    ]
    return torch.cat(losses) if losses else hidden.sum() * hidden.new_zeros(0), predicted
