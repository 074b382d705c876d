from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from anyorder import Infiller, policies
from anyorder.infill.pieces import Pieces
from anyorder.infill.template import Template
from architectures import converted

any_text = st.text(max_size=30)


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


@given(st.lists(any_text.filter(lambda s: "_" not in s), min_size=2, max_size=4))
def test_any_fixed_text_comes_back(byte_tokenizer, pieces):
    infiller = Infiller(converted("llama", vocabulary=len(byte_tokenizer)), byte_tokenizer)
    text = "___".join(pieces)
    try:
        result = infiller(text, length=1)
    except ValueError as error:
        assert "context" in str(error)  # noqa: PT017
        return
    assert fixed_pieces(result.text, result.spans) == text


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


def test_the_space_in_front_of_a_blank_is_brought_by_its_first_token(infiller, byte_tokenizer):
    assert infiller._blanks.encode(Template.parse("a ___ ___ b"), [1, 1], {}).eats_space == [True, True]
    assert infiller._blanks.encode(Template.parse("a  ___\n ___"), [1, 1], {}).eats_space == [False, False]
    spaced = {i for token, i in byte_tokenizer.get_vocab().items() if token.startswith("Ġ")}
    encoded = infiller._blanks.encode(Template.parse("ab ___ c"), [2], {})
    assert encoded.eats_space == [True]
    assert byte_tokenizer.decode(encoded.ids[1:2]) == "ab"  # the space is not among the fixed tokens
    seen = []
    original = infiller.model.generate

    def spy(*args, **kwargs):
        output = original(*args, **kwargs)
        seen.append(output.sequences)
        return output

    infiller.model.generate = spy
    try:
        for seed in range(20):
            infiller("ab ___ c", length=2, generator=torch.Generator().manual_seed(seed))
    finally:
        del infiller.model.generate
    assert all(int(ids[0, 2]) in spaced for ids in seen)
    assert {int(ids[0, 3]) for ids in seen} - spaced  # only the first token is bound


def test_no_special_token_in_a_blank_unless_asked(infiller, byte_tokenizer):
    special = set(byte_tokenizer.all_special_ids)

    def drawn(**options) -> set[int]:
        encoded = [infiller._blanks.encode(Template.parse("___"), [30], {})]
        blanks = torch.tensor([e.blank for e in encoded])
        return set(infiller._allowed(encoded, blanks, **options, suppress_tokens=()).masks[0].nonzero()[:, 0].tolist())

    assert not drawn(special_tokens=False) & special
    assert drawn(special_tokens=True) >= special
    assert drawn(special_tokens=False) | special == set(range(len(byte_tokenizer)))


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
        ("a ___ b" * 20, {}, "text 0 has .* tokens with its blanks; the model's context is 64"),
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


@pytest.mark.parametrize("text", ["___", "a ___ b", "a___b. ___ c", "___ a ___ ___\n___"])
def test_the_ids_are_those_of_the_text_that_comes_back(metaspace_tokenizer, text):
    model = converted("llama", vocabulary=len(metaspace_tokenizer))
    infiller = Infiller(model, metaspace_tokenizer)
    for seed in range(5):
        result = infiller(text, length=2, generator=torch.Generator().manual_seed(seed))
        assert fixed_pieces(result.text, result.spans) == text
