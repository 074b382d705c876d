"""Text that a policy writes, judged: continuations of documents and missing sentences of stories.

The form of A3's second table and third figure (arXiv 2601.13228): how likely another model finds the text, how varied
it is, and in how many steps it was written. One run is one policy; runs stand side by side in `anyorder plot`. Tokens
are drawn at the subject's temperature, special ones never, so that texts to be compared are equally long.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from anyorder.evaluation import documents
from anyorder.evaluation.questions import Question, Written, of_pieces, write
from anyorder.evaluation.story_tasks import Story
from anyorder.evaluation.task import Metric, Subject, Task
from anyorder.evaluation.text_metrics import distinct, entropy, repetition

PROMPT_TOKENS, NEW_TOKENS = 32, 64


class WritingTask(Task):
    """Texts that are written, and what is said of them."""

    metrics: ClassVar[dict[str, Metric]] = {
        "judge_nats_per_token": Metric("judge_nats", "judge_tokens", better="lower"),
        "entropy": Metric("entropy"),
        "distinct_2": Metric("distinct_2"),
        "repetition_4": Metric("repetition_4", better="lower"),
        "steps_per_token": Metric("steps", "tokens", better="lower"),
    }

    def written(self, subject: Subject, questions: Sequence[Question], texts: Sequence[str]) -> list[Written]:
        """What the subject writes; the draws of each depend on its text."""
        generators = [documents.generator_of(subject.seed, text) for text in texts]
        return write(
            subject.model, questions, subject.policy, temperature=subject.temperature, generator=generators,
            suppress_tokens=subject.tokenizer.all_special_ids,
        )  # fmt: skip

    def numbers(self, written: Written) -> dict[str, Any]:
        """What is said of a text without a judge, by its tokens."""
        return {
            "entropy": entropy(written.ids), "distinct_2": distinct(written.ids, 2),
            "repetition_4": repetition(written.ids, 4), "steps": written.steps, "tokens": len(written.ids),
        }  # fmt: skip


class Continuations(WritingTask):
    """The first tokens of a document, continued."""

    name, about = "continuations", f"{NEW_TOKENS} tokens behind {PROMPT_TOKENS} of a document, judged"
    source, file = documents.SOURCE, documents.FILE

    def item(self, record: dict[str, Any]) -> str:
        return documents.text_of(record, self.name)

    def evaluate(self, subject: Subject, items: Sequence[Any]) -> list[dict[str, Any]]:
        prompts = [documents.whole(subject.pieces, text, PROMPT_TOKENS).ids for text in items]
        written = self.written(subject, [Question.behind(ids, NEW_TOKENS) for ids in prompts], items)
        pairs = [(subject.pieces.decode(list(ids[1:]), at_start=True), subject.pieces.decode(one.ids))
                 for ids, one in zip(prompts, written, strict=True)]  # fmt: skip
        return [
            self.numbers(one) | {"judge_nats": said.nats, "judge_tokens": said.tokens, "prompt": before, "text": text}
            for one, said, (before, text) in zip(written, subject.judge(pairs), pairs, strict=True)
        ]


class Fills(WritingTask):
    """Sentence 3 of a story at its true length, given both sides; the judge reads on to the end of the story."""

    name, about = "fills", "sentence 3 of 5 at its true length, judged"
    source, file = None, "cloze_test_val__spring2016"
    blank = 2
    metrics: ClassVar[dict[str, Metric]] = {
        **WritingTask.metrics,
        "judge_nats_per_token_behind": Metric("judge_nats_behind", "judge_tokens_behind", better="lower"),
        "judge_nats_per_token_reference": Metric("judge_nats_reference", "judge_tokens_reference", better="lower"),
        "judge_nats_per_token_behind_reference": Metric(
            "judge_nats_behind_reference", "judge_tokens_behind", better="lower"
        ),
    }

    def item(self, record: dict[str, Any]) -> Story:
        return Story.of(record, self.name)

    def evaluate(self, subject: Subject, items: Sequence[Any]) -> list[dict[str, Any]]:
        questions = [of_pieces(subject.pieces, story.parts, self.blank) for story in items]
        written = self.written(subject, questions, ["".join(story.parts) for story in items])
        texts = [subject.pieces.decode(one.ids) for one in written]
        pairs: list[tuple[str, str]] = []
        for story, text in zip(items, texts, strict=True):
            before, behind = ("".join(part) for part in (story.parts[: self.blank], story.parts[self.blank + 1 :]))
            reference = story.parts[self.blank]
            pairs += [(before, text), (before + text, behind), (before, reference), (before + reference, behind)]
        said, results = iter(subject.judge(pairs)), []
        for story, one, text in zip(items, written, texts, strict=True):
            own, behind_it, true, behind_true = (next(said) for _ in range(4))
            results.append(self.numbers(one) | {
                "judge_nats": own.nats, "judge_tokens": own.tokens,
                "judge_nats_behind": behind_it.nats, "judge_tokens_behind": behind_it.tokens,
                "judge_nats_reference": true.nats, "judge_tokens_reference": true.tokens,
                "judge_nats_behind_reference": behind_true.nats,
                "text": text, "reference": story.parts[self.blank],
            })  # fmt: skip
        return results
