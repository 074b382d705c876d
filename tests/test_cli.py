"""The command line, as a user types it, on a tiny checkpoint."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from anyorder import AnyOrderForCausalLM, Factorization, Infiller, load
from anyorder.cli import build_parser, main
from anyorder.infill.pieces import Pieces
from anyorder.runtime.packages import ON_CPU
from command_line import run

COMMANDS = ("convert", "adapt", "generate", "infill", "score", "bench", "show", "plot")


def pipe(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="ascii"))


def test_infill(capsys, checkpoint):
    text = "a ___ b ___"
    code, out, _ = run(capsys, "infill", text, "--model", checkpoint, "--length", 2, 3, "--json")
    assert code == 0
    record = json.loads(out)
    expected = Infiller(*load(str(checkpoint)))(text, length=[2, 3])
    assert record["text"] == expected.text
    assert record["log_prob"] == pytest.approx(expected.log_prob)
    assert record["forwards"] == expected.forwards
    assert [span["text"] for span in record["spans"]] == [span.text for span in expected.spans]
    for span in record["spans"]:
        assert record["text"][span["start"] : span["end"]] == span["text"]
    code, out, _ = run(capsys, "infill", text, "--model", checkpoint, "--length", 2, 3)
    assert out == expected.text + "\n"


def test_infill_finds_lengths(capsys, checkpoint):
    arguments = ("infill", "a ___ b ___", "--model", checkpoint, "--json")
    record = json.loads(run(capsys, *arguments, "--length", "2-4", "auto")[1])
    expected = Infiller(*load(str(checkpoint)))("a ___ b ___", length=[(2, 4), "auto"])
    assert record["text"] == expected.text
    assert list(record["spans"][0]["lengths"]) == ["2", "3", "4"]
    for wrong in ("2-", "x", "0-3", "automatic"):
        with pytest.raises(SystemExit):
            main([*map(str, arguments), "--length", wrong])
        assert "is not a whole number from 1 up" in capsys.readouterr().err


def test_policies_are_chosen_by_name(capsys, checkpoint):
    arguments = ("generate", "a b", "--model", checkpoint, "--max-new-tokens", 9, "--json")
    plain = json.loads(run(capsys, *arguments)[1])
    fast = json.loads(run(capsys, *arguments, "--policy", "speculative:draft=ngram")[1])
    assert fast["text"] == plain["text"]
    assert fast["forwards"] <= plain["forwards"] == 9
    infill = ("infill", "a ___ b", "--model", checkpoint, "--length", 6, "--json")
    assert json.loads(run(capsys, *infill, "--policy", "dynamic:criterion=entropy,step_size=4")[1])["forwards"] == 2
    code, _, error = run(capsys, *arguments, "--policy", "speculative", "--group-size", 4)
    assert code == 2
    assert "--group-size 4 and --policy both say what a step commits" in error


def test_constraints_of_blanks(capsys, checkpoint):
    arguments = ("infill", "a ___ c", "--model", checkpoint, "--json")
    record = json.loads(run(capsys, *arguments, "--choice", "b", "ab ab")[1])
    assert record["spans"][0]["text"] in ("b", "ab ab")
    assert sum(record["spans"][0]["probabilities"].values()) == pytest.approx(1)
    record = json.loads(run(capsys, *arguments, "--length", 3, "--pattern", "[0-9]+")[1])
    assert record["spans"][0]["text"].isdigit()


def test_watching_and_drawing(capsys, checkpoint, tmp_path):
    file = tmp_path / "trace.json"
    arguments = ("infill", "a ___ c", "--model", checkpoint, "--length", 4, "--trace", file, "--watch")
    code, out, error = run(capsys, *arguments, "--policy", "dynamic:step_size=2")
    assert code == 0
    shown = [line for line in error.splitlines() if line.startswith("a")]
    assert shown[0] == "a···· c"
    assert [line.count("·") for line in shown] == [4, 2, 0]
    assert shown[-1] == out.strip()
    for kind in ("html", "png", "gif"):
        assert run(capsys, "plot", file, tmp_path / f"order.{kind}")[1].endswith("4 tokens in 2 steps\n")
        assert (tmp_path / f"order.{kind}").stat().st_size > 1000
    assert "no trace" in run(capsys, "plot", tmp_path / "order.html", tmp_path / "x.png")[2]
    two = run(capsys, "infill", "a ___", "b ___", "--model", checkpoint, "--trace", file)
    assert "--trace takes one text, got 2" in two[2]


def test_a_policy_that_does_not_exist_is_told_at_once(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "a", "--policy", "dynamic:step=3"])
    assert "did you mean 'step_size'" in capsys.readouterr().err


def test_several_texts_give_one_object_a_line(capsys, checkpoint):
    code, out, _ = run(capsys, "infill", "a ___", "___ b", "--model", checkpoint, "--length", 1, "--json")
    assert code == 0
    assert len([json.loads(line) for line in out.splitlines()]) == 2


def test_generate(capsys, checkpoint):
    arguments = ("generate", "a b", "--model", checkpoint, "--max-new-tokens", 5, "--json")
    record = json.loads(run(capsys, *arguments)[1])
    model, tokenizer = load(str(checkpoint))
    ids = torch.tensor([tokenizer.encode("a b")])
    tokens = model.causal_lm.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
    assert record["continuation"] == tokenizer.decode(tokens, skip_special_tokens=True)
    assert record["text"] == "a b" + record["continuation"]
    assert record["tokens"] == len(tokens)
    grouped = json.loads(run(capsys, *arguments, "--group-size", 5)[1])
    assert grouped["forwards"] == 1


def test_sampling_is_seeded_and_each_text_has_its_own_seed(capsys, checkpoint):
    arguments = ("generate", "--model", checkpoint, "--max-new-tokens", 8, "--temperature", 1.5)
    first = run(capsys, *arguments, "a", "b", "--seed", 3)[1]
    assert run(capsys, *arguments, "a", "b", "--seed", 3)[1] == first
    assert run(capsys, *arguments, "b", "--seed", 4)[1] == first.split("\nb", 1)[1].join(["b", ""])
    assert run(capsys, *arguments, "a", "b", "--seed", 5)[1] != first


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of Inductor's own imports
def test_compiled_code_gives_the_same_text(capsys, checkpoint, code_cache, monkeypatch):
    monkeypatch.setitem(ON_CPU, "max_autotune", False)
    arguments = ["infill", "a ___ b", "--model", checkpoint, "--length", 4, "--group-size", 2, "--json"]
    _, eager, _ = run(capsys, *arguments)
    before = set(code_cache.glob("compiled/*/*"))
    code, compiled, error = run(capsys, *arguments, "--compile")
    assert code == 0, error
    assert json.loads(compiled)["text"] == json.loads(eager)["text"]
    assert set(code_cache.glob("compiled/*/*")) > before


def test_score(capsys, checkpoint):
    record = json.loads(run(capsys, "score", "a b é", "--model", checkpoint, "--json")[1])
    model, tokenizer = load(str(checkpoint))
    ids = torch.tensor([[Pieces(tokenizer).start_token(), *tokenizer.encode("a b é")]])
    expected = float(model.log_likelihood(ids, Factorization.left_to_right(ids.shape[1])).sum())
    assert record["log_prob"] == pytest.approx(expected)
    assert record["tokens"] == ids.shape[1] - 1
    assert record["nats_per_token"] == pytest.approx(-expected / record["tokens"])
    assert record["bits_per_byte"] == pytest.approx(-expected / 6 / torch.log(torch.tensor(2.0)).item())
    random = json.loads(
        run(capsys, "score", "a b é", "--model", checkpoint, "--json", "--order", "random", "--seed", 1)[1]
    )
    assert random["log_prob"] != record["log_prob"]
    assert "nats a token" in run(capsys, "score", "a b", "--model", checkpoint)[1]


def test_show_loads_no_model(capsys):
    code, out, _ = run(capsys, "show", "The cat ___ ___", "--group-size", 2)
    assert code == 0
    assert "0  ==##  '?2' '?3'" in out
    assert "query    ?3           w" in out
    record = json.loads(run(capsys, "show", "a b c", "--order", "random", "--seed", 2, "--json")[1])
    assert sorted(record["group_ids"]) == [-1, 0, 1]
    assert run(capsys, "show", " ")[0] == 2


def test_convert_writes_a_model_that_loads(capsys, checkpoint, tmp_path):
    code, out, _ = run(capsys, "convert", checkpoint, tmp_path / "new", "--dtype", "bfloat16", "--json")
    assert code == 0
    record = json.loads(out)
    assert record["greatest_logit_difference"] < 0.1
    model = AnyOrderForCausalLM.from_pretrained(tmp_path / "new")
    assert record["parameters"] == sum(p.numel() for p in model.parameters())
    assert run(capsys, "infill", "a ___", "--length", 1, "--model", tmp_path / "new")[0] == 0
    code, _, errors = run(capsys, "convert", checkpoint, tmp_path / "new")
    assert code == 2
    assert "exists and is not empty" in errors
    assert run(capsys, "convert", checkpoint, tmp_path / "new", "--overwrite", "--recipe", "paper")[0] == 0
    assert run(capsys, "convert", tmp_path / "new", tmp_path / "copy")[0] == 0
    code, _, errors = run(capsys, "convert", checkpoint, tmp_path / "new" / "config.json", "--overwrite")
    assert (code, "is a file; choose a directory" in errors) == (2, True)
    assert AnyOrderForCausalLM.from_pretrained(tmp_path / "new").recipe == "paper"


def test_texts_come_from_files_and_standard_input(capsys, checkpoint, tmp_path, monkeypatch):
    options = ("--model", checkpoint, "--length", 1, "--json")
    (tmp_path / "t.txt").write_bytes("é\r\n___\r\n".encode())
    assert json.loads(run(capsys, "infill", "--file", tmp_path / "t.txt", *options)[1])["text"].startswith("é\r\n")
    pipe(monkeypatch, "ü ___\n".encode())
    assert json.loads(run(capsys, "infill", *options)[1])["text"].startswith("ü ")
    pipe(monkeypatch, b"a ___")
    assert json.loads(run(capsys, "infill", "-", *options)[1])["text"].startswith("a ")
    pipe(monkeypatch, "a ___\r\nb\u2028___\x0cc\n".encode())
    first, second = map(json.loads, run(capsys, "infill", "--lines", *options)[1].strip().split("\n"))
    assert first["text"].startswith("a ")
    assert second["text"].startswith("b\u2028")
    pipe(monkeypatch, b"a ___\n\nb ___\n")
    assert "no blank in ''" in run(capsys, "infill", "--lines", *options)[2]
    pipe(monkeypatch, b"a ___\n\nb ___\n")
    assert "(text 2 of 3)" in run(capsys, "infill", "--lines", *options)[2]
    pipe(monkeypatch, b"\xff")
    assert "standard input is not UTF-8 text" in run(capsys, "infill", *options)[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["infill", "no blank"], "no blank in 'no blank'"),
        (["infill", "a ___", "--model", "./nowhere"], "no model at './nowhere'"),
        (["infill", "a ___", "--file", "x"], "not both"),
        (["infill", "--file", "nowhere.txt"], "nowhere.txt"),
        (["infill", "a ___", "--lines"], "--lines is for --file"),
        (["show", ""], "the text is empty"),
        (["score", "\udcff"], "an argument is not UTF-8 text"),
        (["score", "a", "--device", "nonsense"], "nonsense"),
        (["show", "a b", "--given", "3"], "given must be between 1 and the length 2, got 3"),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(capsys, arguments, message):
    code, out, errors = run(capsys, *arguments)
    assert code == 2
    assert not out
    assert message in errors
    assert errors.startswith(f"anyorder {arguments[0]}: error: ")
    assert "\n" not in errors


def test_errors_behind_loading_are_one_line_too(capsys, checkpoint, tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"\xff ___")
    for arguments, message in (
        (["infill", "a ___", "--temperature", "0"], "temperature is 0"),
        (["infill", "a ___", "--length", "1", "2"], "2 lengths for 1 blanks"),
        (["infill", "___" + "a" * 100], "the model's context is 64"),
        (["infill", "--file", tmp_path / "bad.txt"], "is not UTF-8 text"),
        (["score", ""], "the text is empty"),
        (["generate", "a", "--max-new-tokens", "100"], "the model's context is 64"),
        (["generate", "a", "--device", "nonsense"], "nonsense"),
    ):
        code, _, errors = run(capsys, *arguments, "--model", checkpoint)
        assert code == 2
        assert message in errors.splitlines()[-1]
        assert "Traceback" not in errors


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
    import shlex

    parser = build_parser()
    subparsers = next(action for action in parser._actions if action.dest == "command")
    for command in COMMANDS:
        example = subparsers.choices[command].epilog.removeprefix("example: anyorder ")
        assert parser.parse_args(shlex.split(example)).command == command


def test_help_and_mistakes_answer_without_importing_torch():
    code = "import sys; from anyorder.cli import main; main(['infill', 'no blank']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "no blank" in done.stderr


def test_python_m_anyorder():
    done = subprocess.run([sys.executable, "-m", "anyorder", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("anyorder ")


def test_a_closed_pipe_is_no_error(checkpoint: Path):
    command = f"{sys.executable} -m anyorder show 'a b c' | head -n 0"
    done = subprocess.run(
        ["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
