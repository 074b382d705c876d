"""Text in the middle of a text: encode and decode a piece as if something stood in front of it, or behind it.

Byte-level vocabularies need nothing special in front. SentencePiece-style tokenizers put a space in front of whatever
they encode and drop one from whatever they decode; a piece behind a blank must have neither, so it is handled behind an
anchor that is taken off again.

Behind is harder. How whitespace is cut into tokens depends on what follows: of "    return" the last space belongs to
" return", and of two line ends before a word each is a token, where two at the end of a text are one. So whitespace in
front of a blank is encoded with a word behind it, which is taken off again, and with it the space that it brought.

This module knows one tokenizer at a time; no model.
"""

from __future__ import annotations

from functools import cached_property, lru_cache

from transformers import PreTrainedTokenizerBase

from anyorder.core.text import check_text

DOCUMENT_STARTS = ("<|endoftext|>",)
_SPACE_MARKS = ("Ġ", "▁")  # how byte-level and SentencePiece vocabularies write a leading space
_ANCHOR = "\n"
_LONGEST_CHARACTER = 4
"""Bytes of a character in UTF-8."""


class Pieces:
    """A tokenizer for pieces of text.

    Args:
        tokenizer: of the base model.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.encode_before = lru_cache(maxsize=1024)(self._encode_before)

    def encode(self, piece: str, at_start: bool = False) -> list[int]:
        """Ids of a piece, without special tokens; `at_start`: nothing but a start token stands in front of it."""
        if not piece:
            return []
        check_text("the text", piece)
        if at_start or not self._adds_space:
            return self.tokenizer.encode(piece, add_special_tokens=False)
        anchor = self.tokenizer.encode(_ANCHOR, add_special_tokens=False)
        ids = self.tokenizer.encode(_ANCHOR + piece, add_special_tokens=False)
        if ids[: len(anchor)] != anchor:  # the anchor grew together with the piece: the space is the lesser evil
            return self.tokenizer.encode(piece, add_special_tokens=False)
        return ids[len(anchor) :]

    def _encode_before(self, piece: str, at_start: bool = False) -> tuple[tuple[int, ...], bool]:
        """Ids of a piece that new tokens will follow, and whether the first of these brings the piece's last space,
        which is then not among the ids (or, at the start, the space that the tokenizer puts in front of a text)."""
        if piece[-1:].isspace() or (at_start and not piece):
            ids = self.encode(piece + self._word, at_start)
            for brings in (True, False):
                tail = self.encode(" " * brings + self._word)
                fixed = piece.removesuffix(" ") if brings else piece
                known = ids[: len(ids) - len(tail)]
                if brings and (len(tail) > 1 or (piece and fixed == piece)):
                    continue
                if ids[len(known) :] == tail and self.decode(known, at_start) == fixed:
                    return tuple(known), brings
        return tuple(self.encode(piece, at_start)), False

    def decode(self, ids: list[int], at_start: bool = False) -> str:
        """The text that the ids add to what stands in front of them."""
        if at_start or not self._adds_space:
            return self._decode(ids)
        anchor = self.tokenizer.encode(_ANCHOR, add_special_tokens=False)
        return self._decode(anchor + ids).removeprefix(self._decode(anchor))

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    @cached_property
    def _adds_space(self) -> bool:
        ids = self.tokenizer.encode("a", add_special_tokens=False)
        return bool(ids) and str(self.tokenizer.convert_ids_to_tokens(ids[0])).startswith(_SPACE_MARKS)

    @cached_property
    def _word(self) -> str:
        """A word that is one token with a space in front, if there is any: most are."""
        tokens = sorted(self.tokenizer.get_vocab().items(), key=lambda one: one[1])
        words = (token[1:] for token, _ in tokens if token[:1] in _SPACE_MARKS)
        return next((word for word in words if word.isascii() and word.isalpha()), "a")

    def start_token(self) -> int:
        """The id that a text starts with: a document separator if there is one, else the start or end token.

        Raises:
            ValueError: if the tokenizer has none of them.
        """
        return self._start_token

    @cached_property
    def _start_token(self) -> int:
        vocabulary = self.tokenizer.get_vocab()
        candidates = [vocabulary.get(name) for name in DOCUMENT_STARTS]
        for token_id in (*candidates, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token_id is not None:
                return int(token_id)
        raise ValueError("the tokenizer has no start or end token: pass start_token_id")


class TextStream:
    """Tokens in, text out, as it grows: whole characters only.

    Args:
        pieces: the tokenizer.
        at_start: nothing but a start token stands in front of the first token.
        brings_space: the first token brings a space that has been written already: it is left out.
    """

    def __init__(self, pieces: Pieces, at_start: bool = False, brings_space: bool = False):
        self._pieces, self._at_start, self._drop = pieces, at_start, brings_space
        self._open: list[int] = []  # tokens from the last that ended a character on
        self._written = 0  # characters of theirs that are out

    def put(self, ids: list[int]) -> str:
        """The characters that some more tokens complete."""
        self._open += ids
        text = self._text()
        # Bytes that are no character yet decode as U+FFFD, each or all in one: the last three may still become one.
        kept = text[-(_LONGEST_CHARACTER - 1) :]
        held = len(kept) - len(kept.rstrip("\ufffd"))
        return self._write(text[: len(text) - held], finished=not held)

    def end(self) -> str:
        """What was held back: U+FFFD where a character was not completed. The stream can be used anew."""
        return self._write(self._text(), finished=True)

    def _text(self) -> str:
        return self._pieces.decode(self._open, self._at_start)

    def _write(self, text: str, finished: bool) -> str:
        new = text[self._written :]
        self._written = max(self._written, len(text))
        if finished and self._open:
            self._open, self._written, self._at_start = [], 0, False
        if new and self._drop:
            self._drop, new = False, new.removeprefix(" ")
        return new
