"""HumanEval's missing lines: what is asked, how a line is judged, and that programs are shut in."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from anyorder import load
from anyorder.cli import main
from anyorder.evaluation import execution, questions
from anyorder.evaluation.code_tasks import (
    BLANK,
    FIM,
    AutoLength,
    BehindIndentation,
    FillInTheMiddle,
    LineEnds,
    PrefixOnly,
    SeveralLengths,
    SuffixFirst,
    TrueLength,
)
from anyorder.evaluation.task import Subject

RECORD = {
    "prompt": "def f(x):\n", "canonical_solution": "    y = x\n", "suffix": "    return y\n",
    "test": "def check(g):\n    assert g(3) == 3\n", "entry_point": "f",
}  # fmt: skip


@pytest.fixture(scope="module")
def subject(checkpoint):
    return Subject(*load(str(checkpoint)))


@pytest.fixture(scope="module")
def shut_in():
    try:
        execution.passes("pass")
    except ValueError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("task", [TrueLength(), AutoLength()])
def test_a_line_is_filled_between_what_stands_around_it(subject, task):
    item = task.item(RECORD)
    assert (item.prefix, item.line, item.suffix) == ("def f(x):\n", "    y = x", "\n    return y\n")
    (result,) = task.evaluate(subject, [item])
    asked = questions.of_pieces(subject.pieces, (item.prefix, item.line, item.suffix), 1)
    assert result["nats"] == pytest.approx(-questions.answer(subject.model, [asked])[0], abs=1e-4)
    assert result["tokens"] == len(asked.targets)
    assert "\n" not in result["text"]
    assert "pass_at_1" not in result
    if isinstance(task, TrueLength):
        assert len(subject.pieces.encode(result["text"])) <= result["tokens"]


@torch.no_grad()
def test_the_base_models_own_tokens_are_needed_for_its_fill_in_the_middle(subject, monkeypatch):
    task = FillInTheMiddle()
    with pytest.raises(ValueError, match="the base model has no <.fim_prefix.>"):
        task.evaluate(subject, [task.item(RECORD)])
    seen = []

    def generate(prompt, **options):
        seen.append(prompt[0].tolist())
        return torch.cat([prompt, torch.tensor([subject.pieces.encode("    y = x\nmore")])], dim=1)

    marks = dict(zip(FIM, (5, 6, 7), strict=True))
    monkeypatch.setattr(subject.tokenizer, "convert_tokens_to_ids", marks.get)
    monkeypatch.setattr(subject.model, "generate", generate)
    assert task.fill(subject, task.item(RECORD), 3) == "    y = x"
    prefix, suffix = (subject.pieces.encode(text, at_start=True) for text in (RECORD["prompt"], "\n    return y\n"))
    assert seen == [[5, *prefix, 6, *suffix, 7]]
    line = subject.pieces.encode("    y = x")
    (result,) = task.evaluate(subject, [task.item(RECORD)])  # how likely the line is behind the same prompt
    logits = subject.model.causal_lm(torch.tensor([[*seen[0], *line]])).logits[0, -len(line) - 1 : -1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(line)[:, None]).sum()
    assert result["nats"] == pytest.approx(-float(expected), abs=1e-4)


@pytest.mark.parametrize(
    ("task", "prompt"), [(PrefixOnly(), "def f(x):"), (SuffixFirst(), "    return y\n\ndef f(x):")]
)
@pytest.mark.parametrize("written", ["\n    y = x\nmore", "  # why\n    y = x\nmore"])
def test_a_left_to_right_model_goes_on_behind_a_prompt(subject, monkeypatch, task, prompt, written):
    """The line end in front of the line is its own to write: vocabularies join it with the indentation behind it."""
    item = task.item(RECORD)
    ids = [subject.pieces.start_token(), *subject.pieces.encode(prompt, at_start=True)]
    line = subject.pieces.encode("\n    y = x")
    expected = questions.Question((*ids, *line), tuple(range(len(ids), len(ids + line))), tuple(range(len(ids))))
    seen = []

    def generate(prompt, **options):
        seen.append(prompt[0].tolist())
        return torch.cat([prompt, torch.tensor([subject.pieces.encode(written)])], dim=1)

    monkeypatch.setattr(subject.model, "generate", generate)
    (result,) = task.evaluate(subject, [item])
    assert result["nats"] == pytest.approx(-questions.answer(subject.model, [expected])[0], abs=1e-4)
    assert result["text"] == "    y = x"
    assert result["exact_match"] == 1
    assert seen == [ids]


@pytest.mark.parametrize(("kind", "tries"), [(BehindIndentation, 1), (SeveralLengths, 16)])
@pytest.mark.parametrize(("line", "indentation"), [("    y = x\n", "    "), ("\ty = x\n", "\t"), ("y = x\n", "")])
def test_a_line_is_filled_behind_its_indentation(subject, monkeypatch, line, indentation, kind, tries):
    task, asked = kind(), []

    def infiller(text, **options):
        asked.append((text, options["length"], options["tries"]))
        return SimpleNamespace(spans=[SimpleNamespace(text="y = x")])

    monkeypatch.setattr(subject, "infiller", infiller)
    (result,) = task.evaluate(subject, [task.item(RECORD | {"canonical_solution": line})])
    assert asked == [(f"def f(x):\n{indentation}{BLANK}\n    return y\n", "auto", tries)]
    assert result["text"] == f"{indentation}y = x"
    assert result["exact_match"] == 1
    # Bytes are tokens here, each space its own; the last one in front of a word is the word's, as for blanks.
    before = f"def f(x):\n{indentation}"
    brings = subject.pieces.encode_before(before)[1]
    question = task.question(subject.pieces, task.item(RECORD | {"canonical_solution": line}))
    text = [subject.pieces.decode([question.ids[i] for i in question.targets])]
    assert text == [" " * brings + "y = x"]


def test_a_line_that_is_written_is_not_gone_on_behind(subject):
    prompt = subject.pieces.encode("x\ny")
    ends = LineEnds(subject.pieces, len(prompt))
    rows = [[*prompt, *subject.pieces.encode(text)] for text in ("ab c", "ab\n")]
    assert [bool(ends(torch.tensor([row]), None)) for row in rows] == [False, True]
    whole = subject.model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)
    stopped = subject.model.generate(
        torch.tensor([prompt]), max_new_tokens=20, do_sample=False, stopping_criteria=[ends]
    )
    line, same = (subject.pieces.decode(made[0, len(prompt) :].tolist()) for made in (whole, stopped))
    assert line.partition("\n")[0] == same.partition("\n")[0]


def test_several_lines_are_not_one():
    with pytest.raises(ValueError, match="fills one line"):
        TrueLength().item(RECORD | {"canonical_solution": "a\nb\n"})


def test_programs_are_judged_by_their_tests(shut_in):
    item = TrueLength().item(RECORD)
    assert item.passes("    y = x")
    assert not item.passes("    y = x + 1")
    assert not item.passes("    y = (")


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "x = bytearray(1 << 31)",
        "open('file', 'wb').write(b'0' * (1 << 22))",
        "import socket; socket.create_connection(('127.0.0.1', PORT), 1)",
    ],
)
def test_programs_are_shut_in(program, shut_in):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        socket.create_connection(("127.0.0.1", int(port)), 1).close()  # it is there, for us
        assert not execution.passes(program.replace("PORT", port), seconds=2)
    assert execution.passes("print('fine')")


def test_what_a_program_has_begun_ends_with_it(shut_in, monkeypatch):
    groups, kill = [], os.killpg
    monkeypatch.setattr(execution.os, "killpg", lambda group, sign: (groups.append(group), kill(group, sign)))
    execution.passes("import os, time\nif os.fork() == 0: time.sleep(60)")
    (group,) = groups
    for _ in range(100):  # until whoever takes over orphans has seen that it is dead
        try:
            kill(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    states = [
        Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
        for name in os.listdir("/proc")
        if name.isdigit()
    ]
    assert not [state for state in states if int(state[2]) == group and state[0] != "Z"]


def test_programs_are_run_only_where_the_user_says_so(checkpoint, tmp_path, capsys, monkeypatch):
    ran = []
    monkeypatch.setattr(execution, "passes", lambda program: ran.append(program) or True)
    (tmp_path / "lines.jsonl").write_text(json.dumps(RECORD) + "\n")
    arguments = ["eval", "humaneval_infilling", "--model", str(checkpoint), "--json",
                 "--data", f"humaneval_infilling={tmp_path / 'lines.jsonl'}"]  # fmt: skip
    assert main([*arguments, "--out", str(tmp_path / "not")]) == 0
    assert "pass_at_1" not in json.loads(capsys.readouterr().out)["tasks"]["humaneval_infilling"]
    assert not ran
    assert main([*arguments, "--out", str(tmp_path / "yes"), "--execute-code"]) == 0
    assert json.loads(capsys.readouterr().out)["tasks"]["humaneval_infilling"]["pass_at_1"]["value"] == 1
    (program,) = ran
    assert program.startswith("def f(x):\n")
    assert program.endswith("check(f)\n")
