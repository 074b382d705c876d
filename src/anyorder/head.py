"""Hidden states -> logits, by the base model's own forward over an identity decoder.

Whatever a family does to its logits (caps, scales, biases) is done by its own code, without a copy of it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput


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
