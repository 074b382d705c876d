"""What decoding tells others: single commits, watchers of a run, and the result. Knows ids, no model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Commit:
    """One token that decoding has fixed."""

    row: int
    position: int
    token: int
    log_prob: float
    """log p of the token under the model itself: before temperature, truncation and bans. Nats."""
    step: int


class Watcher(ABC):
    """Is told what `generate` does while it does it."""

    def blanks(self, blank: Tensor) -> None:  # noqa: B027 - most need not know
        """Where blanks of text are filled, before `begin`: (B, T) the blank that each position belongs to, or -1."""

    def offered(self, row: Tensor, column: Tensor, logits: Tensor) -> None:  # noqa: B027 - most need not know
        """What a step may draw, before it does: (N,) rows and columns, and (N, V) the model's own logits there."""

    @abstractmethod
    def begin(self, ids: Tensor, is_open: Tensor) -> None:
        """Before the first step: (B, T) ids, and (B, T) bool where there is no token yet."""

    @abstractmethod
    def step(self, commits: Sequence[Commit]) -> None:
        """What a step has committed, of all rows."""


@dataclass(frozen=True)
class GenerateOutput:
    """What `generate` returns with `return_dict_in_generate=True`."""

    sequences: Tensor
    """(B, T) int64: the filled ids; the pad id at absent positions and behind a committed end."""
    log_probs: Tensor
    """(B, T) float32: log p of each generated token under the model itself, in nats; 0 elsewhere."""
    steps: Tensor
    """(B, T) int64: the step at which each position was committed; -1 if given, -2 if absent or behind the end."""
    forwards: int
    """Forwards of the model: one a step, and one more if all rows of a batch begin with the same 16 tokens or more,
    which are then encoded once."""

    scores: tuple[Tensor, ...] | None = None
    """With output_scores=True: (B, V) float32 for each new token of prompts, or for each of T columns: the logits that
    its token was drawn from, after every setting; 0 where none was drawn."""
    logits: tuple[Tensor, ...] | None = None
    """With output_logits=True: the same before any setting, the model's own."""

    def map(self, function: Callable[[Tensor], Tensor]) -> GenerateOutput:
        """The same with every tensor replaced."""
        scores, logits = (None if part is None else tuple(map(function, part)) for part in (self.scores, self.logits))
        return GenerateOutput(
            function(self.sequences), function(self.log_probs), function(self.steps), self.forwards, scores, logits
        )
