"""Texts of any length -> token ids of documents that are cut at sentence ends; linear in the text.

A long text is tokenized piece by piece: the tokenizer's own record of a token is some hundred bytes, too much for all
tokens of a large file at once. Two pieces part only where the tokenizer is seen to part its tokens too, so that the ids
are those of the whole text.

A text may name blanks: characters that a user would leave out. What stands in them and around them is tokenized each
for itself, as an infill meets it: a tokenizer that joins the last character of a line with the line end would not part
them where the blank ends (the reason why fill-in-the-middle is trained on characters; arXiv 2207.14255, section 3).

Knows strings and ids; nothing of files, data sets or factorizations.
"""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from anyorder.infill.encoding import Blanks
from anyorder.infill.pieces import Pieces
from anyorder.infill.template import Template

PIECE = 1 << 16
"""Characters that are tokenized as one."""
TOGETHER = 1 << 20
"""Characters of the pieces that are tokenized in one call, on all cores: some hundred megabytes of records."""
_WINDOW = 128  # characters on either side of a place to part that say whether tokens part there too
_TRIES = 8  # places, one after another, before the search goes on further on
_SENTENCE = re.compile(r"[.!?][\"'”’)\]]*\s+(?=[\"'“‘(\[]?[A-Z0-9])")
_PART = re.compile(r"(?<=\S)(?= \S)|(?<=\n)(?=\S)")

Ids = NDArray[np.int64]
_Small = NDArray[np.int32]  # a text of the data set has less than 2 GiB


@dataclass(frozen=True)
class Cut:
    """One document.

    Attributes:
        ids: (tokens,) int64, the start token included.
        sentence_starts: ascending positions in `ids` at which sentences start.
        blanks: ascending positions of each blank's first token and of the token behind its last.
    """

    ids: Ids
    sentence_starts: list[int] = field(default_factory=list)
    blanks: list[tuple[int, int]] = field(default_factory=list)


def cut(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int, start: int) -> Iterator[Cut]:
    """The documents of each text, at most `max_length` tokens long, each behind the id `start`.

    A document ends at the last sentence end that it reaches, or is full; nothing is thrown away.
    """
    for text, (ids, begins) in zip(texts, _tokenized(texts, tokenizer), strict=True):
        starts = _sentence_starts(text, begins)
        begin, first = 0, 0  # `first` of `starts` is the first from `begin` on
        while begin < len(ids):
            end = min(begin + max_length - 1, len(ids))
            beyond = bisect.bisect_right(starts, end, first)
            if end < len(ids) and beyond > first and starts[beyond - 1] > begin:
                end = starts[beyond - 1]
            after = bisect.bisect_left(starts, end, first)
            document = np.empty(end - begin + 1, np.int64)
            document[0], document[1:] = start, ids[begin:end]
            yield Cut(document, [s - begin + 1 for s in starts[first:after]])
            begin, first = end, after


def cut_around(
    text: str, blanks: Sequence[Sequence[int]], pieces: Pieces, max_length: int, start: int
) -> Iterator[Cut]:
    """The documents of a text with blanks, full but for the last; of a blank that is cut each has its part.

    Args:
        text: not empty.
        blanks: (first character, the one behind the last) of each, ascending, none touching another.
        pieces: the tokenizer.
        max_length: of a document, in tokens.
        start: id in front of each document.

    Raises:
        ValueError: naming the blank that is none.
    """
    template, inside = parted(text, blanks)
    encoding = Blanks(pieces, [])
    own = {k: encoding.encode_fill(template, k, fill) for k, fill in enumerate(inside)}
    whole = encoding.encode(template, [0] * len(own), own)
    ids, numbers = np.array(whole.ids, np.int64), np.array(whole.blank, np.int64)
    for begin in range(0, len(ids), max_length - 1):
        here = slice(begin, begin + max_length - 1)
        places = (1 + np.flatnonzero(numbers[here] == k) for k in np.unique(numbers[here]) if k >= 0)
        found = [(int(place[0]), int(place[-1]) + 1) for place in places]
        yield Cut(np.concatenate([np.array([start], np.int64), ids[here]]), blanks=found)


