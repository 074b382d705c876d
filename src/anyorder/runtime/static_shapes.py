"""Decoding steps in few static shapes, for engines that compile each shape.

A step is padded to a bucket of content rows and one of query rows, and the store of keys and values to a bucket of
ranks; each combination is one shape. What makes a function of one shape fast is a subclass's business (`cuda_graphs`).
The first forward of a run, over the prompt, and steps of many rows stay eager: they
are bound by arithmetic.

This module knows rows and the store; no policies, no tokens' meaning, no compiler.

Shapes: B batch, R rows of a forward (C content rows first), K ranks of the store.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from anyorder.core.layout import PADDING, Rows
from anyorder.model import adapters
from anyorder.model.attention import Block, additive, attend_by_blocks, for_heads, which_are_read
from anyorder.model.base import AnyOrderPreTrainedModel
from anyorder.model.kv_cache import KeyValueStore, scatter
from anyorder.model.lm_head import head_of
from anyorder.runtime.runner import ModelRunner, weights_of

MOST_ROWS = 64
"""Rows of such a forward, over the batch; with more, arithmetic binds and eager kernels serve."""
RANKS = 64
"""The store's ranks, the spare one included, are a multiple of it."""
Shape = tuple[int, int, int, int, bool, bool]
"""Batch, content rows, query rows, ranks, whether a gated adapter acts on any row, whether adapters are on."""


