"""`anyorder eval`: tasks ask what they say, results survive a kill, mistakes are one clear error."""

from __future__ import annotations

import csv
import gzip
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from anyorder import load
from anyorder.cli import main
from anyorder.evaluation import questions, results, sources
from anyorder.evaluation.choice_tasks import HellaSwag, Lambada, Piqa, Siqa, WinoGrande
from anyorder.evaluation.story_tasks import StoryCloze, ThirdSentence
from anyorder.evaluation.task import Subject
from anyorder.evaluation.tasks import TASKS, task_of
from anyorder.evaluation.trivia import TriviaQa

STORY = {"sentences": ["Tom ran.", "He fell down.", "It hurt.", "He cried a bit.", "Mom came."]}
CLOZE = {f"InputSentence{n}": STORY["sentences"][n - 1] for n in range(1, 5)} | {
    "RandomFifthSentenceQuiz1": "He flew.", "RandomFifthSentenceQuiz2": "Mom came.", "AnswerRightEnding": "2"
}  # fmt: skip
RECORDS = {
    "hellaswag": [{"ctx": f"A {word} is", "endings": ["big.", "small.", "red."], "label": k % 3}
                  for k, word in enumerate(("cat", "dog", "house", "long road", "sea"))],
    "winogrande": [{"sentence": f"Ann met {who} so _ was glad.", "option1": "Ann", "option2": who, "answer": "2"}
                   for who in ("Bob", "Eve", "Old Joe")],
    "siqa": [{"context": "Al sat.", "question": "Why?", "options": ["tired", "bored", "sick"], "answer": "bored"}],
    "piqa": [{"goal": "sit", "sol1": "a chair", "sol2": "a knife", "label": 0}],
    "lambada": [{"text": "he went to the door and saw the dog"}, {"text": "one two three"}],
    "triviaqa": [{"question": "Who?", "golden_answers": ["me", "you"]}],
    "stories": [STORY, {"sentences": ["A.", "B b.", "It did.", "Oh.", "Ha."]}],
}  # fmt: skip


@pytest.fixture(scope="module")
def subject(checkpoint):
    return Subject(*load(str(checkpoint)))


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for name, records in RECORDS.items():
        (folder / f"{TASKS[name].file}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    return folder


def own_score(checkpoint, before, text):
    """log p of a text behind another, by the base model alone."""
    base, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), load(str(checkpoint))[1]
    pieces = Subject(*load(str(checkpoint))).pieces
    start = [pieces.start_token(), *tokenizer.encode(before, add_special_tokens=False)]
    new = tokenizer.encode(text, add_special_tokens=False)
    with torch.no_grad():
        log_p = base(torch.tensor([start + new])).logits[0, len(start) - 1 : -1].log_softmax(-1)
    return float(log_p.gather(1, torch.tensor(new)[:, None]).sum())


def test_left_to_right_scores_are_the_base_models_own(subject, checkpoint):
    (item,) = [HellaSwag().item(record) for record in RECORDS["hellaswag"][:1]]
    (result,) = HellaSwag().evaluate(subject, [item])
    expected = [own_score(checkpoint, "A cat is", f" {ending}") for ending in ("big.", "small.", "red.")]
    assert result["log_probs"] == pytest.approx(expected, abs=1e-4)
    assert result["accuracy"] == float(max(expected) == expected[0])
    lengths = [len(f" {ending}") for ending in ("big.", "small.", "red.")]
    normalised = [value / length for value, length in zip(expected, lengths, strict=True)]
    assert result["accuracy_normalised"] == float(max(normalised) == normalised[0])


