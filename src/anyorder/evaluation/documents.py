"""Documents: records that are texts, as questions about all of their tokens. Knows no model."""

from __future__ import annotations

from typing import Any

import torch

from anyorder.core.rng import seed_of
from anyorder.evaluation.questions import Question
from anyorder.evaluation.sources import columns
from anyorder.evaluation.story_tasks import Story
from anyorder.infill.pieces import Pieces

SOURCE, FILE = "roneneldan/TinyStories::validation", "rocstories_valid"
"""Where the records of tasks on documents are, if nobody says otherwise."""


def text_of(record: dict[str, Any], task: str) -> str:
    """From {"text"}, or the sentences of a story as `Story.of` takes them.

    Raises:
        ValueError: for other columns, and for a text of fewer than two words, which has no order.
    """
    if "sentences" in record or "InputSentence1" in record:
        text = " ".join(Story.of(record, task).sentences)
    else:
        (text,) = columns(record, ("text",), task)
    if len(text.split()) < 2:
        raise ValueError(f"task {task}: a document has at least two words, got {text!r}")
    return text


def whole(pieces: Pieces, text: str, longest: int) -> Question:
    """The first tokens of a text, at most `longest`, all to be predicted behind the start token."""
    ids = [pieces.start_token(), *pieces.encode(text, at_start=True)[:longest]]
    return Question(tuple(ids), tuple(range(1, len(ids))), (0,))


def generator_of(seed: int, text: str) -> torch.Generator:
    """Draws for a text: the same in every run, whatever else is evaluated."""
    return torch.Generator().manual_seed(seed_of(seed, text))
