from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from anyorder import Infiller, policies
from anyorder.decoding.constraints import Pattern
from anyorder.infill.boundaries import Edges, FillAutomaton
from anyorder.infill.infiller import Infill
from anyorder.infill.pieces import Pieces
from anyorder.infill.template import Template
from architectures import converted

any_text = st.text(max_size=30)
WHITESPACE = tuple(" \t\n\r\v\f")


@pytest.fixture(scope="module")
def infiller(byte_tokenizer: PreTrainedTokenizerFast) -> Infiller:
    return Infiller(converted("llama", vocabulary=len(byte_tokenizer)), byte_tokenizer)


TEXTS = [
    "___",
    "a ___",
    "___ b",
    "a ___ b ___ c",
    " ___ ",
    "a  ___",
    "a\n___\r\nb\r___",
    "______",
    "Grüße 🎉 ___ 👩‍👩‍👧 ___ ñ\u0301",
    "def f(x):\r\n\treturn ___\r\n",
    "a ___ ___ ___ ___ b",
    "<s> ___ </s>",
]


def fixed_pieces(text: str, spans) -> str:
    for span in reversed(spans):
        text = text[: span.start] + "___" + text[span.end :]
    return text


@pytest.mark.parametrize("order", ["left_to_right", "random"])
@pytest.mark.parametrize("text", TEXTS)
def test_fixed_text_comes_back_byte_for_byte(infiller, text, order):
    result = infiller(text, length=3, order=order, generator=torch.Generator().manual_seed(0))
    template = Template.parse(text)
    assert Template.parse(fixed_pieces(result.text, result.spans)) == template
    assert len(result.spans) == template.blanks
    for span in result.spans:
        assert result.text[span.start : span.end] == span.text
        assert span.tokens == 3
        assert span.log_prob < 0
    assert result.log_prob == pytest.approx(sum(span.log_prob for span in result.spans))


@settings(max_examples=12)
@given(st.lists(any_text.filter(lambda s: "_" not in s), min_size=2, max_size=4))
def test_any_fixed_text_comes_back(infiller, pieces):
    text = "___".join(pieces)
    try:
        result = infiller(text, length=1)
    except ValueError as error:
        assert "context" in str(error)  # noqa: PT017
        return
    assert Template.parse(fixed_pieces(result.text, result.spans)) == Template.parse(text)


def test_a_batch_is_each_text_alone(infiller):
    texts = ["a ___ b", "___", "x ___ y ___ zzzzzz"]
    greedy = infiller(texts, length=2)
    for text, result in zip(texts, greedy, strict=True):
        alone = infiller(text, length=2)
        assert alone.text == result.text
        assert alone.log_prob == pytest.approx(result.log_prob, abs=1e-4)
    generators = [torch.Generator().manual_seed(b) for b in range(3)]
    drawn = infiller(texts, length=2, generator=generators)
    for b, text in enumerate(texts):
        assert infiller(text, length=2, generator=[torch.Generator().manual_seed(b)]).text == drawn[b].text
    for one in (True, False):
        options = {"length": 2, "order": "random", "do_sample": one}
        drawn = infiller(texts, generator=torch.Generator().manual_seed(5), **options)
        first = infiller(texts[0], generator=torch.Generator().manual_seed(5), **options)
        assert first.text == drawn[0].text
        assert first.log_prob == pytest.approx(drawn[0].log_prob, abs=1e-4)


def test_lengths_by_blank(infiller):
    result = infiller("a ___ b ___", length=[1, 4], group_size=2, policy=policies.groupwise())
    assert [span.tokens for span in result.spans] == [1, 4]
    assert result.forwards == 3


def filled(infiller: Infiller, text: str, draws: int, **options) -> list[Infill]:
    """Draws in every kind of order."""
    orders = (
        {},
        {"policy": policies.speculative(draft_length=2)},
        {"group_size": 2},
        {"order": "random"},
        {"policy": policies.dynamic("entropy", step_size=2)},
    )
    return [
        found
        for seed, order in enumerate(orders)
        for found in infiller(
            [text] * draws, length=5, generator=torch.Generator().manual_seed(seed), **order, **options
        )
    ]


