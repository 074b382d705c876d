from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anyorder import Factorization
from factorizations import groups_of, of_every_constructor, rows

anything = st.recursive(
    st.one_of(st.integers(), st.none(), st.booleans(), st.floats(), st.text(max_size=3)),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=12,
)


@given(anything)
def test_from_groups_never_fails_with_anything_but_a_value_error(groups):
    try:
        f = Factorization.from_groups(groups)
    except ValueError:
        return
    assert sorted(i for group in groups_of(f) for i in group) == list(range(f.length))


@given(st.lists(st.lists(st.integers(-1, 6), max_size=4), max_size=4))
def test_from_groups_takes_exactly_the_partitions(groups):
    flat = [i for group in groups for i in group]
    valid = bool(groups) and all(groups) and sorted(flat) == list(range(len(flat)))
    if valid:
        assert groups_of(Factorization.from_groups(groups)) == [sorted(group) for group in groups]
    else:
        with pytest.raises(ValueError, match=r"groups|position"):
            Factorization.from_groups(groups)


def test_left_to_right():
    assert Factorization.left_to_right(6, group_size=2, given=1).group_ids.tolist() == [[-1, 0, 0, 1, 1, 2]]
    assert Factorization.left_to_right(3, given=3).group_ids.tolist() == [[-1, -1, -1]]


def test_random_order_is_uniform_over_orders():
    g = torch.Generator().manual_seed(0)
    seen = [tuple(Factorization.random(4, 1, generator=g).group_ids[0].tolist()) for _ in range(1200)]
    counts = [seen.count(order) for order in set(seen)]
    assert len(counts) == 6
    assert min(counts) > 140  # 200 each in expectation


def test_infill_predicts_exactly_the_blank_positions():
    blank = torch.tensor([[False, True, True, False], [False, False, True, False]])
    f = Factorization.infill(blank, attention_mask=torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]))
    assert f.group_ids.tolist() == [[-1, 0, 1, -1], [-1, -1, 0, -2]]
    assert f.lengths.tolist() == [4, 3]


def test_conditional_leaves_the_rest_out():
    f = Factorization.conditional(targets=[4, 1], given=[2], length=6)
    assert f.group_ids.tolist() == [[-2, 0, -1, -2, 1, -2]]


def test_stack_pads_and_unstack_gives_the_rows_back():
    parts = [Factorization.left_to_right(3), Factorization.random(6, 2), Factorization.from_groups([[1], [0]])]
    stacked = Factorization.stack(parts)
    assert stacked.group_ids.shape == (3, 6)
    assert stacked.lengths.tolist() == [3, 6, 2]
    assert stacked.unstack() == parts


def test_pack_lays_documents_side_by_side():
    packed = Factorization.pack([Factorization.left_to_right(3), Factorization.left_to_right(2)])
    assert packed.group_ids.tolist() == [[-1, 0, 1, -1, 0]]
    assert packed.documents.tolist() == [[0, 0, 0, 1, 1]]
    assert packed.document_starts.tolist() == [[0, 0, 0, 3, 3]]


@given(st.lists(rows(), min_size=1, max_size=3), st.integers(1, 4))
def test_regroup_keeps_order_and_given_positions(parts, size):
    packed = Factorization.pack(parts)
    regrouped = packed.regroup(size)
    assert torch.equal(regrouped.is_given, packed.is_given)
    for document, part in enumerate(parts):
        ids = regrouped.group_ids[0][regrouped.documents[0] == document].tolist()
        order = [i for group in groups_of(part)[1:] for i in group]
        assert [ids[i] for i in order] == [k // size for k in range(len(order))]


def test_equality_device_and_immutability():
    f = Factorization.left_to_right(5, 2)
    assert f == f.to("cpu")
    assert f == Factorization(torch.tensor([[-1, 0, 0, 1, 1]], dtype=torch.int32))
    assert f != Factorization.left_to_right(5, 1)
    assert f != "f"
    with pytest.raises(AttributeError):
        f.group_ids = f.group_ids  # type: ignore[misc]


def test_describe_draws_every_step():
    f = Factorization.from_groups([[0, 3], [2], [1]])
    assert f.describe() == "given  =..=  0 3\n    0  =.#=  2\n    1  =#==  1"
    assert f.describe([["a", "b", "c", "d"]]).endswith("1  =#==  'b'")
    two = Factorization.stack([f, Factorization.left_to_right(2)]).describe()
    assert "row 1\ngiven  =.  0\n    0  =#  1" in two


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Factorization(torch.tensor([[0, 1]])), "row 0 has no given position"),
        (lambda: Factorization(torch.tensor([[-1, 0], [-1, 1]])), "row 1 skips a step"),
        (lambda: Factorization(torch.tensor([[-1, -3]])), r"row 0, position 1: group id -3"),
        (lambda: Factorization(torch.tensor([-1, 0])), "shape"),
        (lambda: Factorization(torch.tensor([[-1.0, 0.0]])), "integer"),
        (lambda: Factorization(torch.zeros(0, 3, dtype=torch.int64)), "at least one row"),
        (lambda: Factorization(torch.tensor([[-1, 0]]), torch.tensor([[0, 2]])), "document_ids"),
        (lambda: Factorization(torch.tensor([[-1, 0]]), torch.tensor([[0, 1]])), "row 0, document 1 has no given"),
        (lambda: Factorization(torch.tensor([[-1, 0]]), torch.tensor([[0]])), "must be equal"),
        (lambda: Factorization.left_to_right(0), "length must be at least 1, got 0"),
        (lambda: Factorization.left_to_right(3, given=4), "got 4"),
        (lambda: Factorization.random(3, group_size=0), "group_size must be at least 1, got 0"),
        (lambda: Factorization.from_groups([[], [0]]), r"groups\[0\] is empty"),
        (lambda: Factorization.from_groups([[0], []]), r"groups\[1\] is empty"),
        (lambda: Factorization.from_groups([[0], [0]]), "position 0 appears twice"),
        (lambda: Factorization.from_groups([[0], [2]]), "position 2"),
        (lambda: Factorization.infill(torch.ones(3, dtype=torch.bool)), "row 0 has no given"),
        (lambda: Factorization.infill(torch.ones(3)), "bool"),
        (lambda: Factorization.infill(torch.tensor([False, True]), order="backwards"), "'backwards'"),
        (lambda: Factorization.conditional([0], [0], 3), "position 0 is named twice"),
        (lambda: Factorization.conditional([3], [0], 3), "targets position 3"),
        (lambda: Factorization.conditional([1.5], [0], 3), r"targets position 1\.5"),
        (lambda: Factorization.left_to_right("5"), "length must be at least 1, got '5'"),
        (lambda: Factorization.random(5, group_size=2.0), r"group_size must be at least 1, got 2\.0"),
        (lambda: Factorization.from_groups([["a"]]), r"groups\[0\] holds 'a'"),
        (lambda: Factorization.stack([1]), "stack needs factorizations"),
        (lambda: Factorization.stack([]), "at least one"),
        (lambda: Factorization.pack([]), "at least one"),
    ],
)
def test_errors_name_the_place_and_the_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", of_every_constructor(6))
def test_every_constructor_gives_valid_steps(name):
    f = of_every_constructor(6)[name]
    assert f.is_given.any()
    assert sorted(set(f.group_ids[f.is_predicted].tolist())) == list(range(int(f.num_groups)))