class StaticReads:
    """What `attention.Reads` is to eager forwards, for traced ones: every tensor has the shape of its bucket.

    Args:
        lo, hi, positions: (B, R) int64, of the rows.
        gates: (B, R) bool.
        ranks: (B, C) int64.
        key_positions: (B, K) int64.
        keys, values: of each layer, (B, heads, K, head_dim); written to.
    """

    attend = attend_by_blocks

    def __init__(
        self,
        lo: Tensor,
        hi: Tensor,
        positions: Tensor,
        gates: Tensor,
        ranks: Tensor,
        key_positions: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
        dtype: torch.dtype,
    ):
        self.calls: list[tuple[int, int | None]] = []
        self.lo, self.hi, self.positions, self.ranks, self.key_positions = lo, hi, positions, ranks, key_positions
        self.keys, self.values = keys, values
        self.row_count = gates.numel()
        self.open_rows = gates.reshape(-1, 1).to(dtype)

    def keys_values(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store the content rows' keys and values; all ranks come back."""
        C = self.ranks.shape[1]
        scatter(self.keys[layer][None], key[None, :, :, :C], self.ranks)
        scatter(self.values[layer][None], value[None, :, :, :C], self.ranks)
        return self.keys[layer], self.values[layer]

    def stacks_heads(self, repeats: int) -> bool:
        """Always: the mask is of one step."""
        return True

    def plan(self, window: int | None, repeats: int, dtype: torch.dtype) -> list[Block]:
        """All rows in one block, with its mask."""
        R, K = self.lo.shape[1], self.key_positions.shape[1]
        rank = torch.arange(K, device=self.lo.device)
        mask = for_heads(which_are_read(self.lo, self.hi, rank, self.positions, self.key_positions, window), repeats)
        return [(slice(0, R), slice(0, K), mask if dtype == torch.bool else additive(mask, dtype))]


class StaticRunner(ModelRunner):
    """Runs steps as functions of static shapes.

    Args:
        model: a converted model, as it is now: its weights must not change.

    Attributes:
        shapes: those made so far.
    """

    keeps_batch = True  # another batch would be another shape
    most_built: int = 256
    """Functions that are kept; the one used longest ago makes room for a new one."""

    def __init__(self, model: AnyOrderPreTrainedModel):
        self.model = model
        self._made_of = weights_of(model)
        self._built: dict[str, Callable[..., Tensor]] = {}  # the one used longest ago first
        self._shapes: list[Shape] = []
        self._adapted = adapters.first_layer(model)

    def __deepcopy__(self, memo: Any) -> None:
        """A copy of the model begins without."""

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    @property
    def shapes(self) -> list[Shape]:
        return list(self._shapes)

    @abstractmethod
    def build(self, name: str, function: Callable[..., Tensor], inputs: tuple[Any, ...]) -> Callable[..., Tensor]:
        """The function, fast for inputs of exactly these shapes.

        Args:
            name: tells functions and shapes of one model apart.
            function: of tensors and lists of them, some of which it writes to; it reads the model.
            inputs: contiguous, on the model's device.
        """

    def capacity(self, columns: int) -> int:
        return -(-(columns + 1) // RANKS) * RANKS - 1

    def check(self) -> None:
        if weights_of(self.model) != self._made_of:
            raise ValueError("the model's weights have changed since its steps were compiled: compile it anew")

    def hidden(self, rows: Rows, key_positions: Tensor, store: KeyValueStore) -> Tensor:
        B, C, Q = rows.lo.shape[0], rows.content_count, rows.count - rows.content_count
        C_, Q_ = bucket(C), bucket(Q)
        keys, values = store.buffers
        if not keys or B * (C_ + Q_) > MOST_ROWS:
            return self.model.hidden_rows(rows, key_positions, store)
        K, device = store.capacity + 1, self.model.query_embedding.device
        some_open = bool(rows.gates.any())
        shape = (B, C_, Q_, K, some_open, self._adapters_are_on)
        padded = [_padded(getattr(rows, name), C, C_, Q_, filler) for name, filler in PADDING.items()]
        padded += [_right(rows.ranks, C_, store.capacity), _right(key_positions, K, 0)]
        inputs = (*(tensor.contiguous().to(device) for tensor in padded), keys, values)
        if shape not in self._shapes:
            self._shapes.append(shape)
        name = f"rows-{B}-{C_}-{Q_}-{K}" + "-open" * some_open + self._suffix
        hidden = self.call(self._function(name, lambda: self._step(some_open), inputs), inputs)
        return torch.cat([hidden[:, :C], hidden[:, C_ : C_ + Q]], dim=1)

    def call(self, forward: Callable[..., Tensor], inputs: tuple[Any, ...]) -> Tensor:
        """Run a built forward."""
        return forward(*inputs)

    def logits(self, hidden: Tensor) -> Tensor:
        N = max(2, bucket(len(hidden)))  # one row alone gets the slow kernel of a vector
        if N > MOST_ROWS:
            return self.model.head(hidden)
        padded = nn.functional.pad(hidden, (0, 0, 0, N - len(hidden))).contiguous()
        head = self._function(f"head-{N}{self._suffix}", lambda: head_of(self.model.causal_lm), (padded,))
        logits = head(padded)[: len(hidden)]
        return logits.clone() if logits.is_cuda else logits  # the graph's next replay writes over its own

    def _function(
        self, name: str, make: Callable[[], Callable[..., Tensor]], inputs: tuple[Any, ...]
    ) -> Callable[..., Tensor]:
        """The built function of a name, which says all that tells it from others of this model."""
        if name not in self._built:
            while len(self._built) >= self.most_built:
                del self._built[next(iter(self._built))]
            self._built[name] = self.build(name, make(), inputs)
        self._built[name] = found = self._built.pop(name)
        return found

    @property
    def _adapters_are_on(self) -> bool:
        return self._adapted is not None and not self._adapted.disable_adapters

    @property
    def _suffix(self) -> str:
        return "-adapted" if self._adapters_are_on else ""

    def _step(self, some_open: bool) -> Callable[..., Tensor]:
        model = self.model
        dtype = cast(Tensor, model.get_input_embeddings().weight).dtype

        def forward(
            seed_ids: Tensor,
            seeded: Tensor,
            positions: Tensor,
            lo: Tensor,
            hi: Tensor,
            gates: Tensor,
            ranks: Tensor,
            key_positions: Tensor,
            keys: list[Tensor],
            values: list[Tensor],
        ) -> Tensor:
            reads: Any = StaticReads(lo, hi, positions, gates, ranks, key_positions, keys, values, dtype)
            if not some_open:
                reads.open_rows = None
            with torch.no_grad():
                return model.decode(seed_ids, seeded, positions, reads)

        return forward


def bucket(rows: int) -> int:
    """The next power of two; 0 for none."""
    return 1 << (rows - 1).bit_length() if rows else 0


def _right(values: Tensor, width: int, filler: int | bool) -> Tensor:
    return nn.functional.pad(values, (0, width - values.shape[1]), value=filler)


def _padded(values: Tensor, content: int, content_bucket: int, query_bucket: int, filler: int | bool) -> Tensor:
    halves = values[:, :content], values[:, content:]
    return torch.cat(
        [_right(half, n, filler) for half, n in zip(halves, (content_bucket, query_bucket), strict=True)], 1
    )
