from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyorder.infill.template import BLANK, Template

any_text = st.text(max_size=30)


@given(any_text | st.none() | st.integers(), st.text(max_size=3) | st.none())
def test_the_blank_parser_never_fails_with_anything_but_a_value_error(text, blank):
    try:
        template = Template.parse(text, blank)
    except ValueError:
        return
    assert blank == BLANK or blank.join(template.pieces) == text


@given(st.lists(any_text, min_size=2, max_size=5), st.data())
def test_fixed_text_comes_back_and_spans_point_at_the_fills(pieces, data):
    template = Template(tuple(pieces))
    fills = [data.draw(any_text) for _ in range(template.blanks)]
    text, spans = template.fill(fills)
    assert [text[start:end] for start, end in spans] == fills
    for (_, end), (start, _), piece in zip([(0, 0), *spans], [*spans, (len(text), 0)], template.pieces, strict=True):
        assert text[end:start] == piece


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("a ___ b", ("a ", " b")),
        ("______", ("", "")),
        ("_____ a ____", ("", " a ", "")),
        ("___ ___", ("", " ", "")),
        ("__init__(___)", ("__init__(", ")")),
    ],
)
def test_a_run_of_underscores_is_one_blank(text, pieces):
    assert Template.parse(text).pieces == pieces
    other = text.replace("_", "~")  # another marker is taken as it is
    assert Template.parse(other, "~~~").pieces == tuple(other.split("~~~"))
