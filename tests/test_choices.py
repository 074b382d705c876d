"""Blanks that are one of several strings: how probable each is, and what they do to lengths that are sought."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from anyorder import Factorization, Infiller
from anyorder.decoding.constraints import Choice
from anyorder.infill import choices, lengths, lookahead
from anyorder.infill.lengths import LengthPrior, Tries
from anyorder.scoring import conditional_log_likelihood
from architectures import converted

PRIOR = LengthPrior(behind=0.9, length=-0.3, log_length=1.2, opening_length=0.1, opening_log_length=0.4)


@pytest.fixture(scope="module")
def infiller(byte_tokenizer: PreTrainedTokenizerFast) -> Infiller:
    return Infiller(converted("llama", vocabulary=len(byte_tokenizer)), byte_tokenizer, length_prior=PRIOR)


def given_length(infiller: Infiller, before: str, own: str, behind: str) -> float:
    """log p of the tokens of a string given the fixed text around it and how many they are."""
    ids = [infiller.start_token_id, *infiller.pieces.encode(before, at_start=True)]
    tokens = infiller.pieces.encode(own)
    blank = range(len(ids), len(ids) + len(tokens))
    row = torch.tensor([ids + tokens + infiller.pieces.encode(behind)])
    order = Factorization.infill(torch.tensor([i in blank for i in range(row.shape[1])]))
    return float(infiller.model.log_likelihood(row, order).sum())


def log_shares(infiller: Infiller, before: str, counts: list[int], behind: str) -> torch.Tensor:
    """(C,) log P of each number of tokens between two texts."""
    start = [infiller.start_token_id, *infiller.pieces.encode(before, at_start=True)]
    token = infiller.pieces.encode(behind)[0]
    found = []
    for n in counts:
        row = torch.tensor([[*start, *[0] * n, token]])
        found.append(conditional_log_likelihood(infiller.model, row, [len(start) + n], range(len(start))))
    return PRIOR.log_probabilities(Tries(torch.tensor(counts), torch.cat(found), opens=False))


def test_a_choice_weighs_how_many_tokens_there_are(infiller):
    options = ("a", "b c", "abab")
    counts = [len(infiller.pieces.encode(" " + option)) for option in options]
    assert len(set(counts)) > 1
    filled = infiller("a ___ c b", constraints=Choice(*options))
    alone = torch.tensor([given_length(infiller, "a", " " + option, " c b") for option in options]).double()
    every = sorted(set(counts))
    length = dict(zip(every, log_shares(infiller, "a", every, " c b").tolist(), strict=True))
    expected = (alone + torch.tensor([length[n] for n in counts])).softmax(0)
    span = filled.spans[0]
    assert list(span.probabilities) == list(options)
    assert list(span.probabilities.values()) == pytest.approx(expected.tolist(), abs=1e-5)
    assert sum(span.probabilities.values()) == pytest.approx(1)
    assert list(span.log_probs_given_length.values()) == pytest.approx(alone.tolist(), abs=1e-4)
    assert span.text == options[int(expected.argmax())]
    assert span.log_prob == pytest.approx(span.log_probs_given_length[span.text])
    assert filled.text == f"a {span.text} c b"
    assert filled.forwards == 2  # one for the lengths, one for the strings


def test_of_strings_with_as_many_tokens_the_exact_likelihood_decides(infiller):
    filled = infiller("x ___ y", constraints=Choice("a", "b", "c"))
    exact = torch.tensor([given_length(infiller, "x", f" {one}", " y") for one in "abc"]).softmax(0)
    assert list(filled.spans[0].probabilities.values()) == pytest.approx(exact.tolist(), abs=1e-5)
    assert filled.forwards == 1  # no length had to be sought


def test_texts_share_forwards_as_far_as_memory_goes(infiller, monkeypatch):
    texts, choice = ["x ___ y", "x ___ y ___ z", "bcb ___ a ___"], Choice("a", "b c", "abab")
    monkeypatch.setattr(lookahead, "WAVE_ROWS", 0)  # one gap of a text after the other
    together = infiller(texts, constraints=choice)
    monkeypatch.setattr(choices, "BATCH_POSITIONS", 1)
    alone = infiller(texts, constraints=choice)
    assert together[0].forwards == 4  # two of the lengths, two of the strings
    assert alone[0].forwards == 2 + 5 * 3
    for one, other in zip(together, alone, strict=True):
        assert one.text == other.text
        for span, twin in zip(one.spans, other.spans, strict=True):
            assert span.probabilities == pytest.approx(twin.probabilities, abs=1e-5)


# ---------------------------------------------------------------------- beside lengths that are sought


@pytest.mark.parametrize("options", [("cat", "horse"), ("b", "a", "ccccccccc")])
@pytest.mark.parametrize("pieces", [("a", " and", " so b"), ("ab", "", " c"), ("a", " x", "")])
def test_a_length_is_sought_as_if_the_string_chosen_stood_there(infiller, pieces, options):
    text = " ___".join(pieces)
    found = infiller(text, constraints=[Choice(*options), None], length=[2, "auto"])
    assert found.spans[0].lengths is None
    typed = f"{pieces[0]} {found.spans[0].text}{pieces[1]} ___{pieces[2]}"
    assert infiller(typed).spans[0].lengths == pytest.approx(found.spans[1].lengths, abs=1e-5)
    assert list(found.spans[1].lengths) == list(lengths.AUTO)


def test_a_choice_behind_a_blank_is_what_its_length_is_sought_by(infiller):
    found = infiller("ab@@c", blank="@", constraints=[None, Choice("d", "efg")])
    typed = infiller(f"ab@{found.spans[1].text}c", blank="@")
    assert found.spans[0].lengths == pytest.approx(typed.spans[0].lengths, abs=1e-5)


def test_a_choice_is_made_with_the_other_blanks_at_lengths_that_were_sought(infiller):
    """Of strings of one token nothing is unknown but which: the lengths are sought beside one position."""
    found = infiller("x ___ y ___ z", constraints=[Choice("a", "b"), None])
    ids, hole = [infiller.start_token_id, *infiller.pieces.encode("x", at_start=True)], len("x") + 1
    behind = infiller.pieces.encode(" y")
    start = hole + 1 + len(behind)
    token = infiller.pieces.encode(" z")[0]
    evidence = []
    for n in lengths.AUTO:
        row = torch.tensor([[*ids, 0, *behind, *[0] * n, token]])
        given = [c for c in range(start) if c != hole]
        evidence.append(conditional_log_likelihood(infiller.model, row, [start + n], given))
    tries = Tries(torch.tensor(lengths.AUTO), torch.cat(evidence), opens=False)
    length = lengths.AUTO[lengths.chosen(PRIOR.log_probabilities(tries).exp(), opens=False)]
    scores = []
    for option in ("a", "b"):
        (own,) = infiller.pieces.encode(" " + option)
        row = torch.tensor([[*ids, own, *behind, *[0] * length, *infiller.pieces.encode(" z")]])
        given = [c for c in range(row.shape[1]) if c != hole and not start <= c < start + length]
        scores.append(conditional_log_likelihood(infiller.model, row, [hole], given))
    assert list(found.spans[0].log_probs_given_length.values()) == pytest.approx(torch.cat(scores).tolist(), abs=1e-4)
