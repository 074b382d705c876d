"""Which base models the interval rule can serve, and why not the others.

Two nets. `check_config` and `check_model` refuse by name and by interface, before anything is changed.
`check_conversion` runs converted rows over a few tokens and compares their logits with the base model's: an
architecture nobody thought of is refused on evidence, never converted into something else.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

if TYPE_CHECKING:
    from anyorder.modeling import AnyOrderForCausalLM

ALIBI = ("bloom", "mpt")
RECURRENT = ("mamba", "mamba2", "falcon_mamba", "recurrent_gemma", "rwkv", "jamba", "zamba", "bamba")
_SERVED_LAYERS = {"full_attention", "sliding_attention"}

PROBE_LENGTH = 8
PROBE_TOLERANCE = {torch.float32: 0.01, torch.float64: 0.01}
PROBE_TOLERANCE_16_BIT = 0.2
"""Greatest root mean square difference of the probe's logits, relative to their spread. Kernels that round differently
stay well under it; a mask or a position that is off by one gives about 1."""


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


@torch.no_grad()
def probe(causal_lm: PreTrainedModel) -> tuple[Tensor, Tensor] | None:
    """Token ids (1, T) spread over the vocabulary and the plain model's (T, V) logits; to be called before converting.

    None for weights on the meta device, which have no values to compare.
    """
    weight = causal_lm.get_input_embeddings().weight
    if weight.is_meta:
        return None
    ids = (torch.arange(1, PROBE_LENGTH + 1, device=weight.device)[None] * 7919 + 31) % weight.shape[0]
    training = causal_lm.training
    causal_lm.eval()
    try:
        return ids, causal_lm(input_ids=ids, use_cache=False).logits[0].float()
    finally:
        causal_lm.train(training)


@torch.no_grad()
def check_conversion(model: AnyOrderForCausalLM, probed: tuple[Tensor, Tensor] | None) -> None:
    """Raise ValueError unless the converted model, left to right, gives the logits that its base gave.

    Its logits must also respond to positions: a model that numbers its inputs itself passes the first test.
    """
    if probed is None:
        return
    ids, base = probed
    config = model.causal_lm.config
    training = model.causal_lm.training
    model.causal_lm.eval()
    try:
        ours, calls = model._probe(ids)
        stretched, _ = model._probe(ids, stride=3)
    except Exception as error:
        refuse(config, f"its modelling code fails on rows of intervals: {type(error).__name__}: {error}")
    finally:
        model.causal_lm.train(training)
    _check_calls(config, calls)
    difference = float((ours.float() - base).square().mean().sqrt() / base.std().clamp(min=1e-6))
    if not difference < PROBE_TOLERANCE.get(model.causal_lm.dtype, PROBE_TOLERANCE_16_BIT):
        refuse(config, f"its logits change by {difference:.2g} of their spread when attention runs over intervals")
    if torch.equal(stretched, ours):
        refuse(config, "its modelling code ignores position_ids, so tokens cannot be sorted")


def _check_calls(config: PretrainedConfig, calls: Sequence[tuple[int, int | None]]) -> None:
    """One call of the attention function a layer, and every sliding layer must have told its window."""
    layers = {layer for layer, _ in calls}
    if len(layers) != config.num_hidden_layers:
        refuse(config, f"{len(layers)} of its {config.num_hidden_layers} layers go through the attention interface")
    if len(calls) != len(layers):
        refuse(config, f"its {len(layers)} layers call attention {len(calls)} times; the cache keeps one call a layer")
    told = sum(window is not None for _, window in calls)
    layer_types = getattr(config, "layer_types", None)
    if layer_types:
        expected = list(layer_types).count("sliding_attention")
    else:
        expected = config.num_hidden_layers if getattr(config, "sliding_window", None) else 0
    if told < expected:
        refuse(config, f"{expected} of its layers have a sliding window, but only {told} tell the attention function")


@torch.no_grad()
def left_to_right_difference(model: AnyOrderForCausalLM, input_ids: Tensor) -> float:
    """Greatest absolute difference between left-to-right logits of a converted model and of its base.

    Args:
        model: converted with the exact recipe.
        input_ids: (B, T) int64, at least two tokens a row.
    """
    base = model.causal_lm(input_ids=input_ids, use_cache=False).logits[:, :-1]
    ours = model(input_ids).logits[:, 1:]
    return float((base.float() - ours.float()).abs().max())


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