@pytest.mark.parametrize(
    "text",
    ["def f(x):\n    ___\n    return y", "a  ___ b", "a\t___\tb", "x = ___ ", "\t ___ ___\n___", "a ___\r\n\t___"],
)
def test_whitespace_beside_a_blank_is_what_the_user_wrote(infiller, byte_tokenizer, text):
    template = Template.parse(text)
    for found in filled(infiller, text, 2):
        assert Template.parse(fixed_pieces(found.text, found.spans)) == template
        assert byte_tokenizer.decode(found.ids) == found.text
        for span, before, behind in zip(found.spans, template.pieces, template.pieces[1:], strict=False):
            # A number may take a token that is the space alone; in an order that does not read it, so may a space.
            alone = byte_tokenizer.decode(span.ids[:1]) == " "
            if before[-1:] in (" ", "\t") and not (alone and before[-2:-1] not in (" ", "\t", "\n")):
                assert not span.text.startswith(WHITESPACE)
            if behind[:1] in (" ", "\t"):
                assert span.text[-1:] not in (" ", "\t")
            brought = byte_tokenizer.decode(span.ids).removesuffix(span.text)
            assert brought == (" " if before.endswith(" ") else "")


def test_from_left_to_right_the_space_is_never_doubled(infiller):
    for seed in range(3):
        options = {"length": 2, "generator": torch.Generator().manual_seed(seed)}
        for found in infiller(["a ___b"] * 30, **options):
            assert not found.spans[0].text.startswith(WHITESPACE)


@pytest.mark.parametrize("text", ["日本の首都は___です。", "___", "é___🎉___", "a ___ b"])
def test_no_fill_begins_or_ends_inside_a_character(infiller, byte_tokenizer, text):
    for found in filled(infiller, text, 4, single_line=False):
        assert "\ufffd" not in found.text
        assert byte_tokenizer.decode(found.ids) == found.text


def test_characters_of_several_tokens_are_filled_from_left_to_right_alone(infiller, byte_tokenizer):
    generators = [torch.Generator().manual_seed(seed) for seed in range(60)]
    for size in (1, 2):  # the members of a group are drawn in turn
        drawn = infiller(["___"] * 60, length=4, group_size=size, generator=generators)
        assert any(ord(letter) > 0x7F for found in drawn for letter in found.text)
        assert all(byte_tokenizer.decode(found.ids) == found.text for found in drawn)
    anywhere = infiller(["___"] * 60, length=4, policy=policies.dynamic(), generator=generators)
    assert all(ord(letter) < 0x80 for found in anywhere for letter in found.text)


def test_a_greedy_fill_is_the_likeliest_allowed_token_at_each_step(infiller):
    """What may follow is known token by token: nothing else about the distribution changes."""
    model, found = infiller.model, infiller("ab___", length=4)
    ids = torch.tensor([[infiller.start_token_id, *found.ids]])
    automaton = FillAutomaton(infiller.token_bytes, Edges(False, False, False, False), single_line(infiller))
    with torch.no_grad():
        logits = model(ids).logits[0]
    for n in range(4):
        own = [int(token) for token in found.spans[0].ids[:n]]
        mask = automaton.mask(automaton.walk(own), 4 - n)
        column = ids.shape[1] - 4 + n
        assert int(logits[column].masked_fill(~mask, -torch.inf).argmax()) == int(ids[0, column])


def single_line(infiller: Infiller) -> torch.Tensor:
    return infiller.token_bytes.is_text & ~infiller.token_bytes.breaks_line


