"""Compiled decoding steps: the forward of a few rows through torch.compile, in few static shapes.

A step is padded to a bucket of content rows and one of query rows, and the store of keys and values to a bucket of
slots; each combination is compiled once. On the CPU weights are frozen into the compiled code, laid out as its kernels
want them, and `aot` keeps the code on disk: a shape takes one to three minutes the first time (SmolLM2-135M on two
cores), a second ever after. On CUDA each shape becomes a CUDA graph, recorded anew when a run's store lies elsewhere,
of kernels that inductor keeps on disk itself. A model that is trained on must be compiled anew, which `model.train()`
sees to.

The first forward of a run, over the prompt, and steps of many rows stay eager: they are bound by arithmetic.

This module knows rows and the store; no policies, no tokens' meaning.

Shapes: B batch, R rows of a forward (C content rows first), K slots of the store.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import TYPE_CHECKING, Any, cast

import torch
import torch._dynamo
from torch import Tensor, nn

from anyorder import adapters
from anyorder.aot import Packages
from anyorder.attention import Block, additive, for_heads, which_are_read
from anyorder.cache import KeyValueStore, scatter
from anyorder.head import head_of
from anyorder.layout import Rows

if TYPE_CHECKING:
    from anyorder.modeling import AnyOrderForCausalLM

MOST_ROWS = 64
"""Rows of a compiled forward, over the batch; with more, arithmetic binds and eager kernels serve."""
MOST_SHAPES = 256
"""PyTorch counts every shape as a compilation anew of the same function, and gives up after 8 unless told."""
_PADDING: dict[str, int | bool] = {
    "seed_ids": 0, "seeded": True, "positions": 0, "lo": 0, "hi": 1, "gates": False,
}  # fmt: skip
SLOTS = 64
"""The store's slots are a multiple of it."""
ON_CPU: dict[str, Any] = {
    "freezing": True,
    "cpp.enable_concat_linear": True,  # linears of the same rows as one
    "max_autotune": True,  # oneDNN's or generated code, by trial: for one row the latter is twice as fast
    "max_autotune_gemm_backends": "CPP,ATEN",
    "max_autotune_report_choices_stats": False,
    "autotune_num_choices_displayed": 0,
}
"""Inductor's settings there."""
Shape = tuple[int, int, int, int, bool, bool]
"""Batch, content rows, query rows, slots, whether a gated adapter acts on any row, whether adapters are on."""


