from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from anyorder import Infiller
from anyorder.decoding.constraints import Choice, Pattern
from anyorder.infill import lengths
from anyorder.infill.lengths import LengthPrior, Tries, candidates
from anyorder.infill.template import Template
from anyorder.scoring import conditional_log_likelihood
from architectures import converted

PRIOR = LengthPrior(behind=0.9, length=-0.3, log_length=1.2, opening_length=0.1, opening_log_length=0.4)
TEXT = "a dog ___ the cat and ___ home."


@pytest.fixture(scope="module")
def infiller(byte_tokenizer: PreTrainedTokenizerFast) -> Infiller:
    return Infiller(converted("llama", vocabulary=len(byte_tokenizer)), byte_tokenizer, length_prior=PRIOR)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(st.integers() | st.tuples(st.integers(), st.integers()) | st.text() | st.none() | st.lists(st.integers(1, 9)))
def test_a_length_is_read_or_refused(length):
    try:
        tried = candidates(length, 2)
    except ValueError as error:
        told = str(error)
    else:
        assert len(tried) == 2
        assert all(list(one) == sorted(set(one)) and one[0] >= 1 for one in tried)
        return
    assert repr(length) in told or f"{len(length)} lengths" in told


def test_lengths_of_blanks():
    assert candidates(3, 2) == [(3,), (3,)]
    assert candidates([(2, 4), "auto"], 2) == [(2, 3, 4), lengths.AUTO]
    with pytest.raises(ValueError, match=r"got \(4, 2\)"):
        candidates((4, 2), 1)


@pytest.mark.parametrize("opens", [False, True])
def test_the_score_is_evidence_and_prior(opens):
    tries = Tries(torch.tensor([1, 3]), torch.tensor([-5.0, -4.0]), opens)
    found = LengthPrior(2.0, -0.5, 0.3, 0.1, 0.2).probabilities(tries)
    length, log_length = (-0.4, 0.5) if opens else (-0.5, 0.3)
    expected = torch.tensor([-10.0 + length, -8.0 + 3 * length + log_length * math.log(3)], dtype=torch.float64)
    assert found.tolist() == pytest.approx(expected.softmax(dim=0).tolist())


def test_fitting_recovers_the_weights_that_lengths_were_drawn_with():
    source, true = seeded(), LengthPrior(0.8, -0.3, 1.2, 0.2, -0.7)
    cases = []
    for case in range(3000):
        tries = Tries(torch.arange(1, 9), -6 * torch.rand(8, generator=source), opens=case % 2 == 0)
        index = int(torch.multinomial(true.probabilities(tries), 1, generator=source))
        cases.append((tries, index))
    found = lengths.fit(cases, penalty=0)
    for name, value in vars(true).items():
        assert getattr(found, name) == pytest.approx(value, abs=0.2), name
    with pytest.raises(ValueError, match="no cases"):
        lengths.fit([])


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=20))
def test_the_median_is_off_by_the_fewest_tokens(weights):
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    tokens = torch.arange(len(weights))
    off = [float((shares * (tokens - n).abs()).sum()) for n in range(len(weights))]
    assert off[lengths.median(shares)] == pytest.approx(min(off))


@pytest.mark.parametrize("sample", [False, True])
def test_the_result_is_that_of_the_lengths_it_names(infiller, sample):
    source, again = seeded(1), seeded(1)
    found = infiller(TEXT, length=[(2, 5), "auto"], generator=source, do_sample=sample)
    own = [list(span.lengths)[lengths.median(torch.tensor(list(span.lengths.values())))] for span in found.spans]
    fixed = infiller(TEXT, length=own, generator=again, do_sample=sample)
    assert found.text == fixed.text
    assert found.log_prob == pytest.approx(fixed.log_prob, abs=1e-4)
    assert [span.tokens for span in found.spans] == own
    assert torch.equal(source.get_state(), again.get_state()), "seeking lengths drew something"
    assert found.forwards == fixed.forwards + 2
    for span, tried in zip(found.spans, [range(2, 6), lengths.AUTO], strict=True):
        assert list(span.lengths) == list(tried)
        assert sum(span.lengths.values()) == pytest.approx(1)