def test_a_text_without_line_ends_gets_none_unless_asked(infiller):
    def ends(found: list[Infill]) -> int:
        return sum(span.text.count("\n") + span.text.count("\r") for one in found for span in one.spans)

    assert not ends(filled(infiller, "a ___b", 20))
    assert ends(filled(infiller, "a ___b", 20, single_line=False))
    assert ends(filled(infiller, "a\n___b", 20))
    assert not ends(filled(infiller, "a\n___b", 20, single_line=True))
    with pytest.raises(ValueError, match="single_line must be True, False or None, got 'yes'"):
        infiller("a ___", single_line="yes")


def test_a_text_begins_with_no_whitespace(infiller):
    for found in filled(infiller, "___ b", 20, single_line=False):
        assert not found.text.startswith(WHITESPACE)


def test_a_pattern_that_no_token_brings_the_space_for_has_as_many_tokens_as_it_says(infiller, byte_tokenizer):
    pytest.importorskip("outlines_core")
    for length in (3, "auto"):
        found = infiller("x = ___ ", length=length, constraints=Pattern("[0-9]{3}"))
        assert re.fullmatch("x = [0-9]{3} ", found.text)
        assert byte_tokenizer.decode(found.ids) == found.text
        assert len(found.spans[0].ids) == 3
    word = infiller("x = ___ ", length=2, constraints=Pattern("[ab]{2,3}"))  # " a" is a token
    assert byte_tokenizer.decode(word.spans[0].ids) == " " + word.spans[0].text
    either = infiller("x = ___", length=3, constraints=Pattern("c?[0-9]{3}"))  # met so only with a fixed space
    assert re.fullmatch("x = [0-9]{3}", either.text)


def test_a_pattern_says_itself_whether_it_breaks_lines(infiller):
    pytest.importorskip("outlines_core")
    assert infiller("a ___", length=2, constraints=Pattern("b\n")).text == "a b\n"
    with pytest.raises(ValueError, match="exclude each other|match"):
        infiller("a ___", length=2, constraints=Pattern("b\n"), single_line=True)


def test_patterns_hold_characters_of_several_tokens(infiller):
    pytest.importorskip("outlines_core")
    assert infiller("a___", length=9, constraints=Pattern("日本[xy]?|日本語")).text == "a日本語"


def test_no_special_token_in_a_blank_unless_asked(infiller, byte_tokenizer):
    special = set(byte_tokenizer.all_special_ids)
    for order in ({}, {"group_size": 2}):
        generators = [torch.Generator().manual_seed(seed) for seed in range(30)]
        options = {"length": 12, "generator": generators, **order}
        plain = infiller(["a___"] * 30, **options)
        assert not any(special & set(found.ids) for found in plain)
        assert any(special & set(found.ids) for found in infiller(["a___"] * 30, special_tokens=True, **options))


def test_suppressed_tokens_stay_out(infiller):
    letter = infiller("a___", length=1).spans[0].ids[0]
    assert infiller("a___", length=1, suppress_tokens=[letter]).spans[0].ids[0] != letter
    assert infiller("a___", length=1, suppress_tokens=None).spans[0].ids[0] == letter
    with pytest.raises(ValueError, match="suppress_tokens holds True: not a token id"):
        infiller("a___", length=1, suppress_tokens=[True])


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("nothing to fill", {}, "no blank in 'nothing to fill': mark what is to be filled with '___'"),
        ("", {}, "no blank in ''"),
        ("a ___", {"blank": ""}, "the blank marker is empty"),
        ("a ___", {"length": 0}, "length must be .* got 0"),
        ("a ___", {"length": "any"}, "length must be .* got 'any'"),
        ("a ___", {"length": [1, 2]}, "2 lengths for 1 blanks"),
        ("a ___ b ___", {"length": (2, 1)}, r"a list with one of these for each blank, got \(2, 1\)"),
        ("a ___", {"length": True}, "length must be .* got True"),
        ("a ___", {"length": None}, "length must be .* got None"),
        (None, {}, "text must be a string or a list of strings, got NoneType"),
        ("a ___", {"lenght": 2}, "unknown option 'lenght'; did you mean 'length'"),
        ("a ___", {"order": "up"}, "order must be one of left_to_right, random, got 'up'"),
        ("a ___ b" * 20, {"length": 8}, "text 0 has .* tokens with its blanks; the model's context is 64"),
        ([], {}, "no text to fill"),
    ],
)
def test_errors(infiller, text, options, message):
    with pytest.raises(ValueError, match=message):
        infiller(text, **options)


