"""Graphs rewritten for speed: linear layers of the same input as one, no adapters where all gates are closed, weights
in fewer bits. What they compute stays what it was, to rounding.

This module knows nodes of OpenVINO's graphs: linear layers are products with a constant, adapters what gates multiply.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import torch

WEIGHTS = ("float32", "bfloat16", "int8")


@dataclass(frozen=True)
class _Update:
    """What an adapter adds: `total = base + up(down(x) * gate)`."""

    total: Any
    base: Any
    up: Any
    down: Any
    gate: Any


def closed(graph: ov.Model) -> ov.Model:
    """The graph without what adapters add: for rows whose gates are all closed."""
    twin = graph.clone()
    for update in _updates(twin):
        _replace(update.total.output(0), update.base)
    (gates,) = (parameter for parameter in twin.get_parameters() if parameter.get_friendly_name() == "gates")
    if not gates.output(0).get_target_inputs():
        return twin
    # Nodes that nothing reads are still held by the parameter until the graph is made anew of what its results need.
    return ov.Model(twin.get_results(), twin.get_parameters(), twin.get_friendly_name())


def join(graph: ov.Model) -> None:
    """Linear layers of the same input become one, in place, and so do the adapters beside them."""
    beside = {_linear(update.base): update for update in _updates(graph)}
    groups: dict[tuple[Any, ...], list[Any]] = {}
    for node in graph.get_ordered_ops():
        if _is_linear(node) and node not in {update.up for update in beside.values()}:
            source = node.input_value(0)
            groups.setdefault((source.get_node(), source.get_index()), []).append(node)
    down = {update.down for update in beside.values()}
    for layers in groups.values():
        layers = [layer for layer in layers if layer not in down]
        if len(layers) > 1:
            _join(layers, [beside[layer] for layer in layers if layer in beside])
    graph.validate_nodes_and_infer_types()


def in_int8(graph: ov.Model) -> None:
    """Weights of linear layers in 8 bits, in place: whole numbers from -127 to 127 and a scale for each output."""
    for node in graph.get_ordered_ops():
        if _has_weights(node):
            weight, axis = _constant(node), 1 if node.get_attributes()["transpose_b"] else 0
            scale = np.maximum(np.abs(weight).max(axis=axis, keepdims=True), 1e-30) / np.float32(127)
            whole = ops.convert(ops.constant(np.rint(weight / scale).astype(np.int8)), "f32")
            node.input(1).replace_source_output(ops.multiply(whole, ops.constant(scale)).output(0))
    graph.validate_nodes_and_infer_types()


def in_bfloat16(graph: ov.Model) -> None:
    """Weights of linear layers in bfloat16, in place."""
    for node in graph.get_ordered_ops():
        if _has_weights(node):
            weight = torch.from_numpy(_constant(node).copy()).bfloat16()
            bits = weight.view(torch.int16).numpy()  # numpy has no bfloat16
            constant = ov.op.Constant(ov.Tensor(bits, ov.Shape(list(weight.shape)), ov.Type.bf16), shared_memory=False)
            node.input(1).replace_source_output(ops.convert(constant, "f32").output(0))
    graph.validate_nodes_and_infer_types()


def _join(layers: list[Any], updates: list[_Update]) -> None:
    x = layers[0].input_value(0)
    weights = [_constant(layer) for layer in layers]
    whole = _product(x, np.concatenate(weights)).output(0)
    gates = {(update.gate.get_node(), update.gate.get_index()) for update in updates}
    if len(updates) == len(layers) and len(gates) == 1:
        inner = _product(x, np.concatenate([_constant(update.down) for update in updates])).output(0)
        up = _product(ops.multiply(inner, updates[0].gate).output(0), _diagonal([_constant(u.up) for u in updates]))
        for update in updates:
            _replace(update.total.output(0), update.base)
        whole = ops.add(whole, up).output(0)
    axis, sizes = np.int64(-1), np.array([len(weight) for weight in weights], dtype=np.int64)
    parts = ops.variadic_split(whole, axis, sizes)
    for number, layer in enumerate(layers):
        _replace(layer.output(0), parts.output(number))


def _updates(graph: ov.Model) -> list[_Update]:
    """What adapters add in a graph, found from its gates on."""
    gates = [parameter for parameter in graph.get_parameters() if parameter.get_friendly_name() == "gates"]
    found, outputs = [], [gate.output(0) for gate in gates]
    while outputs:
        output = outputs.pop()
        for target in output.get_target_inputs():
            node = target.get_node()
            other = node.input_value(1 - target.get_index()).get_node() if node.get_input_size() == 2 else None
            if node.get_type_name() != "Multiply" or other is None or other.get_type_name() == "Constant":
                outputs.append(node.output(0))
                continue
            (up,) = _targets(node)
            (total,) = _targets(up)
            place = next(i for i in (0, 1) if total.input_value(i).get_node() == up)
            found.append(_Update(total, total.input_value(1 - place), up, other, output))
    return found


def _targets(node: Any) -> list[Any]:
    return [target.get_node() for target in node.output(0).get_target_inputs()]


def _linear(output: Any) -> Any:
    """The product that an output comes from, behind the bias that may have been added to it."""
    node = output.get_node()
    if node.get_type_name() == "Add":
        return next((part for part in (node.input_value(i).get_node() for i in (0, 1)) if _is_linear(part)), node)
    return node


def _is_linear(node: Any) -> bool:
    """Whether it is x W^T with a constant W."""
    return _has_weights(node) and node.get_attributes()["transpose_b"] and not node.get_attributes()["transpose_a"]


def _has_weights(node: Any) -> bool:
    """Whether it is a product with a constant matrix in float32."""
    if node.get_type_name() != "MatMul" or node.input_value(1).get_node().get_type_name() != "Constant":
        return False
    return len(node.input_value(1).get_shape()) == 2 and node.input_value(1).get_element_type() == ov.Type.f32


def _constant(node: Any) -> np.ndarray[Any, Any]:
    return np.asarray(node.input_value(1).get_node().data)


def _product(x: Any, weight: np.ndarray[Any, Any]) -> Any:
    return ops.matmul(x, ops.constant(weight), False, True)


def _diagonal(blocks: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """The matrices along the diagonal of one, zeros elsewhere."""
    whole = np.zeros([sum(sizes) for sizes in zip(*(block.shape for block in blocks), strict=True)], blocks[0].dtype)
    row = column = 0
    for block in blocks:
        whole[row : row + block.shape[0], column : column + block.shape[1]] = block
        row, column = row + block.shape[0], column + block.shape[1]
    return whole


def _replace(output: Any, by: Any) -> None:
    for target in list(output.get_target_inputs()):
        target.replace_source_output(by)
