"""Plain causal LMs by name."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from anyorder.hub.resolve import cannot_load, resolve


def load_causal_lm(name_or_path: str, **kwargs: Any) -> PreTrainedModel:
    """The plain causal LM of a name, in evaluation mode."""
    location = resolve(name_or_path)
    try:
        return AutoModelForCausalLM.from_pretrained(location, **kwargs)
    except OSError as error:
        raise cannot_load(name_or_path, error) from error
