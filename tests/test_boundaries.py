from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anyorder.infill.boundaries import Edges, FillAutomaton, position_masks
from anyorder.infill.pieces import Pieces
from anyorder.infill.token_bytes import DEAD, STATES, WHOLE, TokenBytes

WHITESPACE = b" \t\n\r\v\f"


@pytest.fixture(scope="module")
def tokens(byte_tokenizer) -> TokenBytes:
    return TokenBytes(Pieces(byte_tokenizer), len(byte_tokenizer))


@pytest.fixture(scope="module")
def few(tokens) -> torch.Tensor:
    """Tokens of every kind: parts of characters of two, three and four bytes and of U+FFFD, whitespace, words."""
    wanted = [bytes([byte]) for byte in b" \ta\xc3\xa9\xe6\x97\xf0\x9f\x8e\x89\xef\xbf\xbd"] + [b" a", b"ab"]
    return torch.tensor([data in wanted for data in tokens.bytes])


def is_text(data: bytes) -> bool:
    try:
        return "\ufffd" not in data.decode()
    except UnicodeDecodeError:
        return False


@given(st.binary(max_size=6) | st.text(max_size=3).map(str.encode))
def test_a_text_is_whole_where_python_can_decode_it(tokens, data):
    state = WHOLE
    for byte in data:
        state = int(tokens.steps[state, tokens.bytes.index(bytes([byte]))])
        if state == DEAD:
            break
    assert (state == WHOLE) == is_text(data)


def test_a_character_of_every_size_is_whole_and_no_surrogate_is(tokens):
    for number in (0x7F, 0x80, 0x7FF, 0x800, 0xFFFC, 0xFFFE, 0x10000, 0x10FFFF, 0xD7FF, 0xE000):
        state = WHOLE
        for byte in chr(number).encode():
            state = int(tokens.steps[state, tokens.bytes.index(bytes([byte]))])
        assert state == WHOLE, hex(number)
    surrogate, state = chr(0xD800).encode("utf-8", "surrogatepass"), WHOLE
    for byte in surrogate[:2]:
        state = int(tokens.steps[state, tokens.bytes.index(bytes([byte]))])
    assert state == DEAD
    assert tokens.steps.shape == (STATES, tokens.size)


EDGES = [Edges(space, begins or space, ends, lone)
         for space, begins, ends, lone in itertools.product([False, True], repeat=4)]  # fmt: skip


def fits(edges: Edges, data: bytes) -> bool:
    """The rules as the documentation puts them."""
    if edges.brings_space:
        if data[:1] != b" " or len(data) == 1:
            return False
        data = data[1:]
    return (
        is_text(data)
        and not (edges.begins and data[:1] in [bytes([byte]) for byte in WHITESPACE])
        and not (edges.ends and data[-1:] in (b" ", b"\t"))
    )


def spelled(tokens: TokenBytes, ids) -> bytes:
    return b"".join(tokens.bytes[i] for i in ids)


@pytest.mark.parametrize("edges", EDGES, ids=str)
def test_the_automaton_allows_exactly_what_fits(tokens, few, edges):
    automaton = FillAutomaton(tokens, edges, few)
    for length in (1, 2, 3):
        ways = [()]
        for remaining in range(length, 0, -1):
            ways = [
                (*way, token)
                for way in ways
                for token in automaton.mask(automaton.walk(way), remaining).nonzero()[:, 0].tolist()
            ]
        every = itertools.product(few.nonzero()[:, 0].tolist(), repeat=length)
        expected = {way for way in every if fits(edges, spelled(tokens, way))}
        assert set(ways) == expected
        assert automaton.can_end(automaton.start, length) == bool(expected)
        assert (length in automaton.lengths()) == bool(expected)


@pytest.mark.parametrize("edges", EDGES, ids=str)
def test_positions_by_themselves_fit_whatever_their_neighbours_are(tokens, few, edges):
    for length in (1, 2, 3):
        masks = position_masks(tokens, edges, length, few)
        ways = list(itertools.product(*(mask.nonzero()[:, 0].tolist() for mask in masks)))
        assert ways
        for way in ways:
            data = spelled(tokens, way)
            if edges.brings_space and edges.lone_space and tokens.bytes[way[0]] == b" ":
                data = b" " + data[1:].lstrip()  # the one thing that such a position cannot know
                assert len(data) == 1 or fits(edges, data)
            else:
                assert fits(edges, data)


def test_what_does_not_lead_on_leads_nowhere(tokens, few):
    automaton = FillAutomaton(tokens, Edges(False, False, False, False), few)
    part, letter = tokens.bytes.index(b"\xc3"), tokens.bytes.index(b"a")
    assert automaton.walk([part, letter]) is None
    assert automaton.walk([part]) is not None
    assert not automaton.can_end(automaton.walk([part]), 0)
    assert automaton.walk([]) == automaton.start


@pytest.mark.parametrize(
    ("before", "behind", "at_start", "expected"),
    [
        ("a ", " b", False, Edges(True, True, True, True)),
        ("a  ", "b", False, Edges(True, True, False, False)),
        ("a\n    ", "\n", False, Edges(True, True, False, False)),
        (" ", "", False, Edges(True, True, False, True)),
        ("a\n", "\tb", False, Edges(False, False, True, False)),
        ("a\t", "", False, Edges(False, True, False, True)),
        ("", "", True, Edges(False, True, False, True)),
        ("", "", False, Edges(False, False, False, True)),
    ],
)
def test_what_stands_beside_a_blank(before, behind, at_start, expected):
    found = Edges.between(before, behind, at_start, expected.brings_space)
    assert (found.brings_space, found.begins, found.ends) == (expected.brings_space, expected.begins, expected.ends)
    assert found.lone_space == expected.lone_space or not found.brings_space
