"""What a blank may hold: one of several strings, a regular expression, a value of a JSON schema.

A blank has a fixed number of tokens, so a constraint must be met in exactly so many. That asks for more than which
tokens may come next: which of them can still end in time. outlines-core compiles a regular expression over a vocabulary
into an explicit automaton of tokens, where this is a walk back from the final states; the libraries that make masks on
the fly (llguidance, xgrammar) are faster to set up and know richer grammars, but cannot be asked. So what cannot be met
is refused before decoding starts, and what starts always ends well.

This module knows automata and token ids; `infilling` knows text.

Shapes: B batch, T columns, N predictions, V vocabulary.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anyorder.core.factorization import Factorization

_MARK = "\x00"
LONGEST = 64
"""Lengths in tokens that are tried when saying which would do."""


@dataclass(frozen=True)
class Choice:
    """One of several strings, whatever their lengths in tokens; scored exactly, all of them."""

    options: tuple[str, ...]

    def __init__(self, *options: str):
        if len(options) < 2 or len(set(options)) < len(options) or not all(isinstance(o, str) and o for o in options):
            raise ValueError(f"a choice needs at least two different strings that are not empty, got {options!r}")
        object.__setattr__(self, "options", options)


@dataclass(frozen=True)
class Pattern:
    """The whole blank matches a regular expression (of Rust's regex syntax, without look-around or back-references)."""

    regex: str


@dataclass(frozen=True)
class JsonSchema:
    """The blank is a JSON value of a schema (those that outlines-core can turn into a regular expression)."""

    schema: str

    def __init__(self, schema: str | Mapping[str, Any]):
        object.__setattr__(self, "schema", schema if isinstance(schema, str) else json.dumps(schema))

    @functools.cached_property
    def pattern(self) -> Pattern:
        """The same as a regular expression.

        Raises:
            ValueError: if the schema is none, or cannot be one.
        """
        from outlines_core.json_schema import build_regex_from_schema

        try:
            return Pattern(build_regex_from_schema(self.schema))
        except Exception as error:  # a plain Exception, a ValueError, a TypeError, by what is wrong
            raise ValueError(f"the JSON schema {self.schema} cannot be used: {error}") from error


Constraint = Choice | Pattern | JsonSchema


class Automaton:
    """A regular expression over a vocabulary of tokens.

    Args:
        regex: what the whole text of the tokens must match.
        tokens: text of each token that may be used, by id.
        vocabulary_size: V.

    Raises:
        ValueError: if the expression is none, or no tokens match it.
    """

    def __init__(self, regex: str, tokens: Mapping[int, str], vocabulary_size: int):
        try:
            from outlines_core import Index, Vocabulary
        except ImportError as error:
            raise ValueError("constraints need outlines-core: pip install 'anyorder[constraints]'") from error
        ids: dict[bytes, list[int]] = {}
        for token_id, text in tokens.items():
            if _MARK not in text:
                ids.setdefault(text.encode(), []).append(token_id)
        # outlines-core loses ways that lead on from where a match could end ("1" to "1." in numbers), so no match may
        # end before a mark that no token holds: the states that can end are those that it leads from to a final one.
        mark, unused = vocabulary_size, vocabulary_size + 1
        try:
            index = Index(f"(?:{regex}){_MARK}", Vocabulary(unused, ids | {_MARK.encode(): [mark]}))
        except ValueError as error:
            raise ValueError(f"the pattern {regex!r} cannot be used: {error}") from error
        self.vocabulary_size, self.start = vocabulary_size, int(index.get_initial_state())
        transitions, final = index.get_transitions(), index.get_final_states()
        self.transitions: dict[int, dict[int, int]] = {
            state: {token: after for token, after in row.items() if token < mark} for state, row in transitions.items()
        }
        ends = frozenset(state for state, row in transitions.items() if row.get(mark) in final)
        self._ending = [ends]  # number r: the states that can end in exactly r tokens
        self._before: dict[int, set[int]] = {}
        for state, row in self.transitions.items():
            for after in set(row.values()):
                self._before.setdefault(after, set()).add(state)
        self._masks: dict[tuple[int, int], Tensor] = {}

    def can_end(self, state: int, remaining: int) -> bool:
        """Whether some `remaining` more tokens end in a match."""
        while len(self._ending) <= remaining:
            last = self._ending[-1]
            self._ending.append(frozenset().union(*(self._before.get(state, ()) for state in last)))
        return state in self._ending[remaining]

    def mask(self, state: int, remaining: int) -> Tensor:
        """(V,) bool: the tokens after which `remaining - 1` more can end in a match."""
        if (state, remaining) not in self._masks:
            row = self.transitions.get(state, {})
            good = [token for token, after in row.items() if self.can_end(after, remaining - 1)]
            mask = torch.zeros(self.vocabulary_size, dtype=torch.bool)
            mask[good] = True
            self._masks[state, remaining] = mask
        return self._masks[state, remaining]

    def walk(self, tokens: Sequence[int]) -> int | None:
        """The state after some tokens from the start; None if they lead nowhere."""
        state: int | None = self.start
        for token in tokens:
            state = None if state is None else self.transitions.get(state, {}).get(token)
        return state

    def lengths(self) -> list[int]:
        """Lengths in tokens that can match, up to LONGEST."""
        return [n for n in range(1, LONGEST + 1) if self.can_end(self.start, n)]


class Automata:
    """The automata of patterns, each made once.

    Args:
        texts: gives the text of each token that patterns are made of, by id; asked when the first pattern comes.
        vocabulary_size: V.
    """

    def __init__(self, texts: Callable[[], Mapping[int, str]], vocabulary_size: int):
        self._texts, self.vocabulary_size = functools.cache(texts), vocabulary_size
        self._made: dict[tuple[str, tuple[int, ...]], Automaton] = {}

    def of(self, kind: Constraint | None, eats_space: bool, suppressed: tuple[int, ...]) -> Automaton | None:
        """What a blank's tokens must match, the space included that the first one brings; None: anything.

        Raises:
            ValueError: if the pattern or the schema is none, or no tokens match it.
        """
        kind = kind.pattern if isinstance(kind, JsonSchema) else kind
        if not isinstance(kind, Pattern):
            return None
        regex = f" (?:{kind.regex})" if eats_space else kind.regex
        if (regex, suppressed) not in self._made:
            tokens = {i: text for i, text in self._texts().items() if i not in suppressed}
            self._made[regex, suppressed] = Automaton(regex, tokens, self.vocabulary_size)
        return self._made[regex, suppressed]


@dataclass(frozen=True)
class BlankConstraint:
    """A constrained blank: which columns of which row, and what they must match."""

    row: int
    columns: tuple[int, ...]
    """Neighbours, from left to right."""
    automaton: Automaton


class BlankConstraints:
    """All constrained blanks of a batch: which tokens each position may take, given those to its left.

    Raises:
        ValueError: if a blank's length fits nothing that matches; the message says which lengths would.
    """

    def __init__(self, blanks: Sequence[BlankConstraint], shape: torch.Size):
        self.blanks = list(blanks)
        self.number = torch.full(shape, -1)
        for number, blank in enumerate(self.blanks):
            self.number[blank.row, list(blank.columns)] = number
            if not blank.automaton.can_end(blank.automaton.start, len(blank.columns)):
                possible = blank.automaton.lengths()
                hint = f"possible: {_ranges(possible)}" if possible else f"nothing does up to {LONGEST}"
                raise ValueError(
                    f"text {blank.row}: no {len(blank.columns)} tokens match the constraint of the blank at position "
                    f"{blank.columns[0]}; lengths that do: {hint}"
                )

    def check_order(self, factorization: Factorization) -> None:
        """Raise ValueError unless each constrained blank is filled from left to right, one token at a step."""
        for blank in self.blanks:
            steps = factorization.group_ids[blank.row, list(blank.columns)]
            if bool((steps.diff() <= 0).any()):
                raise ValueError(
                    f"text {blank.row}: a constrained blank is filled from left to right, one of its tokens a step; "
                    "choose group_size=1 and order='left_to_right', or policies.speculative()"
                )

    def mask(self, row: Tensor, column: Tensor, ids: Tensor, ranks: Tensor, hi: Tensor) -> Tensor | None:
        """(N, V) bool of the tokens that (N,) positions may take; None: any.

        A position whose left neighbours in the blank are not all read may take any: only drafts are drawn there.

        Args:
            row, column: (N,) int64.
            ids: (B, T) int64, with tokens wherever they are read.
            ranks: (B, T + 1) int64 in generation order.
            hi: (N,) int64, the rank up to which each reads.
        """
        number = self.number[row, column]
        if not bool((number >= 0).any()):
            return None
        out = torch.ones(len(row), self.blanks[0].automaton.vocabulary_size, dtype=torch.bool)
        for n in (number >= 0).nonzero()[:, 0].tolist():
            blank, b = self.blanks[int(number[n])], int(row[n])
            before = [c for c in blank.columns if c < int(column[n])]
            if not bool((ranks[b, before] < hi[n]).all()):
                continue
            state = blank.automaton.walk(ids[b, before].tolist())
            if state is not None:  # a draft that leads nowhere is refused where it is verified
                out[n] = blank.automaton.mask(state, len(blank.columns) - len(before))
        return out


def _ranges(numbers: Sequence[int]) -> str:
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in parts)
