"""The map from the paper to the code: what it names exists."""

from __future__ import annotations

import ast
import re

import pytest

from pages import ROOT, resolve, rows

PAGE = ROOT / "docs" / "paper.md"
if not PAGE.exists():  # the tests of an installed wheel may lie elsewhere
    pytest.skip("no pages beside the tests", allow_module_level=True)
TABLES = [cells for cells in rows(PAGE.read_text()) if cells[1] != "here"]


def named(cell: str) -> list[str]:
    """The dotted names of a cell; `.name` stands beside the one before it."""
    names: list[str] = []
    for name in re.findall(r"`(\.?[a-z_]+(?:\.\w+)+|\.\w+)`", cell):
        names.append(f"{names[-1].rpartition('.')[0]}{name}" if name.startswith(".") else name)
    return [name for name in names if not name.endswith((".yaml", ".args"))]


@pytest.mark.parametrize("cells", TABLES, ids=lambda cells: cells[0][:40])
def test_what_a_row_names_exists(cells):
    files = re.findall(r"`(recipes/[\w./-]+)`", cells[1])
    assert named(cells[1]) or files, "a row names code or a recipe"
    for name in named(cells[1]):
        assert resolve(name) is not None
    for file in files:
        assert (ROOT / file).is_file()
    for file, test in re.findall(r"`(test_\w+\.py)::(\w+)`", " ".join(cells[2:])):
        tree = ast.parse((ROOT / "tests" / file).read_text())
        assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, test


def test_a_name_that_is_none_is_noticed():
    with pytest.raises(AttributeError):
        resolve("core.factorization.Factorisation")
    assert named("`a.b.C`, `.D` and `recipe`") == ["a.b.C", "a.b.D"]
