"""Keys and values written for all layers at once stand where those written layer by layer do, in any store."""

from __future__ import annotations

import pytest
import torch

from anyorder.model.kv_cache import KeyValueStore
from anyorder.serving.slots import Slots

LAYERS, HEADS, SIZE, CAPACITY = 3, 2, 4, 10


def _new(rows, count, seed):
    return torch.randn(2 * LAYERS, rows, HEADS, count, SIZE, generator=torch.Generator().manual_seed(seed))


def _by_layer(store, new, ranks, start):
    for layer in range(LAYERS):
        store.write(layer, new[2 * layer], new[2 * layer + 1], ranks, start)


def _at_once(store, new, ranks, start):
    store.write_all(new, ranks, start)


def _buffers(store):
    return [part for pair in zip(*store.buffers, strict=True) for part in pair]


_RANKS = [(torch.tensor([[2, 3], [2, 3]]), 2), (torch.tensor([[7, 1], [0, CAPACITY]]), None)]


@pytest.mark.parametrize(("ranks", "start"), _RANKS)
@pytest.mark.parametrize("before", [_by_layer, _at_once, None])
def test_all_at_once_is_layer_by_layer(before, ranks, start):
    stores = [KeyValueStore(CAPACITY) for _ in range(2)]
    for store, write in zip(stores, (_by_layer, _at_once), strict=True):
        if before is not None:
            before(store, _new(2, 1, 0), torch.tensor([[5], [6]]), None)
        write(store, _new(2, 2, 1), ranks, start)
    assert stores[1].stack is not None
    for one, other in zip(*map(_buffers, stores), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(stores[1].stack, torch.stack(_buffers(stores[0])))
    # Copies of rows, and of the beginning of one, are as good.
    rows = torch.tensor([1, 0, 1])
    for one, other in zip(*(_buffers(store.of(rows)) for store in stores), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(*(_buffers(store.first_of(1, 4)) for store in stores), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("chosen", [slice(1, 3), [2, 0]])
def test_slots_are_written_at_once_as_layer_by_layer(chosen):
    ranks, start = _RANKS[1]
    every = [Slots(4, 1000, grows=True) for _ in range(2)]
    for slots, write in zip(every, (_by_layer, _at_once), strict=True):
        write(slots[0:4], _new(4, 1, 0), torch.full((4, 1), 3), 3)
        write(slots[chosen] if isinstance(chosen, slice) else slots.of(chosen), _new(2, 2, 1), ranks, start)
    _same(every)
    for slots in every:  # larger buffers hold the same
        slots.use(1, 200)
        slots.fit()
        slots[0:4].write(1, *_new(4, 1, 2)[:2], torch.full((4, 1), 150), 150)
    assert every[1].held.stack.shape[3] == every[1].capacity + 1 == 256
    _same(every)


def _same(every):
    for store in (lambda slots: slots[0:4], lambda slots: slots[1:2], lambda slots: slots.of([3, 1])):
        whole, stacked = (store(slots) for slots in every)
        for one, other in zip(_buffers(whole), _buffers(stacked), strict=True):
            assert torch.equal(one, other)
        assert torch.equal(stacked.stack, torch.stack(_buffers(whole)))


def test_a_stack_is_made_of_what_slots_began_with():
    row = KeyValueStore(4)
    _by_layer(row, _new(1, 4, 0), torch.arange(4)[None], 0)
    slots = Slots(2, 1000)
    slots[1:2].begin_with([row])
    slots.fit()
    slots[0:2].write_all(_new(2, 1, 1), torch.full((2, 1), 4), 4)
    for part, begun, new in zip(_buffers(slots[1:2]), _buffers(row), _new(2, 1, 1), strict=True):
        assert torch.equal(part[:, :, :5], torch.cat([begun[:, :, :4], new[1:]], dim=2))
