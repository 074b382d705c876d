"""Which compiled runner a model's device takes, kept with the model until its weights change."""

from __future__ import annotations

from contextlib import suppress

from anyorder.model.base import AnyOrderPreTrainedModel
from anyorder.runtime.cuda_graphs import CudaGraphRunner
from anyorder.runtime.packages import PackagedRunner
from anyorder.runtime.static_shapes import StaticRunner


def compiled_runner(model: AnyOrderPreTrainedModel) -> StaticRunner:
    """The compiled steps of a model: those made before, if they are still its own."""
    kept = model.__dict__.get("_compiled_runner")
    if isinstance(kept, StaticRunner):
        with suppress(ValueError):
            kept.check()
            return kept
    made = (PackagedRunner if model.device.type == "cpu" else CudaGraphRunner)(model)
    model.__dict__["_compiled_runner"] = made  # not a module of the model's
    return made
