"""The backend for lm-evaluation-harness: requests made by hand, against direct calls and the stock backend."""

from __future__ import annotations

import math

import pytest
import torch

from anyorder import AnyOrderForCausalLM, Factorization, policies, scoring
from anyorder.core.rng import seed_of
from anyorder.evaluation.batches import batches
from architectures import adapted, base_model, converted, coupled
from harness import PAIRS, TEXTS, close, direct, generate, likelihoods, rolling

pytest.importorskip("lm_eval", reason="the backend needs lm-eval: pip install 'anyorder[eval]'")

CONTEXT = 64


# ---------------------------------------------------------------------- left to right: the base model's own


def test_continuations_score_as_in_the_stock_backend(backend, stock):
    long = [
        ("a b " * 40, " c ab"),
        ("c " * 31, " a"),
        ("c" * 70, "b" * 62 + " c"),
    ]  # cut, at the edge, cut to one token
    for own, theirs in zip(likelihoods(backend(), PAIRS + long), likelihoods(stock, PAIRS + long), strict=True):
        assert close(own[0], theirs[0])
        assert own[1] == theirs[1]


def test_greedy_continuations_are_told(backend, stock):
    """The stock backend's own greedy text is greedy, and with another last token it is not."""
    lm, context = backend(), "q: a b"
    ids = lm.encoder.prompt(context)
    new = lm.model.generate(torch.tensor([ids]), max_new_tokens=3, do_sample=False, eos_token_id=())[0, len(ids) :]
    ids = torch.tensor(ids + new.tolist())[None]
    predicted = torch.zeros_like(ids, dtype=torch.bool)
    predicted[:, -3:] = True
    assert scoring.teacher_forced_by_base(lm.model, ids, predicted).is_best[predicted].all()
    ids[0, -1] = (ids[0, -1] + 1) % 200
    assert scoring.teacher_forced_by_base(lm.model, ids, predicted).is_best[predicted].tolist() == [True, True, False]


def test_texts_score_as_in_the_stock_backend(backend, stock):
    texts = [text for text in TEXTS if text] + ["a b c" * 60]  # several windows
    assert close(rolling(backend(), texts), rolling(stock, texts))
    assert close(rolling(backend(max_length=9), texts), rolling(_shorter(stock, 9), texts))


def _shorter(stock, length):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=stock.model, tokenizer=stock.tokenizer, max_length=length, batch_size=4)


def test_text_is_generated_as_in_the_stock_backend(backend, stock):
    asked = {"until": ["\n", "zz"], "max_gen_toks": 12}
    more = {"max_gen_toks": 9, "until": "b"}
    pairs = [(context, asked) for context, _ in PAIRS[:6]] + [("a b " * 40, asked), ("c", more)]
    assert generate(backend(), *pairs) == generate(stock, *pairs)


@pytest.mark.parametrize("kind", ["full", "gated", "lora", "coupled"])
def test_the_wrapped_model_scores_what_rows_score(kind):
    """In left-to-right groups of one the exact recipe's query rows are the causal LM's own, adapted or not."""
    model = {"full": converted, "coupled": coupled}.get(kind, lambda name: adapted(name, kind))("llama")
    ids = torch.randint(3, 37, (2, 9), generator=torch.Generator().manual_seed(0))
    order = Factorization.stack([Factorization.left_to_right(9, given=3)] * 2)
    whole = scoring.teacher_forced_by_base(model, ids, order.is_predicted)
    rows = scoring.teacher_forced(model, ids, order)
    assert torch.allclose(whole.log_probs, rows.log_probs, atol=1e-5)
    assert torch.allclose(whole.log_probs, model.log_likelihood(ids, order), atol=1e-5)
    assert torch.equal(whole.is_best, rows.is_best)
    assert scoring.is_its_base(model, "left_to_right", 1)
    assert not scoring.is_its_base(converted("llama", "paper"), "left_to_right", 1)


def test_the_paper_recipe_scores_by_its_own_rows(backend):
    lm = backend(recipe="paper")
    for (log_p, greedy), pair in zip(likelihoods(lm, PAIRS), PAIRS, strict=True):
        text = lm.encoder.pair(*pair)
        expected = direct(lm, text.given, text.predicted)
        assert close(log_p, expected[0], 1e-5)
        assert greedy == expected[1]


# ---------------------------------------------------------------------- orders


@pytest.mark.parametrize(("order", "group_size"), [("random", 1), ("random", 3), ("left_to_right", 2)])
def test_orders_and_groups_score_as_the_model_says(backend, order, group_size):
    lm = backend(order=order, group_size=group_size, seed=5)
    for (log_p, greedy), pair in zip(likelihoods(lm, PAIRS), PAIRS, strict=True):
        text = lm.encoder.pair(*pair)
        generator = torch.Generator().manual_seed(seed_of(5, pair[0]))
        expected = direct(lm, text.given, text.predicted, order, group_size, generator)
        assert close(log_p, expected[0], 1e-5)
        assert greedy == expected[1]
    assert [one for one, _ in likelihoods(backend(), PAIRS)] != [one for one, _ in likelihoods(lm, PAIRS)]


