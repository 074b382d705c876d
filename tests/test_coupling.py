"""Coupled groups: likelihoods stay exact, what is drawn is what is scored, and nothing else changes."""

from __future__ import annotations

import itertools
import json
from functools import cache
from weakref import WeakKeyDictionary

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anyorder import AnyOrderForCausalLM, Factorization, policies
from anyorder.decoding.policies.drafts import StateDrafts
from anyorder.decoding.sampling import AllowedTokens
from anyorder.model.coupling import Coupling
from anyorder.model.reference import reference_logits
from architectures import ARCHITECTURES, RECIPES, VOCABULARY, converted, couple, coupled, gated
from decoding_runs import IDS, T, generator, p_value, repeated, run
from factorizations import groups_of, of_every_constructor, rows

THREE = torch.tensor(list(itertools.product(range(3), repeat=4)))
GROUPS = {
    "left to right": Factorization.left_to_right(5, group_size=4),
    "scattered": Factorization.from_groups([[0, 3], [1, 4, 6], [2, 5]]),
}


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt2"])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", of_every_constructor(5))
def test_probabilities_sum_to_one(architecture, recipe, name):
    model, order = coupled(architecture, recipe, vocabulary=3), of_every_constructor(5)[name]
    ids = torch.cat([torch.zeros(81, 1, dtype=torch.int64), THREE], dim=1)
    total = model.log_likelihood(ids, Factorization.stack([order] * 81)).sum(dim=1).exp().double()
    for fixed in {tuple(row) for row in ids[:, ~order.is_predicted[0]].tolist()}:
        same = (ids[:, ~order.is_predicted[0]] == torch.tensor(fixed)).all(dim=1)
        assert abs(float(total[same].sum()) - 1) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_slow_twin_agrees(architecture, recipe):
    model = coupled(architecture, recipe)
    for order in of_every_constructor(T).values():
        if not bool(order.is_present.all()):
            continue
        logits = model(IDS[:1], order).logits[0]
        torch.testing.assert_close(logits, reference_logits(model, IDS[0], groups_of(order)), atol=2e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("recipe", RECIPES)
@given(part=rows(max_length=T), architecture=st.sampled_from(ARCHITECTURES))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
def test_first_members_are_what_they_are_without_it_bit_for_bit(recipe, part, architecture):
    with_it, without = coupled(architecture, recipe), converted(architecture, recipe)
    ids = IDS[:1, : part.length]
    ours, plain = with_it(ids, part).logits[0], without(ids, part).logits[0]
    groups = part.group_ids[0].tolist()
    first = torch.tensor([g >= 0 and g not in groups[:i] for i, g in enumerate(groups)])
    assert torch.equal(ours[first], plain[first])
    later = torch.tensor([g >= 0 and g in groups[:i] for i, g in enumerate(groups)])
    assert not bool(later.any()) or not torch.equal(ours[later], plain[later])
    alone = part.regroup(1)
    assert torch.equal(with_it(ids, alone).logits, without(ids, alone).logits)


@torch.no_grad()
@given(part=rows(min_length=3, max_length=T), data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_member_sees_itself_or_a_later_one(part, data):
    model, ids = coupled(data.draw(st.sampled_from(["llama", "gemma2", "gpt2"]))), IDS[:1, : part.length].clone()
    order = part.group_ids[0] * part.length + torch.arange(part.length)
    predicted = part.is_predicted[0].nonzero()[:, 0].tolist()
    if not predicted:
        return
    i = data.draw(st.sampled_from(predicted))
    before = model(ids, part).logits
    ids[0, i] = (ids[0, i] + 1 + data.draw(st.integers(0, VOCABULARY - 2))) % VOCABULARY
    unseen = part.is_predicted[0] & (order <= order[i])
    assert torch.equal(model(ids, part).logits[0, unseen], before[0, unseen])


@pytest.mark.parametrize("recipe", RECIPES)
@given(
    parts=st.lists(rows(max_length=T), min_size=1, max_size=3),
    architecture=st.sampled_from(ARCHITECTURES),
    greedy=st.booleans(),
    policy=st.sampled_from([policies.groupwise(), policies.dynamic("entropy", step_size=3), policies.groupwise(4)]),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
def test_cached_is_parallel_and_batch_is_single(recipe, parts, architecture, greedy, policy):
    model, order = coupled(architecture, recipe), Factorization.stack(parts)
    ids = IDS[: len(parts), : order.length]
    drawn = {} if greedy else {"generator": [generator(b) for b in range(len(parts))], "temperature": 0.7}
    output = run(model, ids, order, policy=policy, **drawn)
    took = Factorization(output.steps)
    torch.testing.assert_close(output.log_probs, model.log_likelihood(output.sequences, took), atol=2e-5, rtol=0)
    for b, part in enumerate(parts):
        own = {} if greedy else {"generator": [generator(b)], "temperature": 0.7}
        alone = run(model, ids[b : b + 1, : part.length], part, policy=policy, **own)
        assert torch.equal(alone.sequences[0], output.sequences[b, : part.length])


@pytest.mark.parametrize("case", GROUPS)
def test_sampled_groups_are_distributed_as_they_are_scored(case):
    N, order, model = 6_000, GROUPS[case], coupled("llama", vocabulary=4)
    where = order.is_predicted[0].nonzero()[:, 0]
    ids = torch.ones(4 ** len(where), order.length, dtype=torch.int64)
    ids[:, where] = torch.tensor(list(itertools.product(range(4), repeat=len(where))))
    exact = model.log_likelihood(ids, repeated(order, len(ids))).sum(dim=1).double().exp()
    alone = converted("llama", vocabulary=4).log_likelihood(ids, repeated(order, len(ids))).sum(dim=1).double().exp()
    start = torch.ones(N, order.length, dtype=torch.int64)
    output = run(model, start, repeated(order, N), temperature=1.0, generator=generator(3))
    base = 4 ** torch.arange(len(where) - 1, -1, -1)
    counts = torch.bincount((output.sequences[:, where] * base).sum(1), minlength=len(ids))
    assert p_value(counts, exact * N) > 0.01
    assert p_value(counts, alone * N) < 1e-6  # and the test would notice


@pytest.fixture
def few_are_drafted(monkeypatch):
    """Drafts are made of two tokens alone."""
    monkeypatch.setattr("anyorder.model.coupling.DRAFTED", 2)
    monkeypatch.setattr("anyorder.runtime.runner._OF_CODES", WeakKeyDictionary())


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize(
    ("architecture", "draft"), [("llama", "query"), ("llama", "state"), ("gemma2", "state"), ("llama", "auto")]
)
@pytest.mark.parametrize("drafted", ["all", "few"])
def test_coupled_drafts_change_no_distribution(architecture, draft, greedy, drafted, request):
    if drafted == "few":
        request.getfixturevalue("few_are_drafted")
    model, plain = coupled(architecture, vocabulary=4), converted(architecture, vocabulary=4)
    order = Factorization.from_groups([[0, 3], [1, 2], [4, 5]])
    policy = policies.speculative(draft=draft, draft_length=3)
    if greedy:
        start = torch.ones(1, 6, dtype=torch.int64)
        ours = run(model, start, order, policy=policy)
        assert torch.equal(ours.sequences, run(plain, start, order.regroup(1)).sequences)
        return
    N, where = 4_000, order.is_predicted[0].nonzero()[:, 0]
    ids = torch.ones(4**4, 6, dtype=torch.int64)
    ids[:, where] = torch.tensor(list(itertools.product(range(4), repeat=4)))
    exact = plain.log_likelihood(ids, repeated(order.regroup(1), len(ids))).sum(dim=1).double().exp()
    start = torch.ones(N, 6, dtype=torch.int64)
    output = run(model, start, repeated(order, N), policy=policy, temperature=1.0, generator=generator(5))
    counts = torch.bincount((output.sequences[:, where] * 4 ** torch.arange(3, -1, -1)).sum(1), minlength=len(ids))
    assert p_value(counts, exact * N) > 0.01


@pytest.mark.usefixtures("few_are_drafted")
@pytest.mark.parametrize("draft", ["state", "auto"])
def test_drafts_of_few_tokens_leave_the_others_to_constraints(draft, monkeypatch):
    """Tokens that drafts are not made of are drawn nevertheless, also where nothing else is allowed."""
    model, order = coupled("llama"), repeated(Factorization.left_to_right(T), 3)
    widths = []
    propose = StateDrafts.propose

    def proposed(self, run, verified):
        drafts = propose(self, run, verified)
        widths.append(None if drafts.probs is None else drafts.probs.shape[2])
        return drafts

    monkeypatch.setattr(StateDrafts, "propose", proposed)
    policy = policies.speculative(draft=draft, draft_length=3)
    free = run(model, IDS, order, policy=policy, temperature=1.0, generator=generator(1))
    assert int(free.sequences[:, 1:].max()) >= VOCABULARY // 4  # what drafts are made of here
    assert set(widths) - {None} == {VOCABULARY // 4}
    last = torch.arange(VOCABULARY) >= VOCABULARY - 5
    allowed = AllowedTokens(last[None], torch.zeros(IDS.shape, dtype=torch.int64))
    for drawn in ({"temperature": 1.0, "generator": generator(1)}, {}):
        output = run(model, IDS, order, policy=policy, allowed_tokens=allowed, **drawn)
        assert int(output.sequences[:, 1:].min()) >= VOCABULARY - 5
    assert widths[-1] is None or widths[-1] == VOCABULARY
    greedy = run(model, IDS, order.regroup(1), allowed_tokens=allowed)
    assert torch.equal(output.sequences, greedy.sequences)
    for drawn in ({"temperature": 1.0, "generator": generator(1)}, {}):
        forced = run(model, IDS, order, policy=policy, forced_ids=torch.full_like(IDS, VOCABULARY - 1), **drawn)
        assert bool((forced.sequences[:, 1:] == VOCABULARY - 1).all())
    penalised = run(model, IDS, order, policy=policy, repetition_penalty=3.0)
    assert torch.equal(penalised.sequences, run(model, IDS, order.regroup(1), repetition_penalty=3.0).sequences)


def test_state_drafts_take_no_row_more_and_need_a_network():
    model, order = coupled("llama"), Factorization.left_to_right(T)
    rows = []
    decode = type(model).decode

    def counted(self, seed_ids, *more):
        rows.append(seed_ids.shape[1])
        return decode(self, seed_ids, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "decode", counted)
        run(model, IDS[:1], order, policy=policies.speculative(draft="state", draft_length=3))
    assert max(rows) <= 4
    with pytest.raises(ValueError, match="needs a model whose coupling drafts"):
        run(converted("llama"), IDS[:1], order, policy=policies.speculative(draft="state"))


def test_groups_of_one_take_no_product_more(monkeypatch):
    model = coupled("llama")
    monkeypatch.setattr(model.coupling, "forward", lambda *a: pytest.fail("asked for a delta"))
    with torch.no_grad():
        model(IDS, repeated(Factorization.random(T, group_size=1), 3))
    run(model, IDS, repeated(Factorization.left_to_right(T), 3))
    run(model, IDS, repeated(Factorization.left_to_right(T), 3), policy=policies.speculative(draft="ngram"))


def test_uncoupled_is_the_model_without_its_coupling_and_leaves_that_alone():
    model, order = coupled("llama"), repeated(Factorization.left_to_right(T, group_size=4), 3)
    plain, before = model.uncoupled(), model.log_likelihood(IDS, order)
    assert torch.equal(plain.log_likelihood(IDS, order), converted("llama").log_likelihood(IDS, order))
    assert torch.equal(run(plain, IDS, order).sequences, run(converted("llama"), IDS, order).sequences)
    assert model.coupling is not None
    assert torch.equal(model.log_likelihood(IDS, order), before)
    assert plain.causal_lm is model.causal_lm


# ---------------------------------------------------------------------- saved and loaded


@pytest.mark.parametrize("kind", [None, "gated", "lora"])
def test_saved_and_loaded_it_is_the_same(kind, tmp_path):
    from architectures import base_model

    base_model("llama").save_pretrained(tmp_path / "base")
    model = couple(AnyOrderForCausalLM.from_causal_lm(str(tmp_path / "base"), adapter=kind))
    model.save_pretrained(tmp_path / "saved")
    again = AnyOrderForCausalLM.from_pretrained(tmp_path / "saved")
    order = repeated(Factorization.left_to_right(T, group_size=4), 3)
    assert torch.equal(model.eval().log_likelihood(IDS, order), again.eval().log_likelihood(IDS, order))
    assert again.config.coupling == {"width": 24, "rank": 8, "window": 7, "drafts": True, "scattered": True}
    if kind == "lora":
        merged = again.merge_adapter()
        merged.save_pretrained(tmp_path / "merged")
        whole = AnyOrderForCausalLM.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(
            whole.log_likelihood(IDS, order), model.log_likelihood(IDS, order), atol=1e-4, rtol=0
        )


def test_what_older_versions_cannot_read_says_so(tmp_path):
    model = gated("llama")
    assert model.config.format_version == 1
    assert couple(model).config.format_version == 2


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path):
    from architectures import base_model

    base_model("llama").save_pretrained(tmp_path / "base")
    model = couple(AnyOrderForCausalLM.from_causal_lm(str(tmp_path / "base"), adapter="gated"))
    model.save_pretrained(tmp_path / "saved")
    config = tmp_path / "saved" / "config.json"
    config.write_text(config.read_text().replace('"width": 24', '"width": 16'))
    with pytest.raises(ValueError, match="coupling.safetensors does not fit the model"):
        AnyOrderForCausalLM.from_pretrained(tmp_path / "saved")
    config.write_text(config.read_text().replace('"width": 16', '"height": 16'))
    with pytest.raises(ValueError, match="fields that this version does not know .height."):
        AnyOrderForCausalLM.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize(("fields", "words"), [({"width": 0}, "width of a coupling"), ({"window": True}, "window")])
def test_sizes_are_whole_numbers(fields, words):
    with pytest.raises(ValueError, match=words):
        Coupling(**fields)


def test_a_model_has_one_coupling():
    with pytest.raises(ValueError, match="has a coupling of its own"):
        couple(couple(gated("llama")))


def test_what_was_saved_before_there_were_layers_for_scattered_members_is_read_as_it_was(tmp_path):
    from architectures import base_model

    base_model("llama").save_pretrained(tmp_path / "base")
    model = couple(AnyOrderForCausalLM.from_causal_lm(str(tmp_path / "base"), adapter="gated"), scattered=False)
    model.save_pretrained(tmp_path / "saved")
    config = tmp_path / "saved" / "config.json"
    saved = json.loads(config.read_text())
    del saved["coupling"]["scattered"]
    config.write_text(json.dumps(saved))
    again, order = AnyOrderForCausalLM.from_pretrained(tmp_path / "saved"), repeated(GROUPS["scattered"], 3)
    assert again.coupling.scattered is None
    assert torch.equal(again.eval().log_likelihood(IDS[:, :7], order), model.eval().log_likelihood(IDS[:, :7], order))


# ---------------------------------------------------------------------- members that stand apart


@cache
def apart_and_not():
    """A coupled model, and the same with random layers for scattered members."""
    one, other = couple(gated("llama"), scattered=False), couple(gated("llama"), scattered=False)
    other.couple(Coupling(width=24, rank=8))
    for parameter in other.coupling.scattered.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return one.eval(), other.eval()


@torch.no_grad()
@given(size=st.integers(1, T), given_first=st.integers(1, T - 1))
@settings(max_examples=20, deadline=None)
def test_groups_that_stand_together_are_what_they_are_without_layers_for_others_bit_for_bit(size, given_first):
    one, other = apart_and_not()
    order = repeated(Factorization.left_to_right(T, group_size=size, given=given_first), 3)
    assert torch.equal(one(IDS, order).logits, other(IDS, order).logits)
    outputs = [run(model, IDS, order, do_sample=True, generator=generator(3)) for model in (one, other)]
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    assert torch.equal(outputs[0].log_probs, outputs[1].log_probs)


@torch.no_grad()
def test_members_whose_left_neighbour_is_not_one_of_them_have_their_own_layers():
    one, other = apart_and_not()
    order = Factorization.from_groups([[0], [1, 2, 4, 6], [3, 5]])  # 2 stands beside 1; 4, 6 and 5 stand apart
    apart = one(IDS[:1, :7], order).logits - other(IDS[:1, :7], order).logits
    changed = (apart.abs() > 1e-4).any(dim=-1)[0]
    assert changed.nonzero()[:, 0].tolist() == [4, 5, 6]


@torch.no_grad()
def test_layers_for_others_begin_as_those_that_are_there():
    model, order = couple(gated("llama"), scattered=False).eval(), repeated(GROUPS["scattered"], 3)
    before = model(IDS[:, :7], order).logits
    model.couple(Coupling(width=24, rank=8))
    torch.testing.assert_close(model(IDS[:, :7], order).logits, before, atol=1e-6, rtol=0)
    assert model.config.coupling["scattered"]
    with pytest.raises(ValueError, match="has a coupling of its own"):
        couple(gated("llama"), scattered=False).couple(Coupling(width=16, rank=8))


# ---------------------------------------------------------------------- the head


@pytest.mark.parametrize(
    ("architecture", "linear"), [("llama", True), ("granite", True), ("gpt2", True), ("gemma2", False)]
)
def test_products_are_saved_where_the_head_is_linear_and_nowhere_else(architecture, linear):
    model = coupled(architecture)
    found = model.coupling.logits_of_codes(model.head)
    assert (found is not None) == linear
    if linear:
        hidden, code = torch.randn(5, 32, generator=generator()), torch.randn(5, 8, generator=generator(1))
        expected = model.head(hidden + model.coupling.up(code))
        torch.testing.assert_close(model.head(hidden) + code @ found[1].t(), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found[0], model.head(torch.zeros(1, 32))[0])


def test_weights_that_change_between_two_runs_are_noticed():
    model = couple(gated("llama"))
    order = repeated(Factorization.left_to_right(T, group_size=4), 3)
    for layer in (model.coupling.up, model.get_output_embeddings(), model.coupling.up):
        output = run(model, IDS, order)
        expected = model.log_likelihood(output.sequences, order)
        torch.testing.assert_close(output.log_probs, expected, atol=2e-5, rtol=0)
        layer.weight.data *= 1.5  # an edit that PyTorch does not count


@torch.no_grad()
def test_members_summed_up_by_distance_say_the_same():
    coupling = coupled("llama").coupling
    embed = coupled("llama").get_input_embeddings()
    hidden = torch.randn(5, coupling.state.in_features, generator=generator(0))
    ids = torch.randint(3, VOCABULARY, (5, 4), generator=generator(1))
    distances = torch.tensor([[1, 2, 3, 4], [1, 0, 0, 0], [0, 0, 0, 0], [5, 6, 7, 200], [9, 9, 1, 0]])
    summed = coupling.summed(ids, distances, embed)
    assert torch.equal(summed[2], torch.zeros_like(summed[2]))
    expected = coupling.code(hidden, ids, distances, embed)
    apart = [2, 3]
    found = coupling.code_of(hidden, summed)
    found[apart] = coupling.code_of(hidden, summed, coupling.scattered)[apart]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (expected[0] - coupling.code(hidden, ids, distances.flip(1), embed)[0]).abs().max() > 1e-4
