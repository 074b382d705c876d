from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from anyorder import Factorization, Infiller, lengths
from anyorder.constraints import Choice, Pattern
from anyorder.lengths import LengthPrior, Tries, candidates
from anyorder.template import Template
from architectures import converted

PRIOR = LengthPrior(left_to_right=1.0, fill=0.9, length=0.3, log_length=-0.2)
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


def test_the_score_of_a_draw_is_its_importance_weight():
    tries = Tries(torch.tensor([1, 2]), torch.tensor([-5.0, -7.0]), torch.tensor([-1.0, -4.0]))
    found = LengthPrior(1, 1, 0, 0).probabilities(tries)
    assert torch.allclose(found, torch.tensor([-4.0, -3.0], dtype=torch.float64).softmax(dim=0))


def test_fitting_recovers_the_weights_that_lengths_were_drawn_with():
    source, true = seeded(), LengthPrior(0.8, 0.6, -0.3, 1.2)
    cases = []
    for _ in range(3000):
        n = torch.arange(1, 9)
        tries = Tries(n, -3 * torch.rand(8, generator=source) * n, -2 * torch.rand(8, generator=source) * n)
        index = int(torch.multinomial(true.probabilities(tries), 1, generator=source))
        cases.append((tries, index))
    found = lengths.fit(cases, penalty=0)
    for name, value in vars(true).items():
        assert getattr(found, name) == pytest.approx(value, abs=0.2), name
    with pytest.raises(ValueError, match="no cases"):
        lengths.fit([])


@pytest.mark.parametrize("sample", [False, True])
def test_the_result_is_that_of_the_lengths_it_names(infiller, sample):
    source, again = seeded(1), seeded(1)
    found = infiller(TEXT, length=[(2, 5), "auto"], generator=source, do_sample=sample)
    own = [max(span.lengths, key=span.lengths.get) for span in found.spans]
    fixed = infiller(TEXT, length=own, generator=again, do_sample=sample)
    assert found.text == fixed.text
    assert found.log_prob == pytest.approx(fixed.log_prob, abs=1e-4)
    assert [span.tokens for span in found.spans] == own
    assert torch.equal(source.get_state(), again.get_state()), "the search drew more than the result"
    for span, tried in zip(found.spans, [range(2, 6), lengths.AUTO], strict=True):
        assert list(span.lengths) == list(tried)
        assert sum(span.lengths.values()) == pytest.approx(1)


def test_probabilities_of_lengths_are_those_of_every_length_alone(infiller):
    """The slow twin: each length filled by itself, and the whole text scored from left to right."""
    text = "a dog ___ the cat."
    found = infiller(text, length=(1, 6)).spans[0].lengths
    scores = []
    for n in range(1, 7):
        (filled,) = infiller._fill([Template.parse(text)], [[n]])  # its bytes need not be text that can be read back
        order = Factorization.left_to_right(len(filled.ids), given=1 + len("a dog"))
        given = infiller.model.log_likelihood(torch.tensor([filled.ids]), order)
        scores.append(float(given.sum()) - 0.9 * filled.infill.log_prob + 0.3 * n - 0.2 * float(torch.tensor(n).log()))
    expected = torch.tensor(scores, dtype=torch.float64).softmax(dim=0)
    assert list(found.values()) == pytest.approx(expected.tolist(), abs=1e-4)


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
    assert LengthPrior.load().left_to_right > 0
