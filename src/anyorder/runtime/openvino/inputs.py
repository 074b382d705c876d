"""What goes into the graph of rows, out of rows as `core.layout` has them.

Shapes: B batch, R rows of a forward (C content rows first), K stored ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anyorder.core.layout import PADDING, Rows
from anyorder.model.base import AnyOrderPreTrainedModel
from anyorder.model.kv_cache import KeyValueStore


def with_content(rows: Rows, spare: int) -> Rows:
    """Rows without content rows, behind one that is padding: the graph wants one at least.

    Args:
        spare: the rank that takes what padding writes.
    """
    assert not rows.content_count

    def behind(values: Tensor, filler: int | bool) -> Tensor:
        return torch.nn.functional.pad(values, (1, 0), value=filler)

    every = {name: behind(getattr(rows, name), filler) for name, filler in PADDING.items()}
    return Rows(**every, ranks=behind(rows.ranks, spare))


def inputs_of(
    model: AnyOrderPreTrainedModel, rows: Rows, key_positions: Tensor, store: KeyValueStore, count: int
) -> dict[str, Tensor]:
    """Inputs by name, all but stored keys and values: see `export.INPUTS`.

    Args:
        model: whose rows they are.
        rows: of one forward.
        key_positions: (B, K) int64, position of the token at each rank.
        store: of earlier forwards.
        count: stored ranks that the graph gets, 1 at least.
    """
    device = model.query_embedding.device
    seeded = None if bool(rows.seeded.all()) else rows.seeded.to(device)
    with torch.no_grad():
        embeds = model.embed_rows(rows.seed_ids.to(device), seeded)
    slots = _slots(rows, store, count)
    positions = key_positions.gather(1, slots.clamp(0, key_positions.shape[1] - 1))
    inputs = {
        "embeds": embeds.float(), "positions": rows.positions, "lo": rows.lo, "hi": rows.hi, "gates": rows.gates,
        "ranks": rows.ranks, "slots": slots, "slot_positions": positions,
    }  # fmt: skip
    return inputs


def _slots(rows: Rows, store: KeyValueStore, count: int) -> Tensor:
    """(B, count + C) the rank of the token in each slot, stored ones first; -1 where this forward stores another."""
    B = len(rows.lo)
    written = torch.zeros(B, store.capacity + 1, dtype=torch.bool).scatter_(1, rows.ranks, True)[:, :count]
    stored = torch.arange(count).expand(B, count).masked_fill(written, -1)
    return torch.cat([stored, rows.ranks], dim=1)
