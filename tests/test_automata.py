"""Automata of patterns: their masks allow exactly what can still match, and what cannot be one is refused."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anyorder.decoding import regular_expressions
from anyorder.decoding.automata import Automaton, LeastRecentlyUsed, Restricted
from anyorder.decoding.constraints import Automata, Pattern
from decoding_runs import AUTOMATA, TOKENS

ALL_LETTERS = dict(enumerate("ab1 $^]#x\n"))
PATTERNS = st.sampled_from(
    ["(ab)+", "1(a2?)*", "a*b?", "[ab]{3,5}", "1+2?", "(a|12) b", "é+a", "a{7}", ".*", "(?:a|ab)(?:b|1)*", "[^a]b"]
)


@given(regex=PATTERNS, length=st.integers(1, 4))
def test_masks_allow_exactly_what_can_still_match(regex, length):
    """Against trying every sequence of tokens."""
    automaton = AUTOMATA.of(Pattern(regex), False, ())
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


@pytest.mark.parametrize(
    ("regex", "message"),
    [
        ("", "the pattern '' cannot be used: it is empty, and a blank holds at least one token"),
        ("^$", r"the pattern '\^\$' cannot be used: it is empty"),
        (
            "()",
            r"the pattern '\(\)' cannot be used: only the empty text matches it, and a blank holds at least one token",
        ),
        ("a(?=b)", r"the pattern 'a\(\?=b\)' cannot be used: look-around is not supported: '\(\?=' at 1"),
        ("(?<!b)a", "look-around is not supported"),
        (r"(a)\1", r"a back-reference is not supported: '\\\\1' at 3"),
        ("(?P<x>a)(?P=x)", "a back-reference is not supported"),
        (r"\ba", "word boundaries .* are not supported"),
        ("a^b", r"'\^' at 1 stands elsewhere than where the text begins"),
        ("a$b", r"'\$' at 1 stands elsewhere than where the text ends"),
        ("(^a)+", "stands elsewhere than where the text begins"),
        ("(a$)*", "stands elsewhere than where the text ends"),
        ("(", r"the pattern '\(' cannot be used: its brackets do not match"),
        ("a)(b", "its brackets do not match"),  # what is put around it must not mend it
        ("[a", "the pattern '\\[a' cannot be used: unterminated character set"),
        ("*a", "the pattern '[*]a' cannot be used: nothing to repeat"),
        ("[^\\s\\S]", "a part of it matches nothing|no text matches it"),
        ("zz", "the pattern 'zz' cannot be used: no tokens of the vocabulary match it"),
    ],
)
def test_patterns_that_cannot_be(regex, message):
    with pytest.raises(ValueError, match=message) as caught:
        Automaton(regex, TOKENS, 8)
    assert "\x00" not in str(caught.value)
    assert "x00" not in str(caught.value)
    assert "(?:" not in str(caught.value).replace(repr(regex), "")


def test_a_pattern_is_read_when_it_is_made():
    for regex in ("", "a(?=b)", None):
        with pytest.raises(ValueError, match="pattern"):
            Pattern(regex)


ANCHORED = [
    ("^a+$", "a+"), (r"\Aa+\z", "a+"), ("^a|b$", "a|b"), ("(?:^a$|^b+$)", "(?:a|b+)"), ("(^|b)a", "(|b)a"),
    ("a(b|$)", "a(b|)"), ("(?m)^ab$", "(?m)ab"), (r"[$^1]|a\$?", r"[$^1]|a\$?"), ("[]^a]+", "[]^a]+"),
    ("(?x) ^ a  b $ # an end", "ab"), ("a b # x", "a b # x"), ("(^a)?b", "(a)?b"),
]  # fmt: skip


@pytest.mark.parametrize(("regex", "same"), ANCHORED)
def test_anchors_at_the_ends_mean_what_they_say(regex, same):
    one, two = Automaton(regex, ALL_LETTERS, len(ALL_LETTERS)), Automaton(same, ALL_LETTERS, len(ALL_LETTERS))
    for n in range(1, 4):
        for ids in itertools.product(ALL_LETTERS, repeat=n):
            first, second = one.walk(ids), two.walk(ids)
            matches = re.fullmatch(regex.replace(r"\z", r"\Z"), "".join(ALL_LETTERS[i] for i in ids)) is not None
            assert (first is not None and one.can_end(first, 0)) == matches
            assert (second is not None and two.can_end(second, 0)) == matches


def test_a_monster_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="its automaton has more than 16,384 states; repeat less"):
        Automaton("[ab]*a[ab]{14}", TOKENS, 8)
    monkeypatch.setattr(regular_expressions, "COMPILER_MEMORY", 2**28)
    monkeypatch.setattr(regular_expressions, "COMPILER_SECONDS", 1)
    with pytest.raises(ValueError, match=r"takes more than 1 seconds or 0\.25 GiB of memory; repeat less"):
        Automaton("[ab]*a[ab]{40}", TOKENS, 8)
    monkeypatch.setattr("anyorder.decoding.automata.MAX_PAIRS", 50)
    with pytest.raises(ValueError, match="its automaton has more than 50 pairs of states"):
        Automaton("[ab1]{40}", TOKENS, 8)


def test_nothing_is_stored_a_token():
    """Every token leads on from each of 32 states; what is stored is which states follow which."""
    letters = {i: "".join(word) for i, word in enumerate(itertools.product("abcdef", repeat=5))}
    automaton = Automaton("[a-z]{5,160}", letters, len(letters), kept=LeastRecentlyUsed(0))
    edges = sum(len(automaton.row(state)[0]) for state in automaton.states.tolist())
    assert edges == 32 * len(letters)
    assert automaton.size < 2 * edges
    held = [value for value in vars(automaton).values() if isinstance(value, dict | list)]
    assert max(map(len, held)) <= 2
    assert automaton.lengths() == list(range(1, 33))


def test_what_is_kept_is_bounded_in_bytes():
    kept = LeastRecentlyUsed(100)
    for key, size in (("a", 40), ("b", 40), ("a", 50), ("c", 40)):
        kept.put(key, key, size)
    assert (kept.get("a"), kept.get("b"), kept.get("c"), kept.size) == ("a", None, "c", 90)
    kept.get("a")
    kept.put("d", "d", 50)  # c was asked for longer ago
    assert (kept.get("a"), kept.get("c"), kept.size) == ("a", None, 100)
    kept.put("e", "e", 101)
    assert (kept.get("e"), kept.size) == (None, 100)


def test_automata_that_were_not_used_for_long_are_made_anew():
    automata = Automata(lambda: TOKENS, 8, limit=20_000)
    first = automata.of(Pattern("a+"), False, ())
    assert automata.of(Pattern("a+"), False, ()) is first
    assert automata.of(Pattern("a+"), False, (7,)) is not first
    for n in range(1, 8):
        automata.of(Pattern(f"[ab]{{{n}}}"), True, ()).mask(0, 1)
    assert automata.kept.size <= 20_000
    again = automata.of(Pattern("a+"), False, ())
    assert again is not first
    assert torch.equal(again.mask(again.start, 2), first.mask(first.start, 2))


def test_the_time_to_compile_is_told(caplog):
    with caplog.at_level("DEBUG", logger="anyorder"):
        Automaton("[ab]{3}", TOKENS, 8)
    assert re.search(r"the pattern '\[ab\]\{3\}': \d+ states of bytes in [\d.]+ s", caplog.text)


def test_tokens_may_hold_a_part_of_a_character():
    automaton = Automaton("é+", {0: b"\xc3", 1: b"\xa9", 2: "é", 3: b"\xa9\xc3"}, 4)
    matching = {ids for n in (1, 2, 3) for ids in itertools.product(range(4), repeat=n)}
    matching = {ids for ids in matching if (s := automaton.walk(ids)) is not None and automaton.can_end(s, 0)}
    assert matching == {(2,), (0, 1), (2, 2), (0, 1, 2), (2, 0, 1), (0, 3, 1), (2, 2, 2)}


@given(regex=PATTERNS, sets=st.lists(st.one_of(st.none(), st.sets(st.integers(0, 7))), min_size=1, max_size=4))
@settings(max_examples=100)
def test_restricted_automata_allow_exactly_what_can_still_match(regex, sets):
    masks = [None if own is None else torch.tensor([i in own for i in range(8)]) for own in sets]
    automaton = Restricted(AUTOMATA.of(Pattern(regex), False, ()), masks)
    n = len(sets)
    choices = [TOKENS if own is None else own for own in sets]
    matching = {ids for ids in itertools.product(*choices) if re.fullmatch(regex, "".join(TOKENS[i] for i in ids))}
    assert automaton.can_end(automaton.start, n) == bool(matching)
    assert automaton.lengths() == [n] * bool(matching)
    reached = [()] if matching else []
    for k in range(n):
        reached = [
            (*ids, token)
            for ids in reached
            for token in automaton.mask(automaton.walk(ids), n - k).nonzero()[:, 0].tolist()
        ]
    assert set(reached) == matching
