"""The study's command: runs, resumes from what is done, and writes the page from the results alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("datasets", reason="training needs the train extra")
pytest.importorskip("matplotlib", reason="training needs the train extra")


BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def study(benchmark_script):
    return benchmark_script("study")


@pytest.mark.filterwarnings("ignore")
def test_a_study_is_made_in_sittings(study, checkpoint, stories, tmp_path, monkeypatch, capsys):
    five = tmp_path / "five.jsonl"
    five.write_text("".join(json.dumps({"sentences": ["a b.", "b a.", "c a.", "ab.", "a."]}) + "\n" for _ in range(3)))
    command = [
        "study.py", "--model", checkpoint, "--work", tmp_path / "work", "--train-file", stories,
        "--eval-file", stories, "--stories", five, "--tokens", 512, "--results", tmp_path / "docs" / "study",
        "--options=--dtype float32 --length 64 --document-length 32 --batch-size 2", "--only",
    ]  # fmt: skip

    def sitting(*names):
        monkeypatch.setattr(sys, "argv", [*map(str, command), *names])
        study.main()
        return capsys.readouterr().out

    assert "--curriculum exact" in sitting("exact")
    assert "--curriculum exact" not in sitting("exact", "paper")
    page = (tmp_path / "docs" / "study.md").read_text()
    lines = [
        line for line in page.splitlines() if line.startswith(("| exact recipe, all", "| paper recipe, all", "| base"))
    ]
    assert len(lines) == 5
    assert "Not yet run: plain AR fine-tuning (control); " in page
    assert "--objective masked_diffusion" in sitting("masked_diffusion")
    page = (tmp_path / "docs" / "study.md").read_text()
    assert len([line for line in page.splitlines() if line.startswith("| masked diffusion, all weights")]) == 2
    assert "every figure is an estimated bound" in page
    record = json.loads((tmp_path / "docs" / "study" / "masked_diffusion.json").read_text())
    assert all(error > 0 for error in record["standard_errors"])
    assert (tmp_path / "docs" / "study" / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["study", "hold_out", "average_adapters", "training_speed"])
def test_scripts_tell_their_options(name):
    done = subprocess.run([sys.executable, BENCHMARKS / f"{name}.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout
