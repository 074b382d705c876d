"""What a release needs: checks before an upload, one version in all files, a site that has all pages and names."""

from __future__ import annotations

import re

import pytest

import anyorder
from anyorder import constraints, policies, revision
from pages import ROOT, pages, resolve

WORKFLOW = ROOT / ".github" / "workflows" / "release.yml"
if not (ROOT / "mkdocs.yml").exists():  # the tests of an installed wheel may lie elsewhere
    pytest.skip("no repository around the tests", allow_module_level=True)


@pytest.fixture
def workflow():
    if not WORKFLOW.exists():
        pytest.skip("a source distribution has no workflow")
    return pytest.importorskip("yaml").safe_load(WORKFLOW.read_text())


def test_checks_run_before_anything_is_uploaded(workflow):
    assert workflow[True] == {"push": {"tags": ["v*"]}}  # YAML reads `on` so
    build, publish = workflow["jobs"]["build"], workflow["jobs"]["publish"]
    runs = [step["run"] for step in build["steps"] if "run" in step]
    made = [run.removeprefix("make ") for run in runs if run.startswith("make ")]
    assert made.index("test") < made.index("release-check") == len(made) - 1
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(made) <= set(targets)
    assert publish["needs"] == "build"


def test_no_secret_and_one_right_to_publish(workflow):
    assert "secrets." not in WORKFLOW.read_text()
    assert workflow["permissions"] == {"contents": "read"}
    assert "permissions" not in workflow["jobs"]["build"]
    assert workflow["jobs"]["publish"]["permissions"] == {"id-token": "write"}


def test_the_changelog_begins_with_this_version():
    (first, *_) = re.findall(
        r"^## ([\w.]+), (?:unreleased|\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.M
    )
    assert first == anyorder.__version__


def test_the_site_has_every_page_once():
    menu = re.findall(r"[\w./-]+\.md\b", (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")[1])
    assert len(menu) == len(set(menu))
    assert set(menu) == {str(page.relative_to(ROOT)) for page in pages()}


def test_the_reference_names_all_that_is_public():
    text = (ROOT / "docs" / "reference.md").read_text()
    directives = re.findall(r"^::: anyorder\.([\w.]+)\n((?: +.*\n)*)", text, re.M)
    assert len(directives) > 20
    for name, options in directives:
        found = resolve(name)
        for member in re.findall(r"\w+", "".join(re.findall(r" members: \[(.*)\]", options))):
            assert hasattr(found, member) or member in found.__annotations__, f"{name}.{member}"
    named = set(re.findall(r"\w+", text))
    for module in (anyorder, constraints, policies, revision):
        assert set(module.__all__) <= named, set(module.__all__) - named
