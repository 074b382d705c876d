"""Factorizations to test on: one of every constructor, and hypothesis strategies."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from anyorder import Factorization


def of_every_constructor(length: int, seed: int = 0) -> dict[str, Factorization]:
    """Single rows of `length` positions, at least 4."""
    g = torch.Generator().manual_seed(seed)
    blank = torch.zeros(length, dtype=torch.bool)
    blank[1 : length - 1] = True
    others = list(range(1, length))
    return {
        "left_to_right": Factorization.left_to_right(length),
        "left_to_right_2": Factorization.left_to_right(length, group_size=2),
        "random": Factorization.random(length, group_size=1, generator=g),
        "random_3": Factorization.random(length, group_size=3, generator=g),
        "from_groups": Factorization.from_groups([[0], others[::2], others[1::2]]),
        "infill": Factorization.infill(blank),
        "infill_random": Factorization.infill(blank, group_size=2, order="random", generator=g),
        "conditional": Factorization.conditional(targets=others[::-1][:2], given=[0, 1], length=length),
    }


@st.composite
def rows(draw: st.DrawFn, min_length: int = 2, max_length: int = 10) -> Factorization:
    """One document: any given positions, any groups."""
    length = draw(st.integers(min_length, max_length))
    steps = draw(st.lists(st.integers(-1, 4), min_size=length, max_size=length))
    steps[draw(st.integers(0, length - 1))] = -1
    present = sorted({step for step in steps if step >= 0})
    return Factorization(torch.tensor([[present.index(s) if s >= 0 else -1 for s in steps]]))


def groups_of(f: Factorization) -> list[list[int]]:
    """The single row `f` as lists of positions, the given ones first."""
    ids = f.group_ids[0].tolist()
    return [[i for i, g in enumerate(ids) if g == step] for step in range(-1, max(ids) + 1)]
