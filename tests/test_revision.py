"""Revision: Gibbs draws the model's own conditional, Metropolis leaves its distribution alone, refining never harms."""

from __future__ import annotations

import itertools

import pytest
import torch

from anyorder import Factorization, policies
from anyorder.decoding import revision
from anyorder.decoding.revision import Revision, refine, revise
from architectures import ARCHITECTURES, RECIPES, VOCABULARY, converted
from decoding_runs import generator, p_value

T = 10
IDS = torch.randint(3, VOCABULARY, (3, T), generator=generator(0))
BLANK = torch.zeros(3, T, dtype=torch.bool)
BLANK[0, 2:5] = BLANK[1, [1, 7]] = True
MASK = torch.ones(3, T, dtype=torch.int64)
MASK[1, 9] = 0

THREE = torch.tensor([[1, *rest] for rest in itertools.product(range(3), repeat=3)])
LEFT_TO_RIGHT = Factorization.left_to_right(4)


def outcome(ids: torch.Tensor) -> torch.Tensor:
    return (ids[:, 1:] * torch.tensor([9, 3, 1])).sum(1)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_only_what_is_blank_changes(architecture, recipe):
    model = converted(architecture, recipe)
    for accept in ("gibbs", "metropolis"):
        result = revise(model, IDS, BLANK, accept=accept, generator=[generator(b) for b in range(3)])
        assert torch.equal(result.sequences[~BLANK], IDS[~BLANK])
        assert (result.sequences[:2] != IDS[:2]).any(1)[result.accepted[:2]].all()
        for b in range(3):
            alone = revise(model, IDS[b : b + 1], BLANK[b : b + 1], accept=accept, generator=[generator(b)])
            assert torch.equal(alone.sequences[0], result.sequences[b])
            assert alone.accepted[0] == result.accepted[b]


def test_padding_stays():
    model, mask = converted("llama"), torch.ones(3, T, dtype=torch.int64)
    mask[0, 6:] = 0
    result = revise(model, IDS, BLANK, attention_mask=mask, generator=generator(1))
    assert torch.equal(result.sequences[0, 6:], IDS[0, 6:])
    alone = revise(model, IDS[:1, :6], BLANK[:1, :6], generator=generator(1))
    assert torch.equal(alone.sequences[0], result.sequences[0, :6])


def test_gibbs_draws_the_models_own_conditional():
    model, N = converted("llama", vocabulary=3), 20_000
    start = torch.tensor([[1, 2, 0, 1]]).repeat(N, 1)
    blank = torch.tensor([[False, True, False, True]]).repeat(N, 1)
    order = Factorization.infill(blank[:27])
    exact = model.log_likelihood(THREE, order).sum(1).exp().double() * (THREE[:, 2] == 0)
    for policy in (None, policies.speculative(draft="query", draft_length=1)):
        drawn = revise(model, start, blank, generator=generator(2), policy=policy).sequences
        counts = torch.bincount(outcome(drawn), minlength=27)[THREE[:, 2] == 0]
        assert p_value(counts, exact[THREE[:, 2] == 0] * N) > 0.01


