"""A model's forward of rows, its head and its coupling, as OpenVINO's graphs.

Traced once by torch.export with all sizes dynamic: batch, rows, content rows among them, and what is stored. Keys and
values of earlier forwards come in, those of this one's content rows go out; where they are kept is the caller's
business. Adapters act on every row times its gate.

Shapes: B batch, R rows of a forward (C content rows first), K stored ranks, S = K + C slots that rows may read.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import openvino as ov
import torch
from torch import Tensor, nn

from anyorder.core.layout import Rows
from anyorder.model.attention import additive, for_heads
from anyorder.model.base import AnyOrderPreTrainedModel
from anyorder.model.coupling import Layers, MemberNetwork
from anyorder.model.kv_cache import KeyValueStore
from anyorder.model.lm_head import head_of
from anyorder.model.scores import Scores

INPUTS = ("embeds", "positions", "lo", "hi", "gates", "ranks", "slots", "slot_positions")
"""Names of what goes in, besides `key.0`, `value.0`, `key.1`, ...; those that a model has no use for are not there."""


class SlotReads:
    """What `attention.Reads` is to eager forwards, for traced ones.

    Args:
        lo, hi, positions: (B, R) int64, of the rows.
        gates: (B, R) bool.
        content_count: C.
        slots: (B, S) int64, the rank of the token in each slot; -1 where there is none to read.
        slot_positions: (B, S) int64, their positions.
        past: (B, heads, K, head_dim) keys and values of each layer, by turns; K and C are 1 at least, as a product over
            nothing is left out of the graph, not zero.

    Attributes:
        new: keys and values of the content rows, (B, heads, C, head_dim), likewise.
    """

    def __init__(
        self,
        lo: Tensor,
        hi: Tensor,
        positions: Tensor,
        gates: Tensor,
        content_count: int,
        slots: Tensor,
        slot_positions: Tensor,
        past: list[Tensor],
    ):
        self.calls: list[tuple[int, int | None]] = []
        self.row_count = gates.numel()
        self.open_rows = gates.reshape(-1, 1).to(torch.float32)
        self.new: dict[int, tuple[Tensor, Tensor]] = {}
        self._lo, self._hi, self._positions, self._content_count = lo, hi, positions, content_count
        self._slots, self._slot_positions, self._past = slots, slot_positions, past
        self._masks: dict[tuple[int | None, int], Tensor] = {}

    def keys_values(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Those of this forward's content rows; `attend` reads the stored ones where they lie."""
        self.new[layer] = key[:, :, : self._content_count], value[:, :, : self._content_count]
        return self.new[layer]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        """All rows in one block, written out, of stored keys and new ones apart: nothing is copied to stand beside
        others. Of its own attention OpenVINO transposes and scales all keys first, and of products with more than one
        axis of batch it copies all that it multiplies. Heads that share keys are stacked as rows, so that keys are read
        once for all of them."""
        assert not scores.dropout, "nothing is trained here"
        layer, _ = self.calls[-1]
        past_key, past_value = self._past[2 * layer : 2 * layer + 2]
        B, H, R, D = query.shape
        G, K = key.shape[1], past_key.shape[2]
        scaled = query.reshape(B * G, H // G * R, D) * scores.factor(D)
        parts = [torch.bmm(scaled, part.flatten(0, 1).transpose(1, 2)) for part in (past_key, key)]
        if scores.window is not None:  # one more that holds zeros: see `_mask`
            parts.append(torch.zeros_like(scaled[:, :, :1]))
        found = scores.capped(torch.cat(parts, dim=2)).reshape(B, G, H // G * R, -1)
        weights = (found + self._mask(scores.window, H // G)).softmax(dim=-1).flatten(0, 1)
        read = torch.bmm(weights[:, :, :K], past_value.flatten(0, 1))
        read = read + torch.bmm(weights[:, :, K : K + self._content_count], value.flatten(0, 1))
        return read.reshape(B, H, R, value.shape[-1])

    def _mask(self, window: int | None, repeats: int) -> Tensor:
        """(B, 1, repeats * R, S) float32. A row whose window holds no key in its interval reads the zeros."""
        if (window, repeats) not in self._masks:
            slots, there = self._slots[:, None], self._slot_positions
            read = (slots >= self._lo[:, :, None]) & (slots < self._hi[:, :, None])
            if window is not None:
                read = read & ((self._positions[:, :, None] - there[:, None]).abs() < window)
                read = torch.cat([read, ~read.any(dim=2, keepdim=True)], dim=2)
            self._masks[window, repeats] = additive(for_heads(read, repeats), torch.float32)
        return self._masks[window, repeats]


class _Forward(nn.Module):
    """Rows of a decoder: their hidden states, and the new keys and values of each layer by turns, as one if all layers
    are alike. Its model is no submodule: exporting takes time by the parameter, used or not."""

    def __init__(self, model: AnyOrderPreTrainedModel):
        super().__init__()
        self.decoder, self._model = model.decoder, (model,)

    def forward(
        self,
        embeds: Tensor,
        positions: Tensor,
        lo: Tensor,
        hi: Tensor,
        gates: Tensor,
        ranks: Tensor,
        slots: Tensor,
        slot_positions: Tensor,
        past: list[Tensor],
    ) -> tuple[Tensor, ...]:
        reads = SlotReads(lo, hi, positions, gates, ranks.shape[1], slots, slot_positions, past)
        (model,) = self._model
        hidden = model.decode_from(embeds, positions, reads)
        parts = [part for layer in sorted(reads.new) for part in reads.new[layer]]
        is_even = len({(part.shape[1], part.shape[3]) for part in parts}) == 1
        return (hidden, torch.stack(parts)) if is_even else (hidden, *parts)


class _Head(nn.Module):
    def __init__(self, model: AnyOrderPreTrainedModel):
        super().__init__()
        self.head = model.get_output_embeddings()
        self._logits = head_of(model.causal_lm)

    def forward(self, hidden: Tensor) -> Tensor:
        return self._logits(hidden)


def exported_rows(model: AnyOrderPreTrainedModel) -> ov.Model:
    """The forward of rows of a model in float32."""
    shapes = _shapes_of_keys_and_values(model)
    embedding = cast(Tensor, model.get_input_embeddings().weight).shape[1]
    B, R, C, K = 2, 5, 3, 7  # any sizes but 0 and 1, and no two alike
    rows = torch.zeros(B, R, dtype=torch.int64)
    slots = torch.arange(K + C).repeat(B, 1)
    past = [torch.zeros(B, heads, K, size) for pair in shapes for heads, size in pair]
    gates = torch.ones(B, R, dtype=torch.bool)
    embeds = torch.zeros(B, R, embedding)
    # Every input a tensor of its own: of one that comes twice tracing sees one use.
    inputs = (embeds, rows, rows.clone(), rows + 1, gates, slots[:, K:].clone(), slots, slots.clone(), past)
    free = torch.export.Dim.DYNAMIC
    dynamic = (*({0: free, 1: free} for _ in INPUTS), [{0: free, 2: free} for _ in past])
    graph = _converted(_Forward(model), inputs, dynamic)
    sizes = {"embeds": [-1, -1, embedding]} | {name: [-1, -1] for name in INPUTS[1:]}
    for layer, pair in enumerate(shapes):
        for name, (heads, size) in zip(("key", "value"), pair, strict=True):
            sizes[f"{name}.{layer}"] = [-1, heads, -1, size]
    for parameter, (name, shape) in zip(graph.get_parameters(), sizes.items(), strict=True):
        parameter.set_partial_shape(ov.PartialShape(shape))
        parameter.set_friendly_name(name)
        parameter.output(0).set_names({name})
    graph.validate_nodes_and_infer_types()
    return graph


def exported_head(model: AnyOrderPreTrainedModel) -> ov.Model:
    """The head of a model in float32: (N, E) hidden states -> (N, V) logits."""
    size = cast(Tensor, model.get_output_embeddings().weight).shape[1]
    graph = _converted(_Head(model), (torch.zeros(2, size),), ({0: torch.export.Dim.DYNAMIC},))
    graph.get_parameters()[0].set_partial_shape(ov.PartialShape([-1, size]))
    graph.validate_nodes_and_infer_types()
    return graph


class _Members(nn.Module):
    """What the members of a group before a position say of its logits, where the head is linear.

    Args:
        network: of the coupling.
        of_codes: of its `logits_of_codes`.
        constant: (V,), added to that; None: nothing.
        layers: of the coupling.
    """

    def __init__(self, network: MemberNetwork, of_codes: Tensor, constant: Tensor | None, layers: Layers):
        super().__init__()
        self.network, self._constant, self._layers = network, constant, layers
        self.register_buffer("of_codes", of_codes)

    def forward(self, hidden: Tensor, summed: Tensor) -> Tensor:
        added = nn.functional.linear(self.network.code_of(hidden, summed, self._layers), cast(Tensor, self.of_codes))
        return added if self._constant is None else added + self._constant


def exported_members(model: AnyOrderPreTrainedModel) -> Iterator[tuple[str, ov.Model]]:
    """Of a coupled model: what is added to the logits of members ("coupling"), of those that stand apart ("scattered"),
    and logits of drafts ("drafts").

    All take (N, E) hidden states and what `MemberNetwork.summed` makes of the members. Where the head caps its logits
    or the model has no such network there is no graph.
    """
    coupling = model.coupling
    if coupling is None:
        return
    networks = {"coupling": (coupling, coupling), "scattered": (coupling, coupling.scattered)}
    for name, (network, layers) in (networks | {"drafts": (coupling.drafts, coupling.drafts)}).items():
        made = None if network is None else network.logits_of_codes(model.head)
        if network is None or layers is None or made is None:
            continue
        constant, of_codes = made
        size, (kinds, _, embedding) = network.state.in_features, network.members.shape
        module = _Members(network, of_codes.float(), constant if name == "drafts" else None, layers)
        inputs = (torch.zeros(2, size), torch.zeros(2, kinds, embedding))
        dynamic = ({0: torch.export.Dim.DYNAMIC},) * 2
        graph = _converted(module, inputs, dynamic)
        for parameter, shape in zip(graph.get_parameters(), ([-1, size], [-1, kinds, embedding]), strict=True):
            parameter.set_partial_shape(ov.PartialShape(shape))
        graph.validate_nodes_and_infer_types()
        del made, constant, of_codes, module
        yield name, graph
        del graph


def _converted(module: nn.Module, inputs: tuple[Any, ...], dynamic: tuple[Any, ...]) -> ov.Model:
    with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of PyTorch about itself, many times over
        exported = torch.export.export(module, inputs, dynamic_shapes=dynamic, strict=False)
        return ov.convert_model(exported)


@contextmanager
def in_float32(model: AnyOrderPreTrainedModel) -> Iterator[AnyOrderPreTrainedModel]:
    """The model in evaluation mode on the CPU with all weights in float32: itself if they are, else a copy."""
    tensors = [*model.parameters(), *model.buffers()]
    is_plain = all(type(t.data) is Tensor and t.dtype in (torch.float32, torch.int64, torch.bool) for t in tensors)
    if is_plain and not model.training:
        yield model
        return
    twin = copy.deepcopy(model).eval()
    made: dict[int, nn.Parameter] = {}  # tied ones stay tied
    for module in twin.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in made:
                whole = parameter.dequantize() if hasattr(parameter, "__tensor_flatten__") else parameter.detach()
                made[id(parameter)] = nn.Parameter(whole.float().cpu(), requires_grad=False)
            setattr(module, name, made[id(parameter)])
    yield twin.float()


def _shapes_of_keys_and_values(model: AnyOrderPreTrainedModel) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Of each layer: heads and size of a head, of its keys and of its values, as a forward of one row has them."""
    one, store = torch.zeros(1, 1, dtype=torch.int64), KeyValueStore(1)
    rows = Rows(one, one == 0, one, lo=one, hi=one + 1, gates=one > 0, ranks=one)
    with torch.no_grad():
        model.hidden_rows(rows, one, store)
    return [
        ((key.shape[1], key.shape[3]), (value.shape[1], value.shape[3]))
        for key, value in zip(*store.buffers, strict=True)
    ]
