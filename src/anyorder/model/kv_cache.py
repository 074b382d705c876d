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

    Attributes:
        layers: keys and values of each that has been written, by its index.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._stack: Tensor | None = None

    @property
    def whole(self) -> object:
        """What this store is a part of, itself for most: what a runner keeps for one it keeps for all parts."""
        return self

    @property
    def buffers(self) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of each layer, (B, heads, capacity + 1, head_dim); empty before the first forward."""
        layers = sorted(self.layers.items())
        return [key for _, (key, _) in layers], [value for _, (_, value) in layers]

    @property
    def stack(self) -> Tensor | None:
        """The buffers as one, (2 x layers, B, heads, capacity + 1, head_dim), keys and values of each layer by turns;
        None before the first `write_all`."""
        return self._stack

    def of(self, batch: Tensor) -> KeyValueStore:
        """A store of copies of some rows of the batch, (A,) int64: any of them, any number of times."""
        store = KeyValueStore(self.capacity)
        if self.stack is not None:
            store._hold(self.stack.index_select(1, batch.to(self.stack.device)))
            return store
        for layer, (key, value) in self.layers.items():
            index = batch.to(key.device)
            store.layers[layer] = key.index_select(0, index), value.index_select(0, index)
        return store

    def first_of(self, row: int, count: int) -> KeyValueStore:
        """A full store of copies of the first `count` ranks of one row of the batch."""
        store = KeyValueStore(count)
        for layer, buffers in self.layers.items():
            key, value = (buffer[row : row + 1, :, : count + 1].clone() for buffer in buffers)
            store.layers[layer] = key, value
        return store

    def resized(self, capacity: int) -> KeyValueStore:
        """A store of another capacity, with copies of the ranks that fit."""
        store, kept = KeyValueStore(capacity), min(capacity, self.capacity)

        def moved(buffer: Tensor) -> Tensor:
            other = buffer.new_zeros(*buffer.shape[:-2], capacity + 1, buffer.shape[-1])
            other[..., :kept, :] = buffer[..., :kept, :]
            return other

        if self.stack is not None:
            store._hold(moved(self.stack))
        else:
            store.layers = {layer: (moved(key), moved(value)) for layer, (key, value) in self.layers.items()}
        return store

    @torch.inference_mode()
    def begin_with(self, rows: Sequence[KeyValueStore | None]) -> None:
        """Let the rows of the batch begin with copies of full stores of one row each; None: with nothing."""
        for number, row in enumerate(rows):
            if row is None:
                continue
            for layer, parts in row.layers.items():
                for buffer, part in zip(self.buffers_of(layer, len(rows), *parts), parts, strict=True):
                    buffer[number, :, : row.capacity] = part[0, :, : row.capacity]

    def buffers_of(self, layer: int, rows: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Those of a layer; if there are none, they are made for so many rows, like (any, heads, any, head_dim)."""
        if layer not in self.layers:
            self.layers[layer] = self._empty(rows, key), self._empty(rows, value)
        return self.layers[layer]

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
        buffers = self.buffers_of(layer, len(key), key, value)
        if key.requires_grad or value.requires_grad:
            buffers = (buffers[0].clone(), buffers[1].clone())
        _write(buffers, (key, value), ranks, start)
        return buffers

    def write(self, layer: int, key: Tensor, value: Tensor, ranks: Tensor, start: int | None) -> None:
        """`append` without anything to read, and without gradients."""
        _write(self.buffers_of(layer, len(key), key, value), (key, value), ranks, start)

    def write_all(self, new: Tensor, ranks: Tensor, start: int | None) -> None:
        """`write` of all layers at once, which are alike: (2 x layers, B, heads, C, head_dim), keys and values of each
        by turns."""
        stack = self.stack_like(new, new.shape[1])
        if start is not None:
            stack[:, :, :, start : start + new.shape[3]] = new
        else:
            scatter(stack, new, ranks)

    def stack_like(self, new: Tensor, rows: int) -> Tensor:
        """`stack`, of so many rows of the batch; what there is of buffers goes into it."""
        if self._stack is None:
            self._hold(stacked(self.layers, new, rows, self.capacity))
        assert self._stack is not None
        return self._stack

    def _hold(self, stack: Tensor) -> None:
        self._stack, self.layers = stack, by_layer(stack)


def stacked(layers: dict[int, tuple[Tensor, Tensor]], new: Tensor, rows: int, capacity: int) -> Tensor:
    """Buffers as one, see `KeyValueStore.stack`: copies of those of layers; without any, zeros for what is to come.

    Args:
        layers: keys and values of each.
        new: (2 x layers, any, heads, any, head_dim).
        rows, capacity: of the buffers.
    """
    if layers:
        return torch.stack([part for _, parts in sorted(layers.items()) for part in parts])
    return new.new_zeros(len(new), rows, new.shape[2], capacity + 1, new.shape[4])


def by_layer(stack: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """The keys and values of each layer, in the memory of a stack."""
    parts = stack.unbind()
    return {layer: (parts[2 * layer], parts[2 * layer + 1]) for layer in range(len(parts) // 2)}


def _write(buffers: tuple[Tensor, Tensor], parts: tuple[Tensor, Tensor], ranks: Tensor, start: int | None) -> None:
    for buffer, new in zip(buffers, parts, strict=True):
        if start is not None:
            buffer[:, :, start : start + new.shape[2]] = new
        else:
            scatter(buffer[None], new[None], ranks)


def scatter(buffers: Tensor, new: Tensor, ranks: Tensor, batch: Tensor | None = None) -> None:
    """Write (n, B, heads, C, head_dim) into (B, C) ranks of n buffers (n, any, heads, capacity + 1, head_dim).

    Args:
        batch: (B,) int64, rows of the buffers; None: the first B.
    """
    if batch is None:
        batch = torch.arange(new.shape[1], device=new.device)
    buffers[:, batch[:, None], :, ranks] = new.permute(1, 3, 0, 2, 4)
