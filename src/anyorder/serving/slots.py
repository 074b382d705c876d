"""Keys and values of many requests in one set of buffers, so that their forwards can be one.

Each request has a slot, a row of the buffers, which is written in place for as long as it lives. A forward goes over
neighbouring slots, without a copy, or over any others, of which it reads copies. What many requests begin with is kept
apart and copied in (`Prefixes`).

This module knows slots, ranks and token ids; which request has which slot is the engine's business.

Shapes: S slots, C ranks of each, B slots of a forward, heads and head_dim of a layer.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anyorder.model.kv_cache import KeyValueStore, by_layer, scatter

SHORTEST = 16
"""Tokens from which on a start is worth keeping: fewer cost a forward hardly anything."""
LEAST = 128
"""Ranks that buffers have at least, the spare one included; they grow and shrink by factors of two."""


class Slots:
    """Buffers for S requests; each layer's are allocated when it is first written.

    Args:
        count: S.
        most: tokens that a request has at most.
        grows: whether buffers have only as many ranks as requests use, and others take their place when these need more
            or far fewer. Engines read buffers whole, or copy what they read.

    Attributes:
        held: the buffers, those of all slots, of C ranks.
        version: another one whenever other buffers have taken the place of those before.
    """

    def __init__(self, count: int, most: int, grows: bool = False):
        self.count, self.most, self._grows = count, most, grows
        self.held = KeyValueStore(min(LEAST - 1, most) if grows else most)
        self.version = 0
        self._used = [0] * count
        self._begins: dict[int, KeyValueStore] = {}
        self._parts: dict[tuple[int, int], KeyValueStore] = {}

    @property
    def capacity(self) -> int:
        """C, as many ranks as there are now."""
        return self.held.capacity

    def __getitem__(self, chosen: slice) -> KeyValueStore:
        """The store of neighbouring slots, which writes into them: the same object each time."""
        return self._parts.setdefault((chosen.start, chosen.stop), _Part(self, chosen))

    def of(self, chosen: Sequence[int]) -> KeyValueStore:
        """The store of some slots: it writes into them, and what is read of it are copies."""
        return _Scattered(self, torch.tensor(chosen))

    def use(self, slot: int, ranks: int) -> None:
        """The request of a slot will use so many ranks, the first ones."""
        self._used[slot] = max(self._used[slot], ranks)

    def free(self, slot: int) -> None:
        """Its request has ended."""
        self._used[slot] = 0
        self._begins.pop(slot, None)

    def begin(self, slot: int, row: KeyValueStore) -> None:
        """Let a slot begin with a copy of a full store of one row, from the next `fit` on."""
        self._begins[slot] = row
        self.use(slot, row.capacity)

    def buffers_of(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Those of a layer; if there are none, they are made like (any, heads, any, head_dim)."""
        return self.held.buffers_of(layer, self.count, key, value)

    def stack_like(self, new: Tensor) -> Tensor:
        """Their stack, for (2 x layers, any, heads, any, head_dim); what there is of buffers goes into it."""
        is_new = self.held.stack is None
        stack = self.held.stack_like(new, self.count)
        self.version += is_new
        return stack

    def fit(self) -> None:
        """Let buffers have the size that requests need, and what slots begin with; between two forwards only."""
        self._resize()
        while self._begins:
            slot, row = self._begins.popitem()
            KeyValueStore.begin_with(self[slot : slot + 1], [row])

    def _resize(self) -> None:
        needed = LEAST
        while needed <= max(self._used):
            needed *= 2
        fits = min(needed - 1, self.most)
        # Not smaller by one half: the next request may need that again.
        if self._grows and (fits > self.capacity or 4 * needed <= self.capacity + 1):
            self.held = self.held.resized(fits)
            self.version += 1


class _OfSlots(KeyValueStore):
    """Some slots as a batch."""

    def __init__(self, slots: Slots):
        self._slots = slots

    @property
    def capacity(self) -> int:  # type: ignore[override]
        return self._slots.capacity

    @property
    def whole(self) -> object:
        return self._slots


