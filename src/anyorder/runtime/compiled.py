"""Which compiled runner a model's device takes, kept with the model until its weights change."""

from __future__ import annotations

from contextlib import suppress

from anyorder.model.base import AnyOrderPreTrainedModel
from anyorder.runtime.static_shapes import StaticRunner


def compiled_runner(model: AnyOrderPreTrainedModel) -> StaticRunner:
    """The compiled steps of a model: those made before, if they are still its own."""
    kept = model.__dict__.get("_compiled_runner")
    if isinstance(kept, StaticRunner):
        with suppress(ValueError):
            kept.check()
            return kept
    made: StaticRunner
    if model.device.type == "cpu":
        from anyorder.runtime.packages import PackagedRunner  # compilers take seconds to import

        made = PackagedRunner(model)
    else:
        from anyorder.runtime.cuda_graphs import CudaGraphRunner

        made = CudaGraphRunner(model)
    model.__dict__["_compiled_runner"] = made  # not a module of the model's
    return made
