"""The one-way rule: every import, lazy ones and those for type checkers included, points to a lower package."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import anyorder

PACKAGE = Path(anyorder.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
LEVELS = [
    {"core"},
    {"model"},
    {"hub", "scoring"},
    {"runtime"},
    {"decoding"},
    {"modeling", "policies", "constraints", "revision"},  # the last three: public paths of what lies in decoding
    {"loading", "infill", "trace"},
    {"training", "evaluation", "serving"},
    {"bench"},
    {"__init__"},
    {"cli"},
    {"__main__"},
]
HEIGHT = {name: height for height, names in enumerate(LEVELS) for name in names}


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def imported(path: Path) -> set[str]:
    """The modules of this package that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.partition(".")[0] == "anyorder"}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            if (node.module or "").partition(".")[0] == "anyorder":
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
    names = {name.partition(".")[2] or "__init__" for name in found}
    return {name if name in MODULES else name.rpartition(".")[0] or "__init__" for name in names}


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    own = module.partition(".")[0]
    assert own in HEIGHT, f"{own} has no place in the house: say in LEVELS what it may import"
    for name in imported(MODULES[module]):
        other = name.partition(".")[0]
        assert other == own or HEIGHT[other] < HEIGHT[own], f"{module} imports {name}"


def test_no_circle():
    TopologicalSorter({module: imported(path) - {module} for module, path in MODULES.items()}).prepare()


def test_the_walk_sees_lazy_imports_and_those_for_type_checkers(tmp_path):
    file = tmp_path / "one.py"
    file.write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from anyorder.cli import main\n"
        "def f():\n    from anyorder.core.layout import Rows\n    import anyorder.modeling\n"
    )
    assert imported(file) == {"cli", "core.layout", "modeling"}


def test_files_and_functions_stay_readable():
    for path in FILES:
        source = path.read_text()
        assert len(source.splitlines()) <= 400, path.name
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno - node.lineno < 60, f"{path.name}: {node.name}"