def test_a_tokenizer_without_a_start_token_says_so(byte_tokenizer):
    bare = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer.backend_tokenizer)
    model = converted("llama", vocabulary=len(byte_tokenizer))
    with pytest.raises(ValueError, match="no start or end token: pass start_token_id"):
        Infiller(model, bare)
    assert Infiller(model, bare, start_token_id=1)("a ___", length=1).text.startswith("a ")


def test_a_tokenizer_of_another_model_is_an_error(byte_tokenizer):
    with pytest.raises(ValueError, match="ids up to 262, the model's vocabulary has 37"):
        Infiller(converted("llama"), byte_tokenizer)


@pytest.fixture(scope="module")
def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """SentencePiece style: a space is put in front of whatever is encoded, and dropped from whatever is decoded."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", "▁", *"abcdefgh.\n", "▁a", "▁b", "▁c", "ab"])}
    merges = [("▁", "a"), ("▁", "b"), ("▁", "c"), ("a", "b")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def test_pieces_behind_a_blank_get_no_space_of_their_own(metaspace_tokenizer):
    pieces = Pieces(metaspace_tokenizer)
    tokens = metaspace_tokenizer.convert_ids_to_tokens
    assert tokens(metaspace_tokenizer.encode("cab")) == ["▁c", "ab"]
    assert tokens(pieces.encode("cab", at_start=True)) == ["▁c", "ab"]
    assert tokens(pieces.encode("cab")) == ["c", "ab"]
    assert tokens(pieces.encode(" cab")) == ["▁c", "ab"]
    assert tokens(pieces.encode(". a")) == [".", "▁a"]
    ids = metaspace_tokenizer.convert_tokens_to_ids(["▁a", "b"])
    assert pieces.decode(ids) == " ab"
    assert pieces.decode(ids, at_start=True) == "ab"


@pytest.fixture(scope="module")
def fallback_tokenizer() -> PreTrainedTokenizerFast:
    """SentencePiece style with bytes for what it has no token for, as Llama 2's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokens = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abc日", "▁a", "▁日"]
    merges = [("▁", "a"), ("▁", "日")]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


@pytest.mark.parametrize("text", ["日本の首都は___です。", "___", "a ___ b", "é___\n  ___🎉"])
def test_characters_are_whole_where_single_bytes_are_tokens(fallback_tokenizer, text):
    infiller = Infiller(converted("llama", vocabulary=len(fallback_tokenizer)), fallback_tokenizer)
    drawn = [found for seed in (0, 1) for found in filled(infiller, text, 8)]
    for found in drawn:
        assert "\ufffd" not in found.text
        assert fallback_tokenizer.decode(found.ids) == found.text
        assert Template.parse(fixed_pieces(found.text, found.spans)) == Template.parse(text)
    if text == "___":  # texts begin as the tokenizer begins them: with a space that is not in the text
        first = fallback_tokenizer.convert_ids_to_tokens([found.ids[0] for found in drawn])
        assert all(token.startswith("▁") or token == "<0x20>" for token in first)


@pytest.mark.parametrize("text", ["___", "a ___ b", "a___b. ___ c", "___ a ___ ___\n___"])
def test_the_ids_are_those_of_the_text_that_comes_back(metaspace_tokenizer, text):
    model = converted("llama", vocabulary=len(metaspace_tokenizer))
    infiller = Infiller(model, metaspace_tokenizer)
    for seed in range(5):
        result = infiller(text, length=2, generator=torch.Generator().manual_seed(seed))
        assert fixed_pieces(result.text, result.spans) == text
