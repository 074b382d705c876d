"""What others rely on, frozen: exported names, command-line options, the direction of imports."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import anyorder
from anyorder.cli import build_parser

PACKAGE = Path(anyorder.__file__).parent

# Lower modules first. A module imports only from lines above its own, at the top of its file; what lies inside a
# function (the public face of a class, cheap start-up) and what is for type checkers alone may look down.
LAYERS = [
    ["__init__", "template", "options", "randomness"],
    ["factorization"],
    ["layout", "inputs"],
    ["cache"],
    ["attention", "configuration", "support", "head", "adapters"],
    ["checkpoint"],
    ["modeling"],
    ["sources", "reference", "sampling", "pieces", "constraints", "lengths"],
    ["blanks", "aot"],
    ["compiled"],
    ["loop"],
    ["policies.base"],
    ["policies.groupwise", "policies.dynamic", "policies.drafts"],
    ["policies.speculative"],
    ["policies"],
    ["scoring", "decoding", "choices"],
    ["infilling", "revision", "trace"],
    ["training.curriculum"],
    ["training.texts", "training.curves", "training.checkpoints", "training.plan"],
    ["training.data"],
    ["training.trainer", "training.heldout"],
    ["training", "training.adapt"],
    ["bench.decoders", "bench.quality"],
    ["bench.measure", "bench.report"],
    ["bench", "bench.run"],
    ["cli.options"],
    ["cli.commands"],
    ["cli"],
    ["__main__"],
]


def test_exported_names():
    expected = ["AnyOrderConfig", "AnyOrderForCausalLM", "Factorization", "Infiller", "load", "policies"]
    assert anyorder.__all__ == expected
    for name in expected:
        assert getattr(anyorder, name) is not None
        assert name in dir(anyorder)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        anyorder.nothing  # noqa: B018


def test_importing_the_package_is_cheap():
    code = "import sys, anyorder; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


MODULES = sorted(m.name.removeprefix("anyorder.") for m in pkgutil.walk_packages([str(PACKAGE)], "anyorder."))
FILES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "__init__" if parts == ("__init__",) else ".".join(p for p in parts if p != "__init__")


@pytest.mark.parametrize("name", MODULES)
def test_every_module_imports_alone_and_says_what_it_is(name):
    if name != "__main__":
        assert importlib.import_module(f"anyorder.{name}").__doc__
    assert [name in layer for layer in LAYERS].count(True) == 1


def test_imports_point_one_way():
    height = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("anyorder"):
                for name in imported(node, height):
                    assert height[name] < height[module_name(path)], f"{path.name} imports {name}"


def test_training_and_decoding_do_not_import_each_other():
    for path in FILES:
        text = path.read_text()
        if "training" in path.parts:
            assert "anyorder.decoding" not in text
        elif path.stem in ("decoding", "loop", "sampling") or "policies" in path.parts:
            assert "anyorder.training" not in text


def imported(node: ast.ImportFrom, known: dict[str, int]) -> list[str]:
    """The modules that `from module import names` loads: the names themselves, where they are modules."""
    module = (node.module or "").partition(".")[2]
    names = [f"{module}.{alias.name}".removeprefix(".") for alias in node.names]
    return [name if name in known else module or "__init__" for name in names]


def test_files_and_functions_stay_readable():
    for path in FILES:
        source = path.read_text()
        assert len(source.splitlines()) <= 430, path.name
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path.name}: {node.name}"


COMMON = {"--debug", "--help", "--json", "-h"}
MODEL = {"--model", "--dtype", "--device", "--int8"}
TEXTS = {"--file", "--lines"}
ORDER = {"--group-size", "--order", "--seed"}
SAMPLING = {"--sample", "--temperature", "--top-k", "--top-p", "--min-p", "--repetition-penalty", "--seed", "--compile"}
WATCHING = {"--watch", "--trace"}
OPTIONS = {
    "adapt": COMMON
    | {
        "--dtype",
        "--device",
        "--attn-implementation",
        "--train-file",
        "--curriculum",
        "--adapter",
        "--rank",
        "--recipe",
        "--tokens",
        "--length",
    }
    | {"--document-length", "--batch-size", "--accumulate", "--learning-rate", "--warmup-steps", "--save-every"}
    | {
        "--log-every",
        "--seed",
        "--resume",
        "--eval-file",
        "--eval-every",
        "--eval-documents",
        "--mixture",
        "--training",
        "--streaming",
        "--plan",
        "--devices",
        "--device-flops",
        "--utilisation",
    },
    "bench": COMMON
    | MODEL
    | {"--policies", "--greedy", "--temperature", "--top-p", "--batch-size", "--prompts", "--prompt-tokens"}
    | {"--new-tokens", "--prompt-file", "--against", "--seed", "--compile"},
    "convert": COMMON | {"--recipe", "--dtype", "--device", "--overwrite"},
    "generate": COMMON | MODEL | TEXTS | SAMPLING | {"--max-new-tokens", "--group-size", "--policy"} | WATCHING,
    "infill": COMMON
    | MODEL
    | TEXTS
    | SAMPLING
    | ORDER
    | {"--blank", "--length", "--special-tokens", "--policy", "--choice", "--pattern"}
    | WATCHING,
    "plot": COMMON,
    "score": COMMON | MODEL | TEXTS | ORDER,
    "show": COMMON | ORDER | {"--given", "--recipe"},
}


def test_no_new_command_line_options():
    """An option is added here, in its help text and in a test, or not at all."""
    subparsers = next(action for action in build_parser()._actions if action.dest == "command")
    found = {
        name: {option for action in parser._actions for option in action.option_strings}
        for name, parser in subparsers.choices.items()
    }
    assert found == OPTIONS
