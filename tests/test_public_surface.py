"""What others rely on, frozen: exported names, command-line options, the direction of imports."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

import anyorder
from anyorder.cli import build_parser

PACKAGE = Path(anyorder.__file__).parent


def test_exported_names():
    expected = ["AnyOrderConfig", "AnyOrderForCausalLM", "Factorization", "Infiller", "load", "policies"]
    assert anyorder.__all__ == expected
    for name in expected:
        assert getattr(anyorder, name) is not None
        assert name in dir(anyorder)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        anyorder.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("path", "name"),
    [("policies", "dynamic"), ("constraints", "Pattern"), ("revision", "revise"), ("modeling", "AnyOrderForCausalLM")],
)
def test_public_paths_hold(path, name):
    assert callable(getattr(importlib.import_module(f"anyorder.{path}"), name))


COMMON = {"--debug", "--help", "--json", "-h"}
DEVICE = {"--dtype", "--device", "--base-model"}
MODEL = {"--model", "--int8"} | DEVICE
TEXTS = {"--file", "--lines", "--ray", "--out"}
ORDER = {"--group-size", "--order", "--seed"}
SAMPLING = {"--sample", "--temperature", "--top-k", "--top-p", "--min-p", "--repetition-penalty", "--seed", "--compile"}
SAMPLING |= {"--engine", "--weights"}
WATCHING = {"--watch", "--trace"}
OPTIONS = {
    "adapt": COMMON
    | DEVICE
    | {
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
        "--coupling",
        "--coupling-only",
        "--scattered-only",
        "--training",
        "--streaming",
        "--objective",
        "--plan",
        "--devices",
        "--device-flops",
        "--utilisation",
    },
    "bench": COMMON
    | MODEL
    | {"--policies", "--greedy", "--temperature", "--top-p", "--batch-size", "--prompts", "--prompt-tokens"}
    | {"--new-tokens", "--prompt-file", "--against", "--seed", "--engines", "--uncoupled", "--warm-up"},
    "convert": COMMON | DEVICE | {"--recipe", "--overwrite"},
    "eval": COMMON
    | MODEL
    | {"--list", "--out", "--data-dir", "--data", "--limit", "--group-size", "--policy", "--batch-size", "--compare"}
    | {"--execute-code", "--orders", "--seed", "--temperature", "--judge", "--uncoupled", "--engine", "--weights"},
    "fit-lengths": COMMON | DEVICE | {"--train-file", "--blanks", "--seed"},
    "generate": COMMON
    | MODEL
    | TEXTS
    | SAMPLING
    | {"--chat", "--max-new-tokens", "--group-size", "--policy"}
    | WATCHING,
    "infill": COMMON
    | MODEL
    | TEXTS
    | SAMPLING
    | ORDER
    | {"--blank", "--chat", "--length", "--tries", "--special-tokens", "--policy", "--choice", "--pattern"}
    | {"--single-line", "--no-single-line"}
    | WATCHING,
    "plot": COMMON,
    "prepare": COMMON | DEVICE | {"--engine", "--weights", "--overwrite"},
    "score": COMMON | MODEL | TEXTS | ORDER | {"--blank", "--chat"},
    "serve": COMMON
    | MODEL
    | {
        "--engine",
        "--weights",
        "--host",
        "--port",
        "--api-keys",
        "--slots",
        "--context",
        "--waiting",
        "--timeout",
        "--patience",
    },
    "show": COMMON | ORDER | {"--blank", "--given", "--recipe"},
}


def test_no_new_command_line_options():
    """An option is added here, in its help text and in a test, or not at all."""
    subparsers = next(action for action in build_parser()._actions if action.dest == "command")
    found = {
        name: {option for action in parser._actions for option in action.option_strings}
        for name, parser in subparsers.choices.items()
    }
    assert found == OPTIONS
