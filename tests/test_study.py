"""The study's command: runs, resumes from what is done, and writes the page from the results alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft", reason="training needs the train extra")
pytest.importorskip("matplotlib", reason="training needs the train extra")


SCRIPT = Path(__file__).parent.parent / "benchmarks" / "study.py"


def test_a_study_is_made_in_sittings(checkpoint, stories, tmp_path):
    five = tmp_path / "five.jsonl"
    five.write_text("".join(json.dumps({"sentences": ["a b.", "b a.", "c a.", "ab.", "a."]}) + "\n" for _ in range(3)))
    command = [
        sys.executable, SCRIPT, "--model", checkpoint, "--work", tmp_path / "work", "--train-file", stories,
        "--eval-file", stories, "--stories", five, "--tokens", 2048, "--results", tmp_path / "docs" / "study",
        "--options=--dtype float32 --length 64 --document-length 32 --batch-size 2", "--only",
    ]  # fmt: skip

    def sitting(*names):
        done = subprocess.run(
            [*map(str, command), *names], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "2"}
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    assert "--curriculum exact" in sitting("exact")
    assert "--curriculum exact" not in sitting("exact", "paper")
    page = (tmp_path / "docs" / "study.md").read_text()
    lines = [
        line for line in page.splitlines() if line.startswith(("| exact recipe, all", "| paper recipe, all", "| base"))
    ]
    assert len(lines) == 5
    assert "Not yet run: plain AR fine-tuning (control); " in page
    assert (tmp_path / "docs" / "study" / "curves.png").read_bytes().startswith(b"\x89PNG")
