from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from anyorder.infill.pieces import Pieces, TextStream
from anyorder.infill.prompt import Prompt
from anyorder.infill.token_bytes import TokenBytes


def texts_of(tokenizer: PreTrainedTokenizerFast, ids) -> list[str]:
    return tokenizer.convert_ids_to_tokens(list(ids))


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    """Byte-level with GPT-2's way of cutting: the last space of a run goes with the word behind it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merged = ["ĠĠ", "ĊĊ", "Ċĉ", "Ġa", "Ġæ"]
    vocabulary = {token: i for i, token in enumerate(["<s>", *alphabet, *merged])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(token) for token in merged]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


@pytest.mark.parametrize(
    ("piece", "tokens", "brings"),
    [
        ("", [], False),
        ("b", ["b"], False),
        ("b ", ["b"], True),
        ("b  ", ["b", "Ġ"], True),
        ("b\n   ", ["b", "Ċ", "ĠĠ"], True),
        ("b\t", ["b", "ĉ"], False),
        ("b\n", ["b", "Ċ"], False),
        ("b\n\n", ["b", "Ċ", "Ċ"], False),  # alone it would be one token, which no word follows
        ("b\n\t", ["b", "Ċ", "ĉ"], False),
        (" ", [], True),
    ],
)
def test_whitespace_is_cut_as_if_a_word_followed(words, piece, tokens, brings):
    pieces = Pieces(words)
    ids, found = pieces.encode_before(piece, at_start=True)
    assert (texts_of(words, ids), found) == (tokens, brings)
    assert list(ids) + pieces.encode(" " * brings + "a") == words.encode(piece + "a")


@given(st.text(max_size=12))
def test_nothing_is_lost_in_front_of_a_blank(words, piece):
    pieces = Pieces(words)
    ids, brings = pieces.encode_before(piece, at_start=True)
    assert pieces.decode(list(ids), at_start=True) + " " * brings == piece


@given(st.text(max_size=12), st.booleans())
def test_a_stream_gives_whole_characters_and_all_of_them(words, text, brings):
    pieces = Pieces(words)
    stream = TextStream(pieces, brings_space=brings)
    parts = [stream.put([token]) for token in words.encode(" " * brings + text)]
    if "\ufffd" not in text:
        assert not any("\ufffd" in part for part in parts)
        assert "".join(parts) == text
        assert stream.end() == ""
    else:
        assert "".join([*parts, stream.end()]) == text


def test_a_stream_holds_back_what_is_no_character_yet_and_tells_at_the_end(words):
    pieces = Pieces(words)
    ids = words.encode("é🎉")
    stream = TextStream(pieces)
    assert [stream.put([token]) for token in ids[:5]] == ["", "é", "", "", ""]
    assert stream.end() == "\ufffd"
    assert stream.put(words.encode("b")) == "b"
    garbage = words.convert_tokens_to_ids(["ÿ"]) * 6  # never a character: not held for ever
    assert "".join([*(stream.put([token]) for token in garbage), stream.end()]) == "\ufffd" * 6


@pytest.mark.parametrize(
    ("text", "ids", "brings"),
    [
        ("b", ["b"], False),
        ("", ["<s>"], False),
        ("b ", ["b"], True),
        (" ", ["<s>"], True),
        ("b\n  ", ["b", "Ċ", "Ġ"], True),
    ],
)
def test_a_prompt_leaves_its_last_space_to_the_first_new_token(words, text, ids, brings):
    prompt = Prompt.of(Pieces(words), text)
    assert (texts_of(words, prompt.ids), prompt.brings_space) == (ids, brings)
    new = words.encode(" " * brings + "ab")
    assert text + prompt.continuation(new) == text + "ab"
    assert prompt.continuation([*new, *words.encode("é")[:1]]) == "ab"  # cut off inside a character
    allowed = prompt.allowed_tokens(TokenBytes(Pieces(words), len(words)), 2)
    if not brings:
        assert allowed is None
        return
    assert allowed.index.shape == (1, len(prompt.ids) + 2)
    assert allowed.index[0].tolist() == [0] * len(prompt.ids) + [1, 0]
    first = set(texts_of(words, allowed.masks[1].nonzero()[:, 0].tolist()))
    assert first == {"Ġa", "Ġæ", "<s>"} | ({"Ġ"} if text in ("b ", " ") else set())


def test_special_tokens_around_a_prompt_stay(words):
    from tokenizers.processors import TemplateProcessing

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words.backend_tokenizer, bos_token="<s>")
    start = [("<s>", tokenizer.bos_token_id)]
    processor = tokenizer.backend_tokenizer.post_processor
    try:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=start)
        assert texts_of(tokenizer, Prompt.of(Pieces(tokenizer), "b ").ids) == ["<s>", "b"]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <s>", special_tokens=start)
        prompt = Prompt.of(Pieces(tokenizer), "b ")  # what stands behind the text ends it: no token brings its space
        assert (texts_of(tokenizer, prompt.ids), prompt.brings_space) == (["b", "Ġ", "<s>"], False)
    finally:
        tokenizer.backend_tokenizer.post_processor = processor
