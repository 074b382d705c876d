"""The audit of orders: spread, the order that a policy takes, and calibration, each against a slow way."""

from __future__ import annotations

import json

import pytest
import torch
from scipy import stats

from anyorder import Factorization, load, policies, scoring
from anyorder.cli import main
from anyorder.evaluation import order_audit
from anyorder.evaluation.documents import text_of
from anyorder.evaluation.order_audit import BINS, Calibration, OrderSpread, OrderTaken, kendall_tau, reliability
from anyorder.evaluation.task import Subject

TEXTS = ["ab a c", "a much longer text than the other ones", "c c a b ab"]


@pytest.fixture(scope="module")
def subject(checkpoint):
    return Subject(*load(str(checkpoint)), orders=3)


def ids_of(subject, text):
    return torch.tensor([[subject.pieces.start_token(), *subject.pieces.encode(text, at_start=True)]])


# ---------------------------------------------------------------------- spread


def test_the_spread_is_that_of_exact_likelihoods(subject):
    (result, *others) = OrderSpread().evaluate(subject, TEXTS)
    ids = ids_of(subject, TEXTS[0])
    tokens = ids.shape[1] - 1
    plain = -float(subject.model.log_likelihood(ids, Factorization.left_to_right(tokens + 1)).double().sum())
    assert result["nats_left_to_right"] == pytest.approx(plain, abs=1e-4)
    assert result["tokens"] == tokens
    by_order = torch.tensor(result["nats_by_order"], dtype=torch.float64)
    assert len(by_order) == 3
    assert len(set(by_order.tolist())) > 1
    assert result["nats_random"] == pytest.approx(float(by_order.mean()))
    assert result["standard_deviation"] == pytest.approx(float(by_order.std()) / tokens)
    assert result["range"] == pytest.approx(float(by_order.max() - by_order.min()) / tokens)
    alone = [OrderSpread().evaluate(subject, [text])[0] for text in TEXTS[1:]]
    for one, other in zip(others, alone, strict=True):
        assert one["nats_by_order"] == pytest.approx(other["nats_by_order"], abs=1e-3)


def test_orders_are_those_of_the_seed(subject, checkpoint):
    first = OrderSpread().evaluate(subject, TEXTS[:1])[0]
    other = Subject(subject.model, subject.tokenizer, orders=3, seed=1)
    assert OrderSpread().evaluate(other, TEXTS[:1])[0]["nats_by_order"] != first["nats_by_order"]
    more = Subject(subject.model, subject.tokenizer, orders=5)
    same = OrderSpread().evaluate(more, TEXTS[:1])[0]["nats_by_order"][:3]
    assert same == pytest.approx(first["nats_by_order"], abs=1e-4)


def test_groups_of_all_tokens_have_no_spread(subject):
    whole = Subject(subject.model, subject.tokenizer, group_size=100, orders=3)
    result = OrderSpread().evaluate(whole, TEXTS[:1])[0]
    assert result["standard_deviation"] == pytest.approx(0, abs=1e-5)
    assert result["nats_random"] == pytest.approx(result["nats_left_to_right"], abs=1e-4)


# ---------------------------------------------------------------------- the order that is taken


@pytest.mark.parametrize("steps", [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2, 2, 1], [0, 0, 1, 1, 2, 2], [4, 0, 1, 2, 3]])
def test_kendall_tau_is_that_of_scipy(steps):
    expected = stats.kendalltau(range(len(steps)), steps).statistic
    assert kendall_tau(torch.tensor(steps)) == pytest.approx(expected)


def test_kendall_tau_by_hand():
    assert kendall_tau(torch.tensor([0, 2, 1])) == pytest.approx((2 - 1) / 3)
    assert kendall_tau(torch.tensor([0, 0, 0])) == 0


