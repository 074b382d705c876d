"""HumanEval with one line missing (arXiv 2207.14255): is it the line that was there, how like it, does it work?

Ways to fill the line: at its true length in tokens, at a length that the model finds, the same behind the line's
indentation, where an editor's cursor stands, there at the likeliest of several lengths, and what a left-to-right model
can do: by the base model's own fill-in-the-middle tokens, where it has them, which a user would take instead; given the
program before the line alone; and prompted with the program behind the line first. Programs are run only where the user
says so (see `execution`).

Some vocabularies (SmolLM2's) join a line end with the indentation behind it in one token. To their models a line that
begins behind a line end by itself has no indentation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import StoppingCriteria

from anyorder.evaluation import execution
from anyorder.evaluation.questions import Question, answer, of_pieces, suffix_first
from anyorder.evaluation.sources import columns
from anyorder.evaluation.task import Metric, Subject, Task
from anyorder.evaluation.text_metrics import edit_similarity
from anyorder.infill.pieces import Pieces

BLANK = "<<<the line>>>"
FIM = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
TRIES = 16
LONGEST_LINE = 64
"""Tokens that a line may have where nobody says how many."""


@dataclass(frozen=True)
class Line:
    """A program with a line missing, and how it is tested."""

    prefix: str
    line: str
    suffix: str
    test: str
    entry_point: str

    def passes(self, line: str) -> bool:
        """Whether the program with this line meets its test."""
        return execution.passes(f"{self.prefix}{line}{self.suffix}\n{self.test}\ncheck({self.entry_point})\n")


class LineInfilling(Task):
    """One line, by the means of a subclass."""

    of_controls = False
    source, file = "loubnabnl/humaneval_infilling:HumanEval-SingleLineInfilling:test", "HumanEval-SingleLineInfilling"
    metrics: ClassVar[dict[str, Metric]] = {
        "exact_match": Metric("exact_match"),
        "edit_similarity": Metric("edit_similarity"),
        "pass_at_1": Metric("pass_at_1"),
        "nats_per_token": Metric("nats", "tokens", better="lower"),
    }

    def item(self, record: dict[str, Any]) -> Line:
        names = ("prompt", "canonical_solution", "suffix", "test", "entry_point")
        prefix, line, suffix, test, entry_point = columns(record, names, self.name)
        if "\n" in line.removesuffix("\n"):
            raise ValueError(f"task {self.name} fills one line, got {line!r}")
        end = "\n" * line.endswith("\n")  # stands whatever the line is
        return Line(prefix, line.removesuffix("\n"), end + suffix, test, entry_point)

    def evaluate(self, subject: Subject, items: Sequence[Any]) -> list[dict[str, Any]]:
        asked = [self.question(subject.pieces, item) for item in items]
        log_probs = answer(subject.model, asked, subject.group_size)
        results = []
        for item, question, log_prob in zip(items, asked, log_probs, strict=True):
            text = self.fill(subject, item, len(question.targets))
            result = {
                "exact_match": float(text.rstrip() == item.line.rstrip()),
                "edit_similarity": edit_similarity(text.strip(), item.line.strip()),
                "nats": -log_prob, "tokens": len(question.targets), "text": text, "reference": item.line,
            }  # fmt: skip
            if subject.execute_code:
                result["pass_at_1"] = float(item.passes(text))
            results.append(result)
        return results

    def question(self, pieces: Pieces, item: Line) -> Question:
        """Whose likelihood is the line's; here, given both sides."""
        return of_pieces(pieces, (item.prefix, item.line, item.suffix), 1)

    def fill(self, subject: Subject, item: Line, tokens: int) -> str:
        """The line that is written; `tokens`: how many the true one has."""
        raise NotImplementedError


def _infill(subject: Subject, item: Line, length: int | str, indentation: str = "", tries: int = 1) -> str:
    text = f"{item.prefix}{indentation}{BLANK}{item.suffix}"
    options = {"blank": BLANK, "length": length, "tries": tries, "policy": subject.policy, "single_line": True}
    (span,) = subject.infiller(text, **options).spans
    return span.text


class TrueLength(LineInfilling):
    """At its true length in tokens, which no user knows."""

    name, about = "humaneval_infilling", "a missing line, at its true length"

    def fill(self, subject: Subject, item: Line, tokens: int) -> str:
        return _infill(subject, item, tokens)


class AutoLength(LineInfilling):
    """At the length that the model finds."""

    name, about = "humaneval_infilling_auto", "a missing line, at a length that the model finds"

    def fill(self, subject: Subject, item: Line, tokens: int) -> str:
        return _infill(subject, item, "auto")


