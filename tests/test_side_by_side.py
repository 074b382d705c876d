"""`anyorder plot` of runs: the page holds what their reports hold, and a figure is drawn where there is data for it."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from anyorder.bench import side_by_side
from anyorder.cli import main
from anyorder.evaluation import figures
from anyorder.evaluation.order_audit import BINS, reliability
from anyorder.evaluation.results import Results
from anyorder.evaluation.tasks import TASKS
from anyorder.training import curves

SETTINGS = {"command": "anyorder eval ...", "model": "m", "group_size": 1, "policy": "groupwise:size=1", "limit": None}
WRITING = {"judge_nats": 20.0, "judge_tokens": 10, "entropy": 1.5, "distinct_2": 0.9, "repetition_4": 0.1, "steps": 2,
           "tokens": 8}  # fmt: skip
ORDER = {"kendall_tau": 0.5, "kendall_tau_own_text": 0.4, "nats": 9.0, "tokens": 4, "steps": [0, 1, 3, 2],
         "steps_own_text": [0, 0, 1, 1]}  # fmt: skip


def calibration(*confidences):
    p = torch.tensor(confidences, dtype=torch.float64)
    return {"bins": reliability(p, (p > 0.5).double()).flatten().tolist(), "confidence": float(p.sum()), "right": 1.0,
            "predictions": len(p)}  # fmt: skip


@pytest.fixture
def evaluated(tmp_path):
    """Writes a finished evaluation."""

    def write(name, tasks, data="same", **settings):
        run = Results(tmp_path / name, SETTINGS | settings | {"data": dict.fromkeys(tasks, data)})
        for task, items in tasks.items():
            run.append(task, items)
        run.report({task: TASKS[task].metrics for task in tasks})
        return tmp_path / name

    return write


@pytest.fixture
def benched(tmp_path):
    def write(name, speed):
        record = {
            "decoder": "groupwise", "batch_size": 1, "tokens_per_second": speed, "tokens_per_second_min": speed,
            "tokens_per_second_max": speed, "ratio_to": "groupwise", "ratio": 1.0, "ratio_min": 1.0, "ratio_max": 1.0,
            "forwards_per_token": 1.0, "ms_per_forward": 9.0, "warm_up_seconds": 0.0, "base_nats_per_token": 3.0,
            "distinct_2": 0.9, "prompts": 2, "same_as_alone": None,
        }  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / "bench.json").write_text(json.dumps({"settings": {}, "results": [record]}))
        return tmp_path / name

    return write


@pytest.fixture
def trained(tmp_path):
    def write(name, loss):
        history = [{"step": step, curves.TOKENS: 10 * step, "loss": loss / step, "eval_random_1": loss / step,
                    "eval_loss": 1.0} for step in (1, 2)]  # fmt: skip
        (tmp_path / name).mkdir()
        curves.write_csv(history, tmp_path / name / "curves.csv")
        return tmp_path / name

    return write


def plot(capsys, *arguments):
    code = main(["plot", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_metrics_of_runs_stand_side_by_side(evaluated, tmp_path, capsys):
    one = evaluated("one", {"continuations": [WRITING, WRITING | {"judge_nats": 40.0}], "lambada": [
        {"accuracy": 1.0, "nats": 3.0}]})  # fmt: skip
    two = evaluated("two", {"continuations": [WRITING, WRITING]}, policy="groupwise:size=4")
    page = tmp_path / "runs.md"
    code, out, _ = plot(capsys, one, two, page, "--json")
    assert code == 0
    text = page.read_text()
    assert "| run | model | policy |" in text  # group size and limit are the same in both
    assert "| two | m | groupwise:size=4 |" in text
    assert "| task | metric | one | two |" in text
    assert "| continuations | judge_nats_per_token | 3.0000 (2.0000 to 4.0000) | 2.0000 (2.0000 to 2.0000) |" in text
    assert "| lambada | nats_per_word | 3.0000 (3.0000 to 3.0000) |  |" in text
    assert "Not the same" not in text
    report = json.loads(out)
    assert report == {"output": str(page), "figures": [str(tmp_path / "runs_quality.png")], "runs": 2}
    assert "![runs_quality](runs_quality.png)" in text
    assert (tmp_path / "runs_quality.png").read_bytes().startswith(b"\x89PNG")


def test_values_that_cannot_be_compared_are_told(evaluated, tmp_path, capsys):
    one = evaluated("one", {"continuations": [WRITING], "lambada": [{"accuracy": 1.0, "nats": 3.0}]})
    two = evaluated("two", {"continuations": [WRITING] * 2}, limit=2)
    other = evaluated("three", {"lambada": [{"accuracy": 1.0, "nats": 3.0}]}, data="others")
    assert plot(capsys, one, two, other, tmp_path / "runs.md")[0] == 0
    text = (tmp_path / "runs.md").read_text()
    assert "**Not the same items: continuations (1 and 2).**" in text
    assert "**Not the same data: lambada.**" in text


def test_every_kind_of_run_has_its_figure(evaluated, benched, trained, tmp_path, capsys):
    audit = evaluated("audit", {"order_taken": [ORDER], "calibration": [calibration(0.1, 0.9)],
                                "fills": [WRITING | {f"judge_{name}": 1.0 for name in (
                                    "nats_behind", "tokens_behind", "nats_reference", "tokens_reference",
                                    "nats_behind_reference")}]})  # fmt: skip
    inputs = [audit, benched("fast", 20.0), benched("slow", 2.0), trained("a", 4.0), trained("b", 2.0)]
    code, out, _ = plot(capsys, *inputs, tmp_path / "all.md")
    assert code == 0
    names = ["speed", "quality", "calibration", "order", "loss"]
    for name in names:
        assert (tmp_path / f"all_{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"all_{name}.png" in out
    text = (tmp_path / "all.md").read_text()
    assert "## fast" in text
    assert "| groupwise | 1 | 20.0 (20.0 .. 20.0) |" in text
    assert text.count("![") == len(names)


def test_benches_are_told_apart_in_one_figure(benched, monkeypatch):
    drawn = {}
    monkeypatch.setattr(side_by_side.bench_report, "plot", lambda records, file: drawn.update({file: records}))
    both = side_by_side.Runs([benched("fast", 20.0), benched("slow", 2.0)])
    side_by_side._drawings(both)["speed"]("two")
    assert [one["decoder"] for one in drawn["two"]] == ["fast: groupwise", "slow: groupwise"]


def test_the_reliability_curve_by_hand():
    items = [calibration(0.01, 0.03), calibration(1.0, 0.9)]
    confidence, right, predictions = figures.reliability_curve(items)
    assert confidence.tolist() == pytest.approx([0.02, 0.9, 1.0])
    assert right.tolist() == [0, 1, 1]
    assert predictions.tolist() == [2, 1, 1]
    assert int(0.9 * BINS) != BINS - 1


def test_the_map_of_orders_by_hand(monkeypatch):
    monkeypatch.setattr(figures, "CELLS", 2)
    items = [{"steps": [0, 1, 2, 3]}, {"steps": [3, 2, 1, 0]}, {"steps": [0, 0]}]
    # Five tokens in either half: of the left half three are predicted early, of the right half three, too.
    assert figures.order_map(items, "steps").tolist() == [[3 / 5, 3 / 5], [2 / 5, 2 / 5]]
    assert figures.order_map(items[:1], "steps").tolist() == [[1, 0], [0, 1]]


def test_curves_are_read_as_they_were_written(trained, tmp_path):
    first, second = curves.read_csv(trained("run", 4.0) / "curves.csv")
    assert (first["step"], first[curves.TOKENS], second["eval_random_1"]) == (1, 10, 2)
    assert "grad_norm" not in first
    for text in ("a,b\n1,2\n", "step,num_input_tokens_seen\n1,x\n", ""):
        (tmp_path / "bad.csv").write_text(text)
        with pytest.raises(ValueError, match=r"bad.csv holds no curves"):
            curves.read_csv(tmp_path / "bad.csv")


def test_without_matplotlib_there_are_the_tables(evaluated, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run = evaluated("one", {"continuations": [WRITING]})
    code, _, errors = plot(capsys, run, tmp_path / "runs.md")
    assert code == 2
    assert "runs.md is written; its figures need Matplotlib: pip install 'anyorder[plot]'" in errors
    assert "| continuations | entropy |" in (tmp_path / "runs.md").read_text()


def test_runs_of_one_name_are_told_by_their_paths(evaluated, tmp_path, capsys):
    (tmp_path / "x").mkdir()
    one, other = evaluated("run", {"continuations": [WRITING]}), evaluated("x/run", {"continuations": [WRITING]})
    assert plot(capsys, one, other, tmp_path / "runs.md")[0] == 0
    assert f"| task | metric | {one} | {other} |" in (tmp_path / "runs.md").read_text()
    assert "named twice" in plot(capsys, one, one, tmp_path / "runs.md")[2]


def test_mistakes_are_one_clear_error(evaluated, tmp_path, capsys):
    run = evaluated("run", {"continuations": [WRITING]})
    (tmp_path / "empty").mkdir()
    (tmp_path / "trace.json").write_text("{}")
    page = tmp_path / "runs.md"
    assert "was written by none of anyorder eval, bench and adapt" in plot(capsys, tmp_path / "empty", page)[2]
    assert "is no directory" in plot(capsys, run, tmp_path / "trace.json", page)[2]
    assert "must end in .md" in plot(capsys, run, tmp_path / "runs.png")[2]
    assert "one trace is drawn at a time" in plot(capsys, tmp_path / "trace.json", page, tmp_path / "o.html")[2]
    (run / "report.json").unlink()
    assert "holds an unfinished evaluation; this goes on with it: anyorder eval ..." in plot(capsys, run, page)[2]
    assert not page.exists()
