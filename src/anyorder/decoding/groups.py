"""Drawing the members of a group one after the other, each knowing those before it.

The forward has evaluated all of them at once; what a member then knows of the others comes by coupling
(`model.coupling`), where the model has one, and by what looks at tokens: constraints, penalties, processors. No forward
of the decoder is made here, only products with the head.

Shapes: B batch, T columns, N evaluated positions, V vocabulary, E hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from anyorder.decoding.draw import Distribution, Drawer, Evaluated, Visible
from anyorder.runtime.runner import ModelRunner


@dataclass(frozen=True)
class Drawn:
    """Tokens of evaluated positions, in their order."""

    token: Tensor
    """(N,) int64 on the CPU."""
    parts: Sequence[Distribution]
    """What they were drawn from, those that were drawn together in one."""
    places: Tensor | None = None
    """(N,) int64: where in the parts, one behind the other, each position is; None: in their order."""

    @property
    def log_prob(self) -> Tensor:
        """(N,) float32 on the CPU: under the model itself, given the members before, in nats."""
        counts = [len(part.processed) for part in self.parts]
        token = self.token if self.places is None else self.token[self.places.argsort()]
        return self._in_order([part.log_probs(own) for part, own in zip(self.parts, token.split(counts), strict=True)])

    @property
    def probs(self) -> Tensor | None:
        """(N, V) float32 that they were drawn by; None: each was the most likely."""
        parts = [part.probs for part in self.parts]
        return None if any(part is None for part in parts) else self._in_order(cast(list[Tensor], parts))

    def _in_order(self, parts: list[Tensor]) -> Tensor:
        whole = torch.cat(parts)
        return whole if self.places is None else whole[self.places.to(whole.device)]


@dataclass(frozen=True)
class First:
    """A member that has been drawn already, of each row."""

    column: Tensor
    """(B,) int64."""
    token: Tensor
    """(B,) int64."""


def draw_at_once(drawer: Drawer, found: Evaluated, uniform: Tensor, visible: Visible) -> Drawn:
    """Tokens of positions that know nothing of each other: see `Drawer.draw`."""
    token, own = drawer.draw(found, uniform, visible)
    return Drawn(token, [own])


Logits = Callable[[Evaluated, Tensor, Tensor], Tensor]
"""(N, V) float32 logits of members behind the first, given those before each: (N, M) tokens, the last drawn first, and
how far to the left they stand, 0 for those on the right, which say nothing."""


def coupled_by(runner: ModelRunner) -> Logits:
    """Members know those before them, if the model is coupled; else each keeps the logits that it has alone."""

    def logits(found: Evaluated, tokens: Tensor, distances: Tensor) -> Tensor:
        if found.hidden is None:
            return found.logits
        return runner.coupled_logits(found.hidden, found.logits, tokens, distances)

    return logits


UNLIKELY = -1e4
"""Logit of what drafts are not made of, where it must be said: a number, for constraints may leave nothing else."""


def drafted_by(runner: ModelRunner, vocabulary: int | None) -> Logits:
    """Members have no row of their own: their hidden states are those of the rows of their groups' first. Their logits
    are (N, V') of the first tokens alone, or of all of a vocabulary, where something names tokens."""

    def logits(found: Evaluated, tokens: Tensor, distances: Tensor) -> Tensor:
        assert found.hidden is not None
        few = runner.draft_logits(found.hidden, tokens, distances)
        return few if vocabulary is None else pad(few, (0, vocabulary - few.shape[1]), value=UNLIKELY)

    return logits


def draw_in_turn(
    logits: Logits,
    drawer: Drawer,
    found: Evaluated,
    uniform: Tensor,
    visible: Visible,
    first: First | None = None,
) -> Drawn:
    """Tokens of groups, one group a row.

    Args:
        logits: of members that are drawn behind others.
        drawer: draws.
        found: the members, row by row; each row's in the order in which they are drawn.
        uniform: (N,) float64 in [0, 1), one a position.
        visible: what else they may look at.
        first: the first member of each row's group, if it was drawn before; its rank is the one behind those that
            `found` reads.
    """
    offset = torch.arange(len(found.row))
    begins = torch.ones(len(found.row), dtype=torch.bool)
    begins[1:] = found.row[1:] != found.row[:-1]
    place = offset - (offset * begins).cummax(dim=0).values
    counts, places = place.bincount().tolist(), None
    if len(counts) < len(place):  # of several rows: those that are drawn together side by side
        order = place.argsort(stable=True)
        found, uniform, places = found.take(order), uniform[order], order.argsort()
    known = 0 if first is None else 1
    members = torch.zeros(2, len(visible.ids), known + len(counts), dtype=torch.int64)  # columns and tokens
    if first is not None:
        members[0, :, 0], members[1, :, 0] = first.column, first.token
    if drawer.reads_tokens:
        visible = Visible(visible.ids.clone(), visible.ranks.clone())
    tokens, parts, end = [], [], 0
    for number, count in enumerate(counts, known):
        one, end = found.between(end, end + count), end + count
        one = replace(one, hi=one.hi + number)
        if number:
            columns, before = members[:, one.row, :number].flip(2)
            one = replace(one, logits=logits(one, before, (one.column[:, None] - columns).clamp(min=0)))
        token, own = drawer.draw(one, uniform[end - count : end], visible)
        tokens.append(token)
        parts.append(own)
        members[:, one.row, number] = torch.stack([one.column, token])
        if drawer.reads_tokens:
            visible.ids[one.row, one.column], visible.ranks[one.row, one.column] = token, one.hi
    whole = torch.cat(tokens)
    return Drawn(whole if places is None else whole[places], parts, places)