@pytest.mark.parametrize("order", ["left_to_right", "random"])
def test_a_context_is_scored_given_what_is_behind_it(backend, order):
    """log P(context | continuation) as the model itself says it, where both have the tokens of a usual request."""
    lm = backend(scored="context", order=order, seed=5)
    pairs = [*PAIRS, ("a b ", "c"), ("ab", ""), ("", " a")]
    for (log_p, _), (context, continuation) in zip(likelihoods(lm, pairs), pairs, strict=True):
        if not context:
            assert log_p == 0
            continue
        usual = lm.encoder.pair(context, continuation)
        text = lm.encoder.document(context.rstrip())
        ids = [*text.given, *text.predicted, *usual.predicted]
        given, end = len(text.given), len(text.given) + len(text.predicted)
        plain = Factorization.conditional(range(given, end), [*range(given), *range(end, len(ids))], len(ids))
        f = plain.regroup(1, order, torch.Generator().manual_seed(seed_of(5, context)))
        assert close(log_p, float(lm.model.log_likelihood(torch.tensor([ids]), f).double().sum()), 1e-5)
    greedy = [best for _, best in likelihoods(lm, [("", " a")])]
    assert greedy == [True]


def test_the_answers_to_a_question_do_not_make_it_equally_likely(backend):
    lm = backend(scored="context")
    scores = [score for score, _ in likelihoods(lm, PAIRS[:3])]
    assert len(set(scores)) == 3
    assert scores != [score for score, _ in likelihoods(backend(), PAIRS[:3])]
    assert close(rolling(lm, TEXTS), rolling(backend(), TEXTS))  # a whole text has no context
    with pytest.raises(ValueError, match=r"scored='answer': use continuation or context"):
        backend(scored="answer")
    with pytest.raises(ValueError, match="does not fit the 16 that the model can read; raise max_length"):
        likelihoods(backend(scored="context", max_length=16), [("a b c" * 9, " a")])


def test_several_orders_give_the_likelihood_of_their_mixture(backend):
    lm = backend(order="random", order_average=4, seed=1)
    for (log_p, greedy), pair in zip(likelihoods(lm, PAIRS), PAIRS, strict=True):
        text = lm.encoder.pair(*pair)
        generator = torch.Generator().manual_seed(seed_of(1, pair[0]))
        each = [direct(lm, text.given, text.predicted, "random", 1, generator) for _ in range(4)]
        assert close(log_p, math.log(sum(math.exp(one) for one, _ in each) / 4), 1e-5)
        assert greedy == all(best for _, best in each)


def test_a_mixture_of_orders_sums_to_one():
    from anyorder.evaluation.harness.encoding import Encoded
    from anyorder.evaluation.harness.likelihoods import Scorer
    from anyorder.evaluation.harness.settings import Settings

    model = converted("llama", vocabulary=3)
    scorer = Scorer(model, Settings(order="random", order_average=3, group_size=2), context=CONTEXT)
    texts = [Encoded([0], [a, b, c], "one question") for a in range(3) for b in range(3) for c in range(3)]
    assert sum(math.exp(score.log_likelihood) for _, score in scorer(texts)) == pytest.approx(1, abs=1e-5)


def test_long_texts_in_random_orders_are_cut_into_windows(backend):
    lm, text = backend(order="random", max_length=16), "a b c" * 20
    ids = lm.encoder.document(text).predicted
    generator, tokens, total, done = torch.Generator().manual_seed(seed_of(0, text)), [1, *ids], 0.0, 1
    while done < len(tokens):
        end = min(len(tokens), done + 15)
        begin = max(0, end - 16)
        total += direct(lm, tokens[begin:done], tokens[done:end], "random", 1, generator)[0]
        done = end
    assert close(rolling(lm, [text])[0], total)


# ---------------------------------------------------------------------- batches


@pytest.mark.parametrize("model_args", [{}, {"order": "random", "order_average": 2}])
def test_results_do_not_depend_on_batches(backend, model_args):
    alone = backend(batch_size=1, **model_args)
    generation = {"max_gen_toks": 6, "do_sample": True, "temperature": 0.9, "until": ["zz"]}
    pairs = [(context, generation) for context, _ in PAIRS[:5]]
    scores = [one for one, _ in likelihoods(alone, PAIRS)], rolling(alone, TEXTS), generate(alone, *pairs)
    assert len(set(scores[2])) > 1
    for batching in ({"batch_size": "auto"}, {"batch_size": 3}, {"tokens_at_once": 70}, {"max_batch_size": 2}):
        lm = backend(**model_args | batching)
        assert close([one for one, _ in likelihoods(lm, PAIRS)], scores[0], 1e-5)
        assert close(rolling(lm, TEXTS), scores[1])
        assert generate(lm, *pairs) == scores[2]
    assert close([one for one, _ in likelihoods(alone, PAIRS[::-1])], scores[0][::-1], 1e-5)


