"""Texts of an evaluation as token ids: what is given, what is predicted, and windows of them that fit a model.

Whoever compares scores needs the same tokens, so where text is cut follows the stock backend of lm-evaluation-harness
wherever that is sound: whitespace at the end of a context belongs to its continuation, and a continuation has the
tokens that it has behind its context. Where a token would span the join, the context keeps the tokens it has by itself
and the continuation is encoded behind it: what is scored spells the continuation, no more and no less.

This module knows one tokenizer; it knows no model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from anyorder.core.text import check_text
from anyorder.infill.pieces import Pieces


@dataclass(frozen=True)
class Encoded:
    """A text to score."""

    given: list[int]
    """At least one token, if any is predicted."""
    predicted: list[int]
    source: str
    """The text that decides in which random orders this one is predicted."""
    behind: tuple[int, ...] = ()
    """Given, too, behind what is predicted."""


@dataclass(frozen=True)
class Window:
    """Consecutive tokens that fit a model: the first of them given, the last, too, if any, the others predicted."""

    ids: list[int]
    given: int
    behind: int = 0

    @property
    def end(self) -> int:
        """Behind the last that is predicted."""
        return len(self.ids) - self.behind


class TextEncoder:
    """Texts to ids.

    Args:
        tokenizer: of the model.
        add_bos_token: whether texts begin with the start token; None: with what the tokenizer puts there.
        prefix_token_id: what stands in front of a text with no context; None: see `start`.

    Raises:
        ValueError: if add_bos_token asks for a start token and there is none.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, add_bos_token: bool | None = None, prefix_token_id: int | None = None
    ):
        self.tokenizer, self.pieces = tokenizer, Pieces(tokenizer)
        self.add_bos_token, self.prefix_token_id = add_bos_token, prefix_token_id
        if add_bos_token and tokenizer.bos_token_id is None:
            raise ValueError("add_bos_token=true: the tokenizer has no start token")

    def pair(self, context: str, continuation: str) -> Encoded:
        """A continuation to be scored behind its context."""
        if not continuation:
            return Encoded([], [], context)
        source, kept = context, context.rstrip()
        context, continuation = kept, context[len(kept) :] + continuation
        if not context:
            return Encoded(*self._behind_start(continuation), source)
        given, whole = self._encode(context) or self.start, self._encode(context + continuation)
        if len(whole) > len(given) and whole[: len(given)] == given:
            return Encoded(given, whole[len(given) :], source)
        return Encoded(given, self.pieces.encode(continuation), source)

    def context_of(self, context: str, continuation: str) -> Encoded:
        """A context to be scored, given the continuation behind it: both have the tokens that `pair` gives them."""
        kept = context.rstrip()
        if not kept:
            return Encoded([], [], context)
        return Encoded(*self._behind_start(kept), context, tuple(self.pair(context, continuation).predicted))

    def document(self, text: str) -> Encoded:
        """A whole text to be scored."""
        return Encoded(*self._behind_start(text), text) if text else Encoded([], [], text)

    def prompt(self, context: str) -> list[int]:
        """A text to be continued."""
        return self._encode(context) if context else list(self.start)

    @cached_property
    def start(self) -> list[int]:
        """What stands in front of a text with no context.

        Raises:
            ValueError: if there is nothing that could.
        """
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if self.prefix_token_id is not None:
            return [self.prefix_token_id]
        if self._front:
            return self._front
        if bos is None and eos is None:
            raise ValueError(
                "a text with no context needs a token in front of it, and the tokenizer has neither a start nor an end "
                "token: name one with prefix_token_id="
            )
        return [eos if bos is None else bos]

    @cached_property
    def _front(self) -> list[int]:
        """What the tokenizer puts in front of every text; what some put behind texts is left out."""
        if self.add_bos_token is not None:
            return [self.tokenizer.bos_token_id] if self.add_bos_token else []
        ids, own = self.tokenizer.encode("a"), self._own("a")
        return next((ids[:k] for k in range(len(ids)) if ids[k : k + len(own)] == own), [])

    def _own(self, text: str) -> list[int]:
        check_text("a text of the evaluation", text)
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _encode(self, text: str) -> list[int]:
        """With what stands in front of texts, once: a chat template may have written it already."""
        own, front = self._own(text), self._front
        return own if own[: len(front)] == front else [*front, *own]

    def _behind_start(self, text: str) -> tuple[list[int], list[int]]:
        own, start = self._own(text), self.start
        return list(start), own[len(start) :] if own[: len(start)] == start else own


def windows(text: Encoded, room: int) -> list[Window]:
    """Windows of at most `room` tokens that predict every token once.

    What does not fit is left out from the left as long as one token of the context stays. A longer text is cut: each
    window predicts as many tokens as it can, and the last one is filled up with what stands in front of its own.

    Raises:
        ValueError: for a text with something behind it that does not fit: no part of it can be left out.
    """
    tokens, new = text.given + text.predicted, len(text.predicted)
    if not new:
        return []
    if text.behind:
        whole = [*tokens, *text.behind]
        if len(whole) > room:
            raise ValueError(
                f"scored=context: a text of {len(whole)} tokens does not fit the {room} that the model can read; "
                "raise max_length, if the model allows, or leave long texts out"
            )
        return [Window(whole, len(text.given), len(text.behind))]
    if new < room:
        tokens = tokens[-room:]
        return [Window(tokens, len(tokens) - new)]
    tokens, done, found = tokens[-new - 1 :], 1, []
    while done < len(tokens):
        end = min(len(tokens), done + room - 1)
        begin = max(0, end - room)
        found.append(Window(tokens[begin:end], done - begin))
        done = end
    return found