class BehindIndentation(LineInfilling):
    """At the length that the model finds, behind the line's own indentation."""

    name = "humaneval_infilling_indented"
    about = "a missing line behind its indentation, at a length that the model finds"
    tries: ClassVar[int] = 1

    def question(self, pieces: Pieces, item: Line) -> Question:
        indentation, rest = _indented(item.line)
        before = item.prefix + indentation
        last = len(before) - int(pieces.encode_before(before)[1])  # the space that belongs to the token behind it
        return of_pieces(pieces, (before[:last], before[last:] + rest, item.suffix), 1)

    def fill(self, subject: Subject, item: Line, tokens: int) -> str:
        indentation, _ = _indented(item.line)
        return indentation + _infill(subject, item, "auto", indentation, self.tries)


class SeveralLengths(BehindIndentation):
    """There at TRIES lengths, of which the whole program says which it keeps."""

    name = "humaneval_infilling_tries"
    about = "a missing line behind its indentation, the likeliest of sixteen lengths"
    tries = TRIES


def _indented(line: str) -> tuple[str, str]:
    """The indentation of a line, and the rest."""
    rest = line.lstrip(" \t")
    return line[: len(line) - len(rest)], rest


class FillInTheMiddle(LineInfilling):
    """By the base model's own tokens for it: prefix, suffix, then the line, greedy up to its end."""

    name, about = "humaneval_infilling_fim", "a missing line, by the base model's own fill-in-the-middle tokens"

    def question(self, pieces: Pieces, item: Line) -> Question:
        """The line behind the same prompt that it is filled by."""
        asked, line = self._prompt(pieces, item), pieces.encode(item.line)
        return replace(Question.behind(asked, len(line)), ids=(*asked, *line))

    def fill(self, subject: Subject, item: Line, tokens: int) -> str:
        prompt = self._prompt(subject.pieces, item)
        ends = LineEnds(subject.pieces, len(prompt))
        return _go_on(subject, prompt, stopping_criteria=[ends]).partition("\n")[0]

    def _prompt(self, pieces: Pieces, item: Line) -> list[int]:
        marks = [pieces.tokenizer.convert_tokens_to_ids(mark) for mark in FIM]
        if any(mark is None or mark == pieces.tokenizer.unk_token_id for mark in marks):
            raise ValueError(f"task {self.name}: the base model has no {', '.join(FIM)}")
        before, behind = (pieces.encode(text, at_start=True) for text in (item.prefix, item.suffix))
        return [marks[0], *before, marks[1], *behind, marks[2]]


class Prompted(LineInfilling):
    """By going on behind a prompt, greedy up to the end of the line. The line end in front of the line is the model's
    to write, with the indentation that its vocabulary may join with it."""

    def prompt(self, item: Line) -> str:
        """What is gone on with."""
        raise NotImplementedError

    def question(self, pieces: Pieces, item: Line) -> Question:
        before, end = _without_line_end(self.prompt(item))
        return of_pieces(pieces, (before, end + item.line), 1)

    def fill(self, subject: Subject, item: Line, tokens: int) -> str:
        pieces, (before, end) = subject.pieces, _without_line_end(self.prompt(item))
        text = _go_on(subject, [pieces.start_token(), *pieces.encode(before, at_start=True)])
        return text.partition(end)[2].partition("\n")[0] if end else text.partition("\n")[0]


def _without_line_end(text: str) -> tuple[str, str]:
    """A text without the line end that it may end with, and that."""
    before = text.removesuffix("\n")
    return before, text[len(before) :]


class PrefixOnly(Prompted):
    """Given the program before the line alone."""

    name, about = "humaneval_infilling_prefix", "a missing line, given the program before it alone"

    def prompt(self, item: Line) -> str:
        return item.prefix


class SuffixFirst(Prompted):
    """Given the program behind the line first, then the program before it."""

    name, about = "humaneval_infilling_reordered", "a missing line, prompted with the program behind it first"

    def prompt(self, item: Line) -> str:
        return suffix_first(item.prefix, item.suffix)


class LineEnds(StoppingCriteria):
    """Ends a row whose text from token number `start` on holds a line end."""

    def __init__(self, pieces: Pieces, start: int):
        self.pieces, self.start = pieces, start

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """(B,) bool for (B, T) ids without padding."""
        ended = ["\n" in self.pieces.decode(row[self.start :]) for row in input_ids.tolist()]
        return torch.tensor(ended, dtype=torch.bool, device=input_ids.device)


def _go_on(subject: Subject, ids: list[int], **options: Any) -> str:
    """What the model writes behind some ids."""
    prompt = torch.tensor([ids])
    asked: dict[str, Any] = {"max_new_tokens": LONGEST_LINE, "policy": subject.policy, "do_sample": False}
    made = subject.model.generate(prompt, **asked, **options)
    assert isinstance(made, torch.Tensor)
    new = made[0, prompt.shape[1] :].tolist()
    end = subject.tokenizer.eos_token_id
    return subject.pieces.decode(new[: new.index(end)] if end in new else new)
