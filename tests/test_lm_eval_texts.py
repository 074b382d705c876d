"""Where the backend for lm-evaluation-harness cuts text: joins, windows, start tokens; what is scored is the text."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

from anyorder.core.rng import seed_of
from harness import PAIRS, close, direct, generate, likelihoods, rolling

pytest.importorskip("lm_eval", reason="the backend needs lm-eval: pip install 'anyorder[eval]'")


def test_a_token_that_spans_the_join(backend, stock):
    """'a' + 'b' is one token. The context keeps its own and the continuation is encoded behind it."""
    lm = backend()
    a, b, ab = (lm.tokenizer.encode(text, add_special_tokens=False) for text in ("a", "b", "ab"))
    assert len(ab) == 1
    c = lm.tokenizer.encode("cc", add_special_tokens=False)
    for context, continuation, given, predicted in (("cca", "b", c + a, b), ("cca", "bcc", c + a, b + c)):
        text = lm.encoder.pair(context, continuation)
        assert (text.given, text.predicted) == (given, predicted)
        assert close(likelihoods(lm, [(context, continuation)])[0][0], direct(lm, given, predicted)[0])
    with pytest.raises(AssertionError):  # nothing is left of the continuation
        likelihoods(stock, [("cca", "b")])
    assert not close(likelihoods(stock, [("cca", "bcc")])[0][0], likelihoods(lm, [("cca", "bcc")])[0][0])


def test_what_is_cut_from_the_left_is_context(backend):
    lm = backend(max_length=8, order="random")
    text = lm.encoder.pair("q: a b c a b c a b c\na:", " c ab")
    kept = text.given[-(8 - len(text.predicted)) :]
    generator = torch.Generator().manual_seed(seed_of(0, "q: a b c a b c a b c\na:"))
    (log_p, _) = likelihoods(lm, [("q: a b c a b c a b c\na:", " c ab")])[0]
    assert close(log_p, direct(lm, kept, text.predicted, "random", 1, generator)[0], 1e-5)


def test_continuations_longer_than_the_context_are_scored_in_windows(backend):
    """Every token once; the first window has one token of the context."""
    lm, context, continuation = backend(max_length=8), "q: a", " b c a" * 9
    text = lm.encoder.pair(context, continuation)
    tokens, total, done = [text.given[-1], *text.predicted], 0.0, 1
    while done < len(tokens):
        end = min(len(tokens), done + 8)
        total += direct(lm, tokens[max(0, end - 9) : done], tokens[done:end])[0]
        done = end
    assert close(likelihoods(lm, [(context, continuation)])[0][0], total)


def test_an_empty_context_is_the_start_token(backend, stock):
    lm = backend()
    ids = lm.tokenizer.encode(" ab c", add_special_tokens=False)
    for context in ("", " "):  # the space belongs to the continuation
        expected = direct(lm, [1], lm.tokenizer.encode(context + " ab c", add_special_tokens=False))
        assert close(likelihoods(lm, [(context, " ab c")])[0][0], expected[0])
    assert close(likelihoods(lm, [("", " ab c")])[0][0], likelihoods(stock, [("", " ab c")])[0][0])
    assert close(likelihoods(backend(prefix_token_id=2), [("", " ab c")])[0][0], direct(lm, [2], ids)[0])
    assert generate(lm, ("", {"max_gen_toks": 3, "until": []})) == generate(lm, ("<s>", {"max_gen_toks": 3}))
    bare = AutoTokenizer.from_pretrained(lm.tokenizer.name_or_path)
    bare.bos_token = bare.eos_token = None
    lm = backend(pretrained=lm.model, tokenizer=bare, device=None)
    assert likelihoods(lm, [("a", " b")])
    with pytest.raises(ValueError, match="neither a start nor an end token: name one with prefix_token_id="):
        likelihoods(lm, [("", " b")])


def test_nothing_is_certain(backend):
    assert likelihoods(backend(), [("a b", ""), ("", "")]) == [(0.0, True)] * 2
    assert rolling(backend(), [""]) == [0.0]


def test_spaces_at_the_end_of_a_context_belong_to_the_continuation(backend, stock):
    lm = backend()
    one, other = (lm.encoder.pair(*pair) for pair in (("q: a ", "b"), ("q: a", " b")))
    assert (one.given, one.predicted) == (other.given, other.predicted)
    pairs = [("q: a ", "b"), ("q: a\n\n", "c"), ("q:  \n ", " ab")]
    assert close([s for s, _ in likelihoods(lm, pairs)], [s for s, _ in likelihoods(stock, pairs)])


def with_start_token(checkpoint, end=""):
    """The tokenizer, made to put a start token in front of every text."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"<s> $A {end}".strip(), special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


def test_a_start_token_of_the_tokenizers_scores_as_in_the_stock_backend(backend, checkpoint):
    from lm_eval.models.huggingface import HFLM

    tokenizer = with_start_token(checkpoint)
    lm = backend(tokenizer=tokenizer, pretrained=backend().model)
    stock = HFLM(pretrained=lm.model.causal_lm, tokenizer=tokenizer, batch_size=2)
    pairs = [*PAIRS, ("<s>q: a", " b"), ("", " b")]
    assert close([s for s, _ in likelihoods(lm, pairs)], [s for s, _ in likelihoods(stock, pairs)])
    asked = [(context, {"max_gen_toks": 5, "until": ["\n"]}) for context in ("q: a", "<s>q: a")]
    assert generate(lm, *asked) == [generate(stock, one)[0] for one in asked]


def test_a_join_where_the_tokenizer_puts_a_space_in_front_of_texts(space_adding_tokenizer):
    """As SentencePiece's do: the continuation gets none."""
    from anyorder.evaluation.harness.encoding import TextEncoder

    encoder = TextEncoder(space_adding_tokenizer)
    for context, continuation in (("ab", "c"), ("a b", " c"), ("a ", "bc"), ("a", "b")):
        text = encoder.pair(context, continuation)
        assert encoder.tokenizer.decode(text.given + text.predicted) == f" {context}{continuation}"
        assert text.given == encoder.tokenizer.encode(context.rstrip(), add_special_tokens=False)


def test_the_start_token_is_neither_doubled_nor_lost(backend, checkpoint):
    tokenizer = with_start_token(checkpoint, "</s>")
    ab, c = (tokenizer.encode(text, add_special_tokens=False) for text in ("ab", " c"))
    model = backend().model
    lm = backend(pretrained=model, tokenizer=tokenizer, device=None)
    assert tokenizer.encode("ab") == [1, *ab, 2]
    for context in ("ab", "<s>ab"):  # by the tokenizer, by a chat template; and no end in the middle
        text = lm.encoder.pair(context, " c")
        assert (text.given, text.predicted) == ([1, *ab], c)
        assert lm.encoder.prompt(context) == [1, *ab]
        document = lm.encoder.document(context)
        assert (document.given, document.predicted) == ([1], ab)
    assert lm.encoder.pair("", " c").given == [1]
    without = backend(pretrained=model, tokenizer=tokenizer, device=None, add_bos_token=False)
    assert without.encoder.prompt("ab") == ab
    assert backend(add_bos_token=True).encoder.prompt("ab") == [1, *ab]
