"""Five-sentence stories with a sentence missing: how likely it is, how like what was there its filling is, and which of
two endings is likelier.

The protocol is that of A3 (arXiv 2601.13228) and DiffuLLaMA (arXiv 2410.17891): sentence 3 is generated at its true
length in tokens, given sentences 1, 2, 4 and 5, and compared by ROUGE. Beside it stands what a left-to-right model can
do: the same length, given sentences 1 and 2 alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from anyorder.evaluation.questions import answer, fill, of_pieces
from anyorder.evaluation.sources import columns
from anyorder.evaluation.task import Metric, Subject, Task
from anyorder.evaluation.text_metrics import ROUGE, distinct, rouge

_CLOZE = ("InputSentence1", "InputSentence2", "InputSentence3", "InputSentence4",
          "RandomFifthSentenceQuiz1", "RandomFifthSentenceQuiz2", "AnswerRightEnding")  # fmt: skip


@dataclass(frozen=True)
class Story:
    """Sentences, and where there is one, a wrong ending."""

    sentences: tuple[str, ...]
    wrong_ending: str | None = None

    @classmethod
    def of(cls, record: dict[str, Any], task: str) -> Story:
        """From {"sentences": [five]} or a row of the Story Cloze Test."""
        if "sentences" in record:
            if len(record["sentences"]) != 5:
                raise ValueError(f"task {task}: a story has five sentences, got {len(record['sentences'])}: {record}")
            return cls(tuple(record["sentences"]))
        *body, one, two, right = columns(record, _CLOZE, task)
        if str(right) not in ("1", "2"):
            raise ValueError(f"task {task}: AnswerRightEnding must be 1 or 2, got {right!r}")
        ending, wrong = (one, two) if str(right) == "1" else (two, one)
        return cls((*body, ending), wrong)

    @property
    def parts(self) -> list[str]:
        """The text in sentences that bring the space in front of them."""
        return [self.sentences[0], *(f" {sentence}" for sentence in self.sentences[1:])]


class StoryInfilling(Task):
    """One sentence of five, at its true length.

    Args:
        blank: the sentence, from 0.
    """

    source, file = None, "cloze_test_val__spring2016"
    blank: ClassVar[int]
    metrics: ClassVar[dict[str, Metric]] = {
        "nats_per_token": Metric("nats", "tokens", better="lower"),
        "nats_per_token_prefix_only": Metric("nats_prefix_only", "tokens", better="lower"),
        **{name: Metric(name) for name in ROUGE},
        **{f"{name}_prefix_only": Metric(f"{name}_prefix_only") for name in ROUGE},
        "distinct_2": Metric("distinct_2"),
    }

    def item(self, record: dict[str, Any]) -> Story:
        return Story.of(record, self.name)

    def evaluate(self, subject: Subject, items: Sequence[Any]) -> list[dict[str, Any]]:
        behind = range(self.blank + 1, 5)
        both = [of_pieces(subject.pieces, story.parts, self.blank) for story in items]
        one = [of_pieces(subject.pieces, story.parts, self.blank, absent=behind) for story in items]
        found = {
            name: (fill(subject.model, some, subject.policy), answer(subject.model, some, subject.group_size))
            for name, some in (("", both), ("_prefix_only", one))
        }
        results = []
        for n, story in enumerate(items):
            reference = story.sentences[self.blank]
            result: dict[str, Any] = {"tokens": len(both[n].targets), "reference": reference}
            for name, (fills, log_probs) in found.items():
                text = subject.pieces.decode(fills[n]).strip()
                result |= {f"text{name}": text, f"nats{name}": -log_probs[n]}
                result |= {f"{kind}{name}": value for kind, value in rouge(text, reference).items()}
            results.append(result | {"distinct_2": distinct(result["text"].split(), 2)})
        return results


class SecondSentence(StoryInfilling):
    """Sentence 2 of 5."""

    name, about, blank = "stories_2", "infill sentence 2 of 5", 1


class ThirdSentence(StoryInfilling):
    """Sentence 3 of 5, the paper's task."""

    name, about, blank = "stories", "infill sentence 3 of 5 (the paper's)", 2


class FourthSentence(StoryInfilling):
    """Sentence 4 of 5."""

    name, about, blank = "stories_4", "infill sentence 4 of 5", 3


class StoryCloze(Task):
    """Which of two endings is likelier given the story (arXiv 1604.01696), and which makes the story likelier."""

    name, about = "story_cloze", "which of two endings a story has"
    source, file = None, "cloze_test_val__spring2016"
    metrics: ClassVar[dict[str, Metric]] = {
        "accuracy": Metric("accuracy"),
        "accuracy_normalised": Metric("accuracy_normalised"),
        "accuracy_reversed": Metric("accuracy_reversed"),
    }

    def item(self, record: dict[str, Any]) -> Story:
        story = Story.of(record, self.name)
        if story.wrong_ending is None:
            raise ValueError(f"task {self.name} needs a wrong ending: columns {', '.join(_CLOZE)}")
        return story

    def evaluate(self, subject: Subject, items: Sequence[Any]) -> list[dict[str, Any]]:
        questions = []
        for story in items:
            begin = " ".join(story.sentences[:4])
            for ending in (story.sentences[4], story.wrong_ending):
                questions += [of_pieces(subject.pieces, (begin, f" {ending}"), target) for target in (1, 0)]
        found = iter(answer(subject.model, questions, subject.group_size))
        results = []
        for story in items:
            (right, back), (wrong, wrong_back) = [(next(found), next(found)) for _ in range(2)]
            lengths = len(story.sentences[4]), len(story.wrong_ending or "")
            results.append({
                "accuracy": float(right > wrong),
                "accuracy_normalised": float(right / lengths[0] > wrong / lengths[1]),
                "accuracy_reversed": float(back > wrong_back),
                "log_probs": [right, wrong],
            })  # fmt: skip
        return results
