"""Constraints: every one is met, in exactly so many tokens, or refused with a reason before decoding starts."""

from __future__ import annotations

import itertools
import json
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anyorder import Factorization, Infiller, policies
from anyorder.decoding.constraints import Automaton, BlankConstraint, BlankConstraints, Choice, JsonSchema, Pattern
from anyorder.infill.infiller import Infill
from architectures import converted
from decoding_runs import generator, p_value

TOKENS = {0: "a", 1: "b", 2: "ab", 3: "1", 4: "12", 5: " ", 6: "é", 7: "2"}


@pytest.fixture(scope="module")
def infiller(byte_tokenizer):
    return Infiller(converted("llama", vocabulary=len(byte_tokenizer)), byte_tokenizer)


def filled_or_refused(infiller: Infiller, text: str, **options) -> Infill | None:
    """None: no tokens of this length match, and the error says so."""
    try:
        return infiller(text, **options)
    except ValueError as error:
        refused = str(error)
    assert "tokens match the constraint of the blank" in refused
    return None


# ---------------------------------------------------------------------- automata

PATTERNS = st.sampled_from(
    ["(ab)+", "1(a2?)*", "a*b?", "[ab]{3,5}", "1+2?", "(a|12) b", "é+a", "a{7}", ".*", "(?:a|ab)(?:b|1)*", "[^a]b"]
)


@given(regex=PATTERNS, length=st.integers(1, 4))
def test_masks_allow_exactly_what_can_still_match(regex, length):
    """Against trying every sequence of tokens."""
    automaton = Automaton(regex, TOKENS, 8)
    every = list(itertools.product(TOKENS, repeat=length))
    matching = {ids for ids in every if re.fullmatch(regex, "".join(TOKENS[i] for i in ids))}
    assert automaton.can_end(automaton.start, length) == bool(matching)
    assert (length in automaton.lengths()) == bool(matching)
    reached = [()] if matching else []
    for n in range(length):
        reached = [
            (*ids, token)
            for ids in reached
            for token in automaton.mask(automaton.walk(ids), length - n).nonzero()[:, 0].tolist()
        ]
    assert set(reached) == matching


def test_patterns_that_cannot_be():
    with pytest.raises(ValueError, match=r"the pattern '\(' cannot be used"):
        Automaton("(", TOKENS, 8)
    with pytest.raises(ValueError, match="the pattern 'zz' cannot be used"):
        Automaton("zz", TOKENS, 8)


def test_constrained_samples_are_the_renormalised_steps():
    """Masking at each step is what a constrained draw is: known probabilities, of every policy that keeps the order."""
    model, N = converted("llama", vocabulary=8), 20_000
    automaton = Automaton("(?:a|ab|b)*", TOKENS, 8)
    ids = torch.tensor([[3, 0, 0, 5, 4]])
    order = Factorization.infill(torch.tensor([[False, True, True, False, False]]))
    outcomes = torch.tensor([[3, a, b, 5, 4] for a, b in itertools.product(range(3), repeat=2)])
    with torch.no_grad():
        logits = model(outcomes, Factorization.stack([order] * 9)).logits[:, 1:3, :3].log_softmax(-1)
    exact = logits.gather(2, outcomes[:, 1:3, None]).sum((1, 2)).exp().double()
    batch = Factorization.stack([order] * N)
    for policy in (
        policies.groupwise(1),
        policies.speculative(draft="query", draft_length=1),
        policies.speculative(draft="ngram"),
    ):
        blanks = BlankConstraints([BlankConstraint(row, (1, 2), automaton) for row in range(N)], torch.Size((N, 5)))
        drawn = model.generate(
            ids.repeat(N, 1),
            batch,
            policy,
            blank_constraints=blanks,
            generator=generator(1),
            eos_token_id=(),
            temperature=1.0,
        )
        counts = torch.bincount(drawn[:, 1] * 3 + drawn[:, 2], minlength=9)
        assert drawn[:, 1:3].max() < 3
        assert p_value(counts, exact * N) > 0.01


# ---------------------------------------------------------------------- in text

REGEXES = ["[a-c ]+", "(ab|ba)*", "\\d\\d?(\\.\\d+)?", "[A-Z][a-z]*", "(yes|no|maybe)", "a b c", "[^a-z]+"]


