"""Multiple choice by exact likelihood: HellaSwag, WinoGrande, SIQA, PIQA, and the last word of LAMBADA.

`accuracy` is the protocol of DiffuLLaMA's evaluation (arXiv 2410.17891), which A3 follows: the answer whose tokens are
likeliest given the question, from left to right; `accuracy_normalised` divides by characters. The others ask what only
a model of any order can answer exactly: `accuracy_reversed`, which answer makes the *question* likeliest; and
where text stands behind the answer, `accuracy_both_sides`, the answer given both sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from anyorder.evaluation.questions import Question, answer, fill, of_pieces
from anyorder.evaluation.sources import columns
from anyorder.evaluation.task import Metric, Subject, Task


@dataclass(frozen=True)
class Choice:
    """A question, its answers, and what stands behind each of them (nothing, usually)."""

    before: str
    answers: tuple[str, ...]
    behind: str
    right: int


class ChoiceTask(Task):
    """Which of a few answers is likeliest."""

    metrics: ClassVar[dict[str, Metric]] = {
        "accuracy": Metric("accuracy"),
        "accuracy_normalised": Metric("accuracy_normalised"),
        "accuracy_reversed": Metric("accuracy_reversed"),
    }

    def item(self, record: dict[str, Any]) -> Choice:
        choice = self.choice(record)
        if not 0 <= choice.right < len(choice.answers):
            raise ValueError(f"task {self.name}: the right answer is none of the {len(choice.answers)}: {record}")
        return choice

    def choice(self, record: dict[str, Any]) -> Choice:
        """The choice of a record."""
        raise NotImplementedError

    def evaluate(self, subject: Subject, items: Sequence[Any]) -> list[dict[str, Any]]:
        questions: list[Question] = []
        for item in items:
            for text in item.answers:
                parts = item.before, text, item.behind
                questions.append(of_pieces(subject.pieces, parts, 1, absent=[2]))
                questions.append(of_pieces(subject.pieces, parts, 0))
                if item.behind:
                    questions.append(of_pieces(subject.pieces, parts, 2))
                    questions.append(of_pieces(subject.pieces, parts, 1))
        found = iter(answer(subject.model, questions, subject.group_size))
        return [self._result(item, [[next(found) for _ in range(4 if item.behind else 2)] for _ in item.answers])
                for item in items]  # fmt: skip

    def _result(self, item: Choice, log_probs: list[list[float]]) -> dict[str, Any]:
        forward = [own[0] + (own[2] if item.behind else 0.0) for own in log_probs]  # the answer, and what is behind it
        lengths = [len((text + item.behind).encode()) for text in item.answers]
        normalised = [value / length for value, length in zip(forward, lengths, strict=True)]
        result = {
            "accuracy": _is_best(forward, item.right),
            "accuracy_normalised": _is_best(normalised, item.right),
            "accuracy_reversed": _is_best([own[1] for own in log_probs], item.right),
            "log_probs": forward,
            "right": item.right,
        }
        if item.behind:
            result["accuracy_both_sides"] = _is_best([own[3] for own in log_probs], item.right)
        return result


def _is_best(values: list[float], right: int) -> float:
    return float(max(range(len(values)), key=values.__getitem__) == right)


class HellaSwag(ChoiceTask):
    """Which ending a situation has (arXiv 1905.07830)."""

    name, about = "hellaswag", "which of four endings"
    source, file = "Rowan/hellaswag::validation", "hellaswag_dev"

    def choice(self, record: dict[str, Any]) -> Choice:
        context, endings, label = columns(record, ("ctx", "endings", "label"), self.name)
        return Choice(context, tuple(f" {ending}" for ending in endings), "", int(label))


class Piqa(ChoiceTask):
    """Which way reaches a goal (arXiv 1911.11641)."""

    name, about = "piqa", "which of two ways reaches a goal"
    source, file = "ybisk/piqa::validation", "piqa_dev"

    def choice(self, record: dict[str, Any]) -> Choice:
        goal, one, two, label = columns(record, ("goal", "sol1", "sol2", "label"), self.name)
        return Choice(f"Question: {goal}\nAnswer:", (f" {one}", f" {two}"), "", int(label))


class Siqa(ChoiceTask):
    """Which of three answers fits what people do (arXiv 1904.09728)."""

    name, about = "siqa", "which of three answers fits what people do"
    source, file = "allenai/social_i_qa::validation", "siqa_dev"

    def choice(self, record: dict[str, Any]) -> Choice:
        if "options" in record:
            context, question, options, right = columns(record, ("context", "question", "options", "answer"), self.name)
            number = options.index(right) if right in options else -1
        else:
            context, question, *options, label = columns(
                record, ("context", "question", "answerA", "answerB", "answerC", "label"), self.name
            )
            number = int(label) - 1
        return Choice(f"Question: {context} {question}\nAnswer:", tuple(f" {text}" for text in options), "", number)


class WinoGrande(ChoiceTask):
    """Who is meant: the likelihood of the name and of what stands behind it (arXiv 1907.10641)."""

    name, about = "winogrande", "who is meant"
    source, file = "allenai/winogrande:winogrande_xl:validation", "winogrande_dev"
    metrics: ClassVar[dict[str, Metric]] = ChoiceTask.metrics | {"accuracy_both_sides": Metric("accuracy_both_sides")}

    def choice(self, record: dict[str, Any]) -> Choice:
        sentence, one, two, label = columns(record, ("sentence", "option1", "option2", "answer"), self.name)
        before, blank, behind = sentence.partition("_")
        if not blank or not behind.strip():
            raise ValueError(f"task {self.name}: no text behind the blank `_` of {sentence!r}")
        space = " " * before.endswith(" ")
        return Choice(before.removesuffix(" "), (space + one, space + two), behind, int(label) - 1)


class Lambada(Task):
    """The last word of a passage, given all before it (arXiv 1606.06031)."""

    name, about = "lambada", "the last word of a passage"
    source, file = "EleutherAI/lambada_openai:default:test", "lambada_dev"
    metrics: ClassVar[dict[str, Metric]] = {
        "accuracy": Metric("accuracy"),
        "nats_per_word": Metric("nats", better="lower"),
    }

    def item(self, record: dict[str, Any]) -> tuple[str, str]:
        (text,) = columns(record, ("text",), self.name)
        before, space, word = text.rstrip().rpartition(" ")
        if not before:
            raise ValueError(f"task {self.name}: {text!r} is a single word")
        return before, space + word

    def evaluate(self, subject: Subject, items: Sequence[Any]) -> list[dict[str, Any]]:
        questions = [of_pieces(subject.pieces, item, 1) for item in items]
        log_probs = answer(subject.model, questions, subject.group_size)
        results = []
        for question, ids, log_prob in zip(
            questions, fill(subject.model, questions, subject.policy), log_probs, strict=True
        ):
            right = [question.ids[place] for place in question.targets]
            results.append({"accuracy": float(ids == right), "nats": -log_prob})
        return results
