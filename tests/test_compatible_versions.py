"""The page of tested versions says what pyproject.toml and constraints.txt say."""

from __future__ import annotations

import re
import sys
import tomllib

import pytest

from pages import ROOT, rows

PAGE = ROOT / "docs" / "compatibility.md"
if not PAGE.exists():  # the tests of an installed wheel may lie elsewhere
    pytest.skip("no pages beside the tests", allow_module_level=True)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_versions_are_those_of_the_files():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    groups = {"the package": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
    expected: dict[str, list[str]] = {}
    for group, requirements in groups.items():
        for requirement in requirements:
            name, lowest = re.sub(r"\[.*\]", "", requirement).split(">=")
            assert name in pins, f"{name} has no pinned version in constraints.txt"
            row = expected.setdefault(name, [name, lowest, pins[name], ""])
            row[3] = ", ".join(filter(None, [row[3], group]))
    found = [[cell.replace("`", "") for cell in cells] for cells in rows(PAGE.read_text())[1:]]
    assert found == list(expected.values())


def test_python_is_the_one_that_is_named():
    (lowest,) = re.findall(r">=(3\.\d+)", PROJECT["requires-python"])
    assert f"Python {lowest}," in PAGE.read_text()
    assert f"Python {lowest} or newer" in (ROOT / "docs" / "install.md").read_text()
    assert sys.version_info >= tuple(map(int, lowest.split(".")))


def test_every_extra_is_explained():
    named = {cells[0].strip("`") for cells in rows((ROOT / "docs" / "install.md").read_text())[1:]}
    assert named == PROJECT["optional-dependencies"].keys()
