"""Five-sentence stories with a sentence missing: how likely it is, how like what was there its filling is, and which of
two endings is likelier.

The protocol is that of A3 (arXiv 2601.13228) and DiffuLLaMA (arXiv 2410.17891): sentence 3 is generated at its true
length in tokens, given sentences 1, 2, 4 and 5, and compared by ROUGE. Beside it stands what a left-to-right model can
do, at the same length: given sentences 1 and 2 alone, and prompted with what is behind the blank, then with what is
before it (suffix-prefix prompting).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar

from anyorder.evaluation.questions import Question, answer, fill, of_pieces, suffix_first
from anyorder.evaluation.sources import columns
from anyorder.evaluation.task import Metric, Subject, Task
from anyorder.evaluation.text_metrics import ROUGE, distinct, rouge
from anyorder.infill.pieces import Pieces

_WAYS = ("", "_prefix_only", "_reordered")
Found = tuple[list[list[str]], list[float]]
"""Of each story the text of each blank, and the nats of all true ones."""
Ask = Callable[[Pieces, Sequence[str], int], Question]
"""About one part of a text."""

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
    """One sentence of five, or two, at their true lengths.

    Attributes:
        blanks: the sentences, from 0; never the first.
    """

    source, file = None, "cloze_test_val__spring2016"
    blanks: ClassVar[tuple[int, ...]]
    metrics: ClassVar[dict[str, Metric]] = {
        **{f"nats_per_token{way}": Metric(f"nats{way}", "tokens", better="lower") for way in _WAYS},
        **{f"{name}{way}": Metric(f"{name}{way}") for way in _WAYS for name in ROUGE},
        "distinct_2": Metric("distinct_2"),
    }

    def item(self, record: dict[str, Any]) -> Story:
        return Story.of(record, self.name)

    def evaluate(self, subject: Subject, items: Sequence[Any]) -> list[dict[str, Any]]:
        found = {
            "": self._at_once(subject, items),
            "_prefix_only": self._one_by_one(subject, items, self._prefix_only),
            "_reordered": self._one_by_one(subject, items, self._reordered),
        }
        results = []
        for n, story in enumerate(items):
            references = [story.sentences[blank] for blank in self.blanks]
            tokens = sum(len(subject.pieces.encode(story.parts[blank])) for blank in self.blanks)
            result: dict[str, Any] = {"tokens": tokens, "reference": " ".join(references)}
            for way, (fills, nats) in found.items():
                texts = [text.strip() for text in fills[n]]
                each = [rouge(text, reference) for text, reference in zip(texts, references, strict=True)]
                result |= {f"text{way}": " ".join(texts), f"nats{way}": nats[n]}
                result |= {f"{name}{way}": sum(one[name] for one in each) / len(each) for name in ROUGE}
            results.append(result | {"distinct_2": distinct(result["text"].split(), 2)})
        return results

    def _at_once(self, subject: Subject, items: Sequence[Story]) -> Found:
        """All blanks in one question, given both sides."""
        pieces = subject.pieces
        asked = [of_pieces(pieces, story.parts, self.blanks) for story in items]
        texts = []
        for story, ids in zip(items, fill(subject.model, asked, subject.policy), strict=True):
            lengths = [len(pieces.encode(story.parts[blank])) for blank in self.blanks]
            ends = list(accumulate(lengths))
            own = zip(ends, lengths, strict=True)
            texts.append([pieces.decode(ids[end - length : end]) for end, length in own])
        return texts, [-one for one in answer(subject.model, asked, subject.group_size)]

    def _one_by_one(self, subject: Subject, items: Sequence[Story], question: Ask) -> Found:
        """The blanks from left to right, each as a question of its own: what a left-to-right model can do. It is scored
        on the true text, and fills behind what it has filled."""
        written = [list(story.parts) for story in items]
        nats = [0.0] * len(items)
        for blank in self.blanks:
            asked = [question(subject.pieces, story.parts, blank) for story in items]
            nats = [a - b for a, b in zip(nats, answer(subject.model, asked, subject.group_size), strict=True)]
            own = [question(subject.pieces, parts, blank) for parts in written]
            for parts, ids in zip(written, fill(subject.model, own, subject.policy), strict=True):
                parts[blank] = subject.pieces.decode(ids)
        return [[parts[blank] for blank in self.blanks] for parts in written], nats

    def _prefix_only(self, pieces: Pieces, parts: Sequence[str], blank: int) -> Question:
        return of_pieces(pieces, parts, blank, absent=range(blank + 1, len(parts)))

    def _reordered(self, pieces: Pieces, parts: Sequence[str], blank: int) -> Question:
        behind = "".join(part for n, part in enumerate(parts) if n > blank and n not in self.blanks)
        return of_pieces(pieces, (suffix_first("".join(parts[:blank]), behind.lstrip()), parts[blank]), 1)


class SecondSentence(StoryInfilling):
    """Sentence 2 of 5."""

    name, about, blanks = "stories_2", "infill sentence 2 of 5", (1,)


class ThirdSentence(StoryInfilling):
    """Sentence 3 of 5, the paper's task."""

    name, about, blanks = "stories", "infill sentence 3 of 5 (the paper's)", (2,)


class FourthSentence(StoryInfilling):
    """Sentence 4 of 5."""

    name, about, blanks = "stories_4", "infill sentence 4 of 5", (3,)


class SecondAndFourthSentence(StoryInfilling):
    """Sentences 2 and 4 of 5 at once."""

    name, about, blanks = "stories_2_4", "infill sentences 2 and 4 of 5 at once", (1, 3)


class ThirdAndFourthSentence(StoryInfilling):
    """Sentences 3 and 4 of 5 at once: one long blank."""

    name, about, blanks = "stories_3_4", "infill sentences 3 and 4 of 5 at once", (2, 3)


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
