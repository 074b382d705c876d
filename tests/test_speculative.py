"""Speculative decoding: several tokens a forward, distributed exactly as one at a time."""

from __future__ import annotations

import importlib
import itertools
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anyorder import AnyOrderForCausalLM, Factorization, policies
from anyorder.decoding.draw import Drafts
from anyorder.decoding.engine import Queries
from anyorder.decoding.policies import drafts
from anyorder.decoding.sampling import AllowedTokens, Sampler
from anyorder.model.adapters import Adapter
from architectures import ARCHITECTURES, RECIPES, VOCABULARY, base_model, converted
from decoding_runs import IDS, T, exactly, generator, p_value, repeated, run
from factorizations import rows

V = 4


@cache
@torch.no_grad()
def outcomes_of(case: str, sampling: frozenset[tuple[str, float]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Every outcome of a row, and its exact probability one token at a time under a sampler."""
    model, order = converted("llama", vocabulary=V), CASES[case]
    where = order.is_predicted[0].nonzero()[:, 0]
    ids = torch.ones(V ** len(where), order.length, dtype=torch.int64)
    ids[:, where] = torch.tensor(list(itertools.product(range(V), repeat=len(where))))
    logits = model(ids, repeated(order.regroup(1), len(ids))).logits
    sampler, total = Sampler(True, **dict(sampling)), torch.zeros(len(ids), dtype=torch.float64)
    row = torch.arange(len(ids))
    for i in where.tolist():
        processed = sampler.process(logits[:, i].float(), ids[:, :1], row, torch.full_like(row, i))
        total += processed.double().log_softmax(-1)[row, ids[:, i]]
    return ids, total.exp()


CASES = {
    "left to right": Factorization.left_to_right(5),
    "random": Factorization.from_groups([[0], [3], [1], [4], [2]]),
    "gaps": Factorization.from_groups([[0, 3], [1, 2], [4, 5]]),
}


@pytest.mark.parametrize(
    ("case", "draft", "length", "sampling"),
    [
        ("left to right", "query", 1, {}),
        ("random", "query", 2, {"temperature": 0.7}),
        ("gaps", "query", 3, {"top_p": 0.8}),
        ("left to right", "query", 4, {"temperature": 1.4, "top_p": 0.9}),
        ("gaps", "query", 5, {}),
        ("random", "query", 6, {"top_p": 0.8}),
        ("left to right", "query", "auto", {}),
        ("gaps", "ngram", 2, {}),
        ("left to right", "ngram", "auto", {"top_p": 0.9}),
        ("gaps", "auto", 3, {}),
    ],
)
def test_speculative_samples_are_distributed_as_one_at_a_time(case, draft, length, sampling):
    N, order, model = 4_000, CASES[case], converted("llama", vocabulary=V)
    ids, exact = outcomes_of(case, frozenset(sampling.items()))
    assert exact.sum() == pytest.approx(1, abs=1e-5)
    start = torch.ones(N, order.length, dtype=torch.int64)
    policy = policies.speculative(draft=draft, draft_length=length)
    options = {"temperature": 1.0, "generator": generator(6)} | sampling
    output = run(model, start, repeated(order, N), policy=policy, **options)
    where = order.is_predicted[0]
    base = V ** torch.arange(int(where.sum()) - 1, -1, -1)
    counts = torch.bincount((output.sequences[:, where] * base).sum(1), minlength=len(ids))
    assert p_value(counts, exact * N) > 0.01
    assert len(set(output.steps.amax(1).tolist())) > 1  # rows accept different numbers
    assert output.forwards <= int(where.sum())


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("draft", ["query", "ngram", "auto"])
@given(
    parts=st.lists(rows(max_length=T), min_size=1, max_size=3),
    length=st.sampled_from([1, 2, 5, "auto"]),
    architecture=st.sampled_from(ARCHITECTURES),
    greedy=st.booleans(),
    eos=st.sampled_from([(), (4, 9, 11, 13, 17, 20)]),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=12)
def test_speculative_is_scored_exactly_in_no_more_forwards_than_tokens(
    recipe, draft, parts, length, architecture, greedy, eos
):
    model, order = converted(architecture, recipe), Factorization.stack(parts)
    ids = IDS[: len(parts), : order.length]
    policy = policies.speculative(draft=draft, draft_length=length)
    options = {} if greedy else {"generator": [generator(b) for b in range(len(parts))], "temperature": 0.3}
    output = run(model, ids, order, policy=policy, eos_token_id=eos, **options)
    one_by_one = run(model, ids, order, policy=policies.groupwise(1), eos_token_id=eos)
    if greedy:
        assert torch.equal(output.sequences, one_by_one.sequences)
        assert torch.equal(output.steps >= 0, one_by_one.steps >= 0)
    tokens = (output.steps >= 0).sum(1)
    assert output.forwards <= max(1, int(order.regroup(1).num_groups.max()))
    assert (output.steps.amax(1) < tokens.clamp(min=1)).all() or eos
    if not eos:
        again = model.log_likelihood(output.sequences, order.regroup(1))
        torch.testing.assert_close(output.log_probs, again, atol=1e-5, rtol=0)
    if not greedy:
        for b, part in enumerate(parts):
            sampled = {"policy": policy, "eos_token_id": eos, "temperature": 0.3}
            alone = run(model, ids[b : b + 1, : part.length], part, generator=[generator(b)], **sampled)
            assert torch.equal(alone.sequences[0], output.sequences[b, : part.length])


def test_speculative_with_a_gated_adapter_is_the_base_models_own():
    base = base_model("llama")
    expected = base.generate(IDS[:, :5], max_new_tokens=14, do_sample=False, eos_token_id=None, pad_token_id=0)
    model = AnyOrderForCausalLM.from_causal_lm(base, adapter=Adapter("gated", rank=4))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    for draft in ("query", "ngram", "auto"):
        policy = policies.speculative(draft=draft, draft_length=3)
        output = model.generate(
            IDS[:, :5], max_new_tokens=14, policy=policy, eos_token_id=(), return_dict_in_generate=True
        )
        assert torch.equal(output.sequences, expected)
    assert output.forwards < 14  # a random model repeats itself


def test_speculative_keeps_to_forced_and_allowed_tokens():
    model, order = converted("llama"), Factorization.stack([Factorization.random(T, 1, generator=generator(1))] * 3)
    forced = torch.where(torch.arange(T) % 3 == 1, IDS, -100)
    output = run(
        model,
        IDS,
        order,
        policy=policies.speculative(draft="query", draft_length=3),
        forced_ids=forced,
        temperature=1.0,
    )
    assert torch.equal(output.sequences[forced != -100], IDS[forced != -100])
    every = run(model, IDS, order, policy=policies.speculative(draft="query", draft_length=4), forced_ids=IDS)
    torch.testing.assert_close(every.log_probs, model.log_likelihood(IDS, order), atol=1e-5, rtol=0)
    assert every.forwards == 3  # one token, then five, then five
    masks = torch.zeros(2, VOCABULARY, dtype=torch.bool)
    masks[0, ::2], masks[1, 1::2] = True, True
    allowed = AllowedTokens(masks, (torch.arange(T) % 2).expand(3, T))
    for draft in ("query", "ngram", "auto"):
        policy = policies.speculative(draft=draft, draft_length=2)
        output = run(model, IDS, order, policy=policy, allowed_tokens=allowed, temperature=2.0, generator=generator(3))
        drawn = output.steps >= 0
        assert (output.sequences % 2 == torch.arange(T) % 2)[drawn].all()


def test_speculative_stops_at_an_end_as_one_at_a_time_does():
    model = converted("llama")
    order = Factorization.from_groups([[0], [6], [3], [5], [1], [2], [4], [7]])
    tokens = exactly([0, 8, 9, 2, 10, 11, 12, 13])
    for draft_length in (1, 3, 5):
        policy = policies.speculative(draft="query", draft_length=draft_length)
        output = run(model, IDS[:1, :8], order, policy=policy, allowed_tokens=tokens, eos_token_id=2, pad_token_id=0)
        assert output.sequences.tolist() == [[int(IDS[0, 0]), 8, 9, 2, 0, 0, 0, 0]]


def test_repetition_penalty_sees_drafts_as_they_are_read():
    model, order = converted("llama"), Factorization.left_to_right(T)
    plain = run(model, IDS, Factorization.stack([order] * 3), repetition_penalty=3.0)
    for draft in ("query", "ngram", "auto"):
        policy = policies.speculative(draft=draft, draft_length=4)
        output = run(model, IDS, Factorization.stack([order] * 3), repetition_penalty=3.0, policy=policy)
        assert torch.equal(output.sequences, plain.sequences)


def test_the_source_that_pays_best_is_taken_by_each_row_for_itself():
    order = Queries(torch.arange(4).expand(2, 4), torch.ones(2, 4, dtype=torch.bool), torch.arange(4).expand(2, 4))
    best = drafts.BestDrafts([drafts.NgramDrafts(), drafts.QueryDrafts()], rows=2, row_cost=0.5)
    wanted, worth = torch.full((2,), 2), torch.ones(2, 1, dtype=torch.bool)
    none, taken = Drafts.none(2), []
    for _ in range(30):
        asked = best.rows(order, none, wanted, worth)
        taken.append(best.chosen.tolist())
        assert (sum(queries.used.sum(1) for queries in asked) == 2 * best.chosen).all()  # none for n-grams
        best.drafted_by, best.spent = best.chosen, best._price(torch.full((2,), 2))
        passed = torch.stack(
            [best.chosen[0] * 2, 1 - best.chosen[1]]
        )  # query drafts in the first row, others in the second
        best._record(passed)
    assert taken[0] == [0, 0]
    assert {row[0] for row in taken} == {row[1] for row in taken} == {0, 1}  # both are tried
    assert taken[-10:] == [[1, 0]] * 10


@pytest.mark.parametrize(("row_cost", "gate_cost"), [(0.1, 0.0), (0.0, 0.5)])
def test_a_source_that_never_passes_pays_for_its_rows(row_cost, gate_cost):
    """Left to itself, `auto` comes to rows that cost nothing where neither source is any good."""
    best = drafts.BestDrafts([drafts.QueryDrafts(), drafts.NgramDrafts()], 1, row_cost, gate_cost)
    order = Queries(torch.arange(4)[None], torch.ones(1, 4, dtype=torch.bool), torch.arange(4)[None])
    for _ in range(40):
        best.rows(order, Drafts.none(1), torch.full((1,), 2), torch.ones(1, 1, dtype=torch.bool))
        best.drafted_by, best.spent = best.chosen, best._price(torch.zeros(1, dtype=torch.int64))
        best._record(torch.zeros(1, dtype=torch.int64))
    assert best.chosen.tolist() == [1]


def test_ngrams_are_found_where_the_text_repeats_itself():
    """A model that is made to repeat: nearly every draft is accepted."""
    model = converted("llama")
    text = torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5]])
    order = Factorization.left_to_right(16, given=7)
    allowed = AllowedTokens(torch.eye(VOCABULARY, dtype=torch.bool), text)
    output = run(model, text, order, policy=policies.speculative(draft="ngram", draft_length=4), allowed_tokens=allowed)
    assert torch.equal(output.sequences, text)
    assert output.forwards == 3  # one token, then five, then the rest
    backwards = Factorization.from_groups([list(range(7)), *([i] for i in range(15, 6, -1))])
    output = run(model, text, backwards, policy=policies.speculative(draft="ngram"), allowed_tokens=allowed)
    assert torch.equal(output.sequences, text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft": "oracle"}, "draft must be one of auto, state, query, ngram, got 'oracle'"),
        ({"draft_length": 0}, "draft_length must be a whole number, at least 1, or 'auto', got 0"),
        ({"draft_len": 2}, "did you mean 'draft_length'"),
    ],
)
def test_mistakes_in_speculative(options, message):
    with pytest.raises(ValueError, match=message):
        policies.speculative(**options)


def test_rows_are_prepared_for_what_is_likely_and_results_are_the_same(monkeypatch):
    """Which numbers of accepted drafts are prepared for depends on a row's own drafts, and changes no greedy token."""
    module = importlib.import_module("anyorder.decoding.policies.speculative")  # the package has a function of its name
    model, order = converted("llama"), Factorization.stack([Factorization.random(T, 1, generator=generator(1))] * 3)
    policy, rows, found = policies.speculative(draft="query", draft_length=4), [], []
    decode = type(model).decode
    monkeypatch.setattr(
        type(model), "decode", lambda self, ids, *more: rows.append(ids.shape[1]) or decode(self, ids, *more)
    )
    for likely in (0.0, 0.2):
        monkeypatch.setattr(module, "LIKELY", likely)
        rows.append(0)
        found.append(run(model, IDS, order, policy=policy))
        alone = [
            run(model, IDS[b : b + 1], Factorization.random(T, 1, generator=generator(1)), policy=policy)
            for b in range(3)
        ]
        assert all(torch.equal(one.sequences[0], found[-1].sequences[b]) for b, one in enumerate(alone))
    assert torch.equal(found[0].sequences, found[1].sequences)
    start = [n for n, count in enumerate(rows) if not count]
    every, some = rows[: start[1]], rows[start[1] :]
    assert max(some) < max(every)
