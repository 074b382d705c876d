"""Keys and values of many requests in one set of buffers, so that their forwards can be one.

Each request has a slot, a row of the buffers, which is written in place for as long as it lives. A forward goes over
neighbouring slots, without a copy. What many requests begin with is kept apart and copied in (`Prefixes`).

This module knows slots, ranks and token ids; which request has which slot is the engine's business.

Shapes: S slots, C ranks of each, B slots of a forward, heads and head_dim of a layer.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

from torch import Tensor

from anyorder.model.kv_cache import KeyValueStore

SHORTEST = 16
"""Tokens from which on a start is worth keeping: fewer cost a forward hardly anything."""


class Slots:
    """Buffers for S requests of at most C tokens each; each layer's are allocated when it is first written.

    Args:
        count: S.
        capacity: C.
    """

    def __init__(self, count: int, capacity: int):
        self.count, self.capacity = count, capacity
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._parts: dict[tuple[int, int], KeyValueStore] = {}

    def __getitem__(self, chosen: slice) -> KeyValueStore:
        """The store of neighbouring slots, which writes into them: the same object each time, as some runners keep what
        they have made for a store."""
        return self._parts.setdefault((chosen.start, chosen.stop), _Part(self, chosen))


class _Part(KeyValueStore):
    """Some slots as a batch."""

    def __init__(self, slots: Slots, chosen: slice):
        self.capacity, self._slots, self._chosen = slots.capacity, slots, chosen

    @property
    def _layers(self) -> dict[int, tuple[Tensor, Tensor]]:  # type: ignore[override]
        chosen = self._chosen
        return {layer: (key[chosen], value[chosen]) for layer, (key, value) in self._slots._layers.items()}

    def _buffers(self, layer: int, rows: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        whole = self._slots._layers
        if layer not in whole:
            whole[layer] = self._empty(self._slots.count, key), self._empty(self._slots.count, value)
        return whole[layer][0][self._chosen], whole[layer][1][self._chosen]


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
