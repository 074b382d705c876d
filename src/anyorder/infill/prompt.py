"""A text to be continued: its tokens without a space that the first new token brings, and the text that comes of it.

This module knows text, tokens and masks; how tokens are predicted is `decoding`'s business.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from anyorder.core.text import check_text
from anyorder.decoding.sampling import AllowedTokens
from anyorder.infill.boundaries import Edges
from anyorder.infill.pieces import Pieces, TextStream
from anyorder.infill.token_bytes import TokenBytes


@dataclass(frozen=True)
class Prompt:
    """A text to be continued."""

    text: str
    ids: list[int]
    """With the special tokens that its tokenizer adds; the start token if there is nothing else."""
    brings_space: bool
    """The first new token brings the text's last space, which is not among the ids."""
    pieces: Pieces

    @classmethod
    def of(cls, pieces: Pieces, text: str) -> Prompt:
        """The prompt of a text."""
        check_text("the text", text)
        ids = pieces.tokenizer.encode(text)
        own, (fixed, brings) = pieces.encode(text, at_start=True), pieces.encode_before(text, at_start=True)
        ends_in_text = bool(own) and ids[len(ids) - len(own) :] == own  # no special token stands behind it
        if ends_in_text:
            ids = [*ids[: len(ids) - len(own)], *fixed]
        return cls(text, ids or [pieces.start_token()], brings and ends_in_text, pieces)

    def allowed_tokens(self, tokens: TokenBytes, new_tokens: int) -> AllowedTokens | None:
        """What the first new token may be where it brings a space: a word with its space, or an end. None: anything."""
        if not self.brings_space:
            return None
        every = torch.ones(tokens.size, dtype=torch.bool)
        first = tokens.begins_word | ~tokens.is_text  # what begins a word may be a part of its first character
        if Edges.between(self.text, "", not self.text, True).lone_space:
            first = first | tokens.is_space
        index = torch.zeros(1, len(self.ids) + new_tokens, dtype=torch.int64)
        index[0, len(self.ids) :][:1] = 1
        return AllowedTokens(torch.stack([every, first]), index)

    def stream(self) -> TextStream:
        """Turns new tokens into the text that they add, as they come."""
        return TextStream(self.pieces, not self.text, self.brings_space)

    def continuation(self, ids: list[int]) -> str:
        """The text that new tokens add: whole characters, so without bytes of one that was cut off at the end."""
        return self.stream().put(ids)
