"""`load`: a name -> a converted model and its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar, overload

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import cached_file

from anyorder.hub.converted import ConvertedModel
from anyorder.hub.reach import check_reachable
from anyorder.hub.resolve import DEFAULT_MODEL, cannot_load, find_base, resolve
from anyorder.model.configuration import AnyOrderConfig, hub_arguments, of_any_repository
from anyorder.modeling import AnyOrderForCausalLM
from anyorder.runtime.engines import check_engine, prefer

Model = TypeVar("Model", bound=ConvertedModel)


@overload
def load(
    name_or_path: str = ...,
    recipe: str | None = None,
    base_model: str | None = None,
    *,
    model_class: type[Model],
    **kwargs: Any,
) -> tuple[Model, PreTrainedTokenizerBase]: ...


@overload
def load(
    name_or_path: str = ..., recipe: str | None = None, base_model: str | None = None, **kwargs: Any
) -> tuple[AnyOrderForCausalLM, PreTrainedTokenizerBase]: ...


def load(
    name_or_path: str = DEFAULT_MODEL,
    recipe: str | None = None,
    base_model: str | None = None,
    *,
    model_class: type[ConvertedModel] = AnyOrderForCausalLM,
    engine: str = "auto",
    weights: str | None = None,
    **kwargs: Any,
) -> tuple[ConvertedModel, PreTrainedTokenizerBase]:
    """A converted model in evaluation mode and its tokenizer.

    Args:
        name_or_path: a built-in name, a directory, a GGUF file or a hub id. A plain causal LM is converted.
        recipe: "exact" (default) or "paper", for a plain causal LM; a converted one has its own.
        base_model: of an adapter whose base has moved: where it is, as a name, directory or GGUF file.
        model_class: of the result; controls have classes of their own.
        engine, weights: what runs decoding steps unless `generate` is told otherwise, made ready here; as there.
        kwargs: passed on to loading (dtype, device_map, revision, attn_implementation, adapter, ...).

    Raises:
        ValueError: if there is nothing at `name_or_path`, it cannot be converted, or the engine cannot run it.
    """
    check_engine(engine, weights)
    location = resolve(name_or_path)
    check_reachable(name_or_path, location, kwargs)
    config = _config(name_or_path, location, hub_arguments(kwargs))
    try:
        tokenizer = _load_tokenizer(location, config, base_model, hub_arguments(kwargs))
    except (OSError, ValueError) as error:
        raise cannot_load(name_or_path, error) from error
    if config.model_type == model_class.config_class.model_type:
        if recipe not in (None, config.recipe):
            raise ValueError(f"{name_or_path} was converted with recipe={config.recipe!r}; it cannot become {recipe!r}")
        _check_adapter(name_or_path, config, kwargs.pop("adapter", None))
        if base_model is not None and config.adapter is None:
            raise ValueError(f"{name_or_path} is a whole model, not an adapter: it has no base_model")
        base = {} if base_model is None else {"base_model": base_model}
        model = model_class.from_pretrained(location, **base, **kwargs)
    elif isinstance(config, AnyOrderConfig):
        raise ValueError(
            f"{name_or_path} holds a {config.model_type} model, not a {model_class.__name__}: load it with the class "
            "that saved it"
        )
    else:
        if base_model is not None:
            raise ValueError(f"{name_or_path} is a plain causal LM, not an adapter: it has no base_model")
        model = model_class.from_causal_lm(name_or_path, recipe=recipe or "exact", **kwargs)
    model.eval()
    prefer(model, engine, weights)
    return model, tokenizer


def saved_type(name_or_path: str) -> str:
    """The `model_type` of what is at a name, which tells a converted model's class.

    Raises:
        ValueError: if there is nothing.
    """
    location = resolve(name_or_path)
    check_reachable(name_or_path, location, {})
    return str(_config(name_or_path, location, {}).model_type)


def _config(name: str, location: str, options: dict[str, Any]) -> Any:
    try:
        return AutoConfig.from_pretrained(location, **options)
    except (OSError, ValueError) as error:
        raise cannot_load(name, error) from error


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


def _load_tokenizer(
    location: str, config: Any, base_model: str | None, options: dict[str, Any]
) -> PreTrainedTokenizerBase:
    """An adapter that is saved without a tokenizer has its base model's."""
    base = getattr(config, "base", None) or {}
    name, revision = (base.get("name"), base.get("revision")) if base_model is None else (base_model, None)
    if name is None or _has_tokenizer(location, options):
        return AutoTokenizer.from_pretrained(location, **options)
    source = find_base(name, location) if base_model is None else base_model
    where = of_any_repository(options) | ({"revision": revision} if revision else {})
    return AutoTokenizer.from_pretrained(resolve(source), **where)


def _has_tokenizer(location: str, options: dict[str, Any]) -> bool:
    name = "tokenizer_config.json"
    if Path(location).is_dir():
        return (Path(location) / name).is_file()
    found = cached_file(
        location, name, **options,
        _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
    )  # fmt: skip
    return found is not None
