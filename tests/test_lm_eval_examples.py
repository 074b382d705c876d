"""The tasks under examples/lm_eval: each is read by the harness, and asks what `anyorder eval` asks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

lm_eval = pytest.importorskip("lm_eval", reason="the backend needs lm-eval: pip install 'anyorder[eval]'")
EXAMPLES = Path(__file__).parents[1] / "examples" / "lm_eval"
if not EXAMPLES.is_dir():  # the tests of an installed wheel may lie elsewhere
    pytest.skip("no examples beside the tests", allow_module_level=True)

RECORDS = {
    "hellaswag": [{"ctx": f"A {word} is", "endings": ["big.", "small.", "it's red."], "label": k}
                  for k, word in enumerate(("cat", "dog", "sea"))],
    "piqa": [{"goal": "sit", "sol1": f"a chair {k}", "sol2": "a \"knife\"", "label": k % 2} for k in range(3)],
    "siqa": [{"context": "Al sat.", "question": "Why?", "options": ["tired", "bo'red", "sick"], "answer": answer}
             for answer in ("bo'red", "sick", "tired")],
    "winogrande": [{"sentence": f"Ann met {who} so _ was glad.", "option1": "Ann", "option2": who, "answer": "2"}
                   for who in ("Bob", "Eve", "Old Joe")],
    "lambada": [{"text": text} for text in ("he went to the door and saw the dog", "one two three", "a b ")],
    "triviaqa": [{"question": f"Who {k}?", "golden_answers": ["me", "you"]} for k in range(3)],
}  # fmt: skip
LOCAL = [f"{name}_local" for name in RECORDS]


@pytest.fixture
def data(tmp_path, monkeypatch):
    """The directory that the harness runs in, with the records of all tasks."""
    for name, records in RECORDS.items():
        (tmp_path / f"{name}_dev.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)
    return tmp_path


def run(lm, *names):
    """The samples of each task, by document, and the results."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(EXAMPLES), include_defaults=False)
    found = lm_eval.simple_evaluate(
        lm, tasks=list(names), task_manager=manager, log_samples=True, bootstrap_iters=0, verbosity="ERROR"
    )
    samples = {name: sorted(found["samples"][name], key=lambda one: one["doc_id"]) for name in names}
    return samples, found["results"]


def test_every_example_is_tried_here():
    names = {file.stem for file in EXAMPLES.glob("*.yaml")} - {"opposites", "opposite_written"}  # with their own data
    assert names == set(LOCAL)


@pytest.mark.filterwarnings("ignore")
def test_local_tasks_ask_what_the_command_asks(backend, data):
    """Requests and right answers of all six tasks, and the scores of those by likelihood."""
    from anyorder.evaluation.task import Subject
    from anyorder.evaluation.tasks import task_of

    lm = backend(add_bos_token=True)  # as the command has it
    samples, results = run(lm, *LOCAL)
    subject = Subject(lm.model, lm.tokenizer)
    for name in ("hellaswag", "piqa", "siqa", "winogrande"):
        task = task_of(name)
        items = [task.item(record) for record in RECORDS[name]]
        expected = task.evaluate(subject, items)
        for sample, item, own in zip(samples[f"{name}_local"], items, expected, strict=True):
            pairs = [(one["arg_0"], one["arg_1"]) for one in sample["arguments"].values()] if isinstance(
                sample["arguments"], dict) else [tuple(one) for one in sample["arguments"]]  # fmt: skip
            assert pairs == [(item.before, answer + item.behind) for answer in item.answers]
            assert int(sample["target"]) == item.right
            scores = [float(one[0]) for (one,) in sample["resps"]]
            assert scores == pytest.approx(own["log_probs"], abs=1e-3)
            assert sample["acc"] == own["accuracy"]
    lambada = task_of("lambada")
    expected = lambada.evaluate(subject, [lambada.item(record) for record in RECORDS["lambada"]])
    for sample, own in zip(samples["lambada_local"], expected, strict=True):
        assert -float(sample["resps"][0][0][0]) == pytest.approx(own["nats"], abs=1e-3)
        assert sample["acc"] == own["accuracy"]
    assert [one["target"] for one in samples["triviaqa_local"]] == ["me"] * 3
    assert 0 <= results["triviaqa_local"]["acc,none"] <= 1


@pytest.mark.filterwarnings("ignore")
def test_the_question_given_each_answer(backend, data):
    """The same tasks with scored=context: which answer makes the question likeliest."""
    from anyorder.evaluation.task import Subject
    from anyorder.evaluation.tasks import task_of

    lm = backend(scored="context", add_bos_token=True)
    names = ("hellaswag", "piqa", "siqa")
    samples, _ = run(lm, *(f"{name}_local" for name in names))
    for name in names:
        task = task_of(name)
        expected = task.evaluate(Subject(lm.model, lm.tokenizer), [task.item(record) for record in RECORDS[name]])
        assert [one["acc"] for one in samples[f"{name}_local"]] == [one["accuracy_reversed"] for one in expected]


def test_containment_is_that_of_the_command():
    import importlib.util

    spec = importlib.util.spec_from_file_location("containment", EXAMPLES / "containment.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    doc = {"golden_answers": ["The Cat", "dog"]}
    assert module.process_results(doc, [" a cat, surely"]) == {"acc": 1.0}
    assert module.process_results(doc, ["scatter"]) == {"acc": 0.0}
