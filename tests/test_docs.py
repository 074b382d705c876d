"""The pages cannot rot: links lead somewhere, code parses, commands exist, every claim has its test."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

import anyorder
from anyorder.cli import build_parser
from pages import ROOT, anchors, blocks, commands, links, pages, rows, words

if not (ROOT / "docs" / "index.md").exists():  # the tests of an installed wheel may lie elsewhere
    pytest.skip("no pages beside the tests", allow_module_level=True)
CLAIMS = (ROOT / "docs" / "claims.md").read_text()


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_links_lead_somewhere(page):
    for link in links(page.read_text()):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_python_parses_and_imports_what_there_is(page):
    for block in blocks(page.read_text(), "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "anyorder":
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"


@pytest.mark.slow
@pytest.mark.smollm2
@pytest.mark.usefixtures("smollm2")
def test_the_code_of_the_guide_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks((ROOT / "docs" / "guide.md").read_text(), "python"):
        exec(block, names)
    assert "revise" in names


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_commands_parse(page, monkeypatch):
    monkeypatch.chdir(ROOT)  # options may stand in files of the repository
    for block in blocks(page.read_text(), "sh"):
        for command in commands(block):
            check_command(command)


def check_command(command: list[str]) -> None:
    program, *rest = command
    if program == "accelerate":
        program, *rest = command[command.index("-m") + 1 :]
    if program == "anyorder":
        build_parser().parse_args(rest)
    elif rest[:2] == ["-m", "anyorder.evaluation.harness"]:
        harness = pytest.importorskip("lm_eval._cli.harness", reason="the command is lm-eval's")
        options = harness.HarnessCLI()._parser.parse_args(rest[2:])
        for task in options.tasks:
            assert Path(options.include_path, f"{task}.yaml").is_file(), task
    elif program == "python":
        assert (ROOT / rest[0]).is_file(), rest[0]
    elif program == "serve":
        check_serve(*rest)
    elif program == "ray":
        assert rest[0] in ("start", "stop", "status", "get-auth-token"), rest
    elif program == "export":
        assert all(re.fullmatch(r"[A-Z_]+=\S+", one) for one in rest), rest
    elif program == "make":
        assert set(rest) <= make_targets(), rest
    else:
        assert program == "pip", f"{program}: say here how such a command is checked"


def check_serve(what: str, *rest: str) -> None:
    """Of Ray Serve: an application of ours with its arguments, or a file that is there."""
    if what == "run":
        assert rest[0] == "anyorder.serving.ray_app:build", rest[0]
        assert all("=" in one for one in rest[1:]), rest
        if importlib.util.find_spec("ray"):
            import local_ray  # noqa: F401 (says how Ray is to be imported)
            from anyorder.serving.ray_app import Arguments

            Arguments.model_validate(dict(one.split("=") for one in rest[1:]))
    elif what == "deploy":
        assert (ROOT / rest[0]).is_file(), rest[0]
    else:
        assert what == "status", what


def test_a_command_that_is_none_is_noticed():
    for line in ("anyorder infil x", "anyorder infill x --lenght 2", "python benchmarks/none.py", "make nothing", "ls"):
        with pytest.raises((SystemExit, AssertionError)):
            check_command(line.split())


@functools.cache
def make_targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_make_targets_and_extras_exist(page):
    text = page.read_text()
    assert set(re.findall(r"`make ([\w-]+)`", text)) <= make_targets()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {extra for group in re.findall(r"(?:anyorder|\.)\[([a-z0-9,]+)\]", text) for extra in group.split(",")}
    assert named <= project["optional-dependencies"].keys()


def test_every_page_is_in_the_index():
    index = ROOT / "docs" / "index.md"
    linked = {(index.parent / link.partition("#")[0]).resolve() for link in links(index.read_text())}
    assert set((ROOT / "docs").glob("*.md")) - {index} <= linked


@functools.cache
def names_in(file: str) -> set[str]:
    path = ROOT / "tests" / file
    tree = ast.parse(path.read_text() if path.is_file() else "")
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_claim_has_its_test():
    claimed = re.findall(r"`(test_\w+\.py)::(\w+)`", CLAIMS)
    assert len(claimed) > 50
    missing = [f"{file}::{test}" for file, test in claimed if test not in names_in(file)]
    assert not missing, missing


def test_claims_of_the_readme_are_its_own_words():
    readme = words((ROOT / "README.md").read_text())
    section = CLAIMS.split("## Claims of the README")[1].split("\n## ")[0]
    quoted = [re.fullmatch(r'"(.*)"', cells[0]) for cells in rows(section)[1:]]
    assert len(quoted) > 10
    for match in quoted:
        assert match, "a claim of the README is quoted"
        assert words(match.group(1)) in readme, match.group(1)


def test_what_claims_name_exists():
    for path in re.findall(r"`((?:docs|benchmarks)/[\w./]+)`", CLAIMS):
        assert (ROOT / path).is_file(), path


def test_the_citation_is_of_this_version():
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "license"} <= citation.keys()
    assert citation["version"] == anyorder.__version__
    assert any(reference.get("url", "").endswith("2601.13228") for reference in citation["references"])
