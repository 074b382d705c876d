"""Help pages and versions: complete, quick and quiet."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest

from anyorder.cli import build_parser, main
from command_line import run

COMMANDS = ("convert", "adapt", "fit-lengths", "prepare", "generate", "infill", "score", "bench", "show", "plot")


def test_no_command_prints_the_help(capsys):
    code, out, _ = run(capsys)
    assert code == 2
    assert all(command in out for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_page_has_an_example(capsys, command):
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    assert f"example: anyorder {command} " in " ".join(capsys.readouterr().out.split())


def test_the_examples_of_the_help_pages_parse():
    parser = build_parser()
    subparsers = next(action for action in parser._actions if action.dest == "command")
    for command in COMMANDS:
        for line in subparsers.choices[command].epilog.splitlines():
            example = line.removeprefix("example: anyorder ")
            assert parser.parse_args(shlex.split(example)).command == command


@pytest.mark.parametrize(
    "arguments",
    [
        ["infill", "no blank"],
        ["infill", "x", "--policy", "dynamic:criterion=entropy", "--group-size", "2"],
        ["score", "a ___"],
        ["adapt", "--help"],
    ],
)
def test_help_and_mistakes_answer_without_importing_torch(arguments):
    code = f"import sys\nfrom anyorder.cli import main\ntry:\n    main({arguments})\nexcept SystemExit:\n    pass\n"
    code += "assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


def test_reading_a_policy_imports_nothing_heavy():
    code = "import sys; from anyorder.cli import build_parser; build_parser().parse_args(['generate', 'a', '--policy', "
    code += "'dynamic']); assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_standard_error_is_quiet(checkpoint):
    """No bars, no chatter of libraries: what is on standard error is for the user."""
    command = [sys.executable, "-m", "anyorder", "generate", "a", "--policy", "dynamic:step_size=2"]
    command += ["--max-new-tokens", "3", "--model", str(checkpoint)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_python_m_anyorder():
    done = subprocess.run([sys.executable, "-m", "anyorder", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("anyorder ")
