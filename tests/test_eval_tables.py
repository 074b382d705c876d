"""Tables of evaluations: rows are evaluated by the command, in as many sittings as it takes, beside each other."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest

from anyorder import policies
from anyorder.cli import build_parser
from anyorder.evaluation import writing_tasks
from anyorder.evaluation.tasks import TASKS
from test_evaluation import data  # noqa: F401 - a fixture
from test_writing_tasks import TEXTS


@pytest.fixture
def script(benchmark_script, monkeypatch, checkpoint):
    """The script over a tiny model."""
    script = benchmark_script("paper_table")
    use(script, ("base", "shipped", "shipped_4"), checkpoint, monkeypatch)
    return script


@pytest.fixture
def tables(benchmark_script):
    """What the scripts of tables share."""
    return benchmark_script("eval_tables")


def use(script, names, checkpoint, monkeypatch):
    """Let rows of a script ask a tiny model."""
    for name in names:
        row = script.ROWS[name]
        monkeypatch.setitem(script.ROWS, name, dataclasses.replace(row, model=str(checkpoint)))


def test_the_table_is_made_in_sittings_and_keeps_what_is_written_around_it(
    script,
    tables,
    data,  # noqa: F811
    checkpoint,
    tmp_path,
    monkeypatch,
):
    docs = tmp_path / "docs"
    docs.mkdir()
    page = docs / "results.md"
    page.write_text(f"# Ours\n\nWhy.\n\n{tables.BEGIN}\nold\n{tables.END}\n\nSo what.\n")
    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / "exact").symlink_to(checkpoint)

    def sitting(*more):
        command = [
            "paper_table.py",
            "--results",
            docs / "results",
            "--data-dir",
            data,
            "--work",
            tmp_path / "work",
            *more,
        ]
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        script.TABLE.main(script.__doc__)
        return [line for line in page.read_text().splitlines() if line.startswith("| ") and line[2] != "|"]

    (base,) = sitting("--rows", "base")
    assert base.startswith("| the base, nothing trained | ")
    rows = sitting("--rows", "shipped_4", "exact", "--runs", runs)
    assert [row.split(" | ")[0] for row in rows] == [
        f"| {script.ROWS[name].title}" for name in ("base", "exact", "shipped_4")
    ]
    text = page.read_text()
    assert text.startswith("# Ours\n\nWhy.\n")
    assert text.endswith("\n\nSo what.\n")
    assert "old" not in text
    assert "Not yet measured: AR fine-tuning (control); masked diffusion (control); A3's recipe, all weights; " in text
    report = json.loads((tmp_path / "work" / "base" / "stories" / "report.json").read_text())["tasks"]["stories"]
    own = report["nats_per_token_prefix_only"]
    assert f"| {own['value']:.3f} ({own['low']:.3f} to {own['high']:.3f}) |" in base
    own = json.loads((docs / "results" / "exact.json").read_text())["tasks"]["stories"]["nats_per_token"]
    assert f"| {own['value']:.3f} (" in rows[1]
    before = page.read_text()
    sitting("--report-only")
    assert page.read_text() == before
    with pytest.raises(SystemExit, match=r"base.json holds figures of another limit than 1"):
        sitting("--rows", "base", "--limit", "1", "--work", tmp_path / "elsewhere")
    with pytest.raises(SystemExit, match="shipped were asked other questions than base"):
        sitting("--rows", "shipped", "--limit", "1", "--tasks", "lambada", "--work", tmp_path / "elsewhere")
    (docs / "results" / "shipped.json").unlink()
    rows = sitting("--rows", "shipped", "--tasks", "lambada")  # a part of a row is one, too
    shown = rows[-2].split(" | ")
    assert shown[0] == f"| {script.ROWS['shipped'].title}"
    assert [bool(one.strip(" |")) for one in shown[1:]] == [task == "lambada" for _, task, _ in script.COLUMNS]


def test_rows_that_were_trained_need_their_folder(script, data, tmp_path, monkeypatch, capsys):  # noqa: F811
    command = ["paper_table.py", "--results", tmp_path / "results", "--data-dir", data, "--work", tmp_path / "work"]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    with pytest.raises(SystemExit):
        script.TABLE.main(script.__doc__)
    assert "--runs: where autoregressive, masked_diffusion, paper, exact lie" in capsys.readouterr().err


def test_judged_text_is_a_table_of_policies(
    benchmark_script,
    tables,
    data,  # noqa: F811
    checkpoint,
    tmp_path,
    monkeypatch,
):
    script = benchmark_script("judged_text")
    monkeypatch.setattr(writing_tasks, "PROMPT_TOKENS", 6)  # the tiny model's context is short
    monkeypatch.setattr(writing_tasks, "NEW_TOKENS", 8)
    documents = data / f"{TASKS['continuations'].file}.jsonl"
    documents.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    use(script, ("fours", "entropy_4_uncoupled"), checkpoint, monkeypatch)
    folders = ["--results", tmp_path / "judged", "--data-dir", data, "--work", tmp_path / "work"]
    command = ["judged_text.py", *folders, "--rows", "fours", "--limit", "2"]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    script.TABLE.main(script.__doc__)
    (row,) = [line for line in (tmp_path / "judged.md").read_text().splitlines() if line.startswith("| groups of 4 |")]
    own = json.loads((tmp_path / "work" / "fours" / "continuations" / "report.json").read_text())["tasks"][
        "continuations"
    ]
    steps, varied = own["steps_per_token"], own["distinct_2"]
    assert f"| {steps['value']:.3f} (" in row
    assert f"| {100 * varied['value']:.1f} (" in row


@pytest.mark.parametrize("name", ["paper_table", "judged_text"])
def test_rows_are_asked_what_the_command_understands(benchmark_script, name):
    table = benchmark_script(name).TABLE
    for row in table.rows.values():
        asked = build_parser().parse_args(["eval", *table.tasks, "--model", "x", "--out", "y", *row.options])
        if asked.policy is not None:
            policies.parse(asked.policy)