class StaticReads:
    """What `attention.Reads` is to eager forwards, for traced ones: every tensor has the shape of its bucket.

    Args:
        lo, hi, positions: (B, R) int64, of the rows.
        gates: (B, R) bool.
        slots: (B, C) int64.
        key_positions: (B, K) int64.
        keys, values: of each layer, (B, heads, K, head_dim); written to.
    """

    implementation = "sdpa"

    def __init__(
        self,
        lo: Tensor,
        hi: Tensor,
        positions: Tensor,
        gates: Tensor,
        slots: Tensor,
        key_positions: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
        dtype: torch.dtype,
    ):
        self.calls: list[tuple[int, int | None]] = []
        self.lo, self.hi, self.positions, self.slots, self.key_positions = lo, hi, positions, slots, key_positions
        self.keys, self.values = keys, values
        self.open_rows = gates.reshape(-1, 1).to(dtype)

    def keys_values(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store the content rows' keys and values; all slots come back."""
        C = self.slots.shape[1]
        scatter(self.keys[layer], key[:, :, :C], self.slots)
        scatter(self.values[layer], value[:, :, :C], self.slots)
        return self.keys[layer], self.values[layer]

    def plan(self, window: int | None, repeats: int, dtype: torch.dtype) -> list[Block]:
        """All rows in one block, with its mask."""
        R, K = self.lo.shape[1], self.key_positions.shape[1]
        rank = torch.arange(K, device=self.lo.device)
        mask = for_heads(which_are_read(self.lo, self.hi, rank, self.positions, self.key_positions, window), repeats)
        return [(slice(0, R), slice(0, K), mask if dtype == torch.bool else additive(mask, dtype))]


class CompiledForward:
    """Stands in for `AnyOrderForCausalLM.hidden_rows` while decoding.

    Args:
        model: a converted model.

    Attributes:
        shapes: those compiled so far.
    """

    def __init__(self, model: AnyOrderForCausalLM):
        self.model = model
        self._forwards: dict[Shape, Callable[..., Tensor]] = {}
        self._packages: Packages | None = None
        self._heads: dict[tuple[int, bool], Callable[[Tensor], Tensor]] = {}
        self._adapted = adapters.first_layer(model)

    @property
    def shapes(self) -> list[Shape]:
        return list(self._forwards)

    def __call__(self, rows: Rows, key_positions: Tensor, store: KeyValueStore) -> Tensor:
        """(B, R, E) hidden states, as `hidden_rows` gives them."""
        B, C, Q = rows.lo.shape[0], rows.content_count, rows.count - rows.content_count
        C_, Q_ = _bucket(C), _bucket(Q)
        keys, values = store.buffers
        if not keys or B * (C_ + Q_) > MOST_ROWS:
            return self.model.hidden_rows(rows, key_positions, store)
        K, device = store.capacity + 1, self.model.query_embedding.device
        some_open = bool(rows.gates.any())
        shape = (B, C_, Q_, K, some_open, self._adapters_are_on)
        padded = [_padded(getattr(rows, name), C, C_, Q_, filler) for name, filler in _PADDING.items()]
        padded += [_right(rows.slots, C_, store.capacity), _right(key_positions, K, 0)]
        inputs = (*(tensor.contiguous().to(device) for tensor in padded), keys, values)
        if shape not in self._forwards:
            name = f"rows-{B}-{C_}-{Q_}-{K}" + "-open" * some_open + self._suffix
            self._forwards[shape] = self._compiled(name, self._traced(some_open), inputs)
        if device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
            for buffer in keys + values:  # written to in place: a graph keeps their addresses, or is recorded anew
                torch._dynamo.mark_static_address(buffer, guard=False)
        hidden = self._forwards[shape](*inputs)
        return torch.cat([hidden[:, :C], hidden[:, C_ : C_ + Q]], dim=1)

    def head(self, hidden: Tensor) -> Tensor:
        """(N, V) logits of (N, E) hidden states, as `AnyOrderForCausalLM.head` gives them."""
        N = max(2, _bucket(len(hidden)))  # one row alone gets the slow kernel of a vector
        if N > MOST_ROWS:
            return self.model.head(hidden)
        padded = nn.functional.pad(hidden, (0, 0, 0, N - len(hidden))).contiguous()
        shape = (N, self._adapters_are_on)
        if shape not in self._heads:
            function = head_of(self.model.causal_lm)
            self._heads[shape] = self._compiled(f"head-{N}{self._suffix}", function, (padded,))
        logits = self._heads[shape](padded)[: len(hidden)]
        return logits.clone() if logits.is_cuda else logits  # the graph's next replay writes over its own

    @property
    def _adapters_are_on(self) -> bool:
        return self._adapted is not None and not self._adapted.disable_adapters

    @property
    def _suffix(self) -> str:
        return "-adapted" if self._adapters_are_on else ""

    def _compiled(self, name: str, function: Callable[..., Tensor], inputs: tuple[Any, ...]) -> Callable[..., Tensor]:
        if self.model.device.type != "cpu":
            return _just_in_time(function)
        if self._packages is None:
            self._packages = Packages(self.model, dict(ON_CPU))
        return self._packages.load(name, function, inputs)

    def _traced(self, some_open: bool) -> Callable[..., Tensor]:
        model = self.model
        dtype = cast(Tensor, model.get_input_embeddings().weight).dtype

        def forward(
            seed_ids: Tensor,
            seeded: Tensor,
            positions: Tensor,
            lo: Tensor,
            hi: Tensor,
            gates: Tensor,
            slots: Tensor,
            key_positions: Tensor,
            keys: list[Tensor],
            values: list[Tensor],
        ) -> Tensor:
            reads: Any = StaticReads(lo, hi, positions, gates, slots, key_positions, keys, values, dtype)
            if not some_open:
                reads.open_rows = None
            with torch.no_grad():
                return model.decode(seed_ids, seeded, positions, reads)

        return forward


def compiled_forward(model: AnyOrderForCausalLM) -> CompiledForward:
    """The compiled steps of a model, kept until it is trained again."""
    if model._compiled is None:
        model._compiled = CompiledForward(model)
    return model._compiled


def slots_for(columns: int) -> int:
    """Capacity of a store for so many columns whose slots, the spare one included, fill buckets."""
    return -(-(columns + 1) // SLOTS) * SLOTS - 1


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


def _bucket(rows: int) -> int:
    """The next power of two; 0 for none."""
    return 1 << (rows - 1).bit_length() if rows else 0


def _right(values: Tensor, width: int, filler: int | bool) -> Tensor:
    return nn.functional.pad(values, (0, width - values.shape[1]), value=filler)


def _padded(values: Tensor, content: int, content_bucket: int, query_bucket: int, filler: int | bool) -> Tensor:
    halves = values[:, :content], values[:, content:]
    return torch.cat(
        [_right(half, n, filler) for half, n in zip(halves, (content_bucket, query_bucket), strict=True)], 1
    )
