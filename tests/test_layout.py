"""The layout against the table of the design, written out with Python sets."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anyorder import Factorization
from anyorder.core.layout import Arrangement, describe, lay_out
from factorizations import groups_of, rows


def visible_columns(layout, row: int, r: int) -> set[int]:
    lo, hi = int(layout.rows.lo[row, r]), int(layout.rows.hi[row, r])
    return set(layout.key_columns[row, lo:hi].tolist())


@pytest.mark.parametrize("recipe", ["exact", "paper"])
@given(parts=st.lists(rows(), min_size=1, max_size=3), pad=st.integers(0, 2))
def test_every_row_reads_what_the_design_says(recipe, parts, pad):
    packed = Factorization.pack(parts)
    T = packed.length
    f = Factorization.stack([packed, Factorization.left_to_right(T + pad)])
    ids = torch.arange(1, f.length + 1).repeat(2, 1)
    layout = lay_out(ids, f, recipe)
    offset, content = 0, {}
    for r in range(layout.rows.content_count):
        if layout.rows.ranks[0, r] < f.length:
            content[int(layout.key_columns[0, r])] = r
    for part in parts:
        g = {i: k for k, group in enumerate(groups_of(part)) for i in group}
        for i in g:
            before = {offset + j for j in g if g[j] < g[i]}
            # content row
            r = content[offset + i]
            same = {offset + j for j in g if g[j] == g[i] and (recipe == "paper" or j <= i)}
            assert visible_columns(layout, 0, r) == before | same
            assert layout.rows.positions[0, r] == i
            assert layout.rows.seed_ids[0, r] == ids[0, offset + i]
            # query row
            q = int(layout.logit_rows[0, offset + i])
            assert (q >= 0) == (g[i] > 0)
            if q < 0:
                continue
            assert visible_columns(layout, 0, q) == before
            neighbour = recipe == "exact" and i > 0 and g[i - 1] < g[i]
            assert bool(layout.rows.seeded[0, q]) == neighbour
            if neighbour:
                assert layout.rows.seed_ids[0, q] == ids[0, offset + i - 1]
            assert layout.rows.positions[0, q] == (i if recipe == "paper" else max(i - 1, 0))
            # gates: open exactly where the base model never stands
            for row in (r, q):
                p = int(layout.rows.positions[0, row])
                at_home = visible_columns(layout, 0, row) == {offset + j for j in range(p + 1)}
                assert bool(layout.rows.gates[0, row]) != at_home
        offset += part.length


def test_a_free_row_is_the_content_row_of_the_last_token_read():
    ids = torch.arange(8)[None]
    one = lay_out(ids, Factorization.left_to_right(8), "exact")
    assert one.rows.count == one.rows.content_count == 8
    assert one.logit_rows.tolist() == [[-1, 0, 1, 2, 3, 4, 5, 6]]
    four = lay_out(ids, Factorization.left_to_right(8, group_size=4), "exact")
    assert four.rows.count == 8 + 5  # of groups {1..4} and {5..7}, the first of each is free
    paper = lay_out(ids, Factorization.left_to_right(8), "paper")
    assert paper.rows.count == 8 + 7


def test_absent_positions_have_no_rows_that_anyone_reads():
    f = Factorization.conditional(targets=[4], given=[2], length=6)
    layout = lay_out(torch.arange(6)[None], f, "exact")
    assert layout.key_columns.tolist() == [[2, 4]]
    assert layout.rows.count == 3
    assert visible_columns(layout, 0, 2) == {2}
    assert layout.rows.positions.tolist() == [[2, 4, 3]]
    assert not layout.rows.seeded[0, 2]  # token 3 is absent


def test_description_names_rows_and_what_they_read():
    f = Factorization.from_groups([[0, 2], [1]])
    text = describe(lay_out(torch.zeros(1, 3, dtype=torch.int64), f, "exact"), [["The", "?", "sat"]])
    assert text.splitlines() == [
        "row      predicts     starts from   at   reads  The sat ?",
        "content               The            0          ### ... .",
        "content               sat            2          ### ### .",
        "content               ?              1          ### ### #",
        "query    ?            The            0          ### ### .",
    ]


def test_positions_of_groups_of_their_own_come_at_once_as_one_after_the_other():
    f = Factorization.stack([Factorization.left_to_right(6)] * 2)
    ids, columns, counts = torch.arange(12).view(2, 6), torch.tensor([[4, 1, 5], [0, 3, 2]]), torch.tensor([3, 2])
    at_once, in_turn = (Arrangement(ids, f, "paper") for _ in range(2))
    at_once.append(columns, counts, together=False)
    for k in range(3):
        in_turn.append(columns[:, k : k + 1], (k < counts).long())
    first = torch.zeros(2, dtype=torch.int64)
    assert torch.equal(at_once.counts, in_turn.counts)
    one, other = at_once.content(first, counts).alone(), in_turn.content(first, counts).alone()
    for field in dataclasses.fields(one):
        assert torch.equal(getattr(one, field.name), getattr(other, field.name)), field.name