@pytest.mark.parametrize(
    "target", [LEFT_TO_RIGHT, Factorization.from_groups([[0], [3], [1, 2]])], ids=["left to right", "groups"]
)
def test_metropolis_leaves_the_distribution_as_it_is(target):
    model, N = converted("llama", vocabulary=3), 20_000
    exact = model.log_likelihood(THREE, Factorization.stack([target] * 27)).sum(1).exp().double()
    drawn = THREE[torch.multinomial(exact, N, replacement=True, generator=generator(3))]
    targets = Factorization.stack([target] * N)
    g, rates = generator(4), []
    for blank, options in (
        ([0, 1, 1, 0], {}),
        ([0, 0, 1, 1], {"order": "random"}),
        ([0, 1, 0, 1], {"group_size": 2}),
        ([0, 1, 1, 1], {"policy": policies.groupwise(2)}),
        ([0, 0, 1, 1], {"policy": policies.speculative(draft="query")}),
    ):
        blank = torch.tensor([blank]).bool().repeat(N, 1)
        result = revise(model, drawn, blank, accept="metropolis", target=targets, generator=g, **options)
        drawn = result.sequences
        rates.append(float(result.accepted.float().mean()))
        assert p_value(torch.bincount(outcome(drawn), minlength=27), exact * N) > 0.01
    assert min(rates) > 0.1
    assert min(rates) < 0.9
    moved = revise(model, drawn, torch.tensor([[0, 1, 1, 1]]).bool().repeat(N, 1), group_size=3, generator=g).sequences
    assert p_value(torch.bincount(outcome(moved), minlength=27), exact * N) < 1e-6  # without the test it does not stay


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_refining_never_makes_a_row_less_likely(architecture):
    model = converted(architecture)
    options = {"rounds": 6, "length": 2, "do_sample": True}
    result = refine(model, IDS, generator=[generator(b) for b in range(3)], **options)
    order = Factorization.stack([Factorization.left_to_right(T)] * 3)
    assert (result.scores.diff(dim=1) >= 0).all()
    torch.testing.assert_close(result.scores[:, 0], model.log_likelihood(IDS, order).sum(1))
    torch.testing.assert_close(result.scores[:, -1], model.log_likelihood(result.sequences, order).sum(1))
    assert (result.scores[:, -1] > result.scores[:, 0]).any()
    for b in range(3):
        alone = refine(model, IDS[b : b + 1], generator=[generator(b)], **options)
        assert torch.equal(alone.sequences[0], result.sequences[b])


def test_refining_begins_with_the_least_likely_span_and_keeps_what_is_given():
    model = converted("llama")
    order = Factorization.stack([Factorization.left_to_right(T, given=4)] * 3)
    tokens = model.log_likelihood(IDS, order)
    weakest = tokens.masked_fill(~order.is_predicted, 0).argmin(1)
    result = refine(model, IDS, rounds=1, target=order)
    changed = result.sequences != IDS
    assert changed.sum() > 0
    assert (changed.nonzero()[:, 1] == weakest[changed.any(1)]).all()
    result = refine(model, IDS, rounds=12, target=order)
    assert torch.equal(result.sequences[:, :4], IDS[:, :4])


def test_refining_ends_where_no_span_alone_helps():
    """More rounds go on where fewer ended, until every span was tried in vain; then there are no further forwards."""
    model = converted("llama")
    order = Factorization.stack([Factorization.left_to_right(T, given=4)] * 3)
    few, many = (refine(model, IDS, rounds=n, target=order) for n in (5, 40))
    assert torch.equal(few.scores, many.scores[:, :6])
    assert (many.scores[:, -1] > many.scores[:, 0]).all()
    for start in range(4, T):
        blank = torch.zeros(3, T, dtype=torch.bool)
        blank[:, start] = True
        again = revise(model, many.sequences, blank, do_sample=False).sequences
        assert (model.log_likelihood(again, order).sum(1) <= many.scores[:, -1]).all()
    assert torch.equal(refine(model, many.sequences, rounds=7, target=order).sequences, many.sequences)


def test_a_span_that_did_not_help_waits_for_another(monkeypatch):
    model, tried = converted("llama"), []

    def unchanged(model, ids, blank, **options):
        tried.append(blank)
        return Revision(ids, torch.ones(len(ids), dtype=torch.bool), 1)

    monkeypatch.setattr(revision, "revise", unchanged)
    result = refine(model, IDS, rounds=20)
    assert len(tried) == T - 1  # each of the T - 1 spans once, and then nothing is left to try
    assert torch.equal(torch.stack(tried).sum(0), (torch.arange(T) > 0).long().expand(3, T))
    assert result.scores.shape == (3, 21)
    assert (result.scores == result.scores[:, :1]).all()


def test_padding_takes_no_part_in_refining():
    model, mask = converted("llama"), torch.ones(3, T, dtype=torch.int64)
    mask[0, 6:] = 0
    ids = IDS.clone()
    ids[0, 6:] = 10**6  # no token at all
    result = refine(model, ids, rounds=3, attention_mask=mask)
    alone = refine(model, IDS[:1, :6], rounds=3)
    assert torch.equal(result.sequences[0, :6], alone.sequences[0])
    assert torch.equal(result.sequences[0, 6:], ids[0, 6:])
    torch.testing.assert_close(result.scores[:1], alone.scores)


