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

WEIGHTS = ("float32", "bfloat16", "int8", "int4")


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
        is_joined = update.down.get_type_name() == "VariadicSplit"
        _replace(update.total.output(0), _product_alone(update.down) if is_joined else update.base)
    (gates,) = (parameter for parameter in twin.get_parameters() if parameter.get_friendly_name() == "gates")
    if not gates.output(0).get_target_inputs():
        return twin
    # Nodes that nothing reads are still held by the parameter until the graph is made anew of what its results need.
    return ov.Model(twin.get_results(), twin.get_parameters(), twin.get_friendly_name())


def join(graph: ov.Model, weights: str = "float32") -> None:
    """Linear layers of the same input become one, in place, with what adapters beside them make of it; so does what
    those add to them.

    Args:
        graph: with weights in float32.
        weights: of `WEIGHTS`, in which joined layers keep theirs: all of them in float32 once more would be too much.
            int4: in float32, and without what adapters make of the input, which must not end in 4 bits.
    """
    kept = "float32" if weights == "int4" else weights
    beside = {_linear(update.base): update for update in _updates(graph)}
    adapters = {part for update in beside.values() for part in (update.up, update.down)}
    groups: dict[tuple[Any, ...], list[Any]] = {}
    for node in graph.get_ordered_ops():
        if _is_linear(node) and node not in adapters:
            source = node.input_value(0)
            groups.setdefault((source.get_node(), source.get_index()), []).append(node)
    for layers in groups.values():
        updates = [beside[layer] for layer in layers if layer in beside]
        gates = {(update.gate.get_node(), update.gate.get_index()) for update in updates}
        if len(updates) < len(layers) or len(gates) > 1 or weights == "int4":
            updates = []
        if len(layers) > 1 or updates:
            _join(layers, updates, kept)
    graph.validate_nodes_and_infer_types()


def linear_layers(graph: ov.Model) -> list[Any]:
    """Products with a constant matrix in float32."""
    return [node for node in graph.get_ordered_ops() if _has_weights(node)]


def compress(graph: ov.Model, weights: str) -> None:
    """Weights of linear layers in fewer bits, in place.

    Args:
        graph: with weights in float32.
        weights: of `WEIGHTS`. int8: whole numbers from -127 to 127 and a scale for each output. int4: what is left in
            float32 of it, in int8.
    """
    if weights != "float32":
        for node in linear_layers(graph):
            node.input(1).replace_source_output(_weights(_constant(node), weights, _output_axis(node)).output(0))
        graph.validate_nodes_and_infer_types()


def _weights(matrix: np.ndarray[Any, Any], weights: str, outputs: int = 0) -> Any:
    """A matrix as a node of float32.

    Args:
        matrix: in float32.
        weights: in what it is kept.
        outputs: the axis of a layer's outputs.
    """
    if weights == "bfloat16":
        bits = torch.from_numpy(matrix.copy()).bfloat16().view(torch.int16).numpy()
        return ops.convert(_bfloat16(bits), "f32")
    if weights in ("int8", "int4"):
        scale = np.maximum(np.abs(matrix).max(axis=1 - outputs, keepdims=True), 1e-30) / np.float32(127)
        whole = matrix / scale
        whole = np.rint(whole, out=whole).astype(np.int8)
        return ops.multiply(ops.convert(ops.constant(whole), "f32"), ops.constant(scale))
    return ops.constant(matrix)


def _join(layers: list[Any], updates: list[_Update], kept: str) -> None:
    """One product instead of those of layers of the same input, each with an update or none of them."""
    x = layers[0].input_value(0)
    sizes = [len(_constant(layer)) for layer in layers]
    weights = [_constant(node) for node in (*layers, *(update.down for update in updates))]
    whole = _product(x, np.concatenate(weights), kept)
    if updates:
        parts = _split(whole, [sum(sizes), sum(map(len, weights)) - sum(sizes)])
        inner = ops.multiply(parts.output(1), updates[0].gate).output(0)
        added = _product(inner, _diagonal([_constant(update.up) for update in updates]), kept)
        for update in updates:
            _replace(update.total.output(0), update.base)
        whole = ops.add(parts.output(0), added).output(0)
    outputs = [whole] if len(layers) == 1 else _split(whole, sizes).outputs()
    for layer, output in zip(layers, outputs, strict=True):
        _replace(layer.output(0), output)


def _split(output: Any, sizes: list[int]) -> Any:
    """Parts of the last axis."""
    return ops.variadic_split(output, np.int64(-1), np.array(sizes, dtype=np.int64))


def _product_alone(split: Any) -> Any:
    """The first part of a split product, by a product that makes nothing else."""
    product = split.input_value(0).get_node()
    count = split.output(0).get_partial_shape()[-1].get_length()
    weight = _first_rows(product.input_value(1).get_node(), count)
    return ops.matmul(product.input_value(0), weight, False, True).output(0)


def _first_rows(node: Any, count: int) -> Any:
    """The first rows of a matrix of weights, in whatever dtype they are kept."""
    kind = node.get_type_name()
    if kind == "Convert":
        return ops.convert(_first_rows(node.input_value(0).get_node(), count), node.get_element_type().to_string())
    if kind == "Multiply":
        return ops.multiply(*(_first_rows(node.input_value(i).get_node(), count) for i in (0, 1)))
    data = np.ascontiguousarray(node.data[:count])
    if node.get_element_type() != ov.Type.bf16:
        return ops.constant(data)
    return _bfloat16(data.view(np.int16))


def _bfloat16(bits: np.ndarray[Any, Any]) -> Any:
    """A constant; numpy has no bfloat16."""
    return ov.op.Constant(ov.Tensor(bits, ov.Shape(list(bits.shape)), ov.Type.bf16), shared_memory=False)


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


def _output_axis(node: Any) -> int:
    return 0 if node.get_attributes()["transpose_b"] else 1


def _product(x: Any, matrix: np.ndarray[Any, Any], kept: str) -> Any:
    return ops.matmul(x, _weights(matrix, kept), False, True).output(0)


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
