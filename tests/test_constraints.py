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
from anyorder.decoding import regular_expressions
from anyorder.decoding.automata import Automaton
from anyorder.decoding.constraints import BlankConstraint, BlankConstraints, Choice, JsonSchema, Pattern
from anyorder.decoding.sampling import AllowedTokens
from anyorder.infill.infiller import Infill
from architectures import converted, coupled
from decoding_runs import AUTOMATA, TOKENS, generator, p_value


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


def test_constrained_samples_are_the_renormalised_steps():
    """Masking at each step is what a constrained draw is: known probabilities, of every policy that keeps the order."""
    model, N = converted("llama", vocabulary=8), 4000
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


@pytest.mark.parametrize("make", [converted, coupled])
def test_a_pattern_inside_one_group_is_drawn_step_by_step(make):
    """The automaton advances from member to member: each takes what can still match behind those before it."""
    model, N = make("llama", vocabulary=8), 6000
    automaton = AUTOMATA.of(Pattern("(?:a|ab)(?:a|b)(?:a|ab|b)|b(?:ab|b)(?:a|b)"), False, ())
    order = Factorization.infill(torch.tensor([[False, True, True, True, False]]), group_size=3)
    outcomes = torch.tensor([[3, *ids, 4] for ids in itertools.product(range(8), repeat=3)])
    log_p = torch.zeros(len(outcomes), dtype=torch.float64)
    with torch.no_grad():
        logits = model(outcomes, Factorization.stack([order] * len(outcomes))).logits.double()
    for n, ids in enumerate(outcomes[:, 1:4].tolist()):
        for k in range(3):
            state = automaton.walk(ids[:k])
            mask = automaton.mask(state, 3 - k) if state is not None else torch.zeros(8, dtype=torch.bool)
            own = logits[n, 1 + k].masked_fill(~mask, -torch.inf)
            log_p[n] += own.log_softmax(-1)[ids[k]] if mask[ids[k]] else -torch.inf
    exact = log_p.exp()
    assert float(exact.sum()) == pytest.approx(1, abs=1e-6)
    blanks = BlankConstraints([BlankConstraint(row, (1, 2, 3), automaton) for row in range(N)], torch.Size((N, 5)))
    drawn = model.generate(
        torch.tensor([[3, 0, 0, 0, 4]]).repeat(N, 1),
        Factorization.stack([order] * N),
        blank_constraints=blanks,
        generator=generator(1),
        eos_token_id=(),
        temperature=1.0,
    )
    counts = torch.bincount(drawn[:, 1] * 64 + drawn[:, 2] * 8 + drawn[:, 3], minlength=512)
    assert p_value(counts, exact * N) > 0.01


# ---------------------------------------------------------------------- with allowed tokens

POLICIES = {
    "one at a time": None,
    "query drafts": policies.speculative(draft="query", draft_length=2),
    "n-gram drafts": policies.speculative(draft="ngram"),
}


def constrained(regex: str, allowed: list[set[int]], rows: int = 1, **options):
    """Row 0 of a batch, columns 1 to 3, filled from the tokens of `allowed` so that they match."""
    model = converted("llama", vocabulary=8)
    order = Factorization.infill(torch.tensor([[False, True, True, True, False]] * rows))
    masks = torch.tensor([[True] * 8, *([i in own for i in range(8)] for own in allowed)])
    index = torch.zeros(rows, 5, dtype=torch.int64)
    index[:, 1:4] = torch.tensor([1, 2, 3])
    automaton = AUTOMATA.of(Pattern(regex), False, ())
    blanks = BlankConstraints([BlankConstraint(row, (1, 2, 3), automaton) for row in range(rows)], index.shape)
    return model.generate(
        torch.tensor([[3, 0, 0, 0, 4]] * rows), order, allowed_tokens=AllowedTokens(masks, index),
        blank_constraints=blanks, eos_token_id=(), **options,
    )  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("sampling", [{}, {"temperature": 2.0}], ids=["greedy", "sampling"])
