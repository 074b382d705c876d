"""Which base models the interval rule can serve, and why not the others.

The first of two nets: `check_config` and `check_model` refuse by name and by interface, before anything is changed. The
second is the probe of `conversion`.
"""

from __future__ import annotations

import inspect
from typing import Any, NoReturn

from transformers import PretrainedConfig, PreTrainedModel

ALIBI = ("bloom", "mpt")
RECURRENT = ("mamba", "mamba2", "falcon_mamba", "recurrent_gemma", "rwkv", "jamba", "zamba", "bamba")
_SERVED_LAYERS = {"full_attention", "sliding_attention"}


def refuse(config: PretrainedConfig, reason: str) -> NoReturn:
    """Raise the ValueError that says which architecture is refused and why."""
    raise ValueError(f"{config.model_type} cannot be converted: {reason}")


def check_config(config: PretrainedConfig) -> None:
    """Raise ValueError, with the reason, for an architecture that intervals over positions cannot serve."""
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        refuse(config, "it is an encoder-decoder; only decoder-only language models have one causal stream")
    if config.get_text_config() is not config:
        refuse(config, "it is multimodal; convert its language model alone")
    if kind in ALIBI or getattr(config, "alibi", False):
        refuse(config, "ALiBi biases attention by key index and ignores position_ids, so tokens cannot be sorted")
    if kind in RECURRENT:
        refuse(config, "its recurrent layers read a running state, not an interval of keys")
    layer_types = set(getattr(config, "layer_types", None) or []) - _SERVED_LAYERS
    if layer_types:
        names = ", ".join(sorted(layer_types))
        refuse(config, f"it has layers of type {names}; only full and sliding attention are served")
    if any(rope.get("rope_type") == "dynamic" for rope in _ropes(config)):
        refuse(config, "dynamic RoPE rescales with the length of each forward, so cached keys would not match")


def check_model(causal_lm: PreTrainedModel) -> None:
    """Raise ValueError if the modelling code cannot take rows: no position_ids, or no pluggable attention."""
    config = causal_lm.config
    check_config(config)
    if not getattr(causal_lm, "_supports_attention_backend", False):
        refuse(config, "its modelling code does not go through transformers' AttentionInterface")
    decoder = getattr(causal_lm, causal_lm.base_model_prefix, None)
    if not isinstance(decoder, PreTrainedModel):
        refuse(config, f"{type(causal_lm).__name__} has no decoder under '{causal_lm.base_model_prefix}'")
    missing = {"inputs_embeds", "position_ids", "attention_mask"} - set(inspect.signature(decoder.forward).parameters)
    if missing:
        refuse(config, f"its decoder does not take {', '.join(sorted(missing))}")
    if causal_lm.get_output_embeddings() is None:
        refuse(config, "it has no language-model head")


def context_length(config: PretrainedConfig) -> int | None:
    """Positions that the model can stand on, or None if its config does not say."""
    limits = [getattr(config, "max_position_embeddings", None)]
    for rope in _ropes(config):
        if rope.get("rope_type") == "longrope":  # beyond it the frequencies depend on the length of each forward
            own = rope.get("original_max_position_embeddings")
            limits.append(own or getattr(config, "original_max_position_embeddings", None))
    return min((int(limit) for limit in limits if limit), default=None)


def _ropes(config: PretrainedConfig) -> list[dict[str, Any]]:
    """RoPE parameters: one dict, or one for each type of layer."""
    ropes = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in ropes.values() if isinstance(value, dict)]
    return nested or [ropes]
