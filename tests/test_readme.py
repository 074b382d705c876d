"""The README cannot rot: its code runs, its picture is what the command prints, its tree is the tree."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import anyorder
from anyorder.cli import main
from pages import blocks, rows, words

README = Path(__file__).parent.parent / "README.md"
if not README.exists():  # the tests of an installed wheel may lie elsewhere
    pytest.skip("no README beside the tests", allow_module_level=True)
TEXT = README.read_text()
MEASURED = (
    "control.md", "bench/bench.md", "bench_batches/bench.md", "bench_query/bench.md", "bench_coupled/bench.md"
)  # fmt: skip
"""Pages whose tables a program wrote."""


@pytest.mark.smollm2
def test_the_code_runs(smollm2, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks(TEXT, "python"):
        exec(block, names)
    assert (tmp_path / "my-model" / "adapter_model.safetensors").exists()
    assert names["order"].length == names["ids"].shape[1]


def test_the_picture_is_what_the_command_prints(capsys):
    command = re.search(r"`anyorder (show .*?)` draws it", TEXT).group(1)
    main(shlex.split(command))
    assert f"```\n{capsys.readouterr().out}```" in TEXT


def test_the_tree_is_the_tree():
    (tree,) = re.findall(r"^```\nsrc/anyorder/\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
    named = re.findall(r"(?<!\S)(\w+(?:/|\.py))(?=[ ,\n])", tree.replace("in decoding/", ""))
    package = Path(anyorder.__file__).parent
    files = {path.name for path in package.glob("*.py")} - {"__init__.py", "__main__.py"}
    folders = {f"{path.name}/" for path in package.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert sorted(named) == sorted(files | folders)


def test_it_can_be_read_in_one_go():
    lines = TEXT.splitlines()
    assert len(lines) <= 120
    assert max(map(len, lines)) <= 140
    assert "What pays and what does not" in "\n".join(lines[:15])


def test_its_figures_are_those_of_the_measured_pages():
    known = {figure for page in MEASURED for figure in figures((README.parent / "docs" / page).read_text())}
    ours = {figure for cells in rows(TEXT) for figure in figures(" ".join(cells[1:]))}
    ours |= figures(words(TEXT.split("## Install")[0])) - {"2601.13228"}
    assert len(ours) > 20
    assert ours <= known, f"in no measured page: {sorted(ours - known)}"


def figures(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w.])\d+\.\d+(?![\w.]*\d)", text))
