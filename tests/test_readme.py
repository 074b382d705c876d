"""The README cannot rot: its code runs, its picture is what the command prints, its tree is the tree."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import anyorder
from anyorder.cli import build_parser, main

README = Path(__file__).parent.parent / "README.md"
if not README.exists():  # the tests of an installed wheel may lie elsewhere
    pytest.skip("no README beside the tests", allow_module_level=True)
TEXT = README.read_text()


def block(language: str) -> str:
    return re.search(rf"```{language}\n(.*?)```", TEXT, re.DOTALL).group(1)


@pytest.mark.smollm2
def test_the_code_runs(smollm2, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(block("python"), names)
    assert (tmp_path / "my-model" / "model.safetensors").exists()
    assert names["order"].length == names["ids"].shape[1]


def test_the_commands_parse():
    for line in block("sh").splitlines():
        command = shlex.split(line, comments=True)
        assert command[0] == "anyorder"
        build_parser().parse_args(command[1:])


def test_the_picture_is_what_the_command_prints(capsys):
    command = re.search(r"`anyorder (show .*?)` draws it", TEXT).group(1)
    main(shlex.split(command))
    assert f"```\n{capsys.readouterr().out}```" in TEXT


def test_the_tree_is_the_tree():
    tree = TEXT.split("## Where things are")[1]
    named = set(re.findall(r"^  (\w+\.py) ", tree, re.MULTILINE))
    there = {path.name for path in Path(anyorder.__file__).parent.glob("*.py")}
    assert named == there - {"__init__.py", "__main__.py"}
