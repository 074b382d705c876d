"""Texts set aside are not trained on, and none is lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("datasets", reason="training needs the train extra")

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "hold_out.py"


def test_every_fiftieth_text_is_set_aside(tmp_path):
    texts = {
        name: [f"{name} {n}. " + "word " * 150 + "end." for n in range(count)] for name, count in (("a", 101), ("b", 7))
    }
    for name, own in texts.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in own))
    command = [sys.executable, SCRIPT, tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--output", tmp_path / "split"]
    subprocess.run([*map(str, command)], check=True, capture_output=True)

    def read(name):
        return [json.loads(line)["text"] for line in (tmp_path / "split" / f"{name}.jsonl").read_text().splitlines()]

    assert read("held_out") == ["a 0.", "b 0.", "a 50.", "a 100."]  # up to the last sentence end within 500 characters
    assert read("a") == [text for n, text in enumerate(texts["a"]) if n not in (0, 50, 100)]
    assert read("b") == texts["b"][1:]
