"""Curricula draw what they say, and YAML files that break a rule are told so."""

from __future__ import annotations

import pytest
import torch

from anyorder import Factorization
from anyorder.training.curriculum import (
    BUILT_IN,
    Curriculum,
    Document,
    LeftToRight,
    OwnBlanks,
    PrefixSuffix,
    RandomGroups,
    SentenceBlanks,
    Spans,
    Stage,
    seeded,
)

STORY = Document(20, (1, 6, 11, 16))


def draws(regime, count=400, document=STORY):
    return [regime.draw(document, seeded([i])) for i in range(count)]


def test_left_to_right_draws_contiguous_groups_of_its_sizes():
    drawn = draws(LeftToRight((1, 4)))
    ones = [f for f in drawn if f == Factorization.left_to_right(20, 1)]
    fours = [f for f in drawn if f == Factorization.left_to_right(20, 4)]
    assert len(ones) + len(fours) == 400
    assert 160 < len(ones) < 240


def test_random_groups_draw_every_position_alike_and_up_to_a_fraction_given():
    drawn = draws(RandomGroups((4,), given_up_to=0.5), 1000)
    given = torch.stack([f.is_given[0] for f in drawn]).float()
    assert given[:, 0].all()
    share = given[:, 1:].mean(dim=0)
    assert (share - share.mean()).abs().max() < 0.05
    assert given.sum(dim=1).max() <= 1 + 0.5 * 18
    assert given.sum(dim=1).min() == 1
    sizes = [int(torch.bincount(f.group_ids[f.is_predicted]).max()) for f in drawn]
    assert set(sizes) == {4}
    first = torch.stack([f.group_ids[0] == 0 for f in drawn]).float().mean(dim=0)
    assert first[1:].min() > 0.15


def test_spans_are_filled_from_left_to_right():
    for f in draws(Spans(2, (2, 5))):
        blank = f.group_ids[0][f.is_predicted[0]]
        assert torch.equal(blank, torch.arange(len(blank)))
        assert 2 <= len(blank) <= 10


def test_prefix_and_suffix_are_given_and_every_middle_can_come():
    seen = set()
    for f in draws(PrefixSuffix(), 1000, Document(10)):
        blank = f.is_predicted[0].nonzero()[:, 0]
        assert torch.equal(blank, torch.arange(int(blank[0]), int(blank[-1]) + 1))
        assert torch.equal(f.group_ids[0, blank], torch.arange(len(blank)))
        seen.add((int(blank[0]), int(blank[-1])))
    assert seen == {(first, last) for first in range(1, 10) for last in range(first, 10)}


def test_sentence_blanks_are_whole_sentences():
    sentences = [set(range(a, b)) for a, b in ((1, 6), (6, 11), (11, 16), (16, 20))]
    seen = set()
    for f in draws(SentenceBlanks(2)):
        blank = set(f.is_predicted[0].nonzero()[:, 0].tolist())
        chosen = tuple(k for k, sentence in enumerate(sentences) if sentence <= blank)
        assert set().union(*(sentences[k] for k in chosen)) == blank
        seen.add(chosen)
    assert len(seen) == 4 + 6  # every one and every pair
    assert draws(SentenceBlanks(), 3, Document(9))[0].is_predicted.any()


def test_own_blanks_are_those_of_the_text():
    document = Document(20, (), ((2, 5), (7, 8), (15, 20)))
    seen = set()
    for f in draws(OwnBlanks(2), document=document):
        blank = f.is_predicted[0].nonzero()[:, 0].tolist()
        chosen = tuple(own for own in document.blanks if own[0] in blank)
        assert blank == [i for first, end in chosen for i in range(first, end)]
        assert torch.equal(f.group_ids[0, blank], torch.arange(len(blank)))
        seen.add(chosen)
    assert len(seen) == 3 + 3  # every one and every pair
    assert draws(OwnBlanks(), 3, Document(9))[0].is_predicted.any()


def test_the_shortest_documents_have_something_to_predict():
    for name, curriculum in BUILT_IN.items():
        for length in (2, 3, 5):
            for i in range(60):
                f, _ = curriculum.draw(Document(length, (1,)), i / 60, [name, i])
                assert f.length == length
                assert f.is_predicted.any()
                assert f.is_given[0, 0]


def test_stages_follow_one_another_and_weights_are_kept():
    curriculum = Curriculum((
        Stage((LeftToRight((1,)),), (1.0,), share=1),
        Stage((LeftToRight((2,)), LeftToRight((5,))), (3.0, 1.0), share=3),
    ))  # fmt: skip
    assert curriculum.stage(0.2) is curriculum.stages[0]
    assert curriculum.stage(0.3) is curriculum.stages[1]
    assert curriculum.stage(1.0) is curriculum.stages[1]
    fives = sum(curriculum.draw(STORY, 0.9, [i])[0] == Factorization.left_to_right(20, 5) for i in range(400))
    assert 70 < fives < 130
    assert curriculum.draw(STORY, 0.9, [1]) == curriculum.draw(STORY, 0.9, [1])


def test_curricula_from_yaml(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(
        "stages:\n- share: 2\n  mixture:\n  - {regime: spans, weight: 2, blanks: 1, lengths: [3, 3]}\n"
        "  - {regime: left_to_right, group_sizes: [4]}\n"
    )
    stage = Curriculum.load(str(file)).stages[0]
    assert stage == Stage((Spans(1, (3, 3)), LeftToRight((4,))), (2.0, 1.0), 2)
    assert Curriculum.load("paper") is BUILT_IN["paper"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "the file must be a mapping"),
        ({}, "the file needs a list 'stages'"),
        ({"stages": [], "x": 1}, "unknown key 'x' in the file"),
        ({"stages": [{"mixture": []}]}, r"stages\[0\] needs a list 'mixture'"),
        ({"stages": [{"mixture": [{"regime": "magic"}]}]}, r"mixture\[0\] needs a 'regime' out of"),
        ({"stages": [{"mixture": [{"regime": "spans", "blank": 1}]}]}, r"unknown key 'blank' in .*mixture"),
        ({"stages": [{"mixture": [{"regime": "spans", "blanks": 0}]}]}, r"blanks must hold .* got \(0,\)"),
        ({"stages": [{"mixture": [{"regime": "spans", "lengths": [5, 2]}]}]}, "the least and the greatest"),
        ({"stages": [{"mixture": [{"regime": "random_groups", "given_up_to": 2}]}]}, "given_up_to must be between"),
        ({"stages": [{"mixture": [{"regime": "spans", "weight": -1}]}]}, "weights must be at least 0"),
        ({"stages": [{"mixture": [{"regime": "spans"}], "share": 0}]}, "share must be above 0, got 0"),
    ],
)  # fmt: skip
def test_broken_curricula_name_the_key(data, message):
    with pytest.raises(ValueError, match=message):
        Curriculum.from_dict(data)


def test_a_curriculum_that_is_not_there():
    with pytest.raises(ValueError, match="no curriculum 'nothing': use paper, exact, infill or a .yaml file"):
        Curriculum.load("nothing")
