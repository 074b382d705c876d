"""The page of model families: a model a sitting, and tables from what the command measured."""

from __future__ import annotations

import json
import sys

import pytest

from anyorder.evaluation.tasks import TASKS
from test_code_tasks import RECORD
from test_evaluation import data  # noqa: F401 - a fixture


@pytest.fixture
def sitting(benchmark_script, data, tmp_path, monkeypatch):  # noqa: F811
    """The script, asked more of a page that has been begun."""
    script, tables = benchmark_script("families"), benchmark_script("eval_tables")
    monkeypatch.setattr("anyorder.evaluation.code_tasks.LONGEST_LINE", 8)  # the tiny model's context is short
    file = data / f"{TASKS['humaneval_infilling'].file}.jsonl"
    file.write_text(json.dumps(RECORD) + "\n")
    page = tmp_path / "docs" / "families.md"
    page.parent.mkdir()
    page.write_text(f"# Ours\n\n{tables.BEGIN}\nold\n{tables.END}\n\nSo what.\n")

    def run(*more):
        folders = ["--results", page.with_suffix(""), "--data-dir", data, "--work", tmp_path / "work"]
        monkeypatch.setattr(sys, "argv", ["families.py", *map(str, [*folders, *more])])
        script.main()
        return page.read_text()

    return run


def test_tables_hold_what_was_measured(sitting, checkpoint, tmp_path):
    text = sitting(checkpoint)
    title = checkpoint.stem
    record = json.loads((tmp_path / "docs" / "families" / f"{title}.json").read_text())
    assert record["apart"] < 1e-4
    assert sitting("--report-only") == text
    assert text.startswith("# Ours\n")
    assert text.endswith("\n\nSo what.\n")
    assert "old" not in text
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith(f"| {title} ")]
    known, lines = rows[0], rows[1:]
    right = json.loads((tmp_path / "work" / title / "lambada" / "report.json").read_text())["tasks"]["lambada"]
    assert known[3].startswith(f"{100 * right['accuracy']['value']:.1f} (")
    # Without tokens of its own a base does not fill in the middle, and programs run where it is said alone.
    ways = [
        "its true length",
        "that it finds",
        "behind its indentation",
        "sixteen lengths",
        "before it alone",
        "behind it first",
    ]
    assert all(line[1].endswith(way) for line, way in zip(lines, ways, strict=True))
    assert all(line[2] == "" for line in lines)
    nats = record["tasks"]["humaneval_infilling"]["nats_per_token"]["value"]
    assert lines[0][5].startswith(f"{nats:.3f} (")


def test_models_and_data_are_needed(sitting, capsys):
    with pytest.raises(SystemExit):
        sitting()
    assert "tables need models" in capsys.readouterr().err
