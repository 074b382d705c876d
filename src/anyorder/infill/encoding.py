"""A template and the lengths of its blanks -> token ids, and which position belongs to which blank.

The fixed pieces are tokenised one by one, so that nothing beside a blank is retokenised into something else.

The last space in front of a blank belongs to the fixed text, but to the first token of the blank in nearly every
vocabulary (" cat" is one token; "    return" is three spaces and " return"). Where it does (`pieces`), the space is
left out of the tokens, the blank's first token must bring it, and the decoded blank is printed without it. So it is
with the space that some tokenizers put in front of a text, where a blank begins one.

This module knows tokenizers; it knows no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

from anyorder.core.factorization import Factorization
from anyorder.infill.boundaries import Edges
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
        start_ids: the tokens every text starts with.
    """

    def __init__(self, pieces: Pieces, start_ids: Sequence[int]):
        self.pieces, self.start_ids = pieces, list(start_ids)

    def eats_space(self, template: Template, k: int) -> bool:
        """Whether the first token of a blank brings the space in front of it."""
        return k not in template.keeps_space and self.pieces.encode_before(template.pieces[k], at_start=k == 0)[1]

    def edges(self, template: Template, k: int) -> Edges:
        """What stands beside blank k, for its tokens."""
        before, behind = template.pieces[k : k + 2]
        return Edges.between(before, behind, _at_start(template, k), self.eats_space(template, k))

    def encode_fill(self, template: Template, k: int, text: str) -> list[int]:
        """The tokens of a string in blank k, the space included that its first token brings."""
        at_start = _at_start(template, k)  # there, the tokenizer puts it in front by itself
        return self.pieces.encode(" " * (self.eats_space(template, k) and not at_start) + text, at_start)

    def decode_fill(self, template: Template, k: int, ids: list[int]) -> str:
        """The string that tokens stand for in blank k, without the space that the first one brings."""
        at_start = _at_start(template, k)
        text = self.pieces.decode(ids, at_start)
        return text.removeprefix(" ") if self.eats_space(template, k) and not at_start else text

    def encode(self, template: Template, lengths: Sequence[int], decided: Mapping[int, Sequence[int]]) -> Encoded:
        """The template with blanks of these lengths; ids in blanks are 0, but for those that are decided."""
        ids, blank, eats_space = list(self.start_ids), [-1] * len(self.start_ids), []
        for k, piece in enumerate(template.pieces):
            tokens, eats = self._fixed(template, k) if k < template.blanks else (self.pieces.encode(piece), False)
            ids += tokens
            blank += [-1] * len(tokens)
            if k < template.blanks:
                own = list(decided[k]) if k in decided else [0] * lengths[k]
                ids += own
                blank += [k] * len(own)
                eats_space.append(eats)
        return Encoded(ids, blank, eats_space, frozenset(decided))

    def _fixed(self, template: Template, k: int) -> tuple[list[int], bool]:
        """The tokens in front of blank k, and whether its first token brings the last space."""
        tokens, brings = self.pieces.encode_before(template.pieces[k], at_start=k == 0)
        if brings and k in template.keeps_space:
            return self.pieces.encode(template.pieces[k], at_start=k == 0), False
        return list(tokens), brings


def _at_start(template: Template, k: int) -> bool:
    return k == 0 and not template.pieces[0]


def pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """(B, T) int64: the rows, filled up on the right."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


def columns_of(encoded: Sequence[Encoded]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of a batch, each (B, T): ids int64; the number of each position's blank int64, -1 for fixed text; 1 where a
    position is of the text, int64; and whether it is to be filled, bool."""
    ids, blanks = pad([e.ids for e in encoded], 0), pad([e.blank for e in encoded], -1)
    mask = pad([[1] * len(e.ids) for e in encoded], 0)
    is_open = pad([[int(k >= 0 and k not in e.decided) for k in e.blank] for e in encoded], 0).bool()
    return ids, blanks, mask, is_open


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
