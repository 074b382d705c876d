"""What the commands do, as a user types them, on a tiny checkpoint."""

from __future__ import annotations

import io
import json
import sys

import pytest
import torch

from anyorder import AnyOrderForCausalLM, Factorization, Infiller, load
from anyorder.cli import main
from anyorder.infill.pieces import Pieces
from anyorder.runtime.runner import EagerRunner
from command_line import run


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
    several = json.loads(run(capsys, *arguments, "--length", "2-4", "auto", "--tries", 50)[1])
    best = Infiller(*load(str(checkpoint)))("a ___ b ___", length=[(2, 4), "auto"], tries=50)
    assert several["text"] == best.text
    assert several["log_prob"] == pytest.approx(best.log_prob)
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
def test_engines_are_asked_for(capsys, caplog, checkpoint, monkeypatch, command):
    asked = []

    def eager(model, weights):  # what engines do is tested where they are made
        asked.append(weights)
        return EagerRunner(model)

    monkeypatch.setattr("anyorder.runtime.engines._openvino", eager)
    for options in ((), ("--engine", "openvino", "--weights", "float32")):
        assert run(capsys, *command, "--model", checkpoint, *options)[0] == 0
        assert "compile" not in caplog.text
    assert run(capsys, *command, "--model", checkpoint, "--compile")[0] == 0
    assert "compile=True is now engine='openvino', and will go" in caplog.text
    assert asked == ["float32", "float32", "int8"]  # once to be ready


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
        monkeypatch.setattr(f"anyorder.cli.{command}.load_{'model' if command == 'score' else 'ready'}", None)
        pipe(monkeypatch, b"\n\n")
        assert run(capsys, command, "--lines") == (0, "\n\n", "")


# ---------------------------------------------------------------------- greedy, nothing, spaces


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