def test_batches_keep_their_bounds():
    rows = [9, 9, 8, 5, 5, 5, 1]
    assert list(batches(rows, lambda n: n, 20, None)) == [[9, 9], [8, 5], [5, 5, 1]]
    assert list(batches(rows, lambda n: n, 4, None)) == [[n] for n in rows]
    assert list(batches(rows, lambda n: n, 1000, 3)) == [[9, 9, 8], [5, 5, 5], [1]]


# ---------------------------------------------------------------------- generation


@pytest.mark.parametrize(
    "policy", ["groupwise:size=4", "dynamic:criterion=entropy,step_size=2", "speculative:draft_length=2"]
)
def test_policies_generate_as_the_model_does(backend, policy):
    lm = backend(policy=policy)
    ids = lm.encoder.prompt("q: a b")
    text = lm.model.generate(torch.tensor([ids]), max_new_tokens=8, policy=policies.parse(policy), do_sample=False)
    expected = lm.tokenizer.decode(text[0, len(ids) :], skip_special_tokens=True)
    assert generate(lm, ("q: a b", {"max_gen_toks": 8})) == [expected]
    stop = expected[2:4]
    assert generate(lm, ("q: a b", {"max_gen_toks": 8, "until": [stop]})) == [expected[: expected.index(stop)]]


def test_a_stop_counts_behind_the_prompt_only(backend):
    """A stop that begins in the prompt is none."""
    lm = backend()
    whole = generate(lm, ("q: a b", {"max_gen_toks": 8}))[0]
    assert whole[0] != "b"
    assert generate(lm, ("q: a b", {"max_gen_toks": 8, "until": ["b" + whole[0], "q: "]})) == [whole]


def test_draws(backend):
    asked = {"max_gen_toks": 8}
    drawn = {**asked, "do_sample": True, "temperature": 1.5}
    greedy = generate(backend(), ("q: a", asked))
    assert generate(backend(), ("q: a", {**asked, "do_sample": False, "temperature": 1.5, "top_p": 0.9})) == greedy
    assert generate(backend(temperature=0), ("q: a", drawn)) == greedy
    one, two, three = generate(backend(), *[("q: a", drawn)] * 3)  # repeats of a request differ
    assert len({one, two, three, *greedy}) == 4
    assert generate(backend(), ("c", drawn), ("q: a", drawn))[1] == one
    assert generate(backend(seed=1), ("q: a", drawn)) != [one]
    assert generate(backend(temperature=1.5), ("q: a", asked)) not in (greedy, [two])


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"max_gen_toks": 64}, "64 new tokens and a prompt do not fit a context of 64: ask for fewer"),
        ({"max_gen_toks": 4, "temprature": 1}, "unknown option 'temprature'; did you mean 'temperature'"),
        ({"max_gen_toks": 4, "num_beams": 4}, "num_beams is not for any order"),
        ({"max_gen_toks": 4, "until": [3]}, "until must be a text or a list of texts"),
    ],
)
def test_generation_that_cannot_be(backend, said, message):
    with pytest.raises(ValueError, match=message):
        generate(backend(), ("q: a", said))


# ---------------------------------------------------------------------- model_args


@pytest.mark.parametrize(
    ("model_args", "message"),
    [
        ({"grup_size": 2}, "unknown option 'grup_size'; did you mean 'group_size'"),
        ({"order": "both_sides"}, "nothing stands on its right; use order=random"),
        ({"order": "sideways"}, "order='sideways': use left_to_right or random"),
        ({"group_size": 0}, "group_size=0: use a whole number, at least 1"),
        ({"order_average": 2}, "order_average=2 is over random orders: add order=random"),
        ({"policy": "groupwise:sise=4"}, "unknown option 'sise'; did you mean 'size'"),
        ({"policy": 4}, "policy=4: write it as NAME or NAME:OPTION=VALUE"),
        ({"temperature": -1.0}, "temperature"),
        ({"batch_size": "many"}, "batch_size='many': use auto or a whole number"),
        ({"dtype": "float7"}, "dtype='float7': use auto, float32"),
        ({"device": "nowhere"}, "device='nowhere' cannot be used"),
        ({"max_length": 65}, "max_length=65 is more than the 64 tokens that the model can read"),
        ({"add_bos_token": "maybe"}, "add_bos_token='maybe': use true or false"),
        ({"pretrained": "no-such-directory/model"}, "no-such-directory"),
        ({"tokenizer": "x"}, "tokenizer is for a model that is loaded already"),
    ],
)
def test_model_args_that_cannot_be_meant(backend, model_args, message):
    with pytest.raises(ValueError, match=message):
        backend(**model_args)


def test_a_loaded_model_needs_its_tokenizer(backend):
    model = AnyOrderForCausalLM.from_causal_lm(base_model("llama"))
    with pytest.raises(ValueError, match="needs its tokenizer"):
        backend(pretrained=model)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is asked for is there")
def test_the_commands_default_device_is_the_cpu_where_there_is_no_other(backend):
    assert backend(device="cuda:0").device.type == "cpu"
    with pytest.raises(ValueError, match="device='cuda:1' cannot be used"):
        backend(device="cuda:1")


def test_one_process(backend, monkeypatch):
    lm = backend()
    assert (lm.rank, lm.world_size) == (0, 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="runs in one process"):
        backend()
