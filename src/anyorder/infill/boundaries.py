"""Which tokens a blank may hold so that its text fits between what stands beside it.

Two rules. A fill is made of whole characters: no token leaves bytes of a character unsaid. And the whitespace beside a
blank is the user's: behind a space or a tab, or where the text begins, a fill begins with none, and in front of a space
or a tab it ends with neither; what brings the space in front of the blank brings it once.

Both speak of neighbouring tokens. Where a blank is filled from left to right, in groups of any size, its left
neighbours are known when a token is drawn, which may hold a part of a character if what is left of the blank can
complete it: exactly that is `FillAutomaton`. In any other order a neighbour may not be there yet, so each position by
itself keeps the rules: every token is made of whole characters (`position_masks`). Both depend on nothing but tokens
that are known, so what is drawn is the model's distribution, conditioned token by token, in either case.

This module knows tokens as bytes; no templates and no model.

Shapes: V vocabulary, S states, n positions of a blank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anyorder.infill.token_bytes import DEAD, STATES, WHOLE, TokenBytes

_OPENING, _AFTER_SPACE = STATES, STATES + 1
_LONGEST = 64
"""Lengths in tokens that are tried when saying which would do."""


@dataclass(frozen=True)
class Edges:
    """What stands beside a blank, as far as it binds the tokens in it."""

    brings_space: bool
    """The first token brings the space in front of the blank: a word with its space, or the space alone."""
    begins: bool
    """The text of the fill begins with no whitespace."""
    ends: bool
    """It ends with neither space nor tab."""
    lone_space: bool
    """The space that is brought is one between words, no indentation: where tokens do not see their neighbours, the
    first may be the space alone, which numbers need in most vocabularies."""

    @classmethod
    def between(cls, before: str, behind: str, at_start: bool, brings_space: bool) -> Edges:
        """Of a blank between two pieces of text; `at_start`: nothing at all stands in front of it."""
        lone = not before[:-1] or not before[-2].isspace()
        begins = at_start or before[-1:] in (" ", "\t")
        return cls(brings_space, begins, behind[:1] in (" ", "\t"), lone)


def position_masks(tokens: TokenBytes, edges: Edges, n: int, allowed: Tensor) -> list[Tensor]:
    """(V,) bool for each of n positions: what it may hold whatever its neighbours come to.

    Args:
        tokens: the vocabulary.
        edges: of the blank.
        n: how many positions it has.
        allowed: (V,) bool, the tokens that the blank may hold at all.
    """
    whole = allowed & tokens.is_whole
    masks = [whole] * n
    if edges.brings_space:
        first = tokens.begins_word
        masks[0] = whole & (first | tokens.is_space if edges.lone_space and n > 1 else first)
    elif edges.begins:
        masks[0] = whole & ~tokens.begins_blank
    if edges.ends:
        masks[-1] = masks[-1] & ~tokens.ends_blank
    return masks


class FillAutomaton:
    """The rules for a blank that is filled from left to right, as an automaton over tokens.

    Args:
        tokens: the vocabulary.
        edges: of the blank.
        allowed: (V,) bool, the tokens that the blank may hold at all.

    Attributes:
        start: the state before the first token.
        vocabulary_size: V.
    """

    start = _OPENING

    def __init__(self, tokens: TokenBytes, edges: Edges, allowed: Tensor):
        self.vocabulary_size = tokens.size
        steps = tokens.steps.masked_fill(~allowed, DEAD)
        word = steps[WHOLE].masked_fill(tokens.begins_blank, DEAD)
        opening = steps[WHOLE]
        if edges.brings_space:
            opening = opening.masked_fill(~tokens.begins_word, DEAD)
            opening = torch.where(tokens.is_space & allowed, _AFTER_SPACE, opening)
        elif edges.begins:
            opening = word
        self._steps = torch.cat([steps, opening[None], word[None]])  # (S, V)
        closing = ~tokens.ends_blank if edges.ends else torch.ones_like(allowed)
        self._closes = (self._steps == WHOLE) & closing
        led = torch.zeros(len(self._steps), len(self._steps) + 1, dtype=torch.bool)  # the first column is of the dead
        self._leads = led.scatter_(1, (self._steps - DEAD).long(), True)[:, 1:]
        at_end = torch.zeros(len(self._steps), dtype=torch.bool)
        at_end[WHOLE] = True
        self._ending = [at_end, self._closes.any(dim=1)]  # number r: the states that can end in exactly r tokens

    def can_end(self, state: int, remaining: int) -> bool:
        """Whether some `remaining` more tokens end where a fill may."""
        return bool(self._can_end(remaining)[state])

    def _can_end(self, remaining: int) -> Tensor:
        while len(self._ending) <= remaining:
            self._ending.append((self._leads & self._ending[-1]).any(dim=1))
        return self._ending[remaining]

    def mask(self, state: int, remaining: int) -> Tensor:
        """(V,) bool: the tokens after which `remaining - 1` more can end where a fill may."""
        if remaining == 1:
            return self._closes[state]
        steps = self._steps[state]
        return (steps != DEAD) & self._can_end(remaining - 1)[steps.long()]

    def walk(self, tokens: Sequence[int]) -> int | None:
        """The state after some tokens from the start; None if they lead nowhere."""
        state = self.start
        for token in tokens:
            state = int(self._steps[state, token])
            if state == DEAD:
                return None
        return state

    def lengths(self) -> list[int]:
        """Lengths in tokens that a fill may have, up to 64."""
        return [n for n in range(1, _LONGEST + 1) if self.can_end(self.start, n)]
