"""Seeking lengths costs less than it might: guesses ahead and keys that are handed on change no result."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from anyorder import Infiller, policies
from anyorder.decoding.constraints import Choice
from anyorder.infill import infiller as infilling
from anyorder.infill import lookahead
from anyorder.infill.infiller import Infill
from anyorder.infill.lengths import LengthPrior
from anyorder.runtime.runner import EagerRunner
from architectures import converted, gated

PRIOR = LengthPrior(behind=0.9, length=-0.3, log_length=1.2, opening_length=0.1, opening_log_length=0.4)
TEXTS = [
    "a dog ___ the cat and ___ home, ab ___ c ___ b.",
    "___ she said. ___ b ___",
    "ab ___ ___ c ___a",
    "nothing is sought up to here, and here ___ b",
]
LENGTHS = (1, 5)
KINDS = ("exact", "gated", "mistral")


@pytest.fixture(scope="module", params=KINDS)
def infiller(request: pytest.FixtureRequest, byte_tokenizer: PreTrainedTokenizerFast) -> Infiller:
    return made(request.param, byte_tokenizer)


def made(kind: str, tokenizer: PreTrainedTokenizerFast, prior: LengthPrior = PRIOR) -> Infiller:
    size = len(tokenizer)
    if kind == "gated":
        return Infiller(gated("llama", vocabulary=size), tokenizer, length_prior=prior)
    architecture, recipe = ("llama", kind) if kind in ("exact", "paper") else (kind, "exact")
    return Infiller(converted(architecture, recipe, vocabulary=size), tokenizer, length_prior=prior)


def assert_alike(found: list[Infill], expected: list[Infill]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.text == other.text
        assert one.ids == other.ids
        for span, twin in zip(one.spans, other.spans, strict=True):
            assert span.log_prob == pytest.approx(twin.log_prob, abs=1e-4)
            assert (span.lengths is None) is (twin.lengths is None)
            assert span.lengths is None or span.lengths == pytest.approx(twin.lengths, abs=1e-5)


# ---------------------------------------------------------------------- gaps further on, on a guess


@pytest.mark.parametrize("limit", [None, 46])
def test_asking_ahead_changes_no_length(infiller, monkeypatch, limit):
    if limit is not None:  # lengths that no longer fit are not tried, which depends on the lengths in front
        monkeypatch.setattr(infiller.model.causal_lm.config, "max_position_embeddings", limit)
    expected = one_by_one(infiller, TEXTS, monkeypatch)
    monkeypatch.setattr(lookahead, "WAVE_ROWS", 10_000)
    for worth in (0.4, 0.0):
        monkeypatch.setattr(lookahead, "WORTH", worth)
        assert_alike(infiller(TEXTS, length=LENGTHS), expected)


@pytest.mark.parametrize("right", [True, False])
def test_right_guesses_save_forwards_and_wrong_ones_cost_none(infiller, monkeypatch, right):
    (expected,) = one_by_one(infiller, TEXTS[:1], monkeypatch)
    lengths = [span.tokens for span in expected.spans]
    monkeypatch.setattr(lookahead, "WAVE_ROWS", 10_000)
    monkeypatch.setattr(lookahead, "WORTH", 0.0)

    def guess(walk: lookahead._Walk, question: lookahead._Question) -> int:
        length = lengths[question.gap.blank]
        return length if right else next(n for n in question.lengths if n != length)

    monkeypatch.setattr(lookahead._Walk, "_guess", guess)
    found = infiller(TEXTS[0], length=LENGTHS)
    assert_alike([found], [expected])
    assert found.forwards == expected.forwards - (len(lengths) - 1 if right else 0)


def test_given_tokens_that_read_all_others_are_not_guessed_about(byte_tokenizer, monkeypatch):
    infiller = made("paper", byte_tokenizer)
    expected = one_by_one(infiller, TEXTS, monkeypatch)
    monkeypatch.setattr(lookahead, "WAVE_ROWS", 10_000)
    assert infiller(TEXTS, length=LENGTHS) == expected


def one_by_one(infiller: Infiller, texts: list[str], monkeypatch: pytest.MonkeyPatch) -> list[Infill]:
    """The slow twin: a forward for each gap, and one more over all of the text to fill it."""
    with monkeypatch.context() as patch:
        patch.setattr(lookahead, "WAVE_ROWS", 0)
        drop_encoded(patch)
        return infiller(texts, length=LENGTHS)


# ---------------------------------------------------------------------- keys and values that the fill takes over


def drop_encoded(patch: pytest.MonkeyPatch) -> None:
    """Fills encode all of their texts themselves."""
    generate_from = infilling.generate_from
    patch.setattr(
        infilling, "generate_from", lambda model, encoded, *rest, **more: generate_from(model, None, *rest, **more)
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"length": ["auto", 3, (2, 5), (1, 9)]},
        {"constraints": [None, Choice("cat", "a b"), None, None]},
        {"order": "random", "generator": 0},
        {"policy": policies.dynamic("entropy", step_size=2)},
        {"policy": policies.dynamic(reencode=True)},
        {"policy": policies.speculative()},
    ],
    ids=lambda options: next(iter(options), "default"),
)
def test_a_fill_from_keys_taken_over_is_that_from_the_text_alone(byte_tokenizer, monkeypatch, options):
    infiller = made("gated", byte_tokenizer)
    texts = [TEXTS[0], "the ___ b ___ c ___ ___ ab", "___ x, and so ___ ab ___ b ___"]

    def fill() -> list[Infill]:
        own = {"length": LENGTHS, **options}
        if "generator" in own:
            own["generator"] = [torch.Generator().manual_seed(n) for n in range(3)]
        return infiller(texts, **own)

    found = fill()
    drop_encoded(monkeypatch)
    assert_alike(found, fill())


def test_no_known_token_is_encoded_twice(infiller, monkeypatch):
    """Where none are guessed about."""
    monkeypatch.setattr(lookahead, "WAVE_ROWS", 0)
    rows, hidden = [], EagerRunner.hidden

    def count(self, asked, *rest):
        rows.append(asked.content_count)
        return hidden(self, asked, *rest)

    monkeypatch.setattr(EagerRunner, "hidden", count)
    found = infiller(TEXTS[0], length=LENGTHS)
    assert sum(rows) == len(found.ids)  # the start token makes up for the last token filled, which nothing reads


def test_texts_with_keys_and_texts_without_share_a_fill(infiller, monkeypatch):
    texts = ["a dog ___ the cat and", "___", "ab, b ___"]  # nothing to seek by in the second
    found = infiller(texts, length=LENGTHS)
    drop_encoded(monkeypatch)
    assert_alike(found, infiller(texts, length=LENGTHS))


def test_other_engines_and_the_paper_recipe_take_nothing_over(byte_tokenizer, monkeypatch):
    firsts, run = [], EagerRunner.hidden

    class Other(EagerRunner):
        takes_over = False

        def hidden(self, rows, *rest):
            firsts.append(rows.content_count)
            return run(self, rows, *rest)

    for kind in ("exact", "paper"):
        firsts.clear()
        with monkeypatch.context() as patch:
            patch.setattr("anyorder.decoding.request.runner_for", lambda model, *names: Other(model))
            found = made(kind, byte_tokenizer)(TEXTS[0], length=LENGTHS)
        assert firsts[0] == 1 + len(found.ids) - sum(span.tokens for span in found.spans)
        assert_alike([found], [made(kind, byte_tokenizer)(TEXTS[0], length=LENGTHS)])


def test_many_short_blanks_take_fewer_forwards_and_hold_the_same_tokens(infiller):
    text = " b ".join(["a ___"] * 8)
    drafted, plain = infiller(text, length=1), infiller(text, length=1, policy=policies.groupwise())
    assert drafted.ids == plain.ids
    assert drafted.log_prob == pytest.approx(plain.log_prob, abs=1e-4)
    assert drafted.forwards < plain.forwards
    few = " b ".join(["a ___"] * 3)
    assert infiller(few, length=1).forwards == infiller(few, length=1, policy=policies.groupwise()).forwards
