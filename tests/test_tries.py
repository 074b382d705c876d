"""Of a text at several lengths the one is kept whose whole text is likeliest."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from anyorder import Factorization, Infiller
from anyorder.infill.lengths import AUTO
from anyorder.infill.seeking import Sought
from anyorder.infill.tries import Variants
from anyorder.trace.record import Recorder
from architectures import converted

TEXTS = ["a cat ___ on b.", "ab ___.", "c ___ d ___ ab cb"]


@pytest.fixture(scope="module")
def infiller(byte_tokenizer):
    return Infiller(converted("llama", vocabulary=len(byte_tokenizer)), byte_tokenizer)


def sought(shares):
    lengths = [max(own, key=own.get) for own in shares]
    return Sought(lengths, dict(enumerate(shares)), {}, 1, None)


@pytest.mark.parametrize("shares", [
    [{1: 0.5, 2: 0.3, 4: 0.2}],
    [{1: 0.5, 2: 0.3, 4: 0.2}, {3: 0.6, 5: 0.4}],
    [{1: 0.3, 2: 0.7}, {3: 0.1, 5: 0.9}, {1: 0.25, 2: 0.4, 3: 0.35}],
])  # fmt: skip
@pytest.mark.parametrize("tries", [1, 2, 4, 100])
def test_the_likeliest_lengths_are_tried(shares, tries):
    every = sorted(
        itertools.product(*shares), key=lambda own: -math.prod(s[n] for s, n in zip(shares, own, strict=True))
    )
    found = Variants([sought(shares)], tries).sought
    assert [tuple(own.lengths) for own in found] == every[:tries]


def test_the_length_found_is_tried_first_whether_likeliest_or_not():
    own = Sought([7, 2], {1: {1: 0.6, 2: 0.3, 3: 0.1}}, {}, 1, None)
    assert [one.lengths for one in Variants([own], 5).sought] == [[7, 2], [7, 1], [7, 3]]


@pytest.mark.parametrize("recipe", ["exact", "paper"])
@pytest.mark.parametrize("text", TEXTS[:2])
def test_the_whole_text_that_is_kept_is_the_likeliest_from_left_to_right(text, recipe, byte_tokenizer):
    infiller = Infiller(converted("llama", recipe=recipe, vocabulary=len(byte_tokenizer)), byte_tokenizer)
    shares = infiller(text).spans[0].lengths
    assert tuple(shares) == AUTO

    def likelihood(filled):
        row = [infiller.start_token_id, *infiller.pieces.encode(filled, at_start=True)]
        ids = torch.tensor([row])
        return float(infiller.model.log_likelihood(ids, Factorization.left_to_right(len(row))).sum())

    alone = [infiller(text, length=n) for n in shares]
    best = max(alone, key=lambda infill: likelihood(infill.text))
    kept = infiller(text, tries=len(AUTO))
    assert kept.text == best.text
    assert kept.log_prob == pytest.approx(best.log_prob, abs=1e-4)
    assert kept.spans[0].lengths == pytest.approx(shares)


def test_a_text_that_ends_in_a_blank_is_read_to_its_end(infiller, byte_tokenizer):
    kept = infiller("a cat ___", tries=6)

    def likelihood(filled):
        row = [infiller.start_token_id, *infiller.pieces.encode(filled, at_start=True), byte_tokenizer.eos_token_id]
        return float(infiller.model.log_likelihood(torch.tensor([row]), Factorization.left_to_right(len(row))).sum())

    lengths = sorted(kept.spans[0].lengths, key=kept.spans[0].lengths.get, reverse=True)
    found = infiller("a cat ___").spans[0].tokens
    tried = [found, *(n for n in lengths if n != found)][:6]
    assert kept.text == max((infiller("a cat ___", length=n).text for n in tried), key=likelihood)


@pytest.mark.parametrize("draw", [False, True])
def test_a_batch_is_its_texts_alone(infiller, draw):
    def generator(number):
        return torch.Generator().manual_seed(number) if draw else None

    together = infiller(TEXTS, tries=3, generator=[generator(n) for n in range(len(TEXTS))] if draw else None)
    alone = [infiller(text, tries=3, generator=[generator(n)] if draw else None) for n, text in enumerate(TEXTS)]
    assert [one.text for one in together] == [one.text for one in alone]


def test_one_try_and_known_lengths_are_as_without(infiller):
    text = TEXTS[2]
    assert infiller(text, tries=1) == infiller(text)
    assert infiller(text, length=[2, 3], tries=9) == infiller(text, length=[2, 3])
    draws = [infiller(text, tries=n, generator=torch.Generator().manual_seed(5), length=3).text for n in (1, 4)]
    assert draws[0] == draws[1]


def test_mistakes_are_told(infiller):
    for wrong in (0, -1, 1.5, True, "2"):
        with pytest.raises(ValueError, match=rf"tries must be a whole number from 1 up, got {wrong!r}"):
            infiller(TEXTS[0], tries=wrong)
    with pytest.raises(ValueError, match="not of 2: watch with tries=1"):
        infiller(TEXTS[0], tries=2, watch=Recorder(TEXTS[0]))