class _Part(_OfSlots):
    """Neighbouring ones."""

    def __init__(self, slots: Slots, chosen: slice):
        super().__init__(slots)
        self._chosen = chosen
        self._made: tuple[tuple[int, int], dict[int, tuple[Tensor, Tensor]]] | None = None

    @property
    def layers(self) -> dict[int, tuple[Tensor, Tensor]]:  # type: ignore[override]
        # Another thread may read them while they are resized: what belongs together is one object, and the version is
        # read first, so that what is made of buffers is at worst taken for older than it is.
        version, chosen = self._slots.version, self._chosen
        whole, made = self._slots.held.layers, self._made
        if made is None or made[0] != (version, len(whole)):
            parts = {layer: (key[chosen], value[chosen]) for layer, (key, value) in list(whole.items())}
            made = self._made = (version, len(parts)), parts
        return made[1]

    def begin_with(self, rows: Sequence[KeyValueStore | None]) -> None:
        for slot, row in enumerate(rows, self._chosen.start):
            if row is not None:
                self._slots.begin(slot, row)

    def buffers_of(self, layer: int, rows: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self._slots.buffers_of(layer, key, value)
        return self.layers[layer]

    @property
    def stack(self) -> Tensor | None:
        whole = self._slots.held.stack
        return None if whole is None else whole[:, self._chosen]

    def stack_like(self, new: Tensor, rows: int) -> Tensor:
        return self._slots.stack_like(new)[:, self._chosen]


class _Scattered(_OfSlots):
    """Any others."""

    def __init__(self, slots: Slots, chosen: Tensor):
        super().__init__(slots)
        self._chosen = chosen

    @property
    def stack(self) -> Tensor | None:
        whole = self._slots.held.stack
        return None if whole is None else whole.index_select(1, self._chosen.to(whole.device))

    @property
    def layers(self) -> dict[int, tuple[Tensor, Tensor]]:  # type: ignore[override]
        whole = self.stack
        return {layer: self._read(layer) for layer in self._slots.held.layers} if whole is None else by_layer(whole)

    def _read(self, layer: int) -> tuple[Tensor, Tensor]:
        key, value = self._slots.held.layers[layer]
        return key.index_select(0, self._chosen.to(key.device)), value.index_select(0, self._chosen.to(key.device))

    def append(self, layer: int, key: Tensor, value: Tensor, ranks: Tensor, start: int | None) -> tuple[Tensor, Tensor]:
        self.write(layer, key, value, ranks, start)
        return self._read(layer)

    def write(self, layer: int, key: Tensor, value: Tensor, ranks: Tensor, start: int | None) -> None:
        for buffer, new in zip(self._slots.buffers_of(layer, key, value), (key, value), strict=True):
            scatter(buffer[None], new[None], ranks, self._chosen.to(buffer.device))

    def write_all(self, new: Tensor, ranks: Tensor, start: int | None) -> None:
        scatter(self._slots.stack_like(new), new, ranks, self._chosen.to(new.device))


@dataclass(frozen=True)
class Prefix:
    """What some text begins with, encoded."""

    ids: Tensor
    """(n,) int64."""
    store: KeyValueStore
    """Of one row and n ranks."""


class Prefixes:
    """Starts of texts that were encoded before; those used longest ago are forgotten first.

    Args:
        tokens: that are kept at most, of all starts together.
    """

    def __init__(self, tokens: int):
        self.tokens = tokens
        self._kept: OrderedDict[int, Prefix] = OrderedDict()
        self._next = 0
        self._lock = threading.Lock()

    def longest(self, ids: Tensor) -> Prefix | None:
        """The start that agrees with (n,) ids furthest, cut to where it does; None where that is not worth a copy."""
        best, most = None, SHORTEST - 1
        with self._lock:
            for number, prefix in self._kept.items():
                agreeing = _agreeing(prefix.ids, ids)
                if agreeing > most:
                    best, most = number, agreeing
            if best is None:
                return None
            self._kept.move_to_end(best)
            found = self._kept[best]
        return Prefix(found.ids[:most], found.store.first_of(0, most))

    def keep(self, ids: Tensor, store: KeyValueStore) -> None:
        """Remember (n,) ids that the one row of a store begins with; a start of what is kept already adds nothing."""
        if not SHORTEST <= len(ids) <= self.tokens:
            return
        with self._lock:
            for number, prefix in list(self._kept.items()):
                agreeing = _agreeing(prefix.ids, ids)
                if agreeing == len(ids):
                    return
                if agreeing == len(prefix.ids):
                    del self._kept[number]
            self._kept[self._next] = Prefix(ids.clone(), store.first_of(0, len(ids)))
            self._next += 1
            while sum(len(prefix.ids) for prefix in self._kept.values()) > self.tokens:
                self._kept.popitem(last=False)


def _agreeing(one: Tensor, other: Tensor) -> int:
    """How many ids two texts begin with alike."""
    n = min(len(one), len(other))
    return int((one[:n] == other[:n]).long().cumprod(dim=0).sum())