def test_the_order_taken_is_the_policys(subject):
    """Its likelihood is that of the factorization that came about, and no item depends on its batch."""
    policy = policies.dynamic("entropy", step_size=2)
    dynamic = Subject(subject.model, subject.tokenizer, policy)
    results = OrderTaken().evaluate(dynamic, TEXTS)
    for text, result in zip(TEXTS, results, strict=True):
        ids, steps = ids_of(subject, text), result["steps"]
        assert result["tokens"] == len(steps) == ids.shape[1] - 1
        assert max(steps) + 1 == -(-len(steps) // 2)
        order = Factorization(torch.tensor([[-1, *steps]]))
        exact = -float(subject.model.log_likelihood(ids, order).double().sum())
        assert result["nats"] == pytest.approx(exact, abs=1e-3)
        assert result["kendall_tau"] == pytest.approx(stats.kendalltau(range(len(steps)), steps).statistic)
        own = result["steps_own_text"]
        assert result["kendall_tau_own_text"] == pytest.approx(stats.kendalltau(range(len(own)), own).statistic)
        alone = OrderTaken().evaluate(dynamic, [text])[0]
        assert (alone["steps"], alone["own_text"]) == (steps, result["own_text"])


def test_a_window_of_one_goes_from_left_to_right(subject):
    left = Subject(subject.model, subject.tokenizer, policies.dynamic(window=1))
    result = OrderTaken().evaluate(left, TEXTS[1:2])[0]
    assert result["kendall_tau"] == result["kendall_tau_own_text"] == 1
    spread = OrderSpread().evaluate(subject, TEXTS[1:2])[0]
    assert result["nats"] == pytest.approx(spread["nats_left_to_right"], abs=1e-3)


def test_chance_takes_an_order_of_the_seed(subject):
    policy = policies.dynamic("random")
    by_seed = [Subject(subject.model, subject.tokenizer, policy, seed=seed) for seed in (0, 0, 1)]
    taken = [OrderTaken().evaluate(one, TEXTS[1:2]) for one in by_seed]
    assert taken[0] == taken[1]
    assert taken[0][0]["steps"] != taken[2][0]["steps"]


# ---------------------------------------------------------------------- calibration


def test_bins_by_hand():
    confidence = torch.tensor([0.0, 0.01, 0.5, 1.0], dtype=torch.float64)
    predictions, sums, right = reliability(confidence, torch.tensor([0, 1, 0, 1]))
    assert predictions[[0, BINS // 2, BINS - 1]].tolist() == [2, 1, 1]
    assert sums[0] == pytest.approx(0.01)
    assert right.tolist() == [1.0] + [0.0] * (BINS - 2) + [1.0]
    assert predictions.sum() == 4


def test_calibration_is_of_each_tokens_own_distribution(subject, monkeypatch):
    """Against logits: in groups of all tokens every order is the same one forward."""
    whole = Subject(subject.model, subject.tokenizer, group_size=100, orders=2)
    (result,) = Calibration().evaluate(whole, TEXTS[:1])
    ids = ids_of(subject, TEXTS[0])
    order = Factorization.left_to_right(ids.shape[1], group_size=100)
    with torch.no_grad():
        p = subject.model(ids, factorization=order).logits[0, 1:].double().softmax(-1)
    best, tokens = p.max(-1)
    assert result["predictions"] == 2 * len(best)
    assert result["confidence"] == pytest.approx(2 * float(best.sum()), abs=1e-5)
    assert result["right"] == 2 * int((tokens == ids[0, 1:]).sum())
    expected = reliability(best, (tokens == ids[0, 1:]).double()) * 2
    assert result["bins"] == pytest.approx(expected.flatten().tolist(), abs=1e-5)
    found = Calibration.metrics["expected_calibration_error"].estimate([result])
    predictions, confidence, right = expected
    assert found.value == pytest.approx(float((confidence - right).abs().sum() / predictions.sum()), abs=1e-6)


def test_what_greedy_decoding_takes_has_its_own_probability(subject):
    ids = ids_of(subject, TEXTS[1])
    order = Factorization.random(ids.shape[1], group_size=1, generator=torch.Generator().manual_seed(0))
    found = scoring.teacher_forced(subject.model, ids, order)
    with torch.no_grad():
        log_p = subject.model(ids, factorization=order).logits[0].log_softmax(-1)
    assert found.best_log_probs[0, 1:].tolist() == pytest.approx(log_p.max(-1).values[1:].tolist(), abs=1e-4)
    assert found.best_log_probs[0, 0] == 0
    right = found.is_best[0]
    assert torch.allclose(found.best_log_probs[0, right], found.log_probs[0, right], atol=1e-5)
    assert bool((found.best_log_probs >= found.log_probs - 1e-5).all())


# ---------------------------------------------------------------------- records and the command


def test_documents_are_texts_or_stories():
    story = ["Tom ran.", "He fell.", "It hurt.", "He cried.", "Mom came."]
    assert text_of({"text": "a b"}, "t") == "a b"
    assert text_of({"sentences": story}, "t") == "Tom ran. He fell. It hurt. He cried. Mom came."
    for record, message in (({"text": "one"}, "at least two words, got 'one'"), ({"x": 1}, "text is missing"),
                            ({"sentences": ["a"]}, "five sentences, got 1")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            text_of(record, "t")


def test_long_documents_are_cut(subject, monkeypatch):
    monkeypatch.setattr(OrderSpread, "longest", 4)
    assert OrderSpread().evaluate(subject, TEXTS[1:2])[0]["tokens"] == 4
    assert order_audit.DocumentTask.longest == 128


def test_the_audit_by_the_command(checkpoint, tmp_path, capsys):
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    tasks = ["order_spread", "order_taken", "calibration"]
    own = ["--data", *(f"{task}={data}" for task in tasks), "--model", str(checkpoint)]
    out = ["--out", str(tmp_path / "out"), "--policy", "dynamic:criterion=margin"]
    assert main(["eval", *tasks, *own, *out, "--orders", "2", "--seed", "3", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report["tasks"]["order_spread"]) == set(OrderSpread.metrics)
    assert report["settings"]["orders"] == 2
    assert report["settings"]["seed"] == 3
    for found in report["tasks"].values():
        for one in found.values():
            assert one["low"] <= one["value"] <= one["high"]
    items = [json.loads(line) for line in (tmp_path / "out" / "order_spread.jsonl").read_text().splitlines()]
    assert [len(one["nats_by_order"]) for one in items] == [2, 2, 2]
    assert main(["eval", "--compare", str(tmp_path / "out"), str(tmp_path / "out"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["value"] for row in rows} == {0}
    assert "expected_calibration_error" in {row["metric"] for row in rows}


def test_mistakes_are_told_before_a_model_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("anyorder.cli.eval.load_ready", None)
    out = ["--out", str(tmp_path / "out")]
    assert main(["eval", "order_taken", *out]) == 2
    assert "say --policy dynamic:criterion=confidence" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["eval", "order_spread", *out, "--orders", "1"])
    assert "a spread needs at least 2 orders" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