def test_rows_without_blanks_stay(monkeypatch):
    model, none = converted("llama"), torch.zeros(3, T, dtype=torch.bool)
    for accept in ("gibbs", "metropolis"):
        result = revise(model, IDS, none, accept=accept)
        assert torch.equal(result.sequences, IDS)
        assert result.accepted.all()


@pytest.mark.parametrize(
    "options",
    [{"order": "random", "group_size": 2}, {"policy": policies.dynamic("random", step_size=2)}],
    ids=["order", "policy"],
)
def test_a_generator_repeats_the_order_of_greedy_draws(options):
    """Random choices of positions are the generator's, whether tokens are drawn or not."""
    model, blank = converted("llama"), torch.arange(T).expand(3, T) > 1
    one, two, other = (
        revise(model, IDS, blank, do_sample=False, generator=generator(seed), **options).sequences for seed in (1, 1, 2)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    found = [refine(model, IDS, length=6, rounds=2, generator=generator(1), **options).scores for _ in range(2)]
    assert torch.equal(*found)


def test_temperature_0_takes_the_most_likely():
    model = converted("llama")
    cold, greedy = (revise(model, IDS, BLANK, **options) for options in ({"temperature": 0}, {"do_sample": False}))
    assert torch.equal(cold.sequences, greedy.sequences)


def test_metropolis_takes_options_that_leave_the_proposal_alone():
    model, options = converted("llama"), {"accept": "metropolis", "eos_token_id": (), "do_sample": True}
    one, two = (
        revise(model, IDS, BLANK, generator=generator(1), **options, **more) for more in ({}, {"pad_token_id": 5})
    )
    assert torch.equal(one.sequences, two.sequences)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accept": "always"}, "accept must be one of gibbs, metropolis, got 'always'"),
        ({"blank": BLANK[:, :4]}, r"blank has shape \(3, 4\), input_ids has \(3, 10\)"),
        ({"accept": "metropolis", "temperature": 0.5}, "leave out temperature=0.5"),
        ({"accept": "metropolis", "policy": policies.dynamic()}, "needs an order that is fixed beforehand"),
        (
            {"accept": "metropolis", "target": Factorization.stack([Factorization.left_to_right(T, given=3)] * 3)},
            "row 0, position 2 is revised, but the target does not predict it",
        ),
        ({"accept": "metropolis", "target": LEFT_TO_RIGHT}, r"the target has shape \(1, 4\), the text \(3, 10\)"),
        (
            {
                "accept": "metropolis",
                "attention_mask": MASK,
                "target": Factorization.stack([Factorization.left_to_right(T)] * 3),
            },
            "row 1, position 9 is padding, but the target holds it",
        ),
        ({"blank": BLANK.long()}, "blank must be a bool tensor"),
        ({"return_dict_in_generate": False}, "return_dict_in_generate is an option of generate, not of revise"),
        ({"num_return_sequences": 2}, "num_return_sequences is an option of generate"),
        ({"temprature": 1.0}, "did you mean 'temperature'"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        revise(converted("llama"), IDS, **({"blank": BLANK} | options))


def test_mistakes_in_refine():
    with pytest.raises(ValueError, match="row 0 has no 10 neighbouring tokens to revise"):
        refine(converted("llama"), IDS, length=10)
    with pytest.raises(ValueError, match="rounds must be a whole number, at least 1, got 0"):
        refine(converted("llama"), IDS, rounds=0)
    with pytest.raises(ValueError, match="accept is an option of revise"):
        refine(converted("llama"), IDS, accept="metropolis")
    with pytest.raises(ValueError, match=r"the target has shape \(1, 4\), the text \(3, 10\)"):
        refine(converted("llama"), IDS, target=LEFT_TO_RIGHT)
    whole = Factorization.stack([Factorization.left_to_right(T)] * 3)
    with pytest.raises(ValueError, match="row 1, position 9 is padding, but the target holds it"):
        refine(converted("llama"), IDS, attention_mask=MASK, target=whole)