def test_winogrande_scores_the_name_and_what_is_behind_it(subject, checkpoint):
    item = WinoGrande().item(RECORDS["winogrande"][0])
    (result,) = WinoGrande().evaluate(subject, [item])
    expected = [own_score(checkpoint, "Ann met Bob so", f" {who} was glad.") for who in ("Ann", "Bob")]
    assert result["log_probs"] == pytest.approx(expected, abs=1e-4)
    middle = [
        questions.answer(subject.model, [questions.of_pieces(subject.pieces, ("Ann met Bob so", who, " was glad."), 1)])
        for who in (" Ann", " Bob")
    ]
    assert result["accuracy_both_sides"] == float(middle[1] > middle[0])


def test_no_answer_depends_on_what_else_is_asked(subject):
    texts = ["a", "one two", "a much longer text than the others", "x y z"]
    asked = [questions.of_pieces(subject.pieces, (text, " and", " so on"), k % 3) for k, text in enumerate(texts)]
    together = questions.answer(subject.model, asked, tokens_at_once=60)
    alone = [questions.answer(subject.model, [one])[0] for one in asked]
    assert together == pytest.approx(alone, abs=1e-4)
    fills = questions.fill(subject.model, asked, subject.policy)
    assert fills == [questions.fill(subject.model, [one], subject.policy)[0] for one in asked]


def test_lambada_asks_for_the_last_word(subject, checkpoint):
    items = [Lambada().item(record) for record in RECORDS["lambada"]]
    found = Lambada().evaluate(subject, items)
    assert found[0]["nats"] == pytest.approx(
        -own_score(checkpoint, "he went to the door and saw the", " dog"), abs=1e-4
    )
    assert {one["accuracy"] for one in found} <= {0.0, 1.0}


def test_a_story_is_asked_from_one_side_and_from_both(subject):
    task = ThirdSentence()
    (result,) = task.evaluate(subject, [task.item(STORY)])
    parts = ["Tom ran.", " He fell down.", " It hurt.", " He cried a bit.", " Mom came."]
    both = questions.of_pieces(subject.pieces, parts, 2)
    one = questions.of_pieces(subject.pieces, parts[:3], 2)
    assert result["nats"] == pytest.approx(-questions.answer(subject.model, [both])[0], abs=1e-4)
    assert result["nats_prefix_only"] == pytest.approx(-questions.answer(subject.model, [one])[0], abs=1e-4)
    assert result["tokens"] == len(both.targets)
    assert result["reference"] == "It hurt."
    assert {"text", "text_prefix_only", "rougeL", "rougeL_prefix_only", "distinct_2"} <= result.keys()


def test_the_right_ending_of_a_story_cloze_row(subject, checkpoint):
    task = StoryCloze()
    story = task.item(CLOZE)
    assert (story.sentences[4], story.wrong_ending) == ("Mom came.", "He flew.")
    (result,) = task.evaluate(subject, [story])
    begin = " ".join(STORY["sentences"][:4])
    expected = [own_score(checkpoint, begin, ending) for ending in (" Mom came.", " He flew.")]
    assert result["log_probs"] == pytest.approx(expected, abs=1e-4)
    assert result["accuracy"] == float(expected[0] > expected[1])


def test_records_of_the_hub_have_columns_of_their_own():
    assert (
        Siqa()
        .item({"context": "c", "question": "q", "answerA": "a", "answerB": "b", "answerC": "d", "label": "3"})
        .right
        == 2
    )
    assert Siqa().item(RECORDS["siqa"][0]).right == 1
    assert TriviaQa().item({"question": "q", "answer": {"aliases": ["x"]}}).answers == ("x",)
    assert Piqa().item(RECORDS["piqa"][0]).before == "Question: sit\nAnswer:"


