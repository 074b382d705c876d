"""What transformers users pass to `generate`: which names count, which change nothing here, which are refused and why.

Three places say how to generate, the nearer one first: the call, a `generation_config` in it, and the model's own saved
one. This module knows names and values; what they do is `request`'s business.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

from transformers import GenerationConfig

from anyorder.decoding.sampling import DRAWING, does_sample

_LOGGER = logging.getLogger(__name__)

FOR_PROMPTS = ("max_new_tokens", "max_length", "min_new_tokens", "min_length", "attention_mask")
"""With a factorization, its own length and absent positions say these."""

WITHOUT_EFFECT = (
    "use_cache", "cache_implementation", "cache_config", "max_cache_len", "compile_config", "disable_compile",
    "low_memory", "prefill_chunk_size", "synced_gpus", "early_stopping", "length_penalty", "is_assistant",
    "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_lookbehind",
    "max_matching_ngram_size", "target_lookbehind", "decoder_start_token_id", "transformers_version",
)  # fmt: skip
"""Names that never change a result: how transformers keeps keys and values, and details of what is refused below."""

_NEUTRAL: dict[str, object] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "typical_p": 1.0,
    "encoder_repetition_penalty": 1.0,
    "guidance_scale": 1.0,
}
"""Values that say "not at all"; so do None, False and 0 of any name that is refused."""

_BEAMS = "keeps unfinished texts with one common order; draw num_return_sequences and compare their log_likelihood"
_DRAFTS = "is a policy here: policies.speculative() verifies drafts in any order, exactly, with the model itself"
_ONE_STEP = "reads the hidden states of one step from left to right"
_PROCESSOR = "has a class of transformers, which logits_processor= takes, from left to right"
_ENCODER = "is for encoder-decoder models"

REFUSED: dict[str, str] = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "diversity_penalty", "constraints", "force_words_ids"), _BEAMS),
    **dict.fromkeys(("penalty_alpha", "dola_layers"), _ONE_STEP),
    **dict.fromkeys(("assistant_model", "assistant_tokenizer", "prompt_lookup_num_tokens", "use_mtp"), _DRAFTS),
    **dict.fromkeys(("assistant_early_exit", "assistant_ensemble_weight", "speculation_type"), _DRAFTS),
    **dict.fromkeys(("guidance_scale", "negative_prompt_ids", "negative_prompt_attention_mask"), _PROCESSOR),
    **dict.fromkeys(("no_repeat_ngram_size", "bad_words_ids", "sequence_bias", "typical_p", "top_h"), _PROCESSOR),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "renormalize_logits", "remove_invalid_values"), _PROCESSOR),
    **dict.fromkeys(("begin_suppress_tokens", "exponential_decay_length_penalty"), _PROCESSOR),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "watermarking_config"), _PROCESSOR),
    **dict.fromkeys(("encoder_no_repeat_ngram_size", "encoder_repetition_penalty"), _ENCODER),
    "prefix_allowed_tokens_fn": "numbers rows of a left-to-right batch; pass allowed_tokens or blank_constraints",
    "past_key_values": "holds keys in the order of positions; here each call keeps its own, in generation order",
    "inputs_embeds": "says nothing of the tokens that rows start from: pass input_ids",
    "position_ids": "is what the factorization and attention_mask say",
    "token_healing": "changes the prompt: leave its last token out and predict it with a factorization",
    "output_attentions": "is not kept: attention reads intervals; ask model.causal_lm for its own",
    "output_hidden_states": "is not kept: ask model.causal_lm for its own, or call model.predictions",
    "custom_generate": "runs another loop over the model; a loop of one's own is a policy here",
}
"""What makes no sense for tokens that come in any order, and the reason."""


def refuse(options: Mapping[str, Any]) -> None:
    """Raise ValueError for the first option of transformers' that cannot be served and is meant to have an effect."""
    for name, value in options.items():
        if name in REFUSED and _has_effect(name, value):
            raise ValueError(f"{name} is not for any order: it {REFUSED[name]}")


def settled(
    given: Mapping[str, Any],
    generation_config: GenerationConfig | None,
    own: GenerationConfig | None,
    known: Collection[str],
    prompts: bool,
) -> dict[str, Any]:
    """The options that count.

    Args:
        given: of the call, None where nothing is said.
        generation_config: of the call.
        own: the model's saved one. For prompts it counts as in transformers, so a model that is saved with
            do_sample=True samples; with a factorization only its end and padding ids do: its settings were chosen for
            text that goes on from left to right.
        known: names of options.
        prompts: whether there is no factorization.

    Raises:
        ValueError: if something asks for what cannot be served. What the model's own config asks for so is left out,
            and a warning logged.
    """
    if generation_config is not None and not isinstance(generation_config, GenerationConfig):
        raise ValueError(f"generation_config must be a GenerationConfig, got {type(generation_config).__name__}")
    given = {name: value for name, value in given.items() if value is not None}
    refuse(given)
    nearer = _said(generation_config)
    refuse(nearer)
    saved = _said(own)
    if not prompts:
        nearer = {name: value for name, value in nearer.items() if name not in FOR_PROMPTS}
        saved = {name: value for name, value in saved.items() if name in ("pad_token_id", "bos_token_id")}
    out = {name: value for name, value in given.items() if name in known}
    for config in (nearer, saved):
        _add(out, config, known)
    left_out = [f"{name}={value!r}" for name, value in saved.items() if name in REFUSED and _has_effect(name, value)]
    if left_out:
        _LOGGER.warning("the model's generation config asks for %s, which is left out", ", ".join(left_out))
    drawn = {name: given.get(name) for name in DRAWING}
    source = given.get("generator") if given.get("generator") is not None else given.get("seed")
    do_sample = does_sample(given.get("do_sample"), source, drawn)
    if not do_sample and given.get("do_sample") is None and drawn["temperature"] is None:
        do_sample = out.get("do_sample") is True
    out["do_sample"] = do_sample if given.get("do_sample") is None else given["do_sample"]
    if not do_sample:  # what a config says of drawing has no effect, as in transformers; what the call says is checked
        out = {name: value for name, value in out.items() if name not in DRAWING or name in given}
    return out


def _said(config: GenerationConfig | None) -> dict[str, Any]:
    """What a config says that is not transformers' default."""
    return {} if config is None else {name: value for name, value in config.to_diff_dict().items() if value is not None}


def _add(options: dict[str, Any], config: Mapping[str, Any], known: Collection[str]) -> None:
    """Add what a config says and nothing nearer does; a length said nearer, in whichever way, is the length."""
    for names in (("max_new_tokens", "max_length"), ("min_new_tokens", "min_length")):
        if not any(name in options for name in names):
            first = next((name for name in names if name in config), None)
            if first is not None:
                options[first] = config[first]
    lengths = FOR_PROMPTS[:4]
    for name, value in config.items():
        if name in known and name not in lengths:
            options.setdefault(name, value)


def _has_effect(name: str, value: object) -> bool:
    if value is None or value is False or (isinstance(value, (int, float)) and value == 0):
        return False
    return not (name in _NEUTRAL and value == _NEUTRAL[name])
