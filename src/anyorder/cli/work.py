"""What a command does with a text once its model is there. Imports nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from anyorder.modeling import AnyOrderForCausalLM
    from anyorder.runtime.runner import ModelRunner
    from anyorder.trace.record import Trace


@dataclass(frozen=True)
class Result:
    """What a command makes of one text."""

    shown: str
    """What is printed without --json."""
    record: dict[str, Any]
    """What is printed with it."""
    trace: Trace | None = None
    """What each step did, if that was recorded."""


class Answer(Protocol):
    """From a text and its number, from 0, to its result."""

    def __call__(self, number: int, text: str, runner: ModelRunner | None = None) -> Result:
        """Forwards are executed by the runner, or as the options say."""


@dataclass(frozen=True)
class Work:
    """What a command does once its model is there."""

    answer: Answer
    model: AnyOrderForCausalLM | None = None
    """For what has many forwards a text, which can be those of several texts; None: a text is one forward already."""
