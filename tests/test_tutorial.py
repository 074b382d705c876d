"""The tutorial runs as it stands, in its order: on a tiny model with a short training, and on the built-in one."""

from __future__ import annotations

import re
import shlex

import pytest

pytest.importorskip("datasets", reason="training needs the train extra")

from anyorder.cli import main
from pages import ROOT, commands

PAGE = ROOT / "docs" / "tutorial.md"
if not PAGE.exists():  # the tests of an installed wheel may lie elsewhere
    pytest.skip("no pages beside the tests", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore")


def follow(text: str, shorter: str, default: str = "") -> dict:
    """Do what the page says, with these options of `adapt` instead of its ten minutes, and of commands of no model."""
    names: dict = {}
    for language, block in re.findall(r"^```(python|sh)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        if language == "python":
            exec(block, names)
            continue
        for program, *rest in commands(block):
            if program == "anyorder":
                more = shorter if rest[0] == "adapt" else "" if "--model" in rest else default
                assert main([*rest, *shlex.split(more)]) == 0, rest
    return names


def check(names: dict) -> None:
    first, last = names["measured"][0], names["measured"][-1]
    assert first["step"] == "0"
    assert int(last["step"]) > 0
    for regime in ("left_to_right_4", "random_1", "random_4"):
        assert float(last[f"eval_{regime}"]) < float(first[f"eval_{regime}"]), regime
    assert first["eval_left_to_right_1"] == last["eval_left_to_right_1"]
    assert len(names["texts"]) > 20


SHORT = (
    "--tokens 960 --length 32 --document-length 32 --batch-size 2 --rank 4 --learning-rate 1e-2 --warmup-steps 2 "
    "--eval-documents 8 --eval-every 15 --dtype float32"
)


def test_it_runs_on_a_tiny_model(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = re.sub(r"smollm2-135m(-anyorder)?", str(checkpoint), PAGE.read_text())
    text = text.replace('glob("*.py")', 'glob("[a-c]*.py")')
    check(follow(text, SHORT, f"--model {checkpoint}"))


@pytest.mark.slow
@pytest.mark.smollm2
@pytest.mark.usefixtures("smollm2")
def test_it_runs_on_the_built_in_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check(follow(PAGE.read_text(), "--tokens 8192 --length 128 --eval-documents 4 --eval-every 16 --warmup-steps 4"))
