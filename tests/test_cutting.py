"""Documents are cut from a text as by the plain definition, however long the text and small the pieces."""

from __future__ import annotations

import bisect
import re
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("datasets", reason="training needs the train extra")

from anyorder.infill.encoding import Blanks
from anyorder.infill.pieces import Pieces
from anyorder.infill.template import Template
from anyorder.training import cutting

SENTENCE = re.compile(r"(?<=[.!?])[\"'”’)\]]*\s+(?=[\"'“‘(\[]?[A-Z0-9])")


def slow_twin(text, tokenizer, max_length, start):
    """The definition: the whole text tokenized at once, every sentence start looked at for every document."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], [begin for begin, _ in encoded["offset_mapping"]]
    marks = [0] + [match.end() for match in SENTENCE.finditer(text)]

    def first_token(mark):
        index = bisect.bisect_left(offsets, mark)
        before = 0 < index <= len(offsets) and offsets[index - 1] == mark - 1 and text[mark - 1].isspace()
        return index - 1 if before else index

    starts = sorted({first_token(mark) for mark in marks} - {len(ids)})
    begin = 0
    while begin < len(ids):
        end = min(begin + max_length - 1, len(ids))
        inside = [s for s in starts if begin < s <= end]
        if end < len(ids) and inside:
            end = inside[-1]
        yield [start, *ids[begin:end]], [s - begin + 1 for s in starts if begin <= s < end]
        begin = end


TEXTS = st.lists(
    st.one_of(
        st.sampled_from(["ab", "a", " ", ". ", ".\n", "\n\n", "! ", 'a." ', "The", " T", "é", "日本。", "  ", "7 "]),
        st.text(alphabet='ab .!?\n"”)(TZé日\t1', max_size=6),
    ),
    max_size=40,
).map("".join)  # fmt: skip


@pytest.mark.parametrize("kind", ["byte_tokenizer", "space_adding_tokenizer"])
def test_documents_are_those_of_the_plain_definition(kind, request, monkeypatch):
    tokenizer = request.getfixturevalue(kind)
    monkeypatch.setattr(cutting, "PIECE", 10)
    monkeypatch.setattr(cutting, "TOGETHER", 25)
    parted = set()

    @given(st.lists(TEXTS, max_size=3), st.integers(2, 20))
    def check(texts, max_length):
        expected = [document for text in texts for document in slow_twin(text, tokenizer, max_length, 1)]
        found = list(cutting.cut(texts, tokenizer, max_length, 1))
        assert [(document.ids.tolist(), document.sentence_starts) for document in found] == expected
        parted.update(len(list(cutting._pieces(text, tokenizer))) > 1 for text in texts)

    check()
    assert parted == {False, True}  # else nothing was put together


@pytest.mark.parametrize("kind", ["byte_tokenizer", "space_adding_tokenizer"])
def test_blanks_are_tokenized_as_an_infill_meets_them(kind, request):
    tokenizer = request.getfixturevalue(kind)
    pieces = Pieces(tokenizer)

    @given(st.lists(TEXTS.filter(bool), min_size=2, max_size=6), st.integers(2, 40), st.booleans())
    def check(parts, max_length, first_is_blank):
        text = "".join(parts)
        ends = [len("".join(parts[: k + 1])) for k in range(len(parts))]
        ranges = list(zip([0, *ends[:-1]], ends, strict=True))[not first_is_blank :: 2]
        around = [
            text[a:b] for a, b in zip([0, *(b for _, b in ranges)], [a for a, _ in ranges] + [len(text)], strict=True)
        ]
        template = Template(tuple(around))
        asked = Blanks(pieces, [])
        own = [asked.encode_fill(template, k, text[a:b]) for k, (a, b) in enumerate(ranges)]
        expected = asked.encode(template, [len(ids) for ids in own], {})
        found = list(cutting.cut_around(text, ranges, pieces, max_length, 1))
        assert all(document.ids[0] == 1 and len(document.ids) <= max_length for document in found)
        assert [i for document in found for i in document.ids[1:].tolist()] == [
            i if k < 0 else own[k].pop(0) for i, k in zip(expected.ids, expected.blank, strict=True)
        ]
        blank = [any(a <= i < b for a, b in d.blanks) for d in found for i in range(1, len(d.ids))]
        assert blank == [k >= 0 for k in expected.blank]

    check()


def test_a_line_end_does_not_grow_together_with_a_blank_before_it(byte_tokenizer):
    (document,) = cutting.cut_around("cab ab", [(1, 2), (4, 5)], Pieces(byte_tokenizer), 40, 1)
    parts = ["c", "a", "b", " a", "b"]  # canonically "ab" is one token
    assert [byte_tokenizer.decode([i]) for i in document.ids[1:]] == parts
    assert [parts[a - 1 : b - 1] for a, b in document.blanks] == [["a"], [" a"]]


@pytest.mark.parametrize(
    "blank", [[[2, 2]], [[3, 1]], [[0, 9]], [[-1, 2]], [[0, 2], [2, 3]], [[2, 3], [0, 1]], [3], "ab"]
)
def test_blanks_that_are_none_are_named(blank, byte_tokenizer):
    with pytest.raises(ValueError, match=r"blanks must be .* of a text of 4 characters; got "):
        list(cutting.cut_around("abcd", blank, Pieces(byte_tokenizer), 40, 1))


def lines_run(function, file):
    """How many lines of a file a call runs, those of comprehensions each time anew."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        count += event == "line"
        return trace if frame.f_code.co_filename == file else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return count


def test_a_long_text_costs_no_more_a_character_than_a_short_one(byte_tokenizer, monkeypatch):
    """Work is counted, not timed: lines run, and characters that the tokenizer reads."""
    monkeypatch.setattr(cutting, "PIECE", 256)
    read, encode = [], cutting._encode

    def counted(tokenizer, texts):
        read.append(sum(map(len, texts)))
        return encode(tokenizer, texts)

    monkeypatch.setattr(cutting, "_encode", counted)
    lines = []
    for length in (100, 1000):
        read.clear()
        text = "A b c. Ab ab? " * length
        lines.append(lines_run(lambda text=text: list(cutting.cut([text], byte_tokenizer, 16, 1)), cutting.__file__))
        assert len(text) <= sum(read) < 4 * len(text)
    assert lines[1] < 11 * lines[0]
