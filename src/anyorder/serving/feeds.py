"""What decoding commits, as the pieces that clients are sent: text that is settled, or tokens wherever they stand.

This module knows commits and the text of tokens; no protocol.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.generation.logits_process import LogitsProcessor

from anyorder.decoding.events import Commit, Watcher
from anyorder.infill.pieces import TextStream


class EnoughError(Exception):
    """A text has ended: nothing more need be decoded."""


def first_stop(text: str, stops: Sequence[str], start: int = 0) -> tuple[int, str]:
    """Where the first of some strings begins in a text, from `start` on, and which it is; its end and "" if none is."""
    return min(((at, stop) for stop in stops if stop and (at := text.find(stop, start)) >= 0), default=(len(text), ""))


@dataclass(frozen=True)
class Token:
    """A token of a text that grew."""

    id: int
    text: str
    """That it adds, as whole characters: of a character's tokens the last one adds all of it."""
    log_prob: float
    """Under the model itself, in nats."""
    best: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens there and their log-probabilities, if they were asked for."""


@dataclass
class Growth:
    """A text that grows from left to right."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    ended: str = "length"
    """"stop" where a string or a token ended it."""
    stopped_by: str = ""
    """The string, if it was one."""


class Settled(Watcher):
    """Text from left to right, as far as no token of it is missing.

    Args:
        stream: turns tokens into text.
        start: column of the first new token.
        ends: ids of tokens that end a text, which add no text.
        special: ids that add no text.
        stops: strings that end a text and are not in it.
        best: of each column, the likeliest tokens there.
        put: called with the new text and the tokens that came with it.

    Attributes:
        growth: what there is so far.
    """

    def __init__(
        self,
        stream: TextStream,
        start: int,
        ends: Sequence[int],
        special: set[int],
        stops: Sequence[str],
        best: dict[int, tuple[tuple[int, float], ...]],
        put: Callable[[str, list[Token]], None],
    ):
        self.growth = Growth()
        self._stream, self._next = stream, start
        self._ends, self._special, self._stops, self._best, self._put = set(ends), special, stops, best, put
        self._early: dict[int, Commit] = {}
        self._text, self._sent = "", 0  # all of it, and how much of that can no longer become a stop string
        self._new: list[Token] = []

    def begin(self, ids: Tensor, is_open: Tensor) -> None:
        """Nothing is settled yet."""

    def step(self, commits: Sequence[Commit]) -> None:
        """Raises EnoughError behind an end."""
        self._early |= {commit.position: commit for commit in commits}
        while (commit := self._early.pop(self._next, None)) is not None:
            self._settle(commit)
            self._next += 1
        self._send(self._safe())

    def close(self) -> Growth:
        """Send what was held back, and say what there is."""
        self._send(len(self._text))
        return self.growth

    def _settle(self, commit: Commit) -> None:
        is_end = commit.token in self._ends
        text = "" if is_end or commit.token in self._special else self._stream.put([commit.token])
        token = Token(commit.token, text, commit.log_prob, self._best.get(commit.position, ()))
        self._new.append(token)
        self.growth.tokens.append(token)
        searched = max(self._sent - max(map(len, self._stops), default=0), 0)
        self._text += text
        at, self.growth.stopped_by = first_stop(self._text, self._stops, searched)
        self._text = self._text[:at]
        if self.growth.stopped_by or is_end:
            self.growth.ended = "stop"
            self._send(len(self._text))
            raise EnoughError

    def _safe(self) -> int:
        """How much of the text is not the beginning of a stop string."""
        held = 0
        for stop in self._stops:
            for n in range(min(len(stop) - 1, len(self._text)), held, -1):
                if self._text.endswith(stop[:n]):
                    held = n
                    break
        return max(len(self._text) - held, self._sent)

    def _send(self, until: int) -> None:
        text, self._sent = self._text[self._sent : until], max(until, self._sent)
        self.growth.text = self._text[: self._sent]
        if text or self._new:
            new, self._new = self._new, []
            self._put(text, new)


def likeliest(logits: Tensor, count: int) -> tuple[list[list[float]], list[list[int]]]:
    """The log-probabilities and the ids of so many tokens at most of each of (N, V) logits, the likeliest first."""
    log_probs, ids = logits.float().log_softmax(dim=-1).topk(min(count, logits.shape[1]), dim=-1)
    return log_probs.tolist(), ids.tolist()


class Alternatives(LogitsProcessor):
    """Keeps the likeliest tokens of each position, and changes nothing.

    Args:
        count: how many.
        found: where they are put, by column.
    """

    def __init__(self, count: int, found: dict[int, tuple[tuple[int, float], ...]]):
        self.count, self.found = count, found

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        log_probs, ids = likeliest(scores, self.count)
        self.found[input_ids.shape[1]] = tuple(zip(ids[0], log_probs[0], strict=True))
        return scores


@dataclass(frozen=True)
class Alternative:
    """A token that might have stood there."""

    text: str
    token: int
    logprob: float


@dataclass(frozen=True)
class Placed:
    """A token in a blank."""

    blank: int
    position: int
    """Among the tokens of the text, from 0."""
    text: str
    token: int
    logprob: float
    step: int
    top_logprobs: tuple[Alternative, ...] | None = None
    """The likeliest tokens there, if they were asked for."""


class Placing(Watcher):
    """Tokens of blanks, in the order in which they are drawn.

    Args:
        text: of a token id.
        start: tokens in front of the text.
        best: likeliest tokens to tell of each position.
        put: called with what a step has drawn.

    Attributes:
        trace: all of it so far.
    """

    def __init__(self, text: Callable[[int], str], start: int, best: int, put: Callable[[list[Placed]], None]):
        self.trace: list[Placed] = []
        self._text, self._start, self._best, self._put = text, start, best, put
        self._blank: list[int] = []
        self._found: dict[int, tuple[Alternative, ...]] = {}

    def blanks(self, blank: Tensor) -> None:
        self._blank = blank[0].tolist()

    def begin(self, ids: Tensor, is_open: Tensor) -> None:
        """Nothing is drawn yet."""

    def offered(self, row: Tensor, column: Tensor, logits: Tensor) -> None:
        """What was offered last before a token was drawn are its alternatives."""
        if not self._best:
            return
        log_probs, ids = likeliest(logits, self._best)
        for position, own, tokens in zip(column.tolist(), log_probs, ids, strict=True):
            texts = [self._text(token) for token in tokens]
            self._found[position] = tuple(map(Alternative, texts, tokens, own))

    def step(self, commits: Sequence[Commit]) -> None:
        placed = [
            Placed(
                self._blank[c.position], c.position - self._start, self._text(c.token), c.token, c.log_prob, c.step,
                self._found.get(c.position, ()) if self._best else None,
            )
            for c in commits
        ]  # fmt: skip
        self.trace += placed
        self._put(placed)