@pytest.mark.parametrize(
    ("task", "record", "message"),
    [
        (
            "hellaswag",
            {"ctx": "a", "label": 0},
            "task hellaswag needs the columns ctx, endings, label; endings is missing",
        ),
        ("hellaswag", {"ctx": "a", "endings": ["b"], "label": 1}, "the right answer is none of the 1"),
        ("siqa", RECORDS["siqa"][0] | {"answer": "happy"}, "the right answer is none of the 3"),
        ("winogrande", RECORDS["winogrande"][0] | {"sentence": "no blank"}, "no text behind the blank"),
        ("stories", {"sentences": ["one"]}, "a story has five sentences, got 1"),
        ("story_cloze", STORY, "needs a wrong ending"),
        ("story_cloze", CLOZE | {"AnswerRightEnding": "3"}, "AnswerRightEnding must be 1 or 2, got '3'"),
        ("lambada", {"text": "word"}, "is a single word"),
    ],
)
def test_records_that_do_not_fit(task, record, message):
    with pytest.raises(ValueError, match=message):
        task_of(task).item(record)


# ---------------------------------------------------------------------- the command


def evaluate(checkpoint, data, out, *more, tasks=("hellaswag", "stories")):
    return main(["eval", *tasks, "--model", str(checkpoint), "--data-dir", str(data), "--out", str(out), *more])


