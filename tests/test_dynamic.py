"""Dynamic resampling: the surest positions first, each drawn from the model's own distribution."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from anyorder import AnyOrderForCausalLM, Factorization, policies
from anyorder.decoding.policies.base import LOGITS_AT_ONCE
from architectures import RECIPES, base_model, converted
from decoding_runs import IDS, T, generator, p_value, repeated, run
from factorizations import rows

CRITERIA = ("confidence", "entropy", "margin", "random")


@pytest.mark.parametrize("recipe", RECIPES)
@given(
    parts=st.lists(rows(max_length=T), min_size=1, max_size=3),
    criterion=st.sampled_from(CRITERIA),
    how_many=st.sampled_from([{}, {"step_size": 3}, {"entropy_budget": 3.0}]),
    window=st.sampled_from([None, 1, 4]),
    spacing=st.sampled_from([1, 2, 3]),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=12)
def test_dynamic_is_scored_exactly_and_every_row_by_itself(recipe, parts, criterion, how_many, window, spacing):
    # Attention to one single key is the same at every distance: rows from w are equally sure, and rounding chooses.
    assume(all(int(part.is_given.sum()) > 1 for part in parts))
    model, order = converted("llama", recipe), Factorization.stack(parts)
    policy = policies.dynamic(criterion, **how_many, window=window, spacing=spacing)
    ids = IDS[: len(parts), : order.length]
    output = run(model, ids, order, policy=policy, generator=[generator(b) for b in range(len(parts))])
    steps = Factorization(output.steps)  # the order that came about is a factorization, and its likelihood exact
    torch.testing.assert_close(output.log_probs, model.log_likelihood(output.sequences, steps), atol=1e-5, rtol=0)
    for b, part in enumerate(parts):
        alone = run(model, ids[b : b + 1, : part.length], part, generator=[generator(b)], policy=policy)
        assert torch.equal(alone.sequences[0], output.sequences[b, : part.length])
        assert torch.equal(alone.steps[0], output.steps[b, : part.length])


@pytest.mark.parametrize("criterion", CRITERIA)
def test_dynamic_commits_the_surest_positions(criterion):
    """Against a plain loop over Python floats."""
    V = 6
    logits = torch.randn(9, V, generator=generator(2)) * 2
    row = torch.tensor([0] * 4 + [1] * 5)
    uniform = torch.rand(9, generator=generator(3), dtype=torch.float64)
    p = logits.softmax(-1).double()
    top = p.sort(descending=True).values
    entropy = -(p * p.log()).sum(-1)
    sureness = {
        "confidence": top[:, 0], "entropy": -entropy, "margin": top[:, 0] - top[:, 1], "random": uniform
    }[criterion]  # fmt: skip

    def expected(rule):
        out = torch.zeros(9, dtype=torch.bool)
        for members in ([0, 1, 2, 3], [4, 5, 6, 7, 8]):
            members = sorted(members, key=lambda i: -float(sureness[i]))
            for place, i in enumerate(members):
                out[i] = place == 0 or rule(place, i, members[:place])
        return out

    def chosen(**options):
        return policies.dynamic(criterion, **options).select(logits, row, torch.arange(9), uniform)

    assert torch.equal(chosen(), expected(lambda place, i, before: False))
    assert torch.equal(chosen(step_size=3), expected(lambda place, i, before: place < 3))
    budget = expected(lambda place, i, before: sum(float(entropy[j]) for j in before) <= 2.0)
    assert torch.equal(chosen(entropy_budget=2.0), budget)
    if criterion != "random":
        bound = float(sureness.sort().values[4:6].mean())  # between two of them
        at_least = chosen(threshold=-bound if criterion == "entropy" else bound)
        assert torch.equal(at_least, expected(lambda place, i, before: float(sureness[i]) > bound))
        assert 2 < at_least.sum() < 9


def test_random_one_at_a_time_is_the_models_own_random_order_sampling():
    model = converted("llama", vocabulary=3)
    outcomes = torch.tensor([[1, *rest] for rest in itertools.product(range(3), repeat=3)])
    orders = [Factorization.from_groups([[0], *([i] for i in order)]) for order in itertools.permutations((1, 2, 3))]
    exact = torch.stack(
        [model.log_likelihood(outcomes, Factorization.stack([order] * 27)).sum(1).exp() for order in orders]
    )
    N = 6_000
    order = repeated(Factorization.from_groups([[0], [1, 2, 3]]), N)
    start = torch.ones(N, 4, dtype=torch.int64)
    output = run(model, start, order, policy=policies.dynamic("random"), generator=generator(4))
    index = (output.sequences[:, 1:] * torch.tensor([9, 3, 1])).sum(1)
    assert p_value(torch.bincount(index, minlength=27), exact.mean(0).double() * N) > 0.01
    seen = torch.bincount((output.steps[:, 1:] * torch.tensor([9, 3, 1])).sum(1), minlength=27)
    assert p_value(seen[seen > 0].repeat(2), torch.full((12,), N / 6)) > 0.01  # each order as often


@pytest.mark.parametrize("how_many", [{"step_size": 3}, {"threshold": 0.3}, {"entropy_budget": 4.0}])
@pytest.mark.parametrize("spacing", [2, 3])
def test_spaced_positions_are_the_surest_that_stand_apart(spacing, how_many):
    """Against a plain loop over Python floats."""
    logits = torch.randn(16, 6, generator=generator(6)) * 2
    row = torch.tensor([0] * 6 + [1] * 10)
    column = torch.tensor([0, 1, 2, 4, 7, 8, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    uniform = torch.zeros(16, dtype=torch.float64)
    plain = policies.dynamic("confidence", **how_many).select(logits, row, column, uniform)
    spaced = policies.dynamic("confidence", **how_many, spacing=spacing).select(logits, row, column, uniform)
    sureness = logits.softmax(-1).amax(-1)
    for b in (0, 1):
        members = (row == b).nonzero()[:, 0].tolist()
        allowed = members if "step_size" in how_many else [i for i in members if plain[i]]
        ranked = sorted(allowed, key=lambda i: -float(sureness[i]))
        wanted, taken = int(plain[members].sum()), []
        for i in ranked:
            if len(taken) < wanted and all(abs(int(column[i] - column[j])) >= spacing for j in taken):
                taken.append(i)
        if "step_size" in how_many:
            taken += [i for i in ranked if i not in taken][: wanted - len(taken)]
        assert sorted(taken) == [i for i in members if spaced[i]]
    assert not torch.equal(plain, spaced)


@pytest.mark.parametrize("how_many", [{"step_size": 2}, {"entropy_budget": 4.0, "spacing": 2}])
@pytest.mark.parametrize("criterion", [c for c in CRITERIA if c != "random"])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_cached_equals_uncached_bit_for_bit(architecture, recipe, criterion, how_many):
    """The twin runs one whole forward a step, over the order that has come about so far.

    Kernels of other shapes sum in another order, so no two float32 runs agree in the last bit; the weights are float64
    here, and what decoding sees of them, logits in float32, must be the same to the last bit.
    """
    model = copy.deepcopy(converted(architecture, recipe)).double()
    order = Factorization.stack([Factorization.random(n, 2, given=2, generator=generator(n)) for n in (T, 7)])
    policy = policies.dynamic(criterion, **how_many)
    output = run(model, IDS[:2], order, policy=policy, do_sample=False)
    for b, length in enumerate((T, 7)):
        ids, steps = IDS[b, :length].clone(), torch.where(order.is_given[b, :length], -1, T)  # T: open
        log_probs = torch.zeros(length)
        for step in range(T):
            column = (steps == T).nonzero()[:, 0]
            if not len(column):
                break
            so_far = Factorization(torch.where(steps == T, step, steps)[None])
            logits = model(ids[None], so_far).logits[0, column].detach().float()
            uniform = torch.zeros(len(column), dtype=torch.float64)
            chosen = policy.select(logits, torch.zeros_like(column), column, uniform)
            ids[column[chosen]] = logits[chosen].argmax(-1)
            log_probs[column[chosen]] = logits[chosen].log_softmax(-1).amax(-1)
            steps[column[chosen]] = step
        assert torch.equal(output.steps[b, :length], steps)
        assert torch.equal(output.sequences[b, :length], ids)
        assert torch.equal(output.log_probs[b, :length], log_probs)


@pytest.mark.parametrize("max_revisions", [0, 3])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_reencoding_equals_its_slow_twin(architecture, recipe, max_revisions):
    """Algorithm 2 as published: each step is a forward of its own over everything that is finished."""
    model = converted(architecture, recipe)
    order = Factorization.stack([Factorization.random(n, 2, given=2, generator=generator(n)) for n in (T, 7)])
    policy = policies.dynamic("entropy", step_size=2, reencode=True, max_revisions=max_revisions)
    output = run(model, IDS[:2], order, policy=policy)
    first_pass = max(-(-int(row.sum()) // 2) for row in order.is_predicted)
    for b, length in enumerate((T, 7)):
        ids, is_open = IDS[b, :length].clone(), order.is_predicted[b, :length].clone()
        log_probs = torch.zeros(length)
        step = 0
        for part in range(2 if max_revisions else 1):
            if part == 1:
                is_open[log_probs.masked_fill(order.is_given[b, :length], torch.inf).argsort()[:max_revisions]] = True
                step = first_pass
            while is_open.any():
                queries = Factorization(torch.where(is_open, 0, -1)[None])
                logits = model(ids[None], queries).logits[0, is_open]
                where = is_open.nonzero()[:, 0]
                entropy = torch.special.entr(logits.softmax(-1)).sum(-1)
                for i in entropy.argsort()[:2].tolist():
                    ids[where[i]], is_open[where[i]] = logits[i].argmax(), False
                    log_probs[where[i]] = logits[i].log_softmax(-1).max()
                step += 1
        torch.testing.assert_close(output.log_probs[b, :length], log_probs, atol=1e-5, rtol=0)
        assert torch.equal(output.sequences[b, :length], ids)
        if max_revisions:
            assert int((output.steps[b] >= first_pass).sum()) == max_revisions


def test_what_may_not_be_revised():
    """Forced tokens, an end and what is behind it stay; a row with fewer tokens than revisions draws them all anew."""
    model = converted("llama")
    order = Factorization.left_to_right(T, given=2)
    policy = policies.dynamic(reencode=True, max_revisions=2 * T)
    forced = torch.full_like(IDS[:1], -100)
    forced[0, 2] = 5
    plain = run(model, IDS[:1], order, policy=policies.dynamic(reencode=True), forced_ids=forced)
    end = int(plain.sequences[0, T // 2])
    output = run(model, IDS[:1], order, policy=policy, eos_token_id=end, forced_ids=forced)
    (stop, *_) = (output.sequences[0] == end).nonzero()[:, 0].tolist()
    first = run(model, IDS[:1], order, policy=policies.dynamic(reencode=True), eos_token_id=end, forced_ids=forced)
    again = output.steps[0] > first.steps.max()
    assert again[3:stop].all()
    assert stop > 3
    assert not again[:3].any()
    assert not again[stop:].any()


def test_revised_tokens_are_drawn_with_new_numbers():
    """Each pass over a one-position blank draws from the same distribution, independently."""
    model, N = converted("llama", vocabulary=4), 4000
    order = repeated(Factorization.from_groups([[0], [1]]), N)
    ids, same = torch.ones(N, 2, dtype=torch.int64), {}
    for revisions in (0, 1):
        policy = policies.dynamic(reencode=True, max_revisions=revisions)
        same[revisions] = run(model, ids, order, policy=policy, generator=generator(5)).sequences[:, 1]
    exact = model(ids[:1], Factorization.from_groups([[0], [1]])).logits[0, 1].detach().softmax(-1).double()
    table = torch.bincount(same[0] * 4 + same[1], minlength=16)
    assert p_value(table, (exact[:, None] * exact[None, :]).flatten() * N) > 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": "sure"}, "criterion must be one of confidence, entropy, margin, random, got 'sure'"),
        ({"step_size": 2, "threshold": 0.5}, "step_size=2 and threshold=0.5 each say how many"),
        ({"step_size": 0}, "step_size must be a whole number, at least 1, got 0"),
        ({"window": 1.5}, "window must be a whole number, at least 1, got 1.5"),
        ({"max_revisions": -1}, "max_revisions must be a whole number, at least 0, got -1"),
        ({"max_revisions": 2}, "max_revisions=2 takes tokens back, which a cache cannot: add reencode=True"),
        ({"spacing": 0}, "spacing must be a whole number, at least 1, got 0"),
        ({"entropy_budget": -1}, "entropy_budget must be at least 0, got -1"),
        ({"threshold": float("nan")}, "threshold must be a finite number, got nan"),
        ({"entropy_budget": float("inf")}, "entropy_budget must be a finite number, got inf"),
        ({"threshold": True}, "threshold must be a finite number, got True"),
        ({"step_size": True}, "step_size must be a whole number, at least 1, got True"),
        ({"criterion": "random", "threshold": 0.5}, "threshold=0.5 means nothing with criterion='random'"),
        ({"stepsize": 2}, "did you mean 'step_size'"),
    ],
)
def test_mistakes_in_dynamic(options, message):
    with pytest.raises(ValueError, match=message):
        policies.dynamic(**options)


@pytest.mark.parametrize("options", [{"step_size": 20}, {"entropy_budget": 40.0, "spacing": 2}, {"threshold": 0.5}])
def test_logits_of_all_open_positions_are_never_held_at_once(options, monkeypatch):
    """Sureness is a few numbers a position; what is chosen is what all logits at once choose."""
    V, length = 20_000, 500
    model = AnyOrderForCausalLM.from_causal_lm(base_model("llama", vocabulary=V, max_position_embeddings=length))
    ids = torch.randint(3, V, (2, length), generator=generator(1))
    order = Factorization.stack([Factorization.left_to_right(length, length), Factorization.left_to_right(400, 400)])
    policy, heads = policies.dynamic("confidence", **options), []
    head = model.head
    monkeypatch.setattr(model, "head", lambda hidden: heads.append(len(hidden)) or head(hidden))

    def first_step():
        heads.clear()
        return [
            c for c in itertools.takewhile(lambda c: c.step == 0, model.stream(ids, order, policy, eos_token_id=()))
        ]

    commits = first_step()
    asked = 499 + 399
    assert sum(heads[:-1]) >= asked
    assert max(heads) * V <= LOGITS_AT_ONCE
    monkeypatch.setattr("anyorder.decoding.policies.base.LOGITS_AT_ONCE", 2**40)
    at_once = first_step()
    assert heads[0] == asked
    assert [(c.row, c.position, c.token) for c in commits] == [(c.row, c.position, c.token) for c in at_once]
    assert [c.log_prob for c in commits] == pytest.approx([c.log_prob for c in at_once], abs=1e-5)


def test_a_policy_of_ones_own_may_measure():
    class Rightmost(policies.MeasuringPolicy):
        def candidates(self, factorization, is_open):
            return is_open

        def measure(self, logits):
            return torch.zeros(len(logits), 1)

        def choose(self, measured, row, column, uniform):
            last = torch.zeros(int(row.max()) + 1, dtype=torch.int64).scatter_reduce(0, row, column, "amax")
            return column == last[row]

    output = run(converted("llama"), IDS[:1], Factorization.left_to_right(T), policy=Rightmost())
    assert output.steps.tolist() == [[-1, *range(T - 2, -1, -1)]]
