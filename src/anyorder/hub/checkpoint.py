"""Converted models as directories. Whole ones are transformers' business; with an adapter, a small directory without
the weights of the base:

    config.json                 AnyOrderConfig: recipe, adapter, and which base model it belongs to
    adapter_config.json         PEFT's
    adapter_model.safetensors   PEFT's
    query_embedding.safetensors w
    coupling.safetensors        of the tokens of a group, where the model has one

The base is loaded by its name and known again by a fingerprint of its weights. Of a path only the last part is kept.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoConfig, GenerationConfig, PretrainedConfig
from transformers.utils import cached_file

from anyorder.hub.pretrained import load_causal_lm, quiet
from anyorder.hub.reach import check_reachable
from anyorder.hub.resolve import find_base, in_package, way_out
from anyorder.model import adapters
from anyorder.model.base import AnyOrderPreTrainedModel
from anyorder.model.configuration import AnyOrderConfig, hub_arguments, of_any_repository
from anyorder.model.conversion import convert, left_as_it_was_if_refused
from anyorder.model.coupling import Coupling

Model = TypeVar("Model", bound=AnyOrderPreTrainedModel)

QUERY_FILE = "query_embedding.safetensors"
COUPLING_FILE = "coupling.safetensors"


def save_adapted(model: AnyOrderPreTrainedModel, directory: Path, state_dict: dict[str, Any] | None = None) -> None:
    """Write the files; with a gathered `state_dict`, of a model whose parameters are split over processes."""
    config, wrapped, query_embedding = model.config, None, model.query_embedding
    if state_dict is not None:
        wrapped = {n.removeprefix("causal_lm."): t for n, t in state_dict.items() if n.startswith("causal_lm.")}
        query_embedding = state_dict["query_embedding"]
    adapters.save(model.causal_lm, directory, (config.base or {}).get("name"), wrapped)
    query = {"query_embedding": query_embedding.detach().contiguous()}
    save_file(query, directory / QUERY_FILE, metadata={"format": "pt"})
    if model.coupling is not None:
        prefix = "coupling."
        whole = model.state_dict() if state_dict is None else state_dict
        parts = {n.removeprefix(prefix): t.contiguous() for n, t in whole.items() if n.startswith(prefix)}
        save_file(parts, directory / COUPLING_FILE, metadata={"format": "pt"})
    config.save_pretrained(directory)
    share_weights(directory)


def share_weights(directory: Path) -> None:
    """Let those read the weights who may read the config: safetensors writes files for their owner alone."""
    config = directory / "config.json"
    if not config.is_file():  # another process writes
        return
    mode = config.stat().st_mode
    for file in directory.glob("*.safetensors"):
        file.chmod(stat.S_IMODE(mode))


def read_weights(model: AnyOrderPreTrainedModel, find: Callable[[str], Path]) -> None:
    """Read what `save_adapted` wrote into a model that has such an adapter.

    Args:
        model: with the adapter, and the coupling if there is one.
        find: the path of a file of the checkpoint by its name.

    Raises:
        ValueError: if a file does not fit the model.
    """
    adapters.load(model.causal_lm, find(adapters.WEIGHTS_FILE))
    _fill(model.query_embedding, load_file(find(QUERY_FILE))["query_embedding"])
    if model.coupling is None:
        return
    file = find(COUPLING_FILE)
    found, own = load_file(file), dict(model.coupling.named_parameters())
    if {name: tensor.shape for name, tensor in found.items()} != {name: tensor.shape for name, tensor in own.items()}:
        raise ValueError(f"{file} does not fit the model: its coupling is {model.config.coupling}")
    for name, parameter in own.items():
        _fill(parameter, found[name])


def _fill(parameter: Tensor, values: Tensor) -> None:
    """Copy values into a parameter, of which each of several processes may hold a part."""
    own = parameter.data
    whole = values.to(own.dtype)
    own.copy_(distribute_tensor(whole, own.device_mesh, own.placements) if isinstance(own, DTensor) else whole)


def load_converted(cls: type[Model], load_whole: Callable[..., Any], source: Any, *args: Any, **kwargs: Any) -> Any:
    """Load a converted model, with an adapter on its base or whole.

    Args:
        cls: the model class.
        load_whole: transformers' own `from_pretrained` of it.
        source: built-in name, directory or hub id.
        args, kwargs: as `load_whole` takes them.

    Raises:
        ValueError: if the checkpoint is not a converted model, or a weight is missing, unknown or of a wrong shape.
    """
    wants_info = kwargs.pop("output_loading_info", False)
    source = in_package(source)
    check_reachable(source, str(source), kwargs)
    config = kwargs.get("config") or source
    if not isinstance(config, PretrainedConfig):
        config = AutoConfig.from_pretrained(config, **hub_arguments(kwargs))
    if config.model_type != cls.config_class.model_type:
        raise ValueError(
            f"{source} holds a {config.model_type} model, not a converted one: use {cls.__name__}.from_causal_lm"
        )
    if kwargs.get("recipe", config.recipe) != config.recipe:
        raise ValueError(f"{source} was converted with recipe={config.recipe!r}")
    if config.adapter is not None:
        for name in ("config", "adapter_kwargs", "_from_auto", "_from_pipeline"):  # of this model, not of its base
            kwargs.pop(name, None)
        return load_adapted(cls, source, config, **kwargs)
    # Shapes that differ are reported with the other problems, not half loaded with a warning.
    kwargs |= {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    with quiet():
        model, info = load_whole(source, *args, **kwargs)
    problems = [
        f"{kind.replace('_keys', '')}: {', '.join(map(str, sorted(info[kind])[:3]))}"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if info.get(kind)
    ]
    if problems:
        raise ValueError(f"{source} does not fit its config; weights {'; '.join(problems)}")
    with contextlib.suppress(OSError):  # an optional file: the ids in the base config serve
        model.generation_config = GenerationConfig.from_pretrained(source)
    return (model, info) if wants_info else model


def load_adapted(cls: type[Model], source: Any, config: AnyOrderConfig, base_model: Any = None, **kwargs: Any) -> Model:
    """Load the base, check that it is the one, and put the adapter on it.

    Args:
        cls: the model class.
        source: directory or hub id of the adapter.
        config: read from there.
        base_model: name, path or loaded model to use in place of the one that the config names.
        kwargs: options for loading the base (dtype, device_map, ...), and quantization_config, a TorchAoConfig.

    Raises:
        ValueError: for another base, or weights that do not fit.
    """
    assert config.adapter is not None
    origin = config.base or {}
    name = base_model if base_model is not None else origin.get("name")
    if name is None:
        raise ValueError(f"{source} does not say which model it was trained on: pass base_model=")
    names = [adapters.WEIGHTS_FILE, QUERY_FILE] + [COUPLING_FILE] * (config.coupling is not None)
    files = {file: Path(cached_file(source, file, **hub_arguments(kwargs))) for file in names}
    attention = kwargs.pop("attn_implementation", "sdpa")
    quantization = kwargs.pop("quantization_config", None)  # applied last: a quantised base has another fingerprint
    if isinstance(name, (str, os.PathLike)):
        name = find_base(str(name), source) if base_model is None else name
        revision = {"revision": origin["revision"]} if origin.get("revision") and base_model is None else {}
        causal_lm = load_causal_lm(name, **revision, **of_any_repository(kwargs))
    else:
        causal_lm, name = name, type(name).__name__
    try:
        adapters.check_fingerprint(causal_lm, origin.get("fingerprint", {}), str(name))
    except ValueError as error:
        raise ValueError(f"{error}{way_out(name)}") from None
    own = {id(parameter) for parameter in causal_lm.parameters()}
    with left_as_it_was_if_refused(causal_lm):
        model = convert(cls, causal_lm, config.recipe, adapters.Adapter.from_dict(config.adapter), attention)
        if config.coupling is not None:
            model.couple(Coupling.from_dict(config.coupling))
        read_weights(model, files.__getitem__)
    model.config.base = config.base
    model.config.length_prior = config.length_prior
    for parameter in model.parameters():  # not the whole model: buffers of the base may be kept in float32
        if id(parameter) not in own:
            parameter.data = parameter.data.to(causal_lm.dtype)
    model.eval()
    if quantization is not None:
        adapters.quantise_base(model.causal_lm, quantization)
    return model
