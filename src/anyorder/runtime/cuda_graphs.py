"""Decoding steps as CUDA graphs: each shape is compiled, then recorded anew when a run's store lies elsewhere.

Inductor keeps the kernels on disk itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn

from anyorder.runtime.static_shapes import StaticRunner

MOST_SHAPES = 256
"""PyTorch counts every shape as a compilation anew of the same function, and gives up after 8 unless told."""


class CudaGraphRunner(StaticRunner):
    """Steps through torch.compile into CUDA graphs."""

    most_built = MOST_SHAPES

    def build(self, name: str, function: Callable[..., Tensor], inputs: tuple[Any, ...]) -> Callable[..., Tensor]:
        return _just_in_time(function)

    def call(self, forward: Callable[..., Tensor], inputs: tuple[Any, ...]) -> Tensor:
        """Run a built forward, whose last two inputs are the store's buffers."""
        torch.compiler.cudagraph_mark_step_begin()
        for buffer in (*inputs[-2], *inputs[-1]):  # written to in place: a graph keeps their addresses
            torch._dynamo.mark_static_address(buffer, guard=False)
        return forward(*inputs)


def _just_in_time(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Dynamo keeps what it compiles by code object, and tells closures of one code apart by guards that are dropped
    here: so every function gets a code object of its own."""
    code, closure = function.__code__.replace(), function.__closure__
    own = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
    options: dict[str, Any] = {"guard_filter_fn": _guards, "triton.cudagraphs": True}
    compiled = torch.compile(own, fullgraph=True, dynamic=False, options=options)

    def call(*inputs: Any) -> Tensor:
        with torch._dynamo.config.patch(recompile_limit=MOST_SHAPES, accumulated_recompile_limit=MOST_SHAPES):
            return compiled(*inputs)

    return call


def _guards(entries: Sequence[Any]) -> list[bool]:
    """Which of Dynamo's guards stay: those on the global state and on the arguments.

    Most of some thousands watch attributes of modules, at 3 ms a step; whether adapters are on is part of the shape.
    """
    return [
        entry.guard_type in ("GLOBAL_STATE", "SHAPE_ENV")
        or (entry.guard_type == "TENSOR_MATCH" and not isinstance(entry.value, nn.Parameter))
        for entry in entries
    ]
