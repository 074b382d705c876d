"""Decoding steps through OpenVINO.

Prompts and steps alike: every size of the graph is dynamic. Keys and values stay in the run's store, whose buffers the
graph reads where they lie. Steps whose gates are all closed take a graph without adapters, those whose sizes come again
and again one of their own (`compiled`).

Shapes: B batch, R rows of a forward (C content rows first), K stored ranks, N predictions, V vocabulary, E hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import openvino as ov
import torch
from torch import Tensor

from anyorder.core.layout import Rows
from anyorder.model import adapters
from anyorder.model.attention import common_start
from anyorder.model.base import AnyOrderPreTrainedModel
from anyorder.model.coupling import stand_beside
from anyorder.model.kv_cache import KeyValueStore
from anyorder.runtime.openvino.compiled import CompiledRows, Key, Sizes
from anyorder.runtime.openvino.inputs import inputs_of, with_content
from anyorder.runtime.openvino.processor import properties
from anyorder.runtime.runner import ModelRunner, weights_of

RANKS = 64
"""The store's ranks, the spare one included, are a multiple of it, and so is what is read of them: sizes that change
with every step would have kernels made anew."""
CLOSED = 24
"""From so many closed rows on, those that a forward begins with get one of their own, without adapters."""
MOST_SPARE = 512
"""Ranks that no row reads and a graph is given all the same."""


@dataclass
class _Requests:
    """What executes the forwards over one store, by the graph."""

    made: dict[Key, Any] = field(default_factory=dict)
    bound: dict[Key, tuple[int, ...]] = field(default_factory=dict)
    """Where the keys and values lie that a request reads, and how many ranks of them."""
    held: dict[Key, list[Tensor]] = field(default_factory=dict)
    """What those keys and values lie in: OpenVINO does not keep it."""
    inputs: dict[Key, dict[str, Tensor]] = field(default_factory=dict)
    """Where the other inputs lie that a request reads."""

    def keep(self, graphs: CompiledRows) -> None:
        """Let go of those whose graph is no longer kept."""
        for key in [key for key in self.made if key not in graphs]:
            for table in (self.made, self.bound, self.held, self.inputs):
                table.pop(key, None)

    def set(self, key: Key, name: str, value: Tensor) -> None:
        """An input of a request: written where the one before lay if it is as large, as telling OpenVINO of another
        place takes longer."""
        inputs = self.inputs.setdefault(key, {})
        if name in inputs and inputs[name].shape == value.shape:
            inputs[name].copy_(value)
        else:
            inputs[name] = value.clone(memory_format=torch.contiguous_format)
            self.made[key].set_tensor(name, _shared(inputs[name]))


class OpenVINORunner(ModelRunner):
    """Runs forwards of rows, and the head, as OpenVINO's graphs of a model as it is now.

    Args:
        model: on the CPU; its weights must not change.
        folder: what `cache` has of it.
        weights: of `graph.WEIGHTS`, those in the folder.
    """

    follows_buffers = True
    torch_threads = 1

    def __init__(self, model: AnyOrderPreTrainedModel, folder: Path, weights: str):
        self.model, self.weights = model, weights
        self._made_of = weights_of(model)
        self._adapted = adapters.first_layer(model)
        self._is_gated = model.config.is_gated
        self._made_with_adapters = self.adapters_are_on
        self._properties = properties(weights)
        self._core = ov.Core()
        whole = self._core.read_model(folder / "rows.xml")  # reads weights when they are needed
        self.graphs = CompiledRows(whole, self._is_gated, self._compiled)
        self._sizes = _sizes_of_keys_and_values(whole)
        self._head = self._compiled(self._core.read_model(folder / "head.xml")).create_infer_request()
        self._members = {
            name: self._compiled(self._core.read_model(folder / f"{name}.xml")).create_infer_request()
            for name in ("coupling", "scattered", "drafts")
            if (folder / f"{name}.xml").is_file()
        }
        self._widths = {"head": model.vocabulary_size} | {
            name: request.get_compiled_model().output(0).partial_shape[1].get_length()
            for name, request in self._members.items()
        }
        self._shared_by_threads = Lock()  # those of rows belong to a run each
        self._requests: WeakKeyDictionary[object, _Requests] = WeakKeyDictionary()  # of whole stores

    def __deepcopy__(self, memo: Any) -> None:
        """A copy of the model begins without."""

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    @property
    def adapters_are_on(self) -> bool:
        return self._adapted is not None and not self._adapted.disable_adapters

    def capacity(self, columns: int) -> int:
        ranks = RANKS
        while ranks <= columns:  # few sizes, so that the same come again: 1, 2, 3, 4, 6, 8, 12, ... times RANKS
            power = 2 ** (ranks // RANKS).bit_length() // 2 * RANKS
            ranks = ranks + max(power // 2, RANKS) if ranks == power else 2 * power
        return ranks - 1

    def check(self) -> None:
        if weights_of(self.model) != self._made_of:
            raise ValueError("the model's weights have changed since it was prepared for OpenVINO: prepare it anew")
        if not self._is_gated and self.adapters_are_on != self._made_with_adapters:
            state = "off" if self._made_with_adapters else "on"
            raise ValueError(f"the model's adapters were turned {state} since it was prepared for OpenVINO")

    def hidden(self, rows: Rows, key_positions: Tensor, store: KeyValueStore) -> Tensor:
        count = rows.closed_start if self._is_open(rows) else 0
        if count < CLOSED:
            return self._hidden(rows, key_positions, store)
        return torch.cat([self._hidden(part, key_positions, store) for part in rows.split(count)], dim=1)

    def _is_open(self, rows: Rows) -> bool:
        """Whether adapters that act where gates are open have anything to act on."""
        return self._is_gated and self.adapters_are_on and bool(rows.gates.any())

    def _hidden(self, rows: Rows, key_positions: Tensor, store: KeyValueStore) -> Tensor:
        padding = 0 if rows.content_count else 1
        if padding:
            rows = with_content(rows, store.capacity)
        buffers: Tensor | list[Tensor] | None = store.stack
        if buffers is None:
            buffers = [part for pair in zip(*store.buffers, strict=True) for part in pair]
        count = _count(int(rows.hi.max()), store.capacity) if len(buffers) else 1
        sizes = Sizes(self._is_open(rows), len(rows.lo), rows.count, rows.content_count, count)
        requests = self._requests.setdefault(store.whole, _Requests())
        key = self._bound(requests, sizes, store.capacity, buffers)
        request = requests.made[key]
        for name, tensor in inputs_of(self.model, rows, key_positions, store, count).items():
            requests.set(key, name, tensor)
        self.infer(request)
        hidden, *new = (torch.from_numpy(output.data) for output in request.output_tensors)
        start = common_start(rows.ranks, store.capacity)
        if len(new) == 1:
            store.write_all(new[0], rows.ranks, start)
        else:
            for layer in range(len(new) // 2):
                store.write(layer, new[2 * layer], new[2 * layer + 1], rows.ranks, start)
        return hidden[:, padding:].clone()

    def logits(self, hidden: Tensor) -> Tensor:
        return self._logits(self._head, self._widths["head"], hidden)

    def coupled_logits(self, hidden: Tensor, logits: Tensor, members: Tensor, distances: Tensor) -> Tensor:
        coupling = self.model.coupling
        if coupling is None or "coupling" not in self._members:
            return super().coupled_logits(hidden, logits, members, distances)
        beside = stand_beside(distances[:, : coupling.window])
        if "scattered" not in self._members or bool(beside.all()):
            return self._of_members("coupling", hidden, members, distances).add_(logits)
        out = logits.clone()
        for name, chosen in (("coupling", beside), ("scattered", ~beside)):
            (at,) = chosen.nonzero(as_tuple=True)
            out[at] += self._of_members(name, hidden[at], members[at], distances[at])
        return out

    def draft_logits(self, hidden: Tensor, members: Tensor, distances: Tensor) -> Tensor:
        if "drafts" not in self._members:
            return super().draft_logits(hidden, members, distances)
        return self._of_members("drafts", hidden, members, distances)

    def _of_members(self, name: str, hidden: Tensor, members: Tensor, distances: Tensor) -> Tensor:
        """(N, V) float32, of drafts (N, V'): see `export.exported_members`."""
        coupling = self.model.coupling
        network = coupling.drafts if coupling is not None and name == "drafts" else coupling
        assert network is not None
        members, distances = members[:, : network.window], distances[:, : network.window]
        with torch.no_grad():
            summed = network.summed(members, distances, self.model.get_input_embeddings())
        return self._logits(self._members[name], self._widths[name], hidden, summed)

    def _logits(self, request: Any, width: int, *inputs: Tensor) -> Tensor:
        """(N, width) float32 of a graph that makes so many logits of inputs with N rows each."""
        logits = torch.empty(len(inputs[0]), width)
        if not len(logits):
            return logits
        held = [one.float().contiguous() for one in inputs]
        with self._shared_by_threads:
            for number, one in enumerate(held):
                request.set_input_tensor(number, _shared(one))
            request.set_output_tensor(_shared(logits))
            self.infer(request)
        return logits

    def infer(self, request: Any) -> None:
        """OpenVINO's own part of a step."""
        request.infer()

    def _bound(self, requests: _Requests, sizes: Sizes, capacity: int, buffers: Tensor | list[Tensor]) -> Key:
        """Which of the requests executes a forward; it is made, and is given stored keys and values for its input.

        Args:
            requests: over the store.
            sizes: of the forward.
            capacity: of the store.
            buffers: of the store, keys and values of each layer by turns; none before its first forward.
        """
        key, graph = self.graphs.graph_for(sizes)
        if key not in requests.made:
            requests.keep(self.graphs)
            requests.made[key] = graph.create_infer_request()
        count = sizes.stored
        places = [buffers] if isinstance(buffers, Tensor) else buffers
        bound = (sizes.batch, count, *(one.data_ptr() for one in places))
        if requests.bound.get(key) == bound and (not places or count > capacity):
            return key
        if places:
            parts = [buffer[:, :, :count].contiguous() for buffer in buffers]
        else:
            parts = [torch.zeros(sizes.batch, heads, 1, size) for pair in self._sizes for heads, size in pair]
        requests.held[key] = parts
        names = [name for layer in range(len(self._sizes)) for name in (f"key.{layer}", f"value.{layer}")]
        for name, part in zip(names, parts, strict=True):
            requests.made[key].set_tensor(name, _shared(part))
        requests.bound[key] = bound
        return key

    def _compiled(self, graph: ov.Model) -> Any:
        return self._core.compile_model(graph, "CPU", self._properties)


def _sizes_of_keys_and_values(graph: ov.Model) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Of each layer: heads and size of a head, of its keys and of its values."""
    shapes = {parameter.get_friendly_name(): parameter.partial_shape for parameter in graph.get_parameters()}
    found = []
    for layer in range(sum(name.startswith("key.") for name in shapes)):
        key, value = (shapes[f"{name}.{layer}"] for name in ("key", "value"))
        found.append(((key[1].get_length(), key[3].get_length()), (value[1].get_length(), value[3].get_length())))
    return found


def _count(read: int, capacity: int) -> int:
    """Stored ranks that a graph gets: all, unless far more than it reads. Fewer have to be copied and bound in every
    step, which takes as long as reading some hundreds more."""
    needed = RANKS
    while needed < read:
        needed *= 2
    return capacity + 1 if capacity + 1 <= 2 * needed + MOST_SPARE else needed


def _shared(tensor: Tensor) -> ov.Tensor:
    """The memory of a contiguous tensor, which must live as long."""
    assert tensor.is_contiguous()
    return ov.Tensor(tensor.detach().numpy(), shared_memory=True)