@given(
    regexes=st.lists(st.sampled_from([*REGEXES, None]), min_size=2, max_size=2),
    lengths=st.lists(st.integers(1, 6), min_size=2, max_size=2),
    seed=st.integers(0, 10**6),
    fast=st.booleans(),
    text=st.sampled_from(["a ___ b ___.", "x___y___", "___ ___ c"]),
)
@settings(max_examples=500, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_pattern_is_met_or_refused(infiller, regexes, lengths, seed, fast, text):
    constraints = [None if regex is None else Pattern(regex) for regex in regexes]
    policy = policies.speculative(draft="query", draft_length=2) if fast else None
    filled = filled_or_refused(
        infiller,
        text,
        length=lengths,
        constraints=constraints,
        policy=policy,
        generator=generator(seed),
        temperature=2.0,
    )
    if filled is None:
        return
    for span, regex, length in zip(filled.spans, regexes, lengths, strict=True):
        assert span.tokens == length
        assert regex is None or re.fullmatch(regex, span.text), (regex, span.text)
    assert filled.text == text.replace("___", "{}").format(*(span.text for span in filled.spans))


def test_a_length_that_does_not_fit_says_which_would(infiller):
    message = r"text 0: no 2 tokens match the constraint of the blank at position 2; lengths that do: possible: 4 to 6"
    with pytest.raises(ValueError, match=message):
        infiller("x___", length=2, constraints=Pattern("[0-9]{4,6}"))


SCHEMAS = [
    {"type": "integer"},
    {"type": "boolean"},
    {"enum": ["red", "green"]},
    {"type": "string", "maxLength": 6},
    {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "boolean"}}, "required": ["a", "b"]},
    {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 3},
]


@given(schema=st.sampled_from(SCHEMAS), length=st.integers(1, 30), seed=st.integers(0, 10**6))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_json_slots_always_parse(infiller, schema, length, seed):
    options = {"length": length, "constraints": JsonSchema(schema), "generator": generator(seed)}
    filled = filled_or_refused(infiller, "x: ___, y", **options)
    if filled is None:
        return
    value = json.loads(filled.spans[0].text)
    kinds = {"integer": int, "boolean": bool, "string": str, "object": dict, "array": list}
    assert isinstance(value, kinds[schema["type"]]) if "type" in schema else value in schema["enum"]
    assert "required" not in schema or set(value) == {"a", "b"}


def test_a_schema_that_is_none(infiller):
    with pytest.raises(ValueError, match="the JSON schema not json cannot be used"):
        infiller("x ___", constraints=JsonSchema("not json"))


# ---------------------------------------------------------------------- choices


def test_choices_have_exact_renormalised_probabilities(infiller):
    options, text = ("a", "b c", "abab"), "a ___ c b"
    filled = infiller(text, constraints=Choice(*options))
    scores = []
    for option in options:
        ids = [infiller.start_token_id]
        ids += infiller.pieces.encode("a", at_start=True)
        own = infiller.pieces.encode(" " + option)
        blank = range(len(ids), len(ids) + len(own))
        ids = torch.tensor([ids + own + infiller.pieces.encode(" c b")])
        order = Factorization.infill(torch.tensor([i in blank for i in range(ids.shape[1])]))
        scores.append(infiller.model.log_likelihood(ids, order).sum())
    exact = torch.stack(scores).softmax(0)
    span = filled.spans[0]
    assert list(span.probabilities) == list(options)
    torch.testing.assert_close(torch.tensor(list(span.probabilities.values())), exact, atol=1e-5, rtol=0)
    assert sum(span.probabilities.values()) == pytest.approx(1)
    assert span.text == options[int(exact.argmax())]
    assert span.log_prob == pytest.approx(float(max(scores)), abs=1e-4)
    assert filled.text == f"a {span.text} c b"
    assert filled.forwards == 0  # of the decode loop: nothing was left to fill


def test_choices_are_drawn_with_their_probabilities(infiller):
    N, options = 1500, ("a", "b", "ab", "c")
    filled = infiller(["b ___ a"] * N, constraints=Choice(*options), generator=generator(3))
    exact = torch.tensor(list(filled[0].spans[0].probabilities.values())).double()
    counts = torch.tensor([sum(f.spans[0].text == option for f in filled) for option in options])
    from scipy.stats import chisquare

    assert chisquare(counts.numpy(), (exact / exact.sum() * N).numpy()).pvalue > 0.01


