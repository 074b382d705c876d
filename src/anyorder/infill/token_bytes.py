"""What each token of a vocabulary stands for, in bytes, and where it leaves a UTF-8 text.

Byte-level vocabularies write a byte as one letter of an alphabet of their own (GPT-2); SentencePiece writes a space as
"▁" and a byte that it has no token for as "<0xE3>". In both, a token may hold a part of a character only, and a text is
whole if the bytes of its tokens are. That is a small automaton: which bytes are still owed.

This module knows tokenizers and bytes; no blanks and no model.

Shapes: V vocabulary, S states of a UTF-8 text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from anyorder.infill.pieces import Pieces

REPLACEMENT = "\ufffd"
"""What decoders put for bytes that are no character. No token of it is text: it is the scar of a broken one."""
WHOLE = 0
"""The state in which no byte is owed."""
DEAD = -1
_ONE, _TWO, _THREE, _E0, _ED, _F0, _F4, _EF, _EFBF = range(1, 10)
STATES = 10
# (state, first and last byte, state behind): Unicode 16, table 3-7, but for the bytes of U+FFFD itself, EF BF BD.
_STEPS = (
    (WHOLE, 0x00, 0x7F, WHOLE), (WHOLE, 0xC2, 0xDF, _ONE), (WHOLE, 0xE0, 0xE0, _E0), (WHOLE, 0xE1, 0xEC, _TWO),
    (WHOLE, 0xED, 0xED, _ED), (WHOLE, 0xEE, 0xEE, _TWO), (WHOLE, 0xEF, 0xEF, _EF), (WHOLE, 0xF0, 0xF0, _F0),
    (WHOLE, 0xF1, 0xF3, _THREE), (WHOLE, 0xF4, 0xF4, _F4),
    (_ONE, 0x80, 0xBF, WHOLE), (_TWO, 0x80, 0xBF, _ONE), (_THREE, 0x80, 0xBF, _TWO), (_E0, 0xA0, 0xBF, _ONE),
    (_ED, 0x80, 0x9F, _ONE), (_F0, 0x90, 0xBF, _TWO), (_F4, 0x80, 0x8F, _TWO), (_EF, 0x80, 0xBE, _ONE),
    (_EF, 0xBF, 0xBF, _EFBF), (_EFBF, 0x80, 0xBC, WHOLE), (_EFBF, 0xBE, 0xBF, WHOLE),
)  # fmt: skip
_BLANK = b" \t\n\r\v\f"
_BYTE = re.compile("<0x([0-9A-F]{2})>")


def _byte_steps() -> list[list[int]]:
    table = [[DEAD] * 256 for _ in range(STATES)]
    for state, first, last, after in _STEPS:
        table[state][first : last + 1] = [after] * (last + 1 - first)
    return table


def _byte_of_letter() -> dict[str, int]:
    """The alphabet of byte-level vocabularies: bytes that print stand for themselves, the others for letters from 256
    on (Radford et al. 2019, `bytes_to_unicode`)."""
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printing]
    return {chr(byte): byte for byte in printing} | {chr(256 + n): byte for n, byte in enumerate(others)}


_STEP = _byte_steps()
_BYTES = _byte_of_letter()


class TokenBytes:
    """The tokens of a vocabulary as bytes.

    Args:
        pieces: the tokenizer.
        size: V, of the model: it may have ids that the tokenizer lacks.

    Attributes:
        bytes: what each id stands for; None for ids that stand for nothing that could be told.
        is_text: (V,) bool, the tokens of ordinary text.

    Raises:
        ValueError: if the tokenizer has ids that a vocabulary of this size does not.
    """

    def __init__(self, pieces: Pieces, size: int):
        tokenizer, self.size = pieces.tokenizer, size
        tokens = tokenizer.get_vocab()
        if max(tokens.values(), default=0) >= size:
            raise ValueError(
                f"the tokenizer has ids up to {max(tokens.values())}, the model's vocabulary has {size}: "
                "they do not belong together"
            )
        added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        special = added | set(tokenizer.all_special_ids)
        self.bytes: list[bytes | None] = [None] * size
        self.is_text = torch.zeros(size, dtype=torch.bool)
        self.is_text[[i for i in tokens.values() if i not in special]] = True
        read = _reader(pieces)
        for token, i in tokens.items():
            self.bytes[i] = read(token, i) or None

    @cached_property
    def steps(self) -> Tensor:
        """(S, V) int8: the state in which each token leaves a text that was in each state; `DEAD`: in none."""
        table = np.full((STATES, self.size), DEAD, dtype=np.int8)
        for i, data in enumerate(self.bytes):
            if data is None:
                continue
            if data[0] & 0xC0 == 0x80:  # what a character owes, and nothing else, may come in the middle of one
                table[1:, i] = [_walk(state, data) for state in range(1, STATES)]
            else:
                table[WHOLE, i] = _walk(WHOLE, data)
        return torch.from_numpy(table)

    @cached_property
    def is_whole(self) -> Tensor:
        """(V,) bool: tokens that neither begin nor end inside a character."""
        return self.steps[WHOLE] == WHOLE

    @cached_property
    def is_space(self) -> Tensor:
        """(V,) bool: tokens of one space and nothing else."""
        return self._where(lambda data: data == b" ")

    @cached_property
    def begins_word(self) -> Tensor:
        """(V,) bool: tokens of a space and then something that is no whitespace."""
        return self._where(lambda data: len(data) > 1 and data[0] == 0x20 and data[1] not in _BLANK)

    @cached_property
    def begins_blank(self) -> Tensor:
        """(V,) bool: tokens that begin with whitespace."""
        return self._where(lambda data: data[0] in _BLANK)

    @cached_property
    def ends_blank(self) -> Tensor:
        """(V,) bool: tokens that end with a space or a tab."""
        return self._where(lambda data: data[-1] in b" \t")

    @cached_property
    def breaks_line(self) -> Tensor:
        """(V,) bool: tokens that hold a line feed or a carriage return."""
        return self._where(lambda data: b"\n" in data or b"\r" in data)

    def of_text(self) -> dict[int, bytes]:
        """What each token of text stands for, by id."""
        own = {i: self.bytes[i] for i in self.is_text.nonzero()[:, 0].tolist()}
        return {i: data for i, data in own.items() if data is not None}

    def _where(self, holds: Callable[[bytes], bool]) -> Tensor:
        return torch.tensor([data is not None and holds(data) for data in self.bytes])


def _walk(state: int, data: bytes) -> int:
    for byte in data:
        state = _STEP[state][byte]
        if state == DEAD:
            break
    return state


def _reader(pieces: Pieces) -> Callable[[str, int], bytes]:
    """Gives the bytes of a token and its id, by the kind of vocabulary."""
    tokenizer = pieces.tokenizer
    probe = "".join(tokenizer.convert_ids_to_tokens(tokenizer.encode("a a", add_special_tokens=False)))
    if "▁" in probe:
        return _of_sentencepiece
    if "Ġ" in probe:
        return _of_byte_level

    def decoded(token: str, i: int) -> bytes:
        text = pieces.decode([i])
        return b"" if REPLACEMENT in text else text.encode()

    return decoded


def _of_byte_level(token: str, _: int) -> bytes:
    """Tokens that were added later may be plain text."""
    data = [_BYTES.get(letter, DEAD) for letter in token]
    return token.encode() if DEAD in data else bytes(data)


def _of_sentencepiece(token: str, _: int) -> bytes:
    byte = _BYTE.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()
