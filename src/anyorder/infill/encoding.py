"""A template and the lengths of its blanks -> token ids, and which position belongs to which blank.

The fixed pieces are tokenised one by one, so that nothing beside a blank is retokenised into something else.

A single space in front of a blank belongs to the fixed text, but to the first token of the blank in nearly every
vocabulary (" cat" is one token). So the space is left out of the tokens, the blank's first token must bring it, and
the decoded blank is printed without it.

This module knows tokenizers; it knows no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

from anyorder.core.factorization import Factorization
from anyorder.infill.pieces import Pieces
from anyorder.infill.template import Template


@dataclass(frozen=True)
class Encoded:
    """A template as positions."""

    ids: list[int]
    blank: list[int]
    """For each position the number of its blank, -1 for fixed text."""
    eats_space: list[bool]
    """For each blank: its first token brings the space in front of it."""
    decided: frozenset[int] = frozenset()
    """Blanks whose tokens are there already."""

    def columns(self, k: int) -> tuple[int, ...]:
        """The positions of a blank."""
        return tuple(i for i, b in enumerate(self.blank) if b == k)


class Blanks:
    """Turns templates into positions.

    Args:
        pieces: the tokenizer.
        start_token_id: the token every text starts with.
        has_spaces: whether any token begins with a space.
    """

    def __init__(self, pieces: Pieces, start_token_id: int, has_spaces: bool):
        self.pieces, self.start_token_id, self.has_spaces = pieces, start_token_id, has_spaces

    def eats_space(self, template: Template, k: int) -> bool:
        """Whether the first token of a blank brings the space in front of it."""
        piece = template.pieces[k]
        return self.has_spaces and piece.endswith(" ") and not piece[:-1][-1:].isspace()

    def encode_fill(self, template: Template, k: int, text: str) -> list[int]:
        """The tokens of a string in blank k, the space included that its first token brings."""
        return self.pieces.encode(" " * self.eats_space(template, k) + text, _at_start(template, k))

    def decode_fill(self, template: Template, k: int, ids: list[int]) -> str:
        """The string that tokens stand for in blank k, without the space that the first one brings."""
        text = self.pieces.decode(ids, _at_start(template, k))
        return text.removeprefix(" ") if self.eats_space(template, k) else text

    def encode(self, template: Template, lengths: Sequence[int], decided: Mapping[int, Sequence[int]]) -> Encoded:
        """The template with blanks of these lengths; ids in blanks are 0, but for those that are decided."""
        ids, blank, eats_space = [self.start_token_id], [-1], []
        for k, piece in enumerate(template.pieces):
            eats = k < template.blanks and self.eats_space(template, k)
            tokens = self.pieces.encode(piece[:-1] if eats else piece, at_start=k == 0)
            ids += tokens
            blank += [-1] * len(tokens)
            if k < template.blanks:
                own = list(decided[k]) if k in decided else [0] * lengths[k]
                ids += own
                blank += [k] * len(own)
                eats_space.append(eats)
        return Encoded(ids, blank, eats_space, frozenset(decided))


def _at_start(template: Template, k: int) -> bool:
    return k == 0 and not template.pieces[0]


def pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """(B, T) int64: the rows, filled up on the right."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


def check_context(encoded: Sequence[Encoded], limit: int | None) -> None:
    """Raise ValueError if a text has more positions than a model's context."""
    for number, e in enumerate(encoded):
        if limit is not None and len(e.ids) > limit:
            raise ValueError(
                f"text {number} has {len(e.ids)} tokens with its blanks; the model's context is {limit}: shorten it"
            )


def by_blank(
    f: Factorization, blanks: Tensor, wanted: Sequence[int], counts: list[int], order: str, group_size: int
) -> Factorization:
    """The blanks one after the other in a wanted order, each from left to right; groups do not span two of them."""
    if order != "left_to_right":
        raise ValueError(f"blank_order says in which order blanks are filled, order={order!r} too: choose one")
    groups = f.group_ids.clone()
    for row, count in enumerate(counts):
        if len(set(wanted)) < len(wanted) or not all(isinstance(k, Integral) and 0 <= k < count for k in wanted):
            raise ValueError(f"blank_order must hold different numbers of blanks, 0 to {count - 1}, got {list(wanted)}")
        step = 0
        for k in [*wanted, *(k for k in range(count) if k not in wanted)]:
            columns = ((blanks[row] == k) & (f.group_ids[row] >= 0)).nonzero()[:, 0]
            groups[row, columns] = step + torch.arange(len(columns)) // group_size
            step += -(-len(columns) // group_size)
    return Factorization(groups)