def test_every_task_runs_and_reports(checkpoint, data, tmp_path, capsys):
    with (data / "cloze.csv").open("w") as file:
        writer = csv.DictWriter(file, CLOZE)
        writer.writeheader()
        writer.writerow(CLOZE)
    own = ["--data", f"story_cloze={data / 'cloze.csv'}"]
    assert evaluate(checkpoint, data, tmp_path / "out", "--json", *own, tasks=[*RECORDS, "story_cloze"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {task: set(found) for task, found in report["tasks"].items()} == {
        task: set(TASKS[task].metrics) for task in [*RECORDS, "story_cloze"]
    }
    for task, found in report["tasks"].items():
        for one in found.values():
            assert one["low"] <= one["value"] <= one["high"]
            assert one["items"] == len(RECORDS.get(task, [CLOZE]))
    assert report["settings"]["command"].startswith("anyorder eval hellaswag")
    assert "| hellaswag | accuracy |" in (tmp_path / "out" / "report.md").read_text()


def test_a_run_that_was_killed_goes_on_and_counts_nothing_twice(checkpoint, data, tmp_path, monkeypatch, capsys):
    assert evaluate(checkpoint, data, tmp_path / "whole") == 0
    calls, task = [], type(task_of("hellaswag"))
    right = task.evaluate

    def killed(self, subject, items):
        calls.append(len(items))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return right(self, subject, items)

    monkeypatch.setattr(task, "evaluate", killed)
    assert evaluate(checkpoint, data, tmp_path / "out", "--batch-size", "2") == 130
    file = tmp_path / "out" / "hellaswag.jsonl"
    file.write_text(file.read_text() + '{"accuracy": 1.0, "accu')  # as a kill in the middle of a write leaves it
    assert evaluate(checkpoint, data, tmp_path / "out", "--batch-size", "2") == 0
    assert calls == [2, 2, 2, 1]
    for name in ("hellaswag.jsonl", "stories.jsonl"):
        one, other = (
            [json.loads(line) for line in (tmp_path / d / name).read_text().splitlines()] for d in ("out", "whole")
        )
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert a.keys() == b.keys()
            assert all(a[k] == pytest.approx(b[k], abs=1e-4) for k in a)
    monkeypatch.setattr("anyorder.cli.eval.load_ready", None)  # all is done: no model is needed
    assert evaluate(checkpoint, data, tmp_path / "out", "--batch-size", "3") == 0
    capsys.readouterr()


def test_two_runs_are_compared_item_by_item(checkpoint, data, tmp_path, capsys):
    assert evaluate(checkpoint, data, tmp_path / "one") == 0
    assert evaluate(checkpoint, data, tmp_path / "two", "--group-size", "4") == 0
    capsys.readouterr()
    assert main(["eval", "--compare", str(tmp_path / "one"), str(tmp_path / "two"), "--json"]) == 0
    rows = {(row["task"], row["metric"]): row for row in json.loads(capsys.readouterr().out)}
    a, b = (results.read_items(tmp_path / name, "stories") for name in ("one", "two"))
    nats = [sum(one["nats"] for one in run) / sum(one["tokens"] for one in run) for run in (a, b)]
    found = rows["stories", "nats_per_token"]
    assert found["value"] == pytest.approx(nats[1] - nats[0])
    assert found["items"] == 2
    assert main(["eval", "--compare", str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    assert "| stories | nats_per_token |" in capsys.readouterr().out
    settings = json.loads((tmp_path / "two" / "settings.json").read_text())
    settings["data"]["stories"] = "other"
    (tmp_path / "two" / "settings.json").write_text(json.dumps(settings))
    assert main(["eval", "--compare", str(tmp_path / "one"), str(tmp_path / "two")]) == 2
    assert "ran stories on different data" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["helaswag", "--out", "OUT"], "no task 'helaswag'; did you mean 'hellaswag'?"),
        (["hellaswag"], "name a task and --out DIR"),
        (["hellaswag", "--out", "OUT", "--policy", "grupwise", "--data", "hellaswag=GOOD"], "no policy 'grupwise'"),
        (["hellaswag", "--out", "OUT", "--data", "hellaswag"], "--data takes TASK=SOURCE, got 'hellaswag'"),
        (["hellaswag", "--out", "OUT", "--data", "piqa=x.jsonl"], "piqa is none of the tasks hellaswag"),
        (["hellaswag", "--out", "OUT", "--data", "hellaswag=none.jsonl"], "no such file: none.jsonl"),
        (["hellaswag", "--out", "OUT", "--data-dir", "."], "has no records of hellaswag: none of hellaswag_dev.jsonl"),
        (["stories", "--out", "OUT"], "the records of stories are not on the hub"),
        (["hellaswag", "--out", "OUT", "--data", "hellaswag=BAD"], "line 2: no JSON"),
        (["--compare", "OUT", "OUT"], "holds no evaluation: it has no settings.json"),
    ],
)  # fmt: skip
def test_mistakes_are_told_before_a_model_is_loaded(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("anyorder.cli.eval.load_ready", None)
    (tmp_path / "bad.jsonl").write_text(json.dumps(RECORDS["hellaswag"][0]) + "\n{oops\n")
    (tmp_path / "good.jsonl").write_text(json.dumps(RECORDS["hellaswag"][0]) + "\n")
    own = {
        "OUT": str(tmp_path / "out"),
        "hellaswag=GOOD": f"hellaswag={tmp_path / 'good.jsonl'}",
        "hellaswag=BAD": f"hellaswag={tmp_path / 'bad.jsonl'}",
    }
    assert main(["eval", *(own.get(one, one) for one in arguments)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_with_other_settings_is_left_alone(checkpoint, data, tmp_path, capsys):
    assert evaluate(checkpoint, data, tmp_path / "out", "--limit", "1") == 0
    before = (tmp_path / "out" / "report.json").read_text()
    assert evaluate(checkpoint, data, tmp_path / "out", "--limit", "2") == 2
    assert "holds a run with limit 1, not 2" in capsys.readouterr().err
    assert (tmp_path / "out" / "report.json").read_text() == before


def test_the_list_of_tasks(capsys):
    assert main(["eval", "--list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in TASKS)


def test_records_of_every_kind_of_file(tmp_path):
    records = [{"a": "1", "b": "x"}, {"a": "2", "b": "y"}]
    lines = "".join(json.dumps(one) + "\n" for one in records)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "a.json").write_text(json.dumps(records))
    (tmp_path / "a.csv").write_text("a,b\n1,x\n2,y\n")
    for name in ("a.jsonl", "a.jsonl.gz", "a.json", "a.csv"):
        assert sources.read_records(str(tmp_path / name))[0] == records
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "broken.jsonl.gz").write_bytes(b"no gzip")
    for name, message in (("empty.jsonl", "holds no record"), ("list.jsonl", "must be an object, got list"),
                          ("broken.jsonl.gz", "cannot be read")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            sources.read_records(str(tmp_path / name))
