"""What goes wrong on the command line: one line, exit code 2, and no other text lost."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from anyorder import load
from anyorder.cli import main
from command_line import run


def test_an_argument_that_cannot_be_used_loses_no_other(capsys, checkpoint):
    code, out, errors = run(capsys, "infill", "a ___", "b", "--model", checkpoint, "--length", 1)
    assert code == 2
    assert len(out.splitlines()) == 1
    assert errors.startswith("anyorder infill: error: text 2 of 2: no blank in 'b'")


BEFORE_A_MODEL = [
    (["infill", "no blank"], "no blank in 'no blank'"),
    (["infill", "a ___", "--file", "x"], "not both"),
    (["infill", "--file", "nowhere.txt"], "nowhere.txt"),
    (["infill", "a ___", "--lines"], "--lines is for --file"),
    (["infill", "a ___", "--length", "1", "2"], "2 lengths for 1 blanks"),
    (["infill", "a ___", "--pattern", ""], "empty"),
    (["infill", "a ___", "--choice", "b"], "at least two different strings"),
    (["infill", "a ___", "--blank", ""], "the blank marker is empty"),
    (["infill", "a ___", "--policy", "dynamic", "--group-size", "2"], "both say what a step commits"),
    (["infill", "a ___", "--policy", "dynamic", "--pattern", "x"], "--pattern is filled from left to right"),
    (["infill", "a ___", "--trace", "nowhere/t.json"], "there is no directory nowhere"),
    (["infill", "a ___", "--trace", "."], "--trace . is a directory"),
    (["infill", "a ___", "b ___", "--trace", "t.json"], "--trace takes one text, got 2"),
    (["infill", "a ___", "--chat", " "], "the message is empty"),
    (["infill", "a ___", "--pattern", "\udcff"], "--pattern is not UTF-8 text"),
    (["infill", "a ___", "--choice", "a", "\udcff"], "--choice is not UTF-8 text"),
    (["generate", "a", "--policy", "dynamic:step=3"], "did you mean 'step_size'"),
    (["generate", "a", "--policy", "speculative", "--group-size", "4"], "both say what a step commits"),
    (["generate", "a", "--temperature", "-1"], "temperature"),
    (["generate", "a", "--temperature", "nan"], "temperature"),
    (["generate", "a", "--top-p", "2"], "top_p"),
    (["generate", "a", "--trace", "nowhere/t.json"], "there is no directory nowhere"),
    (["generate", "--chat", ""], "the message is empty"),
    (["score", ""], "the text is empty"),
    (["score", "The ___ sat"], "anyorder infill --json fills it"),
    (["score", "\udcff"], "an argument is not UTF-8 text"),
    (["score", "\ud800"], "an argument is not UTF-8 text"),
    (["score", "a", "--chat", "\udcff"], "--chat is not UTF-8 text"),
    (["show", ""], "the text is empty"),
    (["show", "a b", "--given", "3"], "given must be between 1 and the length 2, got 3"),
    (["show", "a ___", "--given", "1"], "--given is for a text without blanks"),
]


@pytest.mark.parametrize(("arguments", "message"), BEFORE_A_MODEL)
def test_an_error_is_one_line_and_exit_code_2_before_a_model_is_loaded(capsys, monkeypatch, arguments, message):
    for command in ("infill", "generate", "score"):
        monkeypatch.setattr(f"anyorder.cli.{command}.load_{'model' if command == 'score' else 'ready'}", None)
    code, out, errors = run(capsys, *arguments)
    assert code == 2
    assert not out
    assert message in errors
    assert errors.startswith(f"anyorder {arguments[0]}: error: ")
    assert "\n" not in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["score", "a", "--model", "./nowhere"], "no model at './nowhere'"),
        (["score", "a", "--device", "banana"], "--device 'banana' cannot be used; this machine has cpu"),
        (["score", "a", "--device", "cuda:99"], "--device 'cuda:99' cannot be used"),
        (["convert", "./nowhere", "out"], "no model at './nowhere'"),
    ],
)
def test_a_model_or_device_that_is_not_there(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    code, out, errors = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert message in errors
    assert "\n" not in errors
    assert not list(tmp_path.iterdir())


def test_a_base_that_has_moved_is_named(capsys, tmp_path, checkpoint):
    base, run_ = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(checkpoint, base)
    model, tokenizer = load(str(base), adapter="gated")
    model.save_pretrained(run_)
    tokenizer.save_pretrained(run_)
    expected = run(capsys, "score", "a b", "--model", run_)
    base.rename(tmp_path / "moved")
    code, _, errors = run(capsys, "score", "a b", "--model", run_)
    assert code == 2
    assert "base_model=" in errors
    assert run(capsys, "score", "a b", "--model", run_, "--base-model", tmp_path / "moved") == expected


def test_a_mistyped_model_is_one_line_with_the_nearest_name():
    """In a process of its own: what libraries say beside it counts too."""
    command = [sys.executable, "-m", "anyorder", "score", "a", "--model", "smollm2-135"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "did you mean 'smollm2-135m'" in done.stderr


def test_errors_behind_loading_are_one_line_too(capsys, checkpoint):
    for arguments, message in (
        (["infill", "___" + "a" * 100], "the model's context is 64"),
        (["generate", "a", "--max-new-tokens", "100"], "the model's context is 64"),
        (["generate", "a", "--chat"], "the tokenizer has no chat template"),
    ):
        code, out, errors = run(capsys, *arguments, "--model", checkpoint)
        assert (code, out) == (2, "")
        assert message in errors.splitlines()[-1]
        assert "Traceback" not in errors


def test_a_trace_that_cannot_be_written_loses_no_text(capsys, checkpoint, tmp_path, monkeypatch):
    def fail(self, file):
        raise OSError("no space left")

    monkeypatch.setattr("anyorder.trace.record.Trace.save", fail)
    arguments = ("generate", "a b", "--model", checkpoint, "--max-new-tokens", 3)
    expected = run(capsys, *arguments)[1]
    assert run(capsys, *arguments, "--trace", tmp_path / "t.json") == (
        2,
        expected,
        "anyorder generate: error: no space left",
    )


# ---------------------------------------------------------------------- arguments, interrupts, pipes


def test_debug_shows_the_traceback(capsys):
    code, _, errors = run(capsys, "infill", "no blank", "--debug")
    assert code == 2
    assert "Traceback" in errors


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["infill", "a ___", "--length", "x"], ["score", "--group-size", "0"]]
)
def test_mistakes_in_arguments_are_one_line_too(capsys, arguments):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("moment", ["while a model is loaded", "while a text is filled"])
def test_an_interrupt_is_one_word(capsys, checkpoint, monkeypatch, moment):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    if moment == "while a model is loaded":
        monkeypatch.setattr("anyorder.cli.infill.load_ready", interrupt)
    else:
        monkeypatch.setattr("anyorder.infill.infiller.generate_from", interrupt)
    assert run(capsys, "infill", "a ___", "b ___", "--length", 1, "--model", checkpoint) == (130, "", "interrupted")


def test_a_closed_pipe_is_no_error(checkpoint: Path):
    command = f"{sys.executable} -m anyorder show 'a b c' | head -n 0"
    done = subprocess.run(
        ["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
