"""The decode loop: cached == parallel, batch == single, greedy == the base model's, frequencies == probabilities."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anyorder import AnyOrderForCausalLM, Factorization, policies
from anyorder.decoding.sampling import AllowedTokens
from architectures import ARCHITECTURES, RECIPES, VOCABULARY, base_model, converted
from decoding_runs import IDS, T, exactly, generator, p_value, repeated, run
from factorizations import of_every_constructor, rows


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cached_equals_parallel(architecture, recipe):
    """Forced tokens through the cache, in unequal rows, have the likelihood of one parallel forward."""
    model = converted(architecture, recipe)
    g = generator(1)
    parts = [Factorization.random(T, 3, given=2, generator=g), Factorization.left_to_right(7, 2), Factorization.infill(
        torch.tensor([False, True, True, False, True, False, True]), order="random", generator=g)]  # fmt: skip
    order = Factorization.stack(parts)
    output = run(model, IDS, order, forced_ids=IDS)
    expected = model.log_likelihood(IDS, order)
    torch.testing.assert_close(output.log_probs, expected, atol=1e-5, rtol=0)
    assert torch.equal(output.sequences[order.is_present], IDS[order.is_present])
    assert torch.equal(output.steps, order.group_ids)
    assert output.forwards == int(order.num_groups.max())
    for b, part in enumerate(parts):  # batch == single
        alone = run(model, IDS[b : b + 1, : part.length], part, forced_ids=IDS[b : b + 1, : part.length])
        torch.testing.assert_close(alone.log_probs[0], output.log_probs[b, : part.length], atol=1e-5, rtol=0)


@pytest.mark.parametrize("recipe", RECIPES)
@given(parts=st.lists(rows(max_length=T), min_size=1, max_size=3), architecture=st.sampled_from(ARCHITECTURES))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
def test_cached_equals_parallel_on_any_factorization(recipe, architecture, parts):
    model = converted(architecture, recipe)
    order = Factorization.stack(parts)
    ids = IDS[: len(parts), : order.length]
    output = run(model, ids, order, temperature=1.3, generator=generator())
    again = model.log_likelihood(output.sequences, order)
    torch.testing.assert_close(output.log_probs, again, atol=1e-5, rtol=0)
    assert torch.equal(output.sequences[order.is_given], ids[order.is_given])


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_row_does_not_depend_on_its_batch_mates(recipe):
    model = converted("llama", recipe)
    parts = [Factorization.random(n, 2, generator=generator(n)) for n in (T, 6, 9)]
    batch = run(model, IDS, Factorization.stack(parts), generator=[generator(b) for b in range(3)])
    for b, part in enumerate(parts):
        alone = run(model, IDS[b : b + 1, : part.length], part, generator=[generator(b)])
        assert torch.equal(alone.sequences[0], batch.sequences[b, : part.length])
        assert not batch.sequences[b, part.length :].any()
    first = run(model, IDS, Factorization.stack(parts), generator=generator(5)).sequences[0]
    assert torch.equal(first, run(model, IDS[:1], parts[0], generator=generator(5)).sequences[0])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_is_the_base_models_greedy(architecture):
    base = base_model(architecture)
    mask = torch.ones(3, 8, dtype=torch.int64)
    mask[1, :3] = mask[2, :5] = 0
    ids = IDS[:, :8] * mask
    options = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    for eos in ([], [4, 9]):
        expected = base.generate(ids, attention_mask=mask, eos_token_id=eos or None, **options)
        model = AnyOrderForCausalLM.from_causal_lm(base)
        assert torch.equal(model.generate(ids, attention_mask=mask, eos_token_id=eos, **options), expected)


def test_prompts_padded_on_either_side_give_the_same_continuations():
    model = converted("llama")
    left, right = torch.zeros(2, 2, 6, dtype=torch.int64)
    masks = torch.zeros(2, 2, 6, dtype=torch.int64)
    for b, n in enumerate((6, 3)):
        left[b, 6 - n :], right[b, :n] = IDS[b, :n], IDS[b, :n]
        masks[0, b, 6 - n :], masks[1, b, :n] = 1, 1
    a = model.generate(left, attention_mask=masks[0], max_new_tokens=5, eos_token_id=(), return_dict_in_generate=True)
    b = model.generate(right, attention_mask=masks[1], max_new_tokens=5, eos_token_id=(), return_dict_in_generate=True)
    assert torch.equal(a.sequences[:, 6:], b.sequences[:, 6:])
    assert torch.equal(a.sequences[:, :6], left)
    assert a.log_probs[:, 6:].lt(0).all()
    assert a.steps.tolist() == [[-1] * 6 + [0, 1, 2, 3, 4]] * 2


def test_sampled_frequencies_are_the_exact_probabilities():
    model = converted("llama", vocabulary=4)
    order = Factorization.from_groups([[0], [3], [1], [2]])
    outcomes = torch.tensor([[1, *rest] for rest in itertools.product(range(4), repeat=3)])
    exact = model.log_likelihood(outcomes, Factorization.stack([order] * 64)).sum(dim=1).exp().double()
    N = 6_000
    start = torch.ones(N, 4, dtype=torch.int64)
    drawn = model.generate(start, repeated(order, N), generator=generator(), eos_token_id=())
    index = (drawn[:, 1:] * torch.tensor([16, 4, 1])).sum(dim=1)
    counts = torch.bincount(index, minlength=64)
    assert p_value(counts, exact * N) > 0.01
    assert p_value(counts, torch.full((64,), N / 64)) < 1e-6  # a wrong distribution is noticed


def test_groups_are_drawn_independently_given_what_they_read():
    model = converted("llama", vocabulary=4)
    order = Factorization.from_groups([[0], [1, 2]])
    outcomes = torch.tensor([[1, *rest] for rest in itertools.product(range(4), repeat=2)])
    exact = model.log_likelihood(outcomes, Factorization.stack([order] * 16)).sum(dim=1).exp().double()
    N = 4000
    drawn = model.generate(
        torch.ones(N, 3, dtype=torch.int64), repeated(order, N), generator=generator(1), eos_token_id=()
    )
    counts = torch.bincount((drawn[:, 1:] * torch.tensor([4, 1])).sum(dim=1), minlength=16)
    assert p_value(counts, exact * N) > 0.01


def test_groupwise_size_cuts_the_order_anew():
    model = converted("llama")
    order = Factorization.random(T, 1, generator=generator(3))
    output = run(model, IDS[:1], order, policy=policies.groupwise(4))
    assert output.forwards == 3
    assert torch.equal(output.steps, order.regroup(4).group_ids)
    torch.testing.assert_close(
        output.log_probs, model.log_likelihood(output.sequences, order.regroup(4)), atol=1e-5, rtol=0
    )
    with pytest.raises(ValueError, match="size must be a whole number, at least 1, got 0"):
        policies.groupwise(0)


def test_a_policy_may_commit_fewer_than_it_asks_for():
    """The loop leaves every choice to the policy; cached == parallel holds for any append-only one."""

    class MostLikelyFirst(policies.GroupPolicy):
        def candidates(self, factorization, is_open):
            return is_open

        def select(self, logits, row, column, uniform):
            best = logits.log_softmax(-1).amax(-1)
            return torch.tensor([bool(best[i] == best[row == row[i]].max()) for i in range(len(row))])

    model = converted("gemma3")
    order = Factorization.stack([Factorization.left_to_right(n) for n in (5, 7, 6)])
    output = run(model, IDS[:, :7], order, policy=MostLikelyFirst())
    assert output.forwards == 6
    steps = Factorization(output.steps)
    assert steps.num_groups.tolist() == [4, 6, 5]
    torch.testing.assert_close(output.log_probs, model.log_likelihood(output.sequences, steps), atol=1e-5, rtol=0)


def test_a_policy_must_commit_something():
    class Never(policies.GroupWise):
        def select(self, logits, row, column, uniform):
            return torch.zeros_like(row, dtype=torch.bool)

    with pytest.raises(ValueError, match="committed nothing in row 0"):
        run(converted("llama"), IDS[:1], Factorization.left_to_right(T), policy=Never())


def test_an_end_drops_what_lies_behind_it_and_the_rest_is_filled():
    model = converted("llama")
    order = Factorization.from_groups([[0], [6], [3], [5], [1], [2], [4], [7]])
    tokens = exactly([0, 8, 9, 2, 10, 11, 12, 13])
    output = run(model, IDS[:1, :8], order, allowed_tokens=tokens, eos_token_id=2, pad_token_id=0)
    assert output.sequences.tolist() == [[int(IDS[0, 0]), 8, 9, 2, 0, 0, 0, 0]]
    assert output.steps.tolist() == [[-1, 2, 3, 1, -2, -2, -2, -2]]
    assert output.forwards == 4  # position 6, the end at 3, then 1 and 2; never 5, 4, 7
    assert (output.log_probs[0] != 0).tolist() == [False, True, True, True, False, False, False, False]


def test_the_earliest_of_several_ends_counts():
    model = converted("llama")
    order = Factorization.from_groups([[0], [5], [1, 3], [2], [4]])
    tokens = exactly([0, 8, 9, 2, 10, 2])
    output = run(model, IDS[:1, :6], order, allowed_tokens=tokens, eos_token_id=[2, 7], pad_token_id=0)
    assert output.sequences[0, 1:].tolist() == [8, 9, 2, 0, 0]


def test_an_end_in_front_of_given_text_is_a_token_like_any_other():
    model = converted("llama")
    order = Factorization.from_groups([[0, 3], [1], [2]])
    output = run(model, IDS[:1, :4], order, allowed_tokens=exactly([0, 2, 5, 0]), eos_token_id=2)
    assert output.sequences[0, 1:3].tolist() == [2, 5]
    assert output.sequences[0, 3] == IDS[0, 3]


def test_a_forced_token_is_never_an_end():
    model, order = converted("llama"), Factorization.left_to_right(5)
    forced = torch.tensor([[3, 4, 2, 6, 7]])
    output = run(model, forced, order, forced_ids=forced, eos_token_id=2)
    assert torch.equal(output.sequences, forced)
    torch.testing.assert_close(output.log_probs, model.log_likelihood(forced, order), atol=1e-5, rtol=0)


def test_rows_with_absent_positions_that_commit_different_numbers():
    model = converted("llama")
    order = Factorization(torch.tensor([[-1, 0, -2, 1, -2], [-1, -1, 0, -2, -2], [-2, -1, 0, 0, 0]]))
    output = run(model, IDS[:, :5], order)
    torch.testing.assert_close(output.log_probs, model.log_likelihood(output.sequences, order), atol=1e-5, rtol=0)


def test_greedy_decoding_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    converted("llama").generate(IDS[:1, :4], max_new_tokens=2)
    assert torch.equal(torch.get_rng_state(), state)


def test_mistakes_in_a_stream_are_told_at_once():
    with pytest.raises(ValueError, match="did you mean 'temperature'"):
        converted("llama").stream(IDS[:1], temprature=1.0)


def test_generation_stops_when_every_row_has_ended():
    model = converted("llama")
    greedy = model.generate(IDS[:, :4], max_new_tokens=10, eos_token_id=())
    ends = sorted({int(row[6]) for row in greedy})
    output = model.generate(IDS[:, :4], max_new_tokens=10, eos_token_id=ends, return_dict_in_generate=True)
    assert output.sequences.shape[1] <= 7
    assert output.forwards <= 3


def test_the_default_end_is_the_models_own():
    model = converted("llama")
    assert model.causal_lm.generation_config.eos_token_id == 2
    allowed = AllowedTokens(torch.eye(VOCABULARY)[2:3].bool(), torch.zeros(1, 4 + 5, dtype=torch.int64))
    out = model.generate(IDS[:1, :4], max_new_tokens=5, allowed_tokens=allowed)
    assert out[0, 4:].tolist() == [2]
    assert (
        model.generate(IDS[:1, :4], max_new_tokens=5, allowed_tokens=allowed, eos_token_id=())[0, 4:].tolist()
        == [2] * 5
    )


def test_the_stream_is_what_generate_returns():
    model = converted("llama")
    order = Factorization.stack([Factorization.random(n, 3, generator=generator(n)) for n in (T, 8)])
    output = run(model, IDS[:2], order, generator=generator())
    commits = list(model.stream(IDS[:2], factorization=order, generator=generator(), eos_token_id=()))
    assert len(commits) == int(order.is_predicted.sum())
    assert [c.step for c in commits] == sorted(c.step for c in commits)
    for c in commits:
        assert output.sequences[c.row, c.position] == c.token
        assert output.steps[c.row, c.position] == c.step
        assert float(output.log_probs[c.row, c.position]) == c.log_prob


def test_streaming_is_lazy():
    model, calls = converted("llama"), []
    hook = model.causal_lm.model.register_forward_hook(lambda *_: calls.append(1))
    try:
        next(iter(model.stream(IDS[:1, :4], max_new_tokens=30, eos_token_id=())))
    finally:
        hook.remove()
    assert len(calls) == 1


def test_one_forward_a_group_and_one_row_a_step():
    """Group size 1 from left to right costs what the base costs: one row a step behind the prompt."""
    model, shapes = converted("llama"), []
    hook = model.causal_lm.model.layers[0].register_forward_hook(lambda m, args, out: shapes.append(args[0].shape[1]))
    try:
        model.generate(IDS[:1, :5], max_new_tokens=4, eos_token_id=())
        model.generate(IDS[:1, :5], max_new_tokens=8, policy=policies.groupwise(4), eos_token_id=())
    finally:
        hook.remove()
    assert shapes == [5, 1, 1, 1, 5 + 3, 4 + 3]


def test_decoding_leaves_no_inference_tensors_behind():
    model = converted("llama")
    output = run(model, IDS[:1], Factorization.left_to_right(T))
    weight = torch.ones((), requires_grad=True)
    (output.log_probs * weight).sum().backward()  # an inference tensor would refuse
    assert weight.grad is not None
    assert not output.sequences.is_inference()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tempreature": 1.0}, "unknown option 'tempreature'; did you mean 'temperature'"),
        ({"num_beams": 4}, "num_beams is not for any order"),
        ({"temperature": -1.0}, "-1.0"),
        ({"temperature": 1.0, "do_sample": False}, r"temperature=1\.0 has no effect with do_sample=False"),
        ({"top_k": -1}, "-1"),
        ({"top_p": 1.5}, r"1\.5"),
        ({"min_p": 2.0}, r"2\.0"),
        ({"repetition_penalty": -1.0}, "-1.0"),
        ({"max_new_tokens": -1}, "max_new_tokens must be a whole number, at least 0, got -1"),
        ({"max_new_tokens": 100}, "112 tokens, blanks and new ones included; the model's context is 64"),
        ({"max_new_tokens": 1.5}, r"max_new_tokens must be a whole number, at least 0, got 1\.5"),
        ({"generator": 5}, "generator must be a torch.Generator"),
        ({"generator": [1]}, "generator must be a torch.Generator"),
        ({"factorization": [[0]], "do_sample": True}, "factorization must be a Factorization, got list"),
        ({"temperature": 1e-39}, "temperature is 1e-39"),
        ({"forced_ids": torch.full((1, T + 20), 99)}, "forced_ids holds 99"),
        ({"forced_ids": torch.full((1, T + 20), -1)}, "forced_ids holds -1"),
        ({"forced_ids": [1]}, "forced_ids must be a tensor, got list"),
        (
            {"allowed_tokens": AllowedTokens(torch.ones(1, 5).bool(), torch.zeros(1, T + 20, dtype=torch.int64))},
            "masks over 5 tokens, not 37",
        ),
        ({"policy": "groupwise"}, r"policy must come from anyorder\.policies, got 'groupwise'"),
        ({"generator": [generator(), generator()]}, "2 generators for 1 rows"),
        ({"attention_mask": torch.zeros(1, T)}, "prompt 0 is empty"),
        ({"attention_mask": torch.zeros(1, 2)}, "attention_mask has shape"),
        ({"forced_ids": torch.zeros(1, 2, dtype=torch.int64)}, "forced_ids has shape"),
        ({"factorization": Factorization.left_to_right(T), "max_new_tokens": 3}, "max_new_tokens is for prompts"),
        ({"factorization": Factorization.left_to_right(T - 1)}, "the factorization"),
        ({"factorization": Factorization.pack([Factorization.left_to_right(6)] * 2)}, "one document a row"),
    ],
)
def test_errors_name_the_option_and_the_way_out(options, message):
    with pytest.raises(ValueError, match=message):
        converted("llama").generate(IDS[:1], **options)


def test_prompts_must_be_integers_in_rows():
    with pytest.raises(ValueError, match="integers of shape"):
        converted("llama").generate(IDS[0])
    with pytest.raises(ValueError, match="integers of shape"):
        converted("llama").generate(IDS.float())
    with pytest.raises(ValueError, match="must be a tensor, got list"):
        converted("llama").generate([[1, 2]])


@pytest.mark.parametrize("name", of_every_constructor(T))
def test_every_constructor_decodes(name):
    order = of_every_constructor(T)[name]
    output = run(converted("qwen3"), IDS[:1], order)
    torch.testing.assert_close(
        output.log_probs, converted("qwen3").log_likelihood(output.sequences, order), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2", "mistral"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_what_all_rows_begin_with_is_encoded_once(architecture, recipe, monkeypatch):
    """Blanks of several lengths behind one start, between two texts: the same as each row alone."""
    model = converted(architecture, recipe)
    start, rows = torch.arange(3, 23), []
    for n in (1, 3, 2):
        end = torch.tensor([7, 9, 11])
        rows.append((torch.cat([start, torch.zeros(n, dtype=torch.int64), end]), range(20, 20 + n)))
    orders = [Factorization.infill(torch.isin(torch.arange(len(ids)), torch.tensor(blank))) for ids, blank in rows]
    batch = torch.stack([torch.nn.functional.pad(ids, (0, 26 - len(ids))) for ids, _ in rows])
    seen = []
    forward = model.hidden_rows

    def spy(rows, *rest):
        seen.append(rows.lo.shape)
        return forward(rows, *rest)

    monkeypatch.setattr(model, "hidden_rows", spy)
    output = run(model, batch, Factorization.stack(orders), generator=[generator(b) for b in range(3)])
    if recipe == "exact":
        assert seen[0] == (1, 19)
        assert seen[1][1] <= 1 + 3 + 1
        assert output.forwards == 3 + 1
    else:  # given tokens read what stands on their right
        assert output.forwards == 3
    assert [shape[0] for shape in seen][-3:] == [3, 2, 1], "full rows leave the batch"
    assert output.steps.max() == 2
    for b, (order, (ids, _)) in enumerate(zip(orders, rows, strict=True)):
        alone = run(model, ids[None], order, generator=[generator(b)])
        assert torch.equal(alone.sequences[0], output.sequences[b, : len(ids)])
        torch.testing.assert_close(alone.log_probs[0], output.log_probs[b, : len(ids)], atol=1e-5, rtol=0)
