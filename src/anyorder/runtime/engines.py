"""Which engine executes a model's steps, by name or by what is at hand; kept with a model until its weights change."""

from __future__ import annotations

import difflib
import importlib.util
import logging
from collections.abc import Sequence
from contextlib import suppress

from anyorder.model.base import AnyOrderPreTrainedModel
from anyorder.runtime.runner import EagerRunner, ModelRunner
from anyorder.runtime.static_shapes import StaticRunner

logger = logging.getLogger(__name__)

ENGINES = ("auto", "eager", "openvino", "cuda_graphs")
WEIGHTS = ("int8", "bfloat16", "float32", "int4")
"""Of prepared graphs, in the order in which "auto" takes them: the fastest first of those near the model's own."""
DEFAULT_WEIGHTS = "int8"


def check_engine(engine: str, weights: str | None) -> None:
    """Raise ValueError for a name that is none, naming the nearest, or for weights of an engine that has none."""
    for name, value, known in (("engine", engine, ENGINES), ("weights", weights, WEIGHTS)):
        if value is not None and value not in known:
            near = difflib.get_close_matches(str(value), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(known)}"
            raise ValueError(f"{name} {value!r} is not known: {hint}")
    if weights is not None and engine not in ("auto", "openvino"):
        raise ValueError(f"weights={weights!r} is for engine='openvino'; engine={engine!r} takes the model's own")


def runner_for(model: AnyOrderPreTrainedModel, engine: str = "auto", weights: str | None = None) -> ModelRunner:
    """What executes the steps of a model.

    Args:
        model: a converted model.
        engine: of `ENGINES`. "auto" takes what the model was loaded for; else OpenVINO where it is installed and the
            model has been prepared for it, and PyTorch otherwise: it prepares nothing.
        weights: of `WEIGHTS`, for OpenVINO; None: int8, or for "auto" the fastest that has been prepared.

    Raises:
        ValueError: for an engine that is not known, not installed, or not for the model's device.
    """
    check_engine(engine, weights)
    if (engine, weights) == ("auto", None):
        engine, weights = model.__dict__.get("_preferred_engine", (engine, weights))
    device = model.device.type
    if engine == "auto":
        weights, why = _prepared(model, weights)
        engine = "eager" if weights is None else "openvino"
        new = engine == "openvino" and weights not in model.__dict__.get("_openvino_runners", {})
        logger.log(logging.INFO if new else logging.DEBUG, "engine %s: %s", engine, why)
    if engine == "eager":
        return EagerRunner(model)
    if engine == "cuda_graphs":
        if device != "cuda":
            raise ValueError(f"engine='cuda_graphs' needs the model on a CUDA device; it is on {device!r}")
        return _cuda_graphs(model)
    if device != "cpu":
        raise ValueError(f"engine='openvino' is for the CPU, the model is on {device!r}: use engine='cuda_graphs'")
    return _openvino(model, weights or DEFAULT_WEIGHTS)


def prefer(model: AnyOrderPreTrainedModel, engine: str, weights: str | None = None) -> None:
    """Let "auto" mean this engine for a model from now on, and make it ready: see `runner_for`. "auto" itself changes
    nothing."""
    if (engine, weights) == ("auto", None):
        return
    runner_for(model, engine, weights)
    model.__dict__["_preferred_engine"] = engine, weights


def compiled_engine(model: AnyOrderPreTrainedModel) -> str:
    """The engine that `compile=True` stands for."""
    return "openvino" if model.device.type == "cpu" else "cuda_graphs"


def check_installed() -> None:
    """Raise ValueError where OpenVINO is not installed."""
    if importlib.util.find_spec("openvino") is None:
        raise ValueError("engine='openvino' needs: pip install 'anyorder[openvino]'")


def _prepared(model: AnyOrderPreTrainedModel, weights: str | None) -> tuple[str | None, str]:
    """Weights for which a model has been prepared, or None, and why."""
    if model.device.type != "cpu":
        return None, "CUDA graphs are compiled shape by shape: ask for engine='cuda_graphs'"
    if importlib.util.find_spec("openvino") is None:
        return None, "openvino is not installed"
    from anyorder.runtime.openvino import cache

    if not cache.root().is_dir() or not any(cache.root().glob(f"{cache.kind_of(model)}-*")):
        return None, "the model has not been prepared (anyorder prepare)"
    wanted: Sequence[str] = WEIGHTS if weights is None else [weights]
    kept = model.__dict__.get("_openvino_runners", {})
    for name in wanted:
        if name in kept or cache.place_of(model, name).is_dir():
            return name, f"the model has been prepared with weights in {name}"
    return None, f"the model as it is now has not been prepared with weights in {' or '.join(wanted)}"


def _cuda_graphs(model: AnyOrderPreTrainedModel) -> ModelRunner:
    """The compiled steps of a model: those made before, if they are still its own."""
    from anyorder.runtime.cuda_graphs import CudaGraphRunner  # its imports take seconds

    kept = model.__dict__.get("_cuda_graph_runner")
    if isinstance(kept, StaticRunner):
        with suppress(ValueError):
            kept.check()
            return kept
    made = CudaGraphRunner(model)
    model.__dict__["_cuda_graph_runner"] = made  # not a module of the model's
    return made


def _openvino(model: AnyOrderPreTrainedModel, weights: str) -> ModelRunner:
    check_installed()
    from anyorder.runtime.openvino.prepare import prepare
    from anyorder.runtime.openvino.runner import OpenVINORunner

    kept: dict[str, OpenVINORunner] = model.__dict__.setdefault("_openvino_runners", {})  # not modules of the model's
    if weights in kept:
        try:
            kept[weights].check()
            return kept[weights]
        except ValueError as stale:
            logger.info("%s", stale)
            kept.clear()
    kept[weights] = OpenVINORunner(model, prepare(model, weights), weights)
    return kept[weights]
