"""The command line, as a user types it, on a tiny checkpoint."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from anyorder import AnyOrderForCausalLM, Factorization, Infiller, load
from anyorder.cli import build_parser, main
from anyorder.infill.pieces import Pieces
from command_line import run

COMMANDS = ("convert", "adapt", "fit-lengths", "generate", "infill", "score", "bench", "show", "plot")


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
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    assert text.startswith(record["continuation"])  # but for bytes at the end that are no whole character
    assert not text.removeprefix(record["continuation"]).strip("\ufffd")
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


@pytest.mark.parametrize("command", [("generate", "a b", "--max-new-tokens", 3), ("infill", "a ___ b")])
def test_compiled_code_is_asked_for(capsys, checkpoint, monkeypatch, command):
    asked, generate = [], AnyOrderForCausalLM.generate

    def eager(self, *arguments, compile=False, **options):  # what compiled code does is tested where it is made
        asked.append(compile)
        return generate(self, *arguments, **options)

    monkeypatch.setattr(AnyOrderForCausalLM, "generate", eager)
    assert run(capsys, *command, "--model", checkpoint, "--compile")[0] == 0
    assert asked[-1]
    assert run(capsys, *command, "--model", checkpoint)[0] == 0
    assert not asked[-1]


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


def test_every_command_knows_the_same_blanks(capsys):
    """`show` and `score` find what `infill` fills."""
    for text, blanks in (("The cat ___.", ["?2"]), ("a______b c", ["?1"]), ("___ a ___", ["?0", "?2"])):
        out = run(capsys, "show", text)[1]
        assert [name for name in ("?0", "?1", "?2", "?3") if name in out] == blanks
        assert run(capsys, "score", text)[0] == 2
    assert "?1" in run(capsys, "show", "a [?] ___", "--blank", "[?]")[1]
    assert "'___'" in run(capsys, "show", "a [?] ___", "--blank", "[?]")[1]


def test_underscores_that_are_no_blank_are_scored_with_another_mark(capsys, checkpoint):
    code, out, _ = run(capsys, "score", "a ___ b", "--blank", "[?]", "--model", checkpoint, "--json")
    assert code == 0
    assert json.loads(out)["tokens"] == 6


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
    pipe(monkeypatch, b"\xff")
    assert "standard input is not UTF-8 text" in run(capsys, "infill", *options)[2]


@pytest.mark.parametrize(
    ("command", "lines", "bad"),
    [
        (("infill", "--length", "1"), ["a ___", "", "b", "c ___"], "no blank in 'b'"),
        (("score",), ["a", "", "b ___", "c"], "the text has a blank (___)"),
        (("generate", "--max-new-tokens", "2"), ["a", "", "a" * 100, "c"], "the model's context is 64"),
    ],
)
def test_a_line_that_cannot_be_used_loses_no_other(capsys, checkpoint, monkeypatch, command, lines, bad):
    """One rule: every line in gives one result out, in order; an empty line an empty one."""
    command = (*command, "--lines", "--model", checkpoint)
    alone = []
    for line in (lines[0], lines[3]):
        pipe(monkeypatch, line.encode())
        alone.append(json.loads(run(capsys, *command, "--json")[1]))
    pipe(monkeypatch, "\n".join(lines).encode())
    code, out, errors = run(capsys, *command, "--json")
    records = list(map(json.loads, out.splitlines()))
    assert code == 2
    assert records[:2] + records[3:] == [alone[0], {"text": ""}, alone[1]]
    assert bad in records[2]["error"]
    assert records[2]["text"] == lines[2]
    assert errors == f"anyorder {command[0]}: error: line 3: {records[2]['error']}"
    pipe(monkeypatch, "\n".join(lines).encode())
    code, out, errors = run(capsys, *command)
    assert code == 2
    if command[0] != "generate":  # whose lines may have line ends
        assert [bool(line) for line in out.splitlines()] == [True, False, False, True]


def test_lines_that_are_all_empty_load_no_model(capsys, monkeypatch):
    for command in ("infill", "score", "generate"):
        monkeypatch.setattr(f"anyorder.cli.{command}.load_model", None)
        pipe(monkeypatch, b"\n\n")
        assert run(capsys, command, "--lines") == (0, "\n\n", "")


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
        monkeypatch.setattr(f"anyorder.cli.{command}.load_model", None)
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


# ---------------------------------------------------------------------- greedy, nothing, chat


def test_temperature_zero_takes_the_most_likely(capsys, checkpoint):
    arguments = ("generate", "a b", "--model", checkpoint, "--max-new-tokens", 6, "--seed", 5)
    greedy = run(capsys, *arguments)[1]
    assert run(capsys, *arguments, "--temperature", 0)[1] == greedy
    assert run(capsys, *arguments, "--temperature", 0, "--top-p", 0.5, "--sample")[1] == greedy
    assert run(capsys, *arguments, "--temperature", 3)[1] != greedy


def test_no_new_tokens(capsys, checkpoint):
    code, out, _ = run(capsys, "generate", "a b", "--model", checkpoint, "--max-new-tokens", 0, "--json")
    record = json.loads(out)
    assert (code, record["text"], record["continuation"], record["tokens"]) == (0, "a b", "", 0)


def test_a_prompts_last_space_is_not_doubled(capsys, checkpoint):
    for prompt in ("a b ", "def f(x):\n    ", "a\n", " "):
        arguments = ("generate", prompt, "--model", checkpoint, "--max-new-tokens", 3, "--json")
        record = json.loads(run(capsys, *arguments)[1])
        assert record["text"] == prompt + record["continuation"]
        assert not (prompt.endswith(" ") and record["continuation"].startswith(" "))


TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'refused' %}{{ raise_exception('not this one') }}{% endif %}"
    "<s>{{ m.role[0] }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<s>a: {% endif %}"
)


@pytest.fixture(scope="module")
def instruct(checkpoint, tmp_path_factory):
    """The checkpoint with a chat template."""
    directory = tmp_path_factory.mktemp("instruct") / "model"
    shutil.copytree(checkpoint, directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    return directory


def test_chat_answers_a_message(capsys, instruct):
    model, tokenizer = load(str(instruct))
    ids = tokenizer.encode("<s>u: hello ___\n<s>a: ")
    expected = model.causal_lm.generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False)[0, len(ids) :]
    arguments = ("generate", "--chat", "hello ___", "--model", instruct, "--max-new-tokens", 5)
    record = json.loads(run(capsys, *arguments, "--json")[1])
    assert record["text"] == record["continuation"]
    assert record["tokens"] == len(expected)
    assert record["text"] == tokenizer.decode(expected, skip_special_tokens=True).rstrip("\ufffd")
    assert run(capsys, *arguments)[1] == record["text"] + "\n"
    code, _, errors = run(capsys, "generate", "refused", "--chat", "--model", instruct)
    assert code == 2
    assert "the chat template does not take these messages: not this one" in errors


def test_blanks_in_an_answer(capsys, instruct):
    text = "b ___ c"
    arguments = ("infill", text, "--model", instruct, "--length", 3, "--json")
    record = json.loads(run(capsys, *arguments, "--chat", "what ___")[1])
    messages = [{"role": "user", "content": "what ___"}]
    filled = Infiller(*load(str(instruct)), messages=messages)(text, length=3)
    assert record["text"] == filled.text
    assert record["text"].startswith("b ")
    assert record["log_prob"] == pytest.approx(filled.log_prob)
    assert record["log_prob"] != json.loads(run(capsys, *arguments)[1])["log_prob"]


def test_a_fill_of_an_answer_is_scored_behind_the_message(instruct):
    """Exactly: the blank's log-probability is the model's own of these tokens behind the template's."""
    model, tokenizer = load(str(instruct))
    messages = [{"role": "user", "content": "what"}]
    filled = Infiller(model, tokenizer, messages=messages)("b c___", length=3)
    start = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    ids = torch.tensor([[*start, *filled.ids]])
    order = Factorization.left_to_right(ids.shape[1], given=ids.shape[1] - 3)
    assert filled.log_prob == pytest.approx(float(model.log_likelihood(ids, order).sum()), abs=1e-5)
    assert tokenizer.decode(filled.ids) == filled.text


