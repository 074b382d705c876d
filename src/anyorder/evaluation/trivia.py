"""TriviaQA, closed book: is one of the known answers in what the model writes (arXiv 1705.03551)?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from anyorder.evaluation.questions import fill, to_continue
from anyorder.evaluation.sources import columns
from anyorder.evaluation.task import Metric, Subject, Task
from anyorder.evaluation.text_metrics import contains

NEW_TOKENS = 24


@dataclass(frozen=True)
class Trivia:
    """A question and the answers that count."""

    question: str
    answers: tuple[str, ...]


class TriviaQa(Task):
    """Normalised containment of a known answer in the first line of a greedy continuation."""

    name, about = "triviaqa", "closed-book questions"
    source, file = "mandarjoshi/trivia_qa:rc.nocontext:validation", "triviaqa_dev"
    metrics: ClassVar[dict[str, Metric]] = {"accuracy": Metric("accuracy")}

    def item(self, record: dict[str, Any]) -> Trivia:
        (question,) = columns(record, ("question",), self.name)
        if "golden_answers" in record:
            return Trivia(question, tuple(record["golden_answers"]))
        (answer,) = columns(record, ("answer",), self.name)
        return Trivia(question, tuple(answer["aliases"]))

    def evaluate(self, subject: Subject, items: Sequence[Any]) -> list[dict[str, Any]]:
        prompts = [f"Question: {item.question}\nAnswer:" for item in items]
        questions = [to_continue(subject.pieces, prompt, NEW_TOKENS) for prompt in prompts]
        end, results = subject.tokenizer.eos_token_id, []
        for item, ids in zip(items, fill(subject.model, questions, subject.policy), strict=True):
            kept = ids[: ids.index(end)] if end in ids else ids
            text = subject.tokenizer.decode(kept).strip().partition("\n")[0]
            results.append({"accuracy": float(contains(text, item.answers)), "text": text})
        return results
