"""Drawing the members of a group one after the other, each knowing those before it.

The forward has evaluated all of them at once; what a member then knows of the others comes by coupling
(`model.coupling`), where the model has one, and by what looks at tokens: constraints, penalties, processors. No forward
of the decoder is made here, only products with the head.

Shapes: B batch, T columns, N evaluated positions, V vocabulary, E hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from anyorder.decoding.draw import Drawer, Evaluated, Visible
from anyorder.decoding.sampling import token_log_probs
from anyorder.runtime.runner import ModelRunner


@dataclass(frozen=True)
class Drawn:
    """Tokens of evaluated positions, in their order."""

    token: Tensor
    """(N,) int64 on the CPU."""
    log_prob: Tensor
    """(N,) float32 on the CPU: under the model itself, given the members before, in nats."""
    parts: Sequence[tuple[Tensor, Tensor]]
    """Which of them, (N,) bool, were drawn from which logits, (n, V)."""

    @property
    def processed(self) -> Tensor:
        """(N, V) logits that they were drawn from."""
        _, first = self.parts[0]
        whole = first.new_empty(len(self.token), first.shape[1])
        for chosen, part in self.parts:
            whole[chosen.to(whole.device)] = part
        return whole


@dataclass(frozen=True)
class First:
    """A member that has been drawn already, of each row."""

    column: Tensor
    """(B,) int64."""
    token: Tensor
    """(B,) int64."""


def draw_at_once(drawer: Drawer, found: Evaluated, uniform: Tensor, visible: Visible) -> Drawn:
    """Tokens of positions that know nothing of each other: see `Drawer.draw`."""
    token, processed = drawer.draw(found, uniform, visible)
    return Drawn(token, found.log_probs(token), [(torch.ones_like(token, dtype=torch.bool), processed)])


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
    row = found.row
    offset = torch.arange(len(row))
    begins = torch.ones(len(row), dtype=torch.bool)
    begins[1:] = row[1:] != row[:-1]
    place = offset - (offset * begins).cummax(dim=0).values
    known = 0 if first is None else 1
    members = torch.zeros(2, len(visible.ids), known + int(place.max()) + 1, dtype=torch.int64)  # columns and tokens
    if first is not None:
        members[0, :, 0], members[1, :, 0] = first.column, first.token
    visible = Visible(visible.ids.clone(), visible.ranks.clone())
    token, log_prob = torch.zeros_like(row), torch.zeros(len(row))
    parts = []
    for number in range(known, members.shape[2]):
        chosen = place == number - known
        one = found.take(chosen)
        one = replace(one, hi=one.hi + number)
        if number:
            columns, tokens = members[:, one.row, :number].flip(2)
            one = replace(one, logits=logits(one, tokens, (one.column[:, None] - columns).clamp(min=0)))
        drawn, own = drawer.draw(one, uniform[chosen], visible)
        token[chosen] = drawn
        log_prob[chosen] = token_log_probs(one.logits, drawn.to(one.logits.device)).cpu()
        parts.append((chosen, own))
        members[0, one.row, number], members[1, one.row, number] = one.column, drawn
        visible.ids[one.row, one.column], visible.ranks[one.row, one.column] = drawn, one.hi
    return Drawn(token, log_prob, parts)