def test_what_is_allowed_can_still_match(policy, sampling):
    """Only 1 2 may end, so a must come before: masks of each alone would let b in and leave nothing to draw."""
    options = {"policy": POLICIES[policy], **sampling, **({"generator": generator(0)} if sampling else {})}
    drawn = constrained("(?:a[ab]1|b[ab]2)", [{0, 1}, {0, 1}, {3, 4}], rows=20, **options)
    assert set(drawn[:, 1].tolist()) == {0}
    assert set(drawn[:, 3].tolist()) == {3}
    assert set(drawn[:, 2].tolist()) <= {0, 1}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("sampling", [{}, {"temperature": 2.0}], ids=["greedy", "sampling"])
def test_what_excludes_each_other_is_refused_before_decoding(policy, sampling, monkeypatch):
    monkeypatch.setattr("anyorder.decoding.engine.Run.steps_of", lambda *_: pytest.fail("decoding began"))
    for allowed in ([{3}, {0, 1}, {0}], [{0, 1}, {0}, {4}], [{1}, {0}, {3}]):
        with pytest.raises(
            ValueError, match="text 0: the constraint of the blank at position 1 and its allowed tokens"
        ):
            constrained("(?:a[ab]1|b[ab]2)", allowed, policy=POLICIES[policy], **sampling)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("sampling", [{}, {"temperature": 2.0}], ids=["greedy", "sampling"])
def test_where_nothing_is_left_to_draw_row_and_position_are_named(policy, sampling, monkeypatch):
    """An automaton that promised more than it keeps stands for whatever may leave no token."""
    order, shape = Factorization.infill(torch.tensor([[False, True, True, False]] * 2)), torch.Size((2, 4))
    automaton = AUTOMATA.of(Pattern("[ab]{2}"), False, ())
    monkeypatch.setattr(automaton, "mask", lambda *_: torch.zeros(8, dtype=torch.bool))
    blanks = BlankConstraints([BlankConstraint(1, (1, 2), automaton)], shape)
    ids, options = torch.ones(2, 4, dtype=torch.int64), {"policy": POLICIES[policy], "eos_token_id": ()}
    with pytest.raises(ValueError, match="row 1, position 1: no token is left to draw; allowed tokens, constraints"):
        converted("llama", vocabulary=8).generate(ids, order, blank_constraints=blanks, **options, **sampling)
    AUTOMATA.kept.put((Pattern("[ab]{2}"), False, frozenset()), None, 0)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("sampling", [{}, {"temperature": 2.0}], ids=["greedy", "sampling"])
def test_drafts_that_cannot_end_in_time_stop_nothing(policy, sampling):
    """A draft is drawn before its left neighbours are known, and may lead where the rest of the blank is too short."""
    model, N = converted("llama", vocabulary=8), 50
    order = Factorization.stack([Factorization.infill(torch.tensor([False, *[True] * 6, False]))] * N)
    automaton = AUTOMATA.of(Pattern("(?:a|bbb|12a1)+2"), False, ())
    blanks = BlankConstraints([BlankConstraint(row, tuple(range(1, 7)), automaton) for row in range(N)], (N, 8))
    options = {"policy": POLICIES[policy], "eos_token_id": (), **sampling}
    if sampling:
        options["generator"] = generator(1)
    drawn = model.generate(torch.ones(N, 8, dtype=torch.int64), order, blank_constraints=blanks, **options)
    for row in drawn[:, 1:7].tolist():
        assert re.fullmatch("(?:a|bbb|12a1)+2", "".join(TOKENS[i] for i in row))


def test_infiller_masks_and_patterns_go_together(infiller):
    """Special tokens are no text of a pattern, and what is suppressed stays out of it."""
    a = infiller.pieces.encode("a")
    filled = infiller("x___", length=3, constraints=Pattern(".*"), special_tokens=True, suppress_tokens=a)
    assert filled.spans[0].tokens == 3
    assert not set(filled.spans[0].ids) & {*a, 0, 1, 2}
    with pytest.raises(ValueError, match="no tokens of the vocabulary that are not suppressed match it"):
        infiller("x___", length=3, constraints=Pattern("a+"), suppress_tokens=[*a, *infiller.pieces.encode(" a")])


