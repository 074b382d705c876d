"""What transformers users pass to `generate` and `forward`: the same names, the same results, or one clear refusal."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, NoRepeatNGramLogitsProcessor, pipeline

from anyorder import AnyOrderForCausalLM, Factorization, policies
from anyorder.decoding import conventions, request
from anyorder.decoding.sampling import AllowedTokens
from architectures import VOCABULARY, base_model, converted
from decoding_runs import IDS, PROMPTS, Recorder, T, generator

ORDER = Factorization.random(T, 2, generator=generator(1))


@pytest.fixture
def pair():
    """A base of its own, whose generation config a test may change, and its conversion."""
    base = base_model("llama", max_position_embeddings=16)
    return base, AnyOrderForCausalLM.from_causal_lm(copy.deepcopy(base))


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 6},
        {"max_length": 9},
        {"max_new_tokens": 6, "min_new_tokens": 4, "eos_token_id": [3, 6, 19, 22, 30]},
        {"max_new_tokens": 6, "min_length": 8, "eos_token_id": list(range(3, 30))},
        {"max_new_tokens": 4, "suppress_tokens": list(range(3, 30))},
        {"max_new_tokens": 4, "repetition_penalty": 2.0, "num_beams": 1, "use_cache": False, "top_k": None},
        {"max_new_tokens": 9, "logits_processor": LogitsProcessorList([NoRepeatNGramLogitsProcessor(1)])},
        {"generation_config": GenerationConfig(max_new_tokens=5, repetition_penalty=1.5, eos_token_id=30)},
    ],
)
def test_options_of_transformers_do_what_they_do_there(pair, options):
    base, model = pair
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None} | options
    if "generation_config" in options:
        options = {"generation_config": options["generation_config"]}
        options["generation_config"].pad_token_id = 0
    expected = base.generate(PROMPTS, attention_mask=torch.ones_like(PROMPTS), **copy.deepcopy(options))
    if options.get("eos_token_id", ()) is None:
        options["eos_token_id"] = ()
    assert torch.equal(model.generate(PROMPTS, attention_mask=torch.ones_like(PROMPTS), **options), expected)
    assert torch.equal(model.generate(inputs=PROMPTS, **options), expected)
    speculated = model.generate(PROMPTS, policy=policies.speculative(draft="query"), **options)
    assert torch.equal(speculated, expected)


def test_the_models_own_generation_config_counts_for_prompts(pair):
    _, model = pair
    saved = model.generation_config
    saved.do_sample, saved.temperature, saved.top_p, saved.max_new_tokens = True, 0.6, 0.9, 4
    drawn = model.generate(PROMPTS, seed=3)
    assert drawn.shape[1] <= 5 + 4
    assert torch.equal(
        drawn, model.generate(PROMPTS, temperature=0.6, top_p=0.9, max_new_tokens=4, generator=generator(3))
    )
    torch.manual_seed(0)
    first = model.generate(PROMPTS)
    torch.manual_seed(1)
    assert not torch.equal(first, model.generate(PROMPTS)), "a model that is saved so samples"
    greedy = model.generate(PROMPTS, do_sample=False)
    assert torch.equal(greedy, model.generate(PROMPTS, temperature=0))
    assert torch.equal(greedy, model.generate(PROMPTS, generation_config=GenerationConfig(do_sample=False)))
    with_order = model.generate(IDS, Factorization.stack([ORDER] * 3))
    assert torch.equal(with_order, model.generate(IDS, Factorization.stack([ORDER] * 3), do_sample=False))


def test_the_nearer_place_counts(pair):
    _, model = pair
    model.generation_config.max_length = 1000  # longer than the model can stand on
    assert model.generate(PROMPTS, eos_token_id=()).shape[1] == 16
    config = GenerationConfig(max_new_tokens=3)
    assert model.generate(PROMPTS, generation_config=config, eos_token_id=()).shape[1] == 8
    assert model.generate(PROMPTS, generation_config=config, max_length=7, eos_token_id=()).shape[1] == 7
    model.generate(IDS, Factorization.stack([ORDER] * 3), generation_config=config)  # its length is the order's


def test_what_the_models_own_config_asks_for_in_vain_is_told(pair, caplog):
    _, model = pair
    model.generation_config.no_repeat_ngram_size = 2
    model.generation_config.cache_implementation = "hybrid"
    with caplog.at_level(logging.WARNING, logger="anyorder"):
        model.generate(PROMPTS, max_new_tokens=1)
    assert [record.getMessage() for record in caplog.records if record.name.startswith("anyorder")] == [
        "the model's generation config asks for no_repeat_ngram_size=2, which is left out"
    ]


def test_without_ids_generation_begins_at_the_start_token(pair):
    _, model = pair
    expected = model.generate(torch.tensor([[1]]), max_new_tokens=4)
    assert torch.equal(model.generate(max_new_tokens=4), expected)
    model.generation_config.bos_token_id = None
    with pytest.raises(ValueError, match="pass input_ids"):
        model.generate(max_new_tokens=4)


def test_no_new_tokens_are_the_prompts():
    model = converted("llama")
    mask = torch.ones_like(PROMPTS)
    mask[1, :2] = 0
    for options in ({"max_new_tokens": 0}, {"max_length": 5}):
        output = model.generate(PROMPTS, attention_mask=mask, return_dict_in_generate=True, **options)
        assert torch.equal(output.sequences, PROMPTS)
        assert output.forwards == 0
        assert list(model.stream(PROMPTS, attention_mask=mask, **options)) == []


def test_temperature_zero_is_the_most_likely_token():
    model = converted("llama")
    expected = model.generate(PROMPTS, do_sample=False, max_new_tokens=4)
    state = torch.get_rng_state()
    for options in (
        {},
        {"do_sample": True},
        {"do_sample": False},
        {"top_p": 0.9, "top_k": 5},
        {"generator": generator()},
    ):
        assert torch.equal(model.generate(PROMPTS, temperature=0, max_new_tokens=4, **options), expected)
    assert torch.equal(
        model.generate(PROMPTS, temperature=0.0, max_new_tokens=4, policy=policies.speculative()), expected
    )
    assert torch.equal(torch.get_rng_state(), state)


def test_a_seed_is_a_generator():
    model = converted("llama")
    drawn = model.generate(PROMPTS, generator=generator(5), max_new_tokens=4)
    assert torch.equal(model.generate(PROMPTS, seed=5, max_new_tokens=4), drawn)
    assert not torch.equal(model.generate(PROMPTS, seed=6, max_new_tokens=4), drawn)
    commits = list(model.stream(PROMPTS, seed=5, max_length=9, num_return_sequences=2, eos_token_id=()))
    assert len(commits) == 3 * 2 * 4


def test_several_sequences_of_a_row_are_rows_of_their_own():
    model = converted("llama")
    twice = PROMPTS.repeat_interleave(2, dim=0)
    mask = torch.ones_like(PROMPTS)
    mask[1, :2] = 0
    options = {"temperature": 1.5, "seed": 2, "attention_mask": mask, "max_new_tokens": 5}
    several = model.generate(PROMPTS, num_return_sequences=2, **options)
    options["attention_mask"] = mask.repeat_interleave(2, dim=0)
    assert torch.equal(several, model.generate(twice, **options))
    assert len({tuple(row) for row in several.tolist()}) == 6
    order = Factorization.stack([ORDER] * 3)
    forced = torch.where(torch.arange(T) == 3, IDS, -100)
    allowed = AllowedTokens(torch.arange(VOCABULARY)[None] > 9, torch.zeros(3, T, dtype=torch.int64))
    given = {"forced_ids": forced, "allowed_tokens": allowed, "seed": 1}
    several = model.generate(IDS, order, num_return_sequences=3, **given)
    again = {"forced_ids": forced.repeat_interleave(3, dim=0), "allowed_tokens": allowed.repeated(3), "seed": 1}
    thrice = Factorization.stack([ORDER] * 9)
    assert torch.equal(several, model.generate(IDS.repeat_interleave(3, dim=0), thrice, **again))
    with pytest.raises(ValueError, match="num_return_sequences=2 of the most likely tokens are all the same"):
        model.generate(PROMPTS, num_return_sequences=2)


@pytest.mark.parametrize("policy", [None, policies.speculative(draft="query", draft_length=2)])
def test_logits_processors_get_the_text_on_the_left(policy):
    """One that knows the text so far decides each token: the next number."""
    model = converted("llama")

    class Successor(LogitsProcessor):
        def __call__(self, input_ids, scores):
            out = torch.full_like(scores, -torch.inf)
            out[torch.arange(len(out)), (input_ids[:, -1] + 1) % VOCABULARY] = 0
            return out

    mask = torch.ones_like(PROMPTS)
    mask[1, :2] = 0
    options = {"max_new_tokens": 4, "eos_token_id": (), "logits_processor": [Successor()], "policy": policy}
    for more in ({}, {"temperature": 0.7, "seed": 1}):
        new = model.generate(PROMPTS, attention_mask=mask, **options, **more)[:, 5:]
        assert torch.equal(new, (PROMPTS[:, -1:] + torch.arange(1, 5)) % VOCABULARY)


def test_scores_are_what_tokens_were_drawn_from(pair):
    base, model = pair
    options = {"max_new_tokens": 5, "do_sample": True, "top_k": 4, "temperature": 0.7, "eos_token_id": None}
    for policy in (None, policies.speculative(draft="query", draft_length=2)):
        output = model.generate(
            PROMPTS, policy=policy, seed=1, return_dict_in_generate=True, output_scores=True, output_logits=True,
            **options | {"eos_token_id": ()},
        )  # fmt: skip
        logits = base(output.sequences).logits.detach()[:, 4:-1]
        torch.testing.assert_close(torch.stack(output.logits, 1), logits, atol=1e-4, rtol=0)
        for scores, own, token in zip(output.scores, output.logits, output.sequences[:, 5:].T, strict=True):
            assert (scores.isfinite().sum(1) == 4).all()
            kept = scores.isfinite()
            torch.testing.assert_close(scores[kept], own[kept] / 0.7)
            assert scores.gather(1, token[:, None]).isfinite().all()
    with_order = model.generate(IDS[:1], ORDER, return_dict_in_generate=True, output_logits=True)
    assert len(with_order.logits) == T
    assert with_order.scores is None
    lp = torch.stack(with_order.logits, 1).log_softmax(-1).gather(2, with_order.sequences[..., None])[..., 0]
    torch.testing.assert_close(lp[ORDER.is_predicted], with_order.log_probs[ORDER.is_predicted])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 4}, "num_beams is not for any order: it keeps unfinished texts with one common order"),
        ({"penalty_alpha": 0.6}, "penalty_alpha is not for any order: it reads the hidden states"),
        ({"assistant_model": object()}, r"assistant_model .* policies.speculative\(\)"),
        ({"prompt_lookup_num_tokens": 3}, r"policies.speculative\(\)"),
        ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size .* logits_processor="),
        ({"past_key_values": ()}, "past_key_values"),
        ({"generation_config": GenerationConfig(num_beams=2)}, "num_beams is not for any order"),
        ({"generation_config": {"do_sample": True}}, "generation_config must be a GenerationConfig, got dict"),
        ({"max_new_tokens": 3, "max_length": 9}, "max_new_tokens and max_length say the same thing"),
        ({"seed": 1, "generator": generator()}, "generator and seed say the same thing"),
        ({"inputs": PROMPTS}, "inputs and input_ids are two names of one thing"),
        ({"max_length": 3}, "max_length=3 is less than the prompts' 5 tokens"),
        ({"max_new_tokens": -1}, "max_new_tokens must be a whole number, at least 0, got -1"),
        ({"max_new_tokens": True}, "max_new_tokens must be a whole number, at least 0, got True"),
        ({"num_return_sequences": 0}, "num_return_sequences must be a whole number, at least 1, got 0"),
        ({"seed": 0.5}, "seed must be a whole number, at least 0, got 0.5"),
        ({"do_sample": "yes"}, "do_sample must be True or False, got 'yes'"),
        ({"suppress_tokens": [99]}, "suppress_tokens holds 99"),
        ({"suppress_tokens": ["a"]}, "suppress_tokens must be one or several token ids, got"),
        ({"stop_strings": "a"}, "pass tokenizer="),
        ({"max_time": "soon"}, "max_time must be a finite number, got 'soon'"),
        ({"output_scores": True}, "output_scores is part of the whole result: add return_dict_in_generate=True"),
        (
            {"streamer": Recorder(), "policy": policies.dynamic()},
            r"streamer needs text .* Dynamic.* chooses its own order",
        ),
        ({"max_time": 5, "policy": policies.dynamic()}, "max_time needs text that grows from left to right"),
        (
            {"logits_processor": [Recorder()], "policy": policies.dynamic()},
            "logits_processor needs text that grows from left to right",
        ),
        ({"logits_processor": Recorder()}, "logits_processor must be a list of processors"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        converted("llama").generate(PROMPTS, **options)


def test_what_is_for_prompts_or_for_orders_only():
    order = Factorization.stack([ORDER] * 3)
    for name in conventions.FOR_PROMPTS:
        with pytest.raises(ValueError, match=f"{name} is for prompts"):
            converted("llama").generate(IDS, order, **{name: 3})
    with pytest.raises(ValueError, match="streamer is for prompts"):
        converted("llama").generate(IDS, order, streamer=Recorder())
    with pytest.raises(ValueError, match="logits_processor needs text that grows from left to right; this"):
        converted("llama").generate(IDS, order, logits_processor=[NoRepeatNGramLogitsProcessor(2)])


def test_every_name_of_transformers_has_a_place():
    """Known, without effect, or refused with a reason: nothing is ignored in silence."""
    names = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    output = {"return_dict_in_generate", "pad_token_id", "output_scores", "output_logits"}
    placed = {*request.NAMES, *output, *conventions.WITHOUT_EFFECT, *conventions.REFUSED}
    assert names - placed <= {"continuous_batching_config"}
    assert not set(conventions.REFUSED) & {*request.NAMES, *conventions.WITHOUT_EFFECT}


@pytest.mark.parametrize("value", ["0.5", True, float("nan"), float("inf"), [1.0]])
@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "repetition_penalty"])
def test_settings_are_finite_numbers(name, value):
    with pytest.raises(ValueError, match=rf"{name} must be a finite number, got "):
        converted("llama").generate(PROMPTS, **{name: value})


@pytest.mark.parametrize("value", [True, "3", 2.0, -1])
def test_top_k_is_a_whole_number(value):
    with pytest.raises(ValueError, match="top_k"):
        converted("llama").generate(PROMPTS, top_k=value)


def test_forward_takes_transformers_options():
    model = converted("llama")
    output = model(IDS, labels=IDS)
    loss, logits, _ = model(IDS, labels=IDS, return_dict=False, use_cache=True)
    assert torch.equal(loss, output.loss)
    assert torch.equal(logits, output.logits)
    assert torch.equal(model(IDS, return_dict=True, use_cache=False).logits, output.logits)
    with pytest.raises(ValueError, match=r"past_key_values holds keys in the order of positions.*generate\(\)"):
        model(IDS, past_key_values=())


def test_the_text_generation_pipeline(byte_tokenizer):
    base = base_model("llama", vocabulary=len(byte_tokenizer))
    model = AnyOrderForCausalLM.from_causal_lm(base_model("llama", vocabulary=len(byte_tokenizer)))
    for options in (
        {"do_sample": False, "max_new_tokens": 8},
        {"do_sample": False, "max_new_tokens": 8, "return_full_text": False, "stop_sequence": "b"},
    ):
        texts = [
            pipeline("text-generation", model=m, tokenizer=byte_tokenizer)(["ab c", "a"], **options)
            for m in (base, model)
        ]
        assert texts[0] == texts[1]
    drawn = pipeline("text-generation", model=model, tokenizer=byte_tokenizer)(
        "ab", max_new_tokens=6, num_return_sequences=3, temperature=2.0, do_sample=True
    )
    assert len({one["generated_text"] for one in drawn}) == 3
