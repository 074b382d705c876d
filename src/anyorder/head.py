"""Hidden states -> logits, or losses without keeping them, by the base model's own forward over an identity decoder.

Whatever a family does to its logits (caps, scales, biases) is done by its own code, without a copy of it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

CHUNK = 512
"""Predictions whose logits exist at the same time in `negative_log_likelihoods`: 512 x 49,152 floats are 100 MB."""


@dataclass
class _IdentityOutput(ModelOutput):
    """Every field that some causal LM's forward reads from its decoder's output."""

    last_hidden_state: Tensor | None = None
    past_key_values: Any = None
    hidden_states: Any = None
    attentions: Any = None
    cross_attentions: Any = None
    router_logits: Any = None


class _IdentityDecoder(nn.Module):
    def forward(self, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> _IdentityOutput:
        return _IdentityOutput(last_hidden_state=inputs_embeds)


def logits_of(causal_lm: PreTrainedModel, hidden: Tensor) -> Tensor:
    """(N, V) logits of (N, E) final hidden states."""
    head = copy.copy(causal_lm)
    head._modules = dict(causal_lm._modules)
    head._modules[causal_lm.base_model_prefix] = _IdentityDecoder()
    # The class's forward: one that a hook has put on the instance is bound to the whole model.
    return cast(Tensor, type(head).forward(head, inputs_embeds=hidden[None], use_cache=False).logits[0])


def negative_log_likelihoods(causal_lm: PreTrainedModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """(N,) float32 cross-entropy of (N,) target ids, in nats; 0 where the target is -100.

    Each chunk's logits are made again in the backward pass, so at most CHUNK x V floats are kept.
    """

    def chunk(states: Tensor, ids: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits_of(causal_lm, states).float(), ids, reduction="none")

    parts = [
        checkpoint(chunk, states, ids, use_reentrant=False) if torch.is_grad_enabled() else chunk(states, ids)
        for states, ids in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
    ]
    return torch.cat(parts) if parts else hidden.sum() * hidden.new_zeros(0)
