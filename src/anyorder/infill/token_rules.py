"""Which tokens each blank of a batch may hold: what was asked for, and what fits between the texts beside it.

This module knows templates, constraints and tokens; it knows no model.

Shapes: B batch, T columns, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from anyorder.core.factorization import Factorization
from anyorder.decoding.automata import TokenAutomaton
from anyorder.decoding.constraints import Automata, BlankConstraint, BlankConstraints, Choice, Constraint
from anyorder.decoding.sampling import AllowedTokens
from anyorder.infill.boundaries import Edges, FillAutomaton, position_masks
from anyorder.infill.encoding import Blanks, Encoded
from anyorder.infill.template import Template
from anyorder.infill.token_bytes import TokenBytes


class TokenRules:
    """What the blanks of a batch may hold.

    Args:
        tokens: the vocabulary.
        blanks: turns templates into positions.
        automata: of patterns.
        special_tokens: whether special tokens may stand in a blank.
        suppress_tokens: ids that no blank may hold; None: none.
        single_line: whether blanks hold no line end; None: those of texts that have none themselves, unless a pattern
            says what a blank holds.

    Attributes:
        suppressed: the ids that patterns have to do without.

    Raises:
        ValueError: if an id is none of the vocabulary's.
    """

    def __init__(
        self,
        tokens: TokenBytes,
        blanks: Blanks,
        automata: Automata,
        special_tokens: bool,
        suppress_tokens: Sequence[int] | None,
        single_line: bool | None,
    ):
        if single_line is not None and not isinstance(single_line, bool):
            raise ValueError(f"single_line must be True, False or None, got {single_line!r}")
        self._tokens, self._blanks, self._automata, self._single_line = tokens, blanks, automata, single_line
        self._allowed = torch.ones_like(tokens.is_text) if special_tokens else tokens.is_text.clone()
        for token in suppress_tokens or ():
            if not isinstance(token, Integral) or isinstance(token, bool) or not 0 <= token < tokens.size:
                raise ValueError(f"suppress_tokens holds {token!r}: not a token id of this model")
            self._allowed[token] = False
        if single_line:
            self._allowed &= ~tokens.breaks_line
        self.suppressed = tuple((tokens.is_text & ~self._allowed).nonzero()[:, 0].tolist())
        self._made: dict[tuple[Edges, bool], FillAutomaton] = {}

    def settle_spaces(
        self, template: Template, constraints: Sequence[Constraint | None], tried: Sequence[tuple[int, ...]]
    ) -> Template:
        """The template, in which the space in front of a pattern stays fixed text where no token brings it along with
        what matches, or where the blank's known length allows a match only so.

        Args:
            template: a text.
            constraints: of each blank.
            tried: the lengths to try for each blank; one where it is known.

        Raises:
            ValueError: if a pattern or a schema is none, or no tokens match it.
        """
        kept = set()
        for k, (constraint, lengths) in enumerate(zip(constraints, tried, strict=True)):
            if constraint is None or isinstance(constraint, Choice) or not self._blanks.eats_space(template, k):
                continue
            spaced = self._automata.of(constraint, True, self.suppressed)
            assert spaced is not None
            starts = (spaced.mask(spaced.start, n) for n in spaced.lengths())
            brought = any(bool((first & ~self._tokens.is_space).any()) for first in starts)
            if brought and len(lengths) == 1 and not spaced.can_end(spaced.start, lengths[0]):
                bare = self._automata.of(constraint, False, self.suppressed)
                assert bare is not None
                brought = not bare.can_end(bare.start, lengths[0])
            if not brought:
                kept.add(k)
        return Template(template.pieces, frozenset(kept))

    def apply(
        self,
        templates: Sequence[Template],
        encoded: Sequence[Encoded],
        constraints: Sequence[Sequence[Constraint | None]],
        order: Factorization,
        keeps_order: bool,
    ) -> tuple[AllowedTokens, BlankConstraints | None]:
        """For `generate`: what each position may hold, and what blanks must match that are filled from left to right.

        Args:
            templates: the texts.
            encoded: their positions.
            constraints: of each blank of each text.
            order: of the positions, as the policy has prepared it.
            keeps_order: whether the policy keeps it.

        Raises:
            ValueError: if a constraint cannot be met, or no token is allowed somewhere.
        """
        masks, bound = {"": self._allowed}, []
        index = torch.zeros_like(order.group_ids)
        for row, (template, e, kinds) in enumerate(zip(templates, encoded, constraints, strict=True)):
            for k, kind in enumerate(kinds):
                columns = e.columns(k)
                if k in e.decided:
                    continue
                automaton: TokenAutomaton | None = self._automata.of(kind, e.eats_space[k], self.suppressed)
                edges, one_line = self._blanks.edges(template, k), self._one_line(template)
                if automaton is None and keeps_order and bool((order.group_ids[row, list(columns)].diff() >= 0).all()):
                    automaton = self._automaton(edges, one_line)
                if automaton is not None:
                    bound.append(BlankConstraint(row, columns, automaton))
                    continue
                own = position_masks(self._tokens, edges, len(columns), self._in(one_line))
                for n, (column, mask) in enumerate(zip(columns, own, strict=True)):
                    place = f"{edges} {one_line} {n == 0} {n == len(columns) - 1}"
                    masks.setdefault(place, mask)
                    index[row, column] = list(masks).index(place)
        allowed = AllowedTokens(torch.stack(list(masks.values())), index)
        return allowed, BlankConstraints(bound, index.shape) if bound else None

    def _one_line(self, template: Template) -> bool:
        return template.is_one_line if self._single_line is None else self._single_line

    def _in(self, one_line: bool) -> Tensor:
        return self._allowed & ~self._tokens.breaks_line if one_line else self._allowed

    def _automaton(self, edges: Edges, one_line: bool) -> FillAutomaton:
        if (edges, one_line) not in self._made:
            self._made[edges, one_line] = FillAutomaton(self._tokens, edges, self._in(one_line))
        return self._made[edges, one_line]
