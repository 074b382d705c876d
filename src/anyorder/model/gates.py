"""Gates: an adapter's update on some rows of a forward, and on no others.

The rows with an open gate travel in the keyword arguments of the decoder's layers, inside the object that holds the
intervals. Hooks open the gate when a layer begins and close it when the layer ends, however it ends: nothing outside
the layers ever sees one. Recomputation under gradient checkpointing runs a layer without its hooks; there the
attention's opens the gate, and the end of the backward pass closes it. Without rows, in plain use of the wrapped model,
no gate is open: the base model answers.

This module knows layers and rows; which rows are open is the layout's business.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class _Gate(NamedTuple):
    """What adapters of the running decoder layer act on."""

    rows: Tensor | slice
    """(N,) int64 numbers of the open rows among the flattened (B x R) rows; a slice of them, in training always of all;
    or, where steps are traced, (B x R, 1) floats, 1 where a row is open."""
    of: int
    """B x R."""


_gate: contextvars.ContextVar[_Gate | None] = contextvars.ContextVar("anyorder_gate", default=None)
"""None: no row is open."""


class _Traced:
    """What `_gate` is, for tracing by torch.compile, which cannot set context variables."""

    gate: _Gate | None = None


_traced = _Traced()


def _set(gate: _Gate | None) -> None:
    if torch.compiler.is_compiling():
        _traced.gate = gate
    else:
        _gate.set(gate)


def _open(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    reads = keywords.get("anyorder_reads")
    if reads is None or reads.open_rows is None:
        _set(None)
    else:
        _set(_Gate(reads.open_rows, reads.row_count))


def _open_again(attention: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
        return
    _open(attention, arguments, keywords)  # recomputation, in a backward pass
    torch.autograd.Variable._execution_engine.queue_callback(lambda: _set(None))


def _close(layer: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
    _set(None)


def open_in_layers(causal_lm: PreTrainedModel) -> None:
    """Let every decoder layer open the gate for the adapters inside it, and close it behind them."""
    for layer in decoder_layers(causal_lm).values():
        layer.register_forward_pre_hook(_open, with_kwargs=True)
        layer.register_forward_hook(_close, always_call=True)
        for module in layer.modules():
            if _is_attention(module):
                module.register_forward_pre_hook(_open_again, with_kwargs=True)


def _is_attention(module: nn.Module) -> bool:
    return hasattr(module, "layer_idx") and "attention" in type(module).__name__.lower()


def decoder_layers(causal_lm: PreTrainedModel) -> dict[str, nn.Module]:
    """The decoder's layers by name: the outermost members of lists that hold an attention module with a number."""
    found = {}
    for name, module in causal_lm.named_modules():
        if _is_attention(module):
            parts = name.split(".")
            number = next((k for k, part in enumerate(parts) if part.isdigit()), None)
            if number is not None:
                layer = ".".join(parts[: number + 1])
                found[layer] = causal_lm.get_submodule(layer)
    return found


def inside_layers(causal_lm: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of all that lies inside decoder layers."""
    for layer_name, layer in decoder_layers(causal_lm).items():
        for name, module in layer.named_modules(prefix=layer_name):
            if module is not layer:
                yield name, module


@functools.cache
def gated_linear() -> type[nn.Module]:
    """The class of PEFT layers with a gate; PEFT is imported on first use."""
    from peft.tuners.lora import Linear

    class GatedLinear(Linear):
        """PEFT's LoRA layer, whose update is computed for the open rows alone."""

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            result: Tensor = self.base_layer(x)
            gate = _traced.gate if torch.compiler.is_compiling() else _gate.get()
            if gate is None or self.disable_adapters:
                return result
            self._check_rows(x.numel() // x.shape[-1], gate.of)
            rows = gate.rows
            if isinstance(rows, Tensor) and rows.is_floating_point():
                return self._add_traced(result, rows, x)
            flat, opened = result.flatten(0, -2), x.flatten(0, -2)
            opened = opened[rows] if isinstance(rows, slice) else opened.index_select(0, rows)
            for name in self.active_adapters:
                flat = self._add(flat, rows, opened, name)
            return flat.view(result.shape)

        def _check_rows(self, found: int, expected: int) -> None:
            if found != expected:
                raise ValueError(
                    f"a gated adapter stands on a layer of {tuple(self.base_layer.weight.shape)} weights that sees "
                    f"{found} of the forward's {expected} rows: leave it out of target_modules"
                )

        def _add_traced(self, result: Tensor, rows: Tensor, x: Tensor) -> Tensor:
            """With the update of every row times its gate: nothing depends on which rows are open but numbers. The
            layer's input goes to products alone, so that engines can join those of several layers."""
            gate = rows.view(*x.shape[:-1], 1)
            for name in self.active_adapters:
                inner = nn.functional.linear(x, self.lora_A[name].weight.to(x.dtype))
                inner = inner * (gate * self.scaling[name])
                result = result + nn.functional.linear(inner, self.lora_B[name].weight.to(x.dtype))
            return result

        def _add(self, flat: Tensor, rows: Tensor | slice, opened: Tensor, name: str) -> Tensor:
            """(N, out) with the update of (n, in) open rows; in place where no gradient flows: a step of decoding is
            hundreds of these."""
            down, up, scale = self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
            if torch.is_grad_enabled():
                inner = nn.functional.linear(self.lora_dropout[name](opened.to(down.dtype)), down)
                update = (nn.functional.linear(inner, up) * scale).to(flat.dtype)
                return flat + update if isinstance(rows, slice) else flat.index_add(0, rows, update)
            inner = nn.functional.linear(opened.to(down.dtype), down)
            if isinstance(rows, slice):
                flat[rows].addmm_(inner.to(flat.dtype), up.t().to(flat.dtype), alpha=scale)
                return flat
            return flat.index_add_(0, rows, nn.functional.linear(inner, up).to(flat.dtype), alpha=scale)

    return GatedLinear
