"""Which base models the interval rule can serve, and why not the others.

Two nets. `check_config` refuses by name, before any weight is read. `check_conversion` runs the base model and the
converted rows over a few tokens and compares their logits: an architecture nobody thought of is refused on evidence,
never converted into something else.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

if TYPE_CHECKING:
    from anyorder.modeling import AnyOrderForCausalLM

ALIBI = ("bloom", "mpt")
RECURRENT = ("mamba", "mamba2", "falcon_mamba", "recurrent_gemma", "rwkv", "jamba", "zamba", "bamba")
_SERVED_LAYERS = {"full_attention", "sliding_attention"}

PROBE_LENGTH = 6
PROBE_TOLERANCE = 2e-2
"""Greatest allowed difference of logits in the probe, relative to their own spread. Rounding in bfloat16 stays under
it; a position or a mask that is off by one does not."""


def refuse(config: PretrainedConfig, reason: str) -> NoReturn:
    """Raise the ValueError that says which architecture is refused and why."""
    raise ValueError(f"{config.model_type} cannot be converted: {reason}")


def check_config(config: PretrainedConfig) -> None:
    """Raise ValueError, with the reason, for an architecture that intervals over positions cannot serve."""
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        refuse(config, "it is an encoder-decoder; only decoder-only language models have one causal stream")
    if kind in ALIBI or getattr(config, "alibi", False):
        refuse(config, "ALiBi biases attention by key index and ignores position_ids, so tokens cannot be sorted")
    if kind in RECURRENT:
        refuse(config, "its recurrent layers read a running state, not an interval of keys")
    layer_types = set(getattr(config, "layer_types", None) or []) - _SERVED_LAYERS
    if layer_types:
        refuse(
            config,
            f"it has layers of type {', '.join(sorted(layer_types))}; only full and sliding attention are served",
        )
    if _rope_type(config) == "dynamic":
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
def check_conversion(model: AnyOrderForCausalLM) -> None:
    """Raise ValueError unless the converted model, left to right, gives its base model's logits on a short probe.

    Its logits must also respond to positions: a model that numbers its inputs itself passes the first test.

    Skipped for weights on the meta device, which have no values to compare.
    """
    causal_lm, config = model.causal_lm, model.causal_lm.config
    weight = model.query_embedding
    if weight.is_meta:
        return
    training = causal_lm.training
    causal_lm.eval()
    try:
        ids = torch.arange(1, PROBE_LENGTH + 1, device=weight.device)[None] % config.vocab_size
        base = causal_lm(input_ids=ids, use_cache=False).logits[0].float()
        ours, windows = model._probe(ids)
        stretched, _ = model._probe(ids, stride=3)
    finally:
        causal_lm.train(training)
    _check_windows(config, windows)
    error = float((ours.float() - base).abs().max() / base.std().clamp(min=1e-6))
    if not error < PROBE_TOLERANCE:
        refuse(config, f"its logits change by {error:.2g} of their spread when attention runs over intervals")
    if torch.equal(stretched, ours):
        refuse(config, "its modelling code ignores position_ids, so tokens cannot be sorted")


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
    if _rope_type(config) == "longrope":  # beyond it the frequencies depend on the length of each forward
        original = (getattr(config, "rope_parameters", None) or {}).get("original_max_position_embeddings")
        original = original or getattr(config, "original_max_position_embeddings", None)
        if original:
            return int(original)
    length = getattr(config, "max_position_embeddings", None)
    return int(length) if length else None


def _rope_type(config: PretrainedConfig) -> Any:
    return (getattr(config, "rope_parameters", None) or {}).get("rope_type")


def _check_windows(config: PretrainedConfig, windows: dict[int, int | None]) -> None:
    """Every layer that the config calls sliding must have told the attention function its window."""
    told = sum(window is not None for window in windows.values())
    layer_types = getattr(config, "layer_types", None)
    if len(windows) != config.num_hidden_layers:
        refuse(config, f"{len(windows)} of its {config.num_hidden_layers} layers went through the attention interface")
    if layer_types:
        expected = list(layer_types).count("sliding_attention")
    else:
        expected = config.num_hidden_layers if getattr(config, "sliding_window", None) else 0
    if told < expected:
        refuse(
            config, f"{expected} of its layers have a sliding window, but only {told} say so to the attention function"
        )
