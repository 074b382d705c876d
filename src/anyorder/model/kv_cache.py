"""Append-only store of keys and values in generation order.

Committing a group appends its content rows; nothing stored is ever recomputed or moved, so cached decoding
equals one parallel forward. The store knows ranks only: which token stands at a rank is the layout's business,
and which row reads what is the attention's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class KeyValueStore:
    """Keys and values of content rows, by layer, row of the batch and rank.

    Args:
        capacity: ranks that can be stored: the columns of the batch. One more rank, number `capacity`, is the spare
            one of `layout`: it takes what padding rows write, and no interval reaches it.

    Buffers are allocated when a layer first writes, in that layer's own shape and dtype: 2 x batch x heads x
    (capacity + 1) x head_dim elements a layer.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def whole(self) -> object:
        """What this store is a part of, itself for most: what a runner keeps for one it keeps for all parts."""
        return self

    @property
    def buffers(self) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of each layer, (B, heads, capacity + 1, head_dim); empty before the first forward."""
        layers = sorted(self._layers.items())
        return [key for _, (key, _) in layers], [value for _, (_, value) in layers]

    def of(self, batch: Tensor) -> KeyValueStore:
        """A store of copies of some rows of the batch, (A,) int64: any of them, any number of times."""
        store = KeyValueStore(self.capacity)
        for layer, (key, value) in self._layers.items():
            index = batch.to(key.device)
            store._layers[layer] = key.index_select(0, index), value.index_select(0, index)
        return store

    def first_of(self, row: int, count: int) -> KeyValueStore:
        """A full store of copies of the first `count` ranks of one row of the batch."""
        store = KeyValueStore(count)
        for layer, buffers in self._layers.items():
            key, value = (buffer[row : row + 1, :, : count + 1].clone() for buffer in buffers)
            store._layers[layer] = key, value
        return store

    @torch.inference_mode()
    def begin_with(self, rows: Sequence[KeyValueStore | None]) -> None:
        """Let the rows of the batch begin with copies of full stores of one row each; None: with nothing."""
        for number, row in enumerate(rows):
            if row is None:
                continue
            for layer, parts in row._layers.items():
                for buffer, part in zip(self._buffers(layer, len(rows), *parts), parts, strict=True):
                    buffer[number, :, : row.capacity] = part[0, :, : row.capacity]

    def _buffers(self, layer: int, rows: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Those of a layer; if there are none, they are made for so many rows, like (any, heads, any, head_dim)."""
        if layer not in self._layers:
            self._layers[layer] = self._empty(rows, key), self._empty(rows, value)
        return self._layers[layer]

    def _empty(self, rows: int, like: Tensor) -> Tensor:
        return like.new_zeros(rows, like.shape[1], self.capacity + 1, like.shape[-1])

    def append(self, layer: int, key: Tensor, value: Tensor, ranks: Tensor, start: int | None) -> tuple[Tensor, Tensor]:
        """Store new content rows and return the whole buffers, each (B, heads, capacity + 1, head_dim).

        Args:
            layer: index of the layer.
            key, value: (B, heads, C, head_dim), the new content rows.
            ranks: (B, C) int64 on the same device, the rank of each.
            start: the first rank, if every row of the batch stores exactly `start .. start + C - 1`; None if the
                rows differ. A plain copy is several times cheaper than a scattered one.

        Keys that gradients flow through are returned in copies of the buffers and not kept: training reads them once,
        and gradient checkpointing appends them again.
        """
        buffers = self._buffers(layer, len(key), key, value)
        if key.requires_grad or value.requires_grad:
            buffers = (buffers[0].clone(), buffers[1].clone())
        _write(buffers, (key, value), ranks, start)
        return buffers

    def write(self, layer: int, key: Tensor, value: Tensor, ranks: Tensor, start: int | None) -> None:
        """`append` without anything to read, and without gradients."""
        _write(self._buffers(layer, len(key), key, value), (key, value), ranks, start)


def _write(buffers: tuple[Tensor, Tensor], parts: tuple[Tensor, Tensor], ranks: Tensor, start: int | None) -> None:
    for buffer, new in zip(buffers, parts, strict=True):
        if start is not None:
            buffer[:, :, start : start + new.shape[2]] = new
        else:
            scatter(buffer, new, ranks)


def scatter(buffer: Tensor, new: Tensor, ranks: Tensor, batch: Tensor | None = None) -> None:
    """Write (B, heads, C, head_dim) into (B, C) ranks of a buffer (any, heads, capacity + 1, head_dim).

    Args:
        batch: (B,) int64, rows of the buffer; None: the first B.
    """
    if batch is None:
        batch = torch.arange(new.shape[0], device=new.device)
    buffer[batch[:, None], :, ranks] = new.transpose(1, 2)