def evidence(infiller: Infiller, before: str, gap: int, behind: str) -> float:
    """log p of the first token of a text so many tokens behind another, by itself."""
    start = [infiller.start_token_id, *infiller.pieces.encode(before, at_start=True)]
    ids = torch.tensor([[*start, *[0] * gap, infiller.pieces.encode(behind)[0]]])
    return float(conditional_log_likelihood(infiller.model, ids, [len(start) + gap], range(len(start))))


def test_probabilities_of_lengths_are_those_of_every_length_alone(infiller):
    """The slow twin, once with a text long enough to be encoded once for all."""
    for before in ("a dog", "Once there was a dog who chased"):
        found = infiller(f"{before} ___ the cat.", length=(1, 6)).spans[0].lengths
        behind = torch.tensor([evidence(infiller, before, n, " the cat.") for n in range(1, 7)])
        expected = PRIOR.probabilities(Tries(torch.arange(1, 7), behind, opens=False))
        assert list(found.values()) == pytest.approx(expected.tolist(), abs=1e-5)


def test_another_blank_is_neither_read_nor_evidence(infiller):
    found = infiller("a ___ cat ___", length=[(2, 3), (1, 4)]).spans[1].lengths  # nothing stands behind the second
    prior = PRIOR.probabilities(Tries(torch.arange(1, 5), torch.zeros(4), opens=False))
    assert list(found.values()) == pytest.approx(prior.tolist())
    beside = infiller("ab______cat", length=[(2, 3), 3]).spans[0].lengths  # what stands behind both
    behind = torch.tensor([evidence(infiller, "ab", n + 3, "cat") for n in (2, 3)])
    expected = PRIOR.probabilities(Tries(torch.tensor([2, 3]), behind, opens=False))
    assert list(beside.values()) == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("text", "opens"),
    [("___ she said.", True), ("It was.  ___", True), ('He: "No!" ___ x', True), ("多い。___", True),
     ("an ___ x", False), ("Mr, ___", False), ("___ ___", True)],
)  # fmt: skip
def test_where_a_sentence_begins(infiller, text, opens):
    template = Template.parse(text)
    tries = infiller._seeker.tries(template, [3] * template.blanks, 0, (1, 2))
    assert tries.opens is opens
    if template.blanks == 2:
        assert not infiller._seeker.tries(template, [3, 3], 1, (1, 2)).opens


def test_texts_of_known_and_unknown_lengths_are_each_as_alone(infiller):
    texts = ["a ___ b", "the cat sat on ___ and slept"]
    together = infiller(texts, length=(1, 4), generator=[seeded(1), seeded(2)])
    alone = [infiller(text, length=(1, 4), generator=[seeded(n)]) for n, text in enumerate(texts, 1)]
    assert [one.text for one in together] == [one.text for one in alone]
    assert infiller("a ___ b", length=(3, 3)) == infiller("a ___ b", length=3)


def test_a_pattern_allows_some_lengths_only(infiller):
    found = infiller("in ___ days", length="auto", constraints=Pattern("(aa|bbbb)"))
    assert list(found.spans[0].lengths) == [2, 3, 4, 5]  # the space is a token of its own, or the first letter's
    with pytest.raises(ValueError, match="lengths that do: possible: 2 to 5"):
        infiller("in ___ days", length=(6, 9), constraints=Pattern("(aa|bbbb)"))


def test_choices_keep_their_own_lengths(infiller):
    found = infiller("a ___ and ___", length="auto", constraints=[Choice("cat", "horse"), None])
    assert found.spans[0].lengths is None
    assert found.spans[0].text in ("cat", "horse")
    assert list(found.spans[1].lengths) == list(lengths.AUTO)
    only = infiller("a ___", length="auto", constraints=Choice("cat", "horse"))
    assert only.spans[0].text in ("cat", "horse")


def test_lengths_that_do_not_fit_the_context_are_not_tried(infiller, monkeypatch):
    monkeypatch.setattr(infiller.model.causal_lm.config, "max_position_embeddings", 16)
    assert list(infiller("0123456789___", length="auto").spans[0].lengths) == [1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="the model's context is 16"):
        infiller("0123456789___", length=(7, 9))


def test_a_prior_that_is_none_is_one_error(tmp_path):
    file = tmp_path / "prior.json"
    file.write_text(json.dumps({"weights": {"length": 1}}))
    with pytest.raises(ValueError, match=r"prior\.json is no length prior: .*log_length"):
        LengthPrior.load(file)
    assert LengthPrior.load().behind > 0
