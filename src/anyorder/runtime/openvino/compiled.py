"""The forward of rows as compiled graphs: of any sizes, and of sizes that come again and again.

A graph whose sizes are all open asks each of its nodes in every step what size it has: a third of a step of one row.
One of fixed sizes does not, but takes seconds to compile and its weights once more. So it is made when a forward of the
same sizes has come so often that it would have paid, as one buys skis when renting has cost as much.

This module knows graphs and sizes; what goes through them is the runner's business.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Any

import openvino as ov

from anyorder.runtime.openvino.graph import closed


@dataclass(frozen=True)
class Sizes:
    """What tells forwards apart for a graph of fixed sizes."""

    is_open: bool
    """Whether the gate of any row is open, or gates are none of the adapters' business."""
    batch: int
    rows: int
    content: int
    """Content rows among them."""
    stored: int
    """Ranks of earlier forwards."""

    def of(self, name: str, shape: ov.PartialShape) -> list[int]:
        """Those of an input of `export.INPUTS`, or of keys and values, (B, heads, K, head_dim)."""
        if name.startswith(("key.", "value.")):
            return [self.batch, shape[1].get_length(), self.stored, shape[3].get_length()]
        if name == "embeds":
            return [self.batch, self.rows, shape[2].get_length()]
        widths = {
            "ranks": self.content,
            "slots": self.stored + self.content,
            "slot_positions": self.stored + self.content,
        }
        return [self.batch, widths.get(name, self.rows)]


Key = Sizes | bool
"""Of a compiled graph: its sizes, or for any sizes whether it has adapters."""


class CompiledRows:
    """The graphs of one model.

    Args:
        whole: the graph with adapters.
        is_gated: whether those act only where gates are open.
        compiled: of a graph.
    """

    often: int = 400
    """Forwards of the same sizes before they get a graph of their own: compiling it takes as long as it saves in so
    many, within a factor of two, for models of 0.1 to 1 billion parameters."""
    most_fixed: int = 4
    """Graphs of fixed sizes that are kept; the one used longest ago makes room."""

    def __init__(self, whole: ov.Model, is_gated: bool, compiled: Callable[[ov.Model], Any]):
        self._sources = {True: whole}
        self._is_gated, self._compiled = is_gated, compiled
        self._any: dict[bool, Any] = {}
        self._fixed: OrderedDict[Sizes, Any] = OrderedDict()
        self._seen: Counter[Sizes] = Counter()
        self._lock = Lock()

    def __contains__(self, key: object) -> bool:
        return key in self._fixed or key in self._any

    def graph_for(self, sizes: Sizes) -> tuple[Key, Any]:
        """What executes a forward of such sizes, and its key."""
        with self._lock:
            if sizes not in self._fixed:
                self._seen[sizes] += 1
                if self._seen[sizes] <= self.often:
                    return sizes.is_open, self._of_any(sizes.is_open)
                del self._seen[sizes]
                graph = self._source(sizes.is_open).clone()
                inputs = {one.get_friendly_name(): one.get_partial_shape() for one in graph.get_parameters()}
                graph.reshape({name: ov.PartialShape(sizes.of(name, shape)) for name, shape in inputs.items()})
                self._fixed[sizes] = self._compiled(graph)
                if len(self._fixed) > self.most_fixed:
                    self._fixed.popitem(last=False)
            self._fixed.move_to_end(sizes)
            return sizes, self._fixed[sizes]

    def _of_any(self, is_open: bool) -> Any:
        if is_open not in self._any:
            self._any[is_open] = self._compiled(self._source(is_open))
        return self._any[is_open]

    def _source(self, is_open: bool) -> ov.Model:
        """The graph with adapters, or without where all gates are closed."""
        has_adapters = is_open or not self._is_gated
        if has_adapters not in self._sources:
            self._sources[has_adapters] = closed(self._sources[True])
        return self._sources[has_adapters]