def test_score_of_an_answer(capsys, instruct):
    model, tokenizer = load(str(instruct))
    start, own = tokenizer.encode("<s>u: hello\n<s>a: "), tokenizer.encode("a b")
    order = Factorization.left_to_right(len(start) + len(own), given=len(start))
    expected = float(model.log_likelihood(torch.tensor([start + own]), order).sum())
    record = json.loads(run(capsys, "score", "a b", "--chat", "hello", "--model", instruct, "--json")[1])
    assert record["log_prob"] == pytest.approx(expected)
    assert record["tokens"] == len(own)


def test_a_model_that_ends_at_once_says_so(capsys, checkpoint, instruct, monkeypatch):
    generate = AnyOrderForCausalLM.generate

    def end_at_once(self, ids, **options):
        output = generate(self, ids, **{**options, "max_new_tokens": 1})
        output.sequences[0, -1] = 2
        return output

    monkeypatch.setattr(AnyOrderForCausalLM, "generate", end_at_once)
    code, out, errors = run(capsys, "generate", "a b", "--model", instruct)
    assert (code, out) == (0, "a b\n")
    assert errors == "anyorder generate: the model ended at once; it was trained to answer messages: --chat asks it so"
    assert run(capsys, "generate", "a b", "--model", checkpoint)[2].endswith("the model ended at once")
    assert run(capsys, "generate", "a b", "--chat", "--model", instruct)[2].endswith("the model ended at once")


@pytest.mark.smollm2
def test_the_built_in_model_answers(capsys, smollm2, monkeypatch):
    monkeypatch.setattr("anyorder.cli.generate.load_model", lambda options: smollm2)
    assert "Paris" in run(capsys, "generate", "--chat", "What is the capital of France?")[1]


# ---------------------------------------------------------------------- the parser


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


@pytest.mark.parametrize("moment", ["while a model is loaded", "while a text is filled"])
def test_an_interrupt_is_one_word(capsys, checkpoint, monkeypatch, moment):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    if moment == "while a model is loaded":
        monkeypatch.setattr("anyorder.cli.infill.load_model", interrupt)
    else:
        monkeypatch.setattr(AnyOrderForCausalLM, "generate", interrupt)
    assert run(capsys, "infill", "a ___", "b ___", "--length", 1, "--model", checkpoint) == (130, "", "interrupted")


def test_a_closed_pipe_is_no_error(checkpoint: Path):
    command = f"{sys.executable} -m anyorder show 'a b c' | head -n 0"
    done = subprocess.run(
        ["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