# ---------------------------------------------------------------------- in text

REGEXES = ["[a-c ]+", "(ab|ba)*", "[0-9][0-9]?(\\.[0-9]+)?", "[A-Z][a-z]*", "(yes|no|maybe)", "a b c", "[^a-z]+"]


@given(
    regexes=st.lists(st.sampled_from([*REGEXES, None]), min_size=2, max_size=2),
    lengths=st.lists(st.integers(1, 6), min_size=2, max_size=2),
    seed=st.integers(0, 10**6),
    fast=st.booleans(),
    text=st.sampled_from(["a ___ b ___.", "x___y___", "___ ___ c"]),
)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_json_slots_always_parse(infiller, schema, length, seed):
    options = {"length": length, "constraints": JsonSchema(schema), "generator": generator(seed)}
    filled = filled_or_refused(infiller, "x: ___, y", **options)
    if filled is None:
        return
    value = json.loads(filled.spans[0].text)
    kinds = {"integer": int, "boolean": bool, "string": str, "object": dict, "array": list}
    assert isinstance(value, kinds[schema["type"]]) if "type" in schema else value in schema["enum"]
    assert "required" not in schema or set(value) == {"a", "b"}


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("not json", "the JSON schema not json cannot be used: it is no JSON"),
        ({"a": {1, 2}}, "cannot be used: it is no JSON"),
        ({"enum": []}, r'the JSON schema {"enum": \[\]} cannot be used: '),
        ({"type": "banana"}, r'the JSON schema {"type": "banana"} cannot be used: '),
        ({"type": "string", "minLength": 4, "maxLength": 2}, r'the JSON schema {"type": "string".* cannot be used: '),
        ({"type": "string", "pattern": "a(?=b)"}, r"the JSON schema .* cannot be used: "),
        ({"type": "string", "minLength": 20_000}, "the JSON schema .* cannot be used: .*; repeat less"),
    ],
)
def test_schemas_that_cannot_be(infiller, schema, message, monkeypatch):
    monkeypatch.setattr(regular_expressions, "COMPILER_SECONDS", 2)
    with pytest.raises(ValueError, match=message) as caught:
        infiller("x ___", length=2, constraints=JsonSchema(schema))
    assert str(caught.value).count("cannot be used") == 1


# ---------------------------------------------------------------------- choices


def test_choices_have_exact_likelihoods(infiller):
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
    span = filled.spans[0]
    assert list(span.probabilities) == list(options)
    assert list(span.log_probs_given_length) == list(options)
    assert list(span.log_probs_given_length.values()) == pytest.approx(torch.stack(scores).tolist(), abs=1e-4)
    assert sum(span.probabilities.values()) == pytest.approx(1)
    assert span.text == max(options, key=span.probabilities.__getitem__)
    assert span.log_prob == span.log_probs_given_length[span.text]
    assert filled.text == f"a {span.text} c b"
    assert filled.forwards == 2  # one for the lengths, one for the strings: nothing was left to fill


def test_choices_are_drawn_with_their_probabilities(infiller):
    N, options = 400, ("a", "b", "ab", "c")
    filled = infiller(["b ___ a"] * N, constraints=Choice(*options), generator=generator(3))
    exact = torch.tensor(list(filled[0].spans[0].probabilities.values())).double()
    counts = torch.tensor([sum(f.spans[0].text == option for f in filled) for option in options])
    from scipy.stats import chisquare

    assert chisquare(counts.numpy(), (exact / exact.sum() * N).numpy()).pvalue > 0.01


def test_choices_follow_the_sampling_options(infiller):
    text, choice = ["b ___ a"] * 100, Choice("a", "b", "ab", "c")
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
    # One token a letter; no token holds a space and such a letter, so the space in front is fixed text.
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
        where.append(range(len(ids) + 2, len(ids) + 2 + span.tokens))
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
        ({"constraints": Pattern("[ab]+"), "order": "random"}, "filled from left to right; choose order="),
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