def parted(text: str, blanks: Sequence[Sequence[int]]) -> tuple[Template, list[str]]:
    """What stands around the blanks of a text, and in each; as for `cut_around`."""
    around, inside, done = [], [], -1
    for blank in blanks:
        whole = isinstance(blank, list | tuple) and len(blank) == 2 and all(isinstance(n, int) for n in blank)
        if not whole or not max(0, done + 1) <= blank[0] < blank[1] <= len(text):
            raise ValueError(
                "blanks must be [first character, the one behind the last] in ascending order, none touching another, "
                f"of a text of {len(text)} characters; got {blank!r} in {blanks!r}"
            )
        around.append(text[max(0, done) : blank[0]])
        inside.append(text[blank[0] : blank[1]])
        done = blank[1]
    return Template((*around, text[max(0, done) :])), inside


def _sentence_starts(text: str, begins: _Small) -> list[int]:
    """Numbers of the tokens that bring the first character of a sentence, with the space in front of it."""
    if not len(begins):
        return []
    marks = np.array([0, *(match.end() for match in _SENTENCE.finditer(text))], np.int32)
    index = begins.searchsorted(marks)
    space_before = (index > 0) & (begins[index - 1] == marks - 1)
    index = np.unique(index - space_before)
    return index[index < len(begins)].tolist()


def _tokenized(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[_Small, _Small]]:
    """Of each text: the ids of its tokens, and the character at which each begins."""
    pieces = [(n, begin, end) for n, text in enumerate(texts) for begin, end in _pieces(text, tokenizer)]
    found: list[list[tuple[_Small, _Small]]] = [[] for _ in texts]
    for together in _calls(pieces):
        encoded = _encode(tokenizer, [texts[n][begin:end] for n, begin, end in together])
        for (n, begin, _), ids, offsets in zip(together, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            begins = np.fromiter((first for first, _ in offsets), np.int32, len(offsets))
            found[n].append((np.array(ids, np.int32), begins + begin))
    for n, own in enumerate(found):
        found[n] = []
        nothing = np.zeros(0, np.int32)
        yield np.concatenate([nothing, *(i for i, _ in own)]), np.concatenate([nothing, *(b for _, b in own)])


def _calls(pieces: Sequence[tuple[int, int, int]]) -> Iterator[list[tuple[int, int, int]]]:
    together: list[tuple[int, int, int]] = []
    size = 0
    for piece in pieces:
        together.append(piece)
        size += piece[2] - piece[1]
        if size >= TOGETHER:
            yield together
            together, size = [], 0
    if together:
        yield together


def _pieces(text: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[int, int]]:
    """Where the pieces of a text begin and end; one piece where the tokenizer parts its tokens nowhere."""
    begin = 0
    while len(text) - begin > PIECE and (parting := _parting(text, begin + PIECE, tokenizer)) is not None:
        end, after = parting
        yield begin, end
        begin = after
    if begin < len(text):
        yield begin, len(text)


def _parting(text: str, earliest: int, tokenizer: PreTrainedTokenizerBase) -> tuple[int, int] | None:
    """The first end of a piece from `earliest` on, and the beginning of the next: where the tokens of the two sides are
    those of both together. A tokenizer that puts a space in front of whatever it encodes puts back one that is left
    out, so the next piece may begin behind it.
    """
    while earliest < len(text):
        for match in itertools.islice(_PART.finditer(text, earliest), _TRIES):
            end = match.start()
            for after in (end, end + 1) if text[end] == " " else (end,):
                sides = text[max(0, end - _WINDOW) : end], text[after : end + _WINDOW]
                both = text[max(0, end - _WINDOW) : end + _WINDOW]
                left, right, whole = _encode(tokenizer, [*sides, both])["input_ids"]
                if left + right == whole:
                    return end, after
        earliest += PIECE
    return None


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> dict[str, Any]:
    more = {"return_offsets_mapping": True, "return_attention_mask": False, "verbose": False}
    return tokenizer(texts, add_special_tokens=False, **more)