def test_choices_follow_the_sampling_options(infiller):
    text, choice = ["b ___ a"] * 400, Choice("a", "b", "ab", "c")
    likeliest = infiller(text[0], constraints=choice).spans[0]
    shares = likeliest.probabilities
    assert likeliest.text == max(shares, key=shares.get)
    for options in ({"do_sample": False, "generator": generator(1)}, {"temperature": 0.01, "generator": generator(1)}):
        assert {f.spans[0].text for f in infiller(text, constraints=choice, **options)} == {likeliest.text}
    torch.manual_seed(0)
    drawn = [f.spans[0].text for f in infiller(text, constraints=choice, temperature=3.0)]
    assert set(drawn) == set(choice.options)


def test_choices_and_other_blanks_in_one_text(infiller):
    constraints = [Pattern("[ab]+"), Choice("a", "b b b"), None]
    filled = infiller(["x ___ y ___ z ___", "___ ___ ___"], length=[2, 1, 3], constraints=constraints)
    for one in filled:
        assert re.fullmatch("[ab]+", one.spans[0].text)
        assert one.spans[1].text in ("a", "b b b")
        assert one.spans[2].tokens == 3
        for span in one.spans:
            assert one.text[span.start : span.end] == span.text
    alone = infiller("___ ___ ___", length=[2, 1, 3], constraints=constraints)
    assert alone.text == filled[1].text


# ---------------------------------------------------------------------- orders and single tokens


def test_blanks_are_filled_in_the_order_asked_for(infiller):
    # One token a letter, and one for the space in front: what is drawn can be encoded again.
    text, options = "a ___ b ___ c ___", {"length": [2, 4, 3], "constraints": Pattern("[d-z]+")}
    plain = infiller(text, **options, blank_order=[0, 1, 2])
    assert plain == infiller(text, **options)
    other = infiller(text, **options, blank_order=[2])
    assert [span.tokens for span in other.spans] == [2, 4, 3]
    assert other.log_prob != pytest.approx(plain.log_prob)
    # The last blank is drawn as if the others were not there.
    ids, where = [], []
    for piece, span in zip(("a", " b", " c"), other.spans, strict=True):
        ids += infiller.pieces.encode(piece, at_start=not ids)
        where.append(range(len(ids) + 1, len(ids) + 1 + span.tokens))
        ids += infiller.pieces.encode(" " + span.text)
    ids = torch.tensor([[infiller.start_token_id, *ids]])
    steps = [place for k in (2, 0, 1) for place in where[k]]
    given_ids = [i for i in range(ids.shape[1]) if i not in steps]
    scores = infiller.model.log_likelihood(ids, Factorization.from_groups([given_ids, *([i] for i in steps)]))[0]
    for k, span in enumerate(other.spans):
        assert float(scores[list(where[k])].sum()) == pytest.approx(span.log_prob, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blank_order": [3]}, r"blank_order must hold different numbers of blanks, 0 to 1, got \[3\]"),
        ({"blank_order": [0, 0]}, "blank_order must hold different numbers"),
        ({"blank_order": [0], "order": "random"}, "order='random' too: choose one"),
        ({"constraints": [None]}, "1 constraints for 2 blanks"),
        ({"constraints": ["a+", None]}, "a constraint is a Choice, a Pattern or a JsonSchema, got 'a[+]'"),
        ({"constraints": Pattern("[ab]+"), "group_size": 2}, "one of its tokens a step"),
        ({"constraints": Pattern("[ab]+"), "policy": policies.dynamic()}, "chooses its own order"),
        ({"suppress_tokens": [10**6]}, "suppress_tokens holds 1000000"),
    ],
)
def test_mistakes(infiller, options, message):
    with pytest.raises(ValueError, match=message):
        infiller("a ___ b ___", length=2, **options)


def test_a_choice_needs_two_strings():
    with pytest.raises(ValueError, match="at least two different strings"):
        Choice("a", "a")


def test_suppressed_tokens_do_not_come(infiller):
    first = infiller("a ___ b", length=4)
    ids = infiller.pieces.encode(" " + first.spans[0].text)
    again = infiller("a ___ b", length=4, suppress_tokens=ids)
    assert not set(ids) & set(infiller.pieces.encode(" " + again.spans[0].text))
    held = infiller("a ___ b", length=3, constraints=Pattern("[a-d]+"), suppress_tokens=infiller.pieces.encode(" a"))
    assert not held.spans[0].text.startswith("a")
