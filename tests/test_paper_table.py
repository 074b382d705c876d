"""The paper's table: rows are evaluated by the command, in as many sittings as it takes, beside each other."""

from __future__ import annotations

import json
import sys

import pytest

from test_evaluation import data  # noqa: F401 - a fixture


@pytest.fixture
def script(benchmark_script, monkeypatch, checkpoint):
    """The script over a tiny model."""
    script = benchmark_script("paper_table")
    for name in ("base", "shipped", "shipped_4"):
        row = script.ROWS[name]
        monkeypatch.setitem(script.ROWS, name, script.Row(row.title, row.options, str(checkpoint), row.infills))
    return script


def test_the_table_is_made_in_sittings_and_keeps_what_is_written_around_it(
    script,
    data,  # noqa: F811
    checkpoint,
    tmp_path,
    monkeypatch,
):
    docs = tmp_path / "docs"
    docs.mkdir()
    page = docs / "results.md"
    page.write_text(f"# Ours\n\nWhy.\n\n{script.BEGIN}\nold\n{script.END}\n\nSo what.\n")
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
        script.main()
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
    report = json.loads((tmp_path / "work" / "base" / "report.json").read_text())["tasks"]["stories"]
    own = report["nats_per_token_prefix_only"]
    assert f"| {own['value']:.3f} ({own['low']:.3f} to {own['high']:.3f}) |" in base
    own = json.loads((docs / "results" / "exact.json").read_text())["tasks"]["stories"]["nats_per_token"]
    assert f"| {own['value']:.3f} (" in rows[1]
    before = page.read_text()
    sitting("--report-only")
    assert page.read_text() == before
    with pytest.raises(SystemExit, match="shipped were asked other questions than base"):
        sitting("--rows", "shipped", "--limit", "1")


def test_rows_that_were_trained_need_their_folder(script, data, tmp_path, monkeypatch, capsys):  # noqa: F811
    command = ["paper_table.py", "--results", tmp_path / "results", "--data-dir", data, "--work", tmp_path / "work"]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    with pytest.raises(SystemExit):
        script.main()
    assert "--runs: where autoregressive, masked_diffusion, paper, exact lie" in capsys.readouterr().err
