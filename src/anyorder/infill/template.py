"""Text with blanks, as strings: fixed pieces and what goes between them. Knows no tokens and no model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from anyorder.core.text import check_text

BLANK = "___"
"""What marks a blank unless something else is said; a longer run of underscores is one blank too."""
_FULL_STOPS = (".", "!", "?", "…", "。", "！", "？")
_CLOSING = "\"'”’»)]"


@dataclass(frozen=True)
class Template:
    """Fixed pieces of text with a blank between each two; the outer pieces may be empty."""

    pieces: tuple[str, ...]
    keeps_space: frozenset[int] = frozenset()
    """Blanks that no token brings the space in front of: it is fixed text, whatever is usual."""

    @classmethod
    def parse(cls, text: str, blank: str = BLANK) -> Template:
        """Split at every occurrence of the marker. Of the default one, a run of three or more underscores is one blank.

        Raises:
            ValueError: if the marker is empty or does not occur.
        """
        if not isinstance(text, str) or not isinstance(blank, str):
            raise ValueError(f"text and blank must be strings, got {type(text).__name__} and {type(blank).__name__}")
        if not blank:
            raise ValueError("the blank marker is empty")
        check_text("the text", text)
        pieces = tuple(re.split("_{3,}" if blank == BLANK else re.escape(blank), text))
        if len(pieces) == 1:
            raise ValueError(f"no blank in {_shorten(text)!r}: mark what is to be filled with {blank!r}")
        return cls(pieces)

    @property
    def blanks(self) -> int:
        return len(self.pieces) - 1

    def opens_a_sentence(self, k: int) -> bool:
        """Whether blank k stands where a sentence begins."""
        before = self.pieces[k].rstrip()
        return before.rstrip(_CLOSING).endswith(_FULL_STOPS) or (k == 0 and not before)

    @property
    def is_one_line(self) -> bool:
        """Whether its fixed text has no line end."""
        return not any(end in piece for piece in self.pieces for end in "\n\r")

    def fill(self, fills: Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
        """The whole text, and the (start, end) character offsets of each fill in it."""
        assert len(fills) == self.blanks
        text, spans = self.pieces[0], []
        for fill, piece in zip(fills, self.pieces[1:], strict=True):
            spans.append((len(text), len(text) + len(fill)))
            text += fill + piece
        return text, spans


def _shorten(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
