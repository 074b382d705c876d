"""What a blank may hold: one of several strings, a regular expression, a value of a JSON schema.

A blank has a fixed number of tokens, so a constraint must be met in exactly so many. That asks for more than which
tokens may come next: which of them can still end in time. outlines-core compiles a regular expression into an explicit
automaton, where this is a walk back from the final states; the libraries that make masks on the fly (llguidance,
xgrammar) are faster to set up and know richer grammars, but cannot be asked. So what cannot be met is refused before
decoding starts, and what starts always ends well.

This module knows automata and token ids; `infill` knows text.

Shapes: B batch, T columns, N predictions, V vocabulary.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anyorder.core.factorization import Factorization
from anyorder.decoding.automata import (
    KEPT_BYTES,
    LONGEST,
    Automaton,
    LeastRecentlyUsed,
    Restricted,
    TokenAutomaton,
    Vocabulary,
)
from anyorder.decoding.regular_expressions import NOT_INSTALLED, compiled, without_anchors
from anyorder.decoding.sampling import AllowedTokens


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
    """The whole blank matches a regular expression (of Rust's regex syntax, without look-around, back-references and
    word boundaries). Anchors where the text begins and ends may be there or not.

    Raises:
        ValueError: if it is empty, or holds what is not supported.
    """

    regex: str

    def __post_init__(self) -> None:
        without_anchors(self.regex, self.name)

    @property
    def name(self) -> str:
        """What errors call it."""
        return f"the pattern {self.regex!r}"


@dataclass(frozen=True)
class JsonSchema:
    """The blank is a JSON value of a schema (those that outlines-core can turn into a regular expression).

    Raises:
        ValueError: if the schema is no JSON.
    """

    schema: str

    def __init__(self, schema: str | Mapping[str, Any]):
        try:
            text = schema if isinstance(schema, str) else json.dumps(schema)
            json.loads(text)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the JSON schema {schema} cannot be used: it is no JSON: {error}") from error
        object.__setattr__(self, "schema", text)

    @property
    def name(self) -> str:
        """What errors call it."""
        return f"the JSON schema {self.schema}"

    @functools.cached_property
    def regex(self) -> str:
        """The same as a regular expression.

        Raises:
            ValueError: if it cannot be one.
        """
        if importlib.util.find_spec("outlines_core") is None:
            raise ValueError(NOT_INSTALLED)
        from outlines_core.json_schema import build_regex_from_schema

        try:
            return build_regex_from_schema(self.schema)
        except Exception as error:  # a plain Exception, a ValueError, a TypeError, by what is wrong
            raise ValueError(f"{self.name} cannot be used: {error}") from error


Constraint = Choice | Pattern | JsonSchema


class Automata:
    """The automata of a vocabulary; those used last are kept.

    Args:
        texts: gives what each token spells that patterns are made of, by id; asked when the first pattern comes.
        vocabulary_size: V.
        limit: bytes of automata that are kept.
    """

    def __init__(self, texts: Callable[[], Mapping[int, str | bytes]], vocabulary_size: int, limit: int = KEPT_BYTES):
        self._vocabulary = functools.cache(lambda: Vocabulary(texts(), vocabulary_size))
        self.vocabulary_size, self.kept = vocabulary_size, LeastRecentlyUsed(limit)

    def of(self, kind: Constraint | None, eats_space: bool, suppressed: Sequence[int]) -> Automaton | None:
        """What a blank's tokens must match, the space included that the first one brings; None: anything.

        Raises:
            ValueError: if the pattern or the schema is none, or no tokens match it, or it is too large.
        """
        if not isinstance(kind, Pattern | JsonSchema):
            return None
        key = (kind, eats_space, frozenset(suppressed))
        automaton: Automaton | None = self.kept.get(key)
        if automaton is None:
            found = compiled(without_anchors(kind.regex, kind.name), kind.name, " " * eats_space)
            automaton = Automaton(found, self._vocabulary(), self.vocabulary_size, suppressed, kind.name, self.kept)
            self.kept.put(key, automaton, automaton.size)
        return automaton


@dataclass(frozen=True)
class BlankConstraint:
    """A constrained blank: which columns of which row, and what they must match."""

    row: int
    columns: tuple[int, ...]
    """Neighbours, from left to right."""
    automaton: TokenAutomaton


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
        """Raise ValueError unless each constrained blank is filled from left to right, in groups of any size."""
        for blank in self.blanks:
            steps = factorization.group_ids[blank.row, list(blank.columns)]
            if bool((steps.diff() < 0).any()):
                raise ValueError(
                    f"text {blank.row}: a constrained blank is filled from left to right; choose order='left_to_right'"
                )

    def within(self, allowed: AllowedTokens | None) -> BlankConstraints:
        """The same where positions may take certain tokens only: what is allowed then ends well too.

        Args:
            allowed: which tokens each position may take; None: any.

        Raises:
            ValueError: if a blank's constraint cannot be met with what its positions may take.
        """
        if allowed is None:
            return self
        made: dict[tuple[int, tuple[int, ...]], Restricted] = {}
        masks = list(allowed.masks.cpu())
        blanks = []
        for blank in self.blanks:
            numbers = tuple(allowed.index[blank.row, list(blank.columns)].tolist())
            automaton = blank.automaton
            if isinstance(automaton, Automaton):
                key = id(automaton), numbers
                made[key] = made.get(key) or Restricted(automaton, [masks[number] for number in numbers])
                automaton = made[key]
            remaining = len(blank.columns)
            first = automaton.mask(automaton.start, remaining) & masks[numbers[0]]
            if not automaton.can_end(automaton.start, remaining) or not bool(first.any()):
                raise ValueError(
                    f"text {blank.row}: the constraint of the blank at position {blank.columns[0]} and its allowed "
                    "tokens exclude each other: allow more tokens, or choose another length"
                )
            blanks.append(BlankConstraint(blank.row, blank.columns, automaton))
        return BlankConstraints(blanks, self.number.shape)

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
        constrained = (number >= 0).nonzero()[:, 0]
        if not len(constrained):
            return None
        out = torch.ones(len(row), self.blanks[0].automaton.vocabulary_size, dtype=torch.bool)
        made: dict[tuple[int, int, int], Tensor] = {}  # many positions of a batch stand alike
        rows = row[constrained]
        read = (ranks[rows, : ids.shape[1]] < hi[constrained, None]).tolist()
        for n, places, tokens in zip(constrained.tolist(), read, ids[rows].tolist(), strict=True):
            blank = self.blanks[int(number[n])]
            before = blank.columns[: blank.columns.index(int(column[n]))]
            if not all(places[c] for c in before):
                continue
            automaton, remaining = blank.automaton, len(blank.columns) - len(before)
            state = automaton.walk([tokens[c] for c in before])
            if state is None or not automaton.can_end(state, remaining):
                continue  # a draft that leads nowhere is refused where it is verified
            key = id(automaton), state, remaining
            if key not in made:
                made[key] = automaton.mask(state, remaining)
            out[n] = made[key]
        return out


def _ranges(numbers: Sequence[int]) -> str:
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in parts)
