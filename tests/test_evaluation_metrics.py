"""Metrics against cases worked out by hand and, where there is one, a library; intervals and tests against theory."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from scipy import stats

from anyorder.evaluation import statistics, text_metrics


def test_edit_similarity_by_hand():
    assert text_metrics.edit_similarity("kitten", "sitting") == pytest.approx(1 - 3 / 7)
    assert text_metrics.edit_similarity("", "") == 1
    assert text_metrics.edit_similarity("", "ab") == 0


@given(st.text("ab", max_size=6), st.text("ab", max_size=6))
def test_edit_similarity_is_a_similarity(one, other):
    found = text_metrics.edit_similarity(one, other)
    assert found == pytest.approx(text_metrics.edit_similarity(other, one))
    assert (found == 1) == (one == other)
    assert 0 <= found <= 1


def test_rouge_is_that_of_the_library():
    text, reference = "the cats were running", "a cat runs in the garden"
    theirs = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True).score(reference, text)
    assert text_metrics.rouge(text, reference) == pytest.approx({name: one.fmeasure for name, one in theirs.items()})


def test_containment_is_of_whole_normalised_words():
    assert text_metrics.contains("It was the Cotswold hills!", ["Cotswold Hills, England", "Cotswold Hills"])
    assert not text_metrics.contains("scatter", ["cat"])
    assert not text_metrics.contains("anything", ["the", ""])
    assert text_metrics.normalised("The  U.S.A., a country") == "usa country"


def test_variety_by_hand():
    assert text_metrics.distinct(["a", "b", "a", "b", "a"], 2) == 2 / 4
    assert text_metrics.distinct(["a"], 2) == 1
    assert text_metrics.repetition([1, 2, 3, 4, 1, 2, 3, 4], 4) == pytest.approx(1 - 4 / 5)


def test_an_estimate_is_a_ratio_of_sums_and_its_interval_that_of_the_normal_law():
    torch.manual_seed(0)
    values = torch.randn(400, dtype=torch.float64) + 3
    found = statistics.estimate(torch.stack([values, torch.ones_like(values)], dim=1))
    assert found.value == pytest.approx(float(values.mean()))
    half = 1.96 * float(values.std()) / math.sqrt(400)
    assert found.low == pytest.approx(found.value - half, abs=0.02)
    assert found.high == pytest.approx(found.value + half, abs=0.02)
    weights = torch.rand(400, dtype=torch.float64) + 0.5
    weighted = torch.stack([values, weights], dim=1)
    assert statistics.estimate(weighted).value == pytest.approx(float(values.sum() / weights.sum()))
    with pytest.raises(ValueError, match="no items"):
        statistics.estimate(weighted[:0])


def test_resamples_in_parts_are_as_many(monkeypatch):
    monkeypatch.setattr(statistics, "AT_ONCE", 3000)
    assert sum(len(some) for some in statistics._resamples(7, 0)) == statistics.RESAMPLES


def test_the_paired_test_is_the_exact_one():
    """Correct or not, in two runs: the permutation test is McNemar's exact test."""
    a = torch.tensor([1.0] * 10 + [0.0] * 10, dtype=torch.float64)
    b = a.clone()
    b[10:17] = 1.0
    b[0] = 0.0
    a, b = (torch.stack([values, torch.ones_like(values)], dim=1) for values in (a, b))
    found = statistics.paired(a, b)
    assert found.value == pytest.approx(6 / 20)
    assert found.p_value == pytest.approx(stats.binomtest(7, 8).pvalue, abs=0.02)
    assert statistics.paired(a, a).p_value == 1
    assert statistics.paired(b, a).value == pytest.approx(-6 / 20)


def test_the_calibration_error_by_hand():
    """Two bins: three predictions of confidence 0.2 of which one is right, one of confidence 0.9 that is right."""
    items = torch.tensor([[2, 0, 0.4, 0, 1, 0], [1, 1, 0.2, 0.9, 0, 1]], dtype=torch.float64)
    expected = 3 / 4 * abs(0.2 - 1 / 3) + 1 / 4 * abs(0.9 - 1)
    found = statistics.estimate(items, statistics.calibration_error)
    assert found.value == pytest.approx(expected)
    assert found.low <= found.value <= found.high
    assert statistics.paired(items, items, statistics.calibration_error).value == 0
    perfect = torch.tensor([[4, 4, 1, 3, 1, 3]], dtype=torch.float64)
    assert statistics.paired(items[:1], perfect, statistics.calibration_error).value == pytest.approx(-0.3)
