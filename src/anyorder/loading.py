"""`load`: a name -> a converted model and its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from anyorder.hub.resolve import DEFAULT_MODEL, cannot_load, resolve
from anyorder.model.configuration import AnyOrderConfig, hub_arguments
from anyorder.modeling import AnyOrderForCausalLM


def load(
    name_or_path: str = DEFAULT_MODEL, recipe: str | None = None, **kwargs: Any
) -> tuple[AnyOrderForCausalLM, PreTrainedTokenizerBase]:
    """A converted model in evaluation mode and its tokenizer.

    Args:
        name_or_path: a built-in name, a directory, a GGUF file or a hub id. A plain causal LM is converted.
        recipe: "exact" (default) or "paper", for a plain causal LM; a converted one has its own.
        kwargs: passed on to loading (dtype, device_map, revision, attn_implementation, adapter, ...).

    Raises:
        ValueError: if there is nothing at `name_or_path`, or it cannot be converted.
    """
    location = resolve(name_or_path)
    try:
        config = AutoConfig.from_pretrained(location, **hub_arguments(kwargs))
        tokenizer = AutoTokenizer.from_pretrained(_tokenizer_location(location, config), **hub_arguments(kwargs))
    except (OSError, ValueError) as error:
        raise cannot_load(name_or_path, error) from error
    if config.model_type == AnyOrderConfig.model_type:
        if recipe not in (None, config.recipe):
            raise ValueError(f"{name_or_path} was converted with recipe={config.recipe!r}; it cannot become {recipe!r}")
        _check_adapter(name_or_path, config, kwargs.pop("adapter", None))
        model = AnyOrderForCausalLM.from_pretrained(location, **kwargs)
    else:
        model = AnyOrderForCausalLM.from_causal_lm(name_or_path, recipe=recipe or "exact", **kwargs)
    return model.eval(), tokenizer


def _check_adapter(name: str, config: AnyOrderConfig, wanted: Any) -> None:
    """A converted model keeps the adapter that it has; ValueError if another one is asked for."""
    if wanted is None:
        return
    kind, rank = (wanted, None) if isinstance(wanted, str) else (wanted.kind, wanted.rank)
    if config.adapter is None:
        raise ValueError(
            f"{name} is converted already and has no adapter: go on with all weights, or start from its base"
        )
    own = config.adapter
    if own["kind"] != kind or rank not in (None, own["rank"]):
        raise ValueError(
            f"{name} has a {own['kind']} adapter of rank {own['rank']}, not a {kind} one of rank {rank}: use the same, "
            "or start from its base"
        )


def _tokenizer_location(location: str, config: Any) -> str:
    """An adapter that is saved without a tokenizer has its base model's."""
    base = getattr(config, "base", None) or {}
    directory = Path(location)
    if base.get("name") and directory.is_dir() and not (directory / "tokenizer_config.json").is_file():
        return resolve(base["name"])
    return location
