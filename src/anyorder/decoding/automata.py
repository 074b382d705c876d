"""Automata of tokens: which tokens may come next, and which of them can still end in time.

An expression is an automaton of bytes (`regular_expressions`), a vocabulary a trie of bytes. Where a token leads from a
state is read off both; so nothing is stored a token but the rows of states that were asked for last. What is stored is
which state can follow which, and that answers whether so many tokens can end in a match.

This module knows token ids and the bytes that they spell; it knows no text and no model.

Shapes: V vocabulary, S states, E pairs of states of which one can follow the other by one token.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from anyorder.decoding.regular_expressions import ByteAutomaton, compiled, without_anchors

LONGEST = 64
"""Lengths in tokens that are tried when saying which would do."""
MAX_PAIRS = 2**22
"""An automaton may hold so many pairs of states: 16 bytes each."""
KEPT_BYTES = 2**27
"""Automata, rows of states and masks that are kept for the next time, a vocabulary."""

_logger = logging.getLogger(__name__)
_serial = itertools.count()


class TokenAutomaton(Protocol):
    """What a constrained blank asks of an automaton of tokens; states are numbers of the automaton's own."""

    @property
    def vocabulary_size(self) -> int: ...

    @property
    def start(self) -> int: ...

    def can_end(self, state: int, remaining: int) -> bool:
        """Whether some `remaining` more tokens end in a match."""

    def mask(self, state: int, remaining: int) -> Tensor:
        """(V,) bool: the tokens after which `remaining - 1` more can end in a match."""

    def walk(self, tokens: Sequence[int]) -> int | None:
        """The state after some tokens from the start; None if they lead nowhere."""

    def lengths(self) -> list[int]:
        """Lengths in tokens that can match, as far as they were tried; for messages."""


class LeastRecentlyUsed:
    """Things that can be made anew; those asked for longest ago make room. Threads may share one.

    Args:
        limit: bytes that may be kept.
    """

    def __init__(self, limit: int):
        self.limit, self.size = limit, 0
        self._kept: OrderedDict[Any, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Any) -> Any:
        """What was put there; None if nothing was, or it made room."""
        with self._lock:
            if key not in self._kept:
                return None
            self._kept.move_to_end(key)
            return self._kept[key][0]

    def put(self, key: Any, value: Any, size: int) -> None:
        """Keep a thing of a size in bytes, unless it alone is beyond the limit."""
        with self._lock:
            self.size -= self._kept.pop(key, (None, 0))[1]
            if size > self.limit:
                return
            self._kept[key] = value, size
            self.size += size
            while self.size > self.limit:
                self.size -= self._kept.popitem(last=False)[1][1]


class Vocabulary:
    """What tokens spell, as a trie.

    Args:
        tokens: text or bytes of each token that may be used, by id; those without any, or with a zero byte, are not.
        size: V.
    """

    def __init__(self, tokens: Mapping[int, str | bytes], size: int):
        self.size = size
        spelled = {token: text.encode() if isinstance(text, str) else text for token, text in tokens.items()}
        self.spelled = {token: text for token, text in spelled.items() if text and 0 not in text}
        self._levels: list[tuple[Tensor, Tensor]] = []  # of each depth: the nodes' parents, and bytes
        self.nodes = 1
        ends: dict[int, int] = {}
        alive = dict.fromkeys(self.spelled, 0)
        while alive:
            depth, found, after = len(self._levels), dict[int, int](), dict[int, int]()
            for token, node in alive.items():
                text = self.spelled[token]
                child = found.setdefault(node << 8 | text[depth], self.nodes + len(found))
                if depth + 1 < len(text):
                    after[token] = child
                else:
                    ends[token] = child
            level = torch.tensor(list(found), dtype=torch.int64)
            self._levels.append(((level >> 8).int(), (level & 255).int()))
            self.nodes += len(found)
            alive = after
        self.ids = torch.tensor(list(ends), dtype=torch.int64)
        """(tokens,) int64: the ids that spell something."""
        self._node = torch.tensor(list(ends.values()), dtype=torch.int32)

    def after(self, table: Tensor, state: int) -> Tensor:
        """(tokens,) int32: where each of `ids` leads.

        Args:
            table: ((S + 1) * 256,) int32, the state after each byte; the last state is the one of no return.
            state: where to begin.
        """
        dead = len(table) // 256 - 1
        reached = torch.full((self.nodes,), dead, dtype=torch.int32)
        reached[0] = state
        first = 1
        for parents, values in self._levels:
            level = table.index_select(0, reached.index_select(0, parents) * 256 + values)
            if bool((level == dead).all()):
                break
            reached[first : first + len(level)] = level
            first += len(level)
        return reached.index_select(0, self._node)


class Automaton:
    """A regular expression over a vocabulary of tokens.

    Args:
        regex: what the whole text of the tokens must match: an expression, or its automaton of bytes.
        tokens: text of each token that may be used, by id; or their trie.
        vocabulary_size: V.
        suppressed: ids that are not used.
        name: what errors call it; default: the expression.
        kept: where rows of states are kept; default: its own place.

    Raises:
        ValueError: if the expression is none, no tokens match it, or the automaton is too large.
    """

    def __init__(
        self,
        regex: str | ByteAutomaton,
        tokens: Mapping[int, str | bytes] | Vocabulary,
        vocabulary_size: int,
        suppressed: Collection[int] = (),
        name: str | None = None,
        kept: LeastRecentlyUsed | None = None,
    ):
        name = f"the pattern {regex!r}" if name is None else name
        found = compiled(without_anchors(regex, name), name) if isinstance(regex, str) else regex
        self.vocabulary = tokens if isinstance(tokens, Vocabulary) else Vocabulary(tokens, vocabulary_size)
        self.vocabulary_size, self.start = vocabulary_size, 0
        self._dead = found.states
        self._next = found.after
        table = torch.frombuffer(found.after, dtype=torch.int32) if found.states else torch.empty(0, dtype=torch.int32)
        self._table = torch.cat([table.where(table >= 0, self._dead), torch.full((256,), self._dead).int()])
        self._suppressed = frozenset(suppressed)
        self._usable = ~torch.isin(self.vocabulary.ids, torch.tensor(sorted(self._suppressed), dtype=torch.int64))
        self._kept = LeastRecentlyUsed(KEPT_BYTES) if kept is None else kept
        self._serial = next(_serial)
        began = time.perf_counter()
        self.before, self.after, self.tokens = self._explore(name)
        """(E,) int64 each: the states that some token leads from, and where to; (V,) bool: the tokens that do so."""
        ends = torch.zeros(self._dead + 1, dtype=torch.bool)
        ends[list(found.ends)] = True
        self._ending = [ends]  # number r: the states that can end in exactly r tokens
        if not self._can_match():
            raise ValueError(f"{name} cannot be used: {self._nothing()}")
        _logger.debug("%s: %d pairs of states in %.2f s", name, len(self.before), time.perf_counter() - began)

    def _explore(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """All states that tokens reach."""
        seen = torch.zeros(self._dead + 1, dtype=torch.bool)
        seen[0] = True
        order, sources, targets, pairs = [0], [], [], 0
        used = torch.zeros(self.vocabulary_size, dtype=torch.bool)
        for state in order:  # grows
            ids, following = self.row(state)
            used[ids] = True
            reached = torch.zeros_like(seen)
            reached[following] = True
            order += (reached & ~seen).nonzero()[:, 0].tolist()
            seen |= reached
            targets.append(reached.nonzero()[:, 0])
            sources.append(torch.full_like(targets[-1], state))
            pairs += len(targets[-1])
            if pairs > MAX_PAIRS:
                raise ValueError(
                    f"{name} cannot be used: its automaton has more than {MAX_PAIRS:,} pairs of states; repeat less, "
                    "or write it shorter"
                )
        return torch.cat(sources), torch.cat(targets), used

    def _nothing(self) -> str:
        """Why no tokens match."""
        if bool(self._ending[0][self.start]):
            return "only the empty text matches it, and a blank holds at least one token"
        return f"no tokens of the vocabulary{' that are not suppressed' if self._suppressed else ''} match it"

    def _can_match(self) -> bool:
        """Whether at least one token from the start ends in a match."""
        good, size = self._ending[0].clone(), -1
        while (count := int(good.sum())) > size:
            size = count
            good[self.before[good[self.after]]] = True
        return bool(good[self.after[self.before == self.start]].any())

    @property
    def states(self) -> Tensor:
        """The states that tokens lead on from."""
        return self.before.unique()

    @property
    def size(self) -> int:
        """Bytes, without the rows."""
        return 8 * len(self._table) + 16 * len(self.before) + self.vocabulary_size

    def row(self, state: int) -> tuple[Tensor, Tensor]:
        """(R,) int32 ids of the tokens that lead on from a state, and (R,) int32 where to."""
        row: tuple[Tensor, Tensor] | None = self._kept.get((self._serial, state))
        if row is None:
            after = self.vocabulary.after(self._table, state)
            used = self._usable & (after != self._dead)
            row = self.vocabulary.ids[used].int(), after[used]
            self._kept.put((self._serial, state), row, 8 * len(row[0]))
        return row

    def ending(self, remaining: int) -> Tensor:
        """(S + 1,) bool: the states that can end in exactly so many tokens."""
        while len(self._ending) <= remaining:
            last, ends = self._ending[-1], torch.zeros(self._dead + 1, dtype=torch.bool)
            ends[self.before[last[self.after]]] = True
            self._ending.append(ends)
        return self._ending[remaining]

    def can_end(self, state: int, remaining: int) -> bool:
        """Whether some `remaining` more tokens end in a match."""
        return bool(self.ending(remaining)[state])

    def mask(self, state: int, remaining: int) -> Tensor:
        """(V,) bool: the tokens after which `remaining - 1` more can end in a match."""
        mask: Tensor | None = self._kept.get((self._serial, state, remaining))
        if mask is None:
            mask = self.leading(state, self.ending(remaining - 1))
            self._kept.put((self._serial, state, remaining), mask, self.vocabulary_size)
        return mask

    def leading(self, state: int, good: Tensor) -> Tensor:
        """(V,) bool: the tokens that lead from a state to one of (S + 1,) bool `good`."""
        ids, after = self.row(state)
        out = torch.zeros(self.vocabulary_size, dtype=torch.bool)
        return out.scatter_(0, ids.long(), good.index_select(0, after))

    def walk(self, tokens: Sequence[int]) -> int | None:
        """The state after some tokens from the start; None if they lead nowhere."""
        state = self.start
        for token in tokens:
            if token in self._suppressed or token not in self.vocabulary.spelled:
                return None
            for value in self.vocabulary.spelled[token]:
                state = self._next[state * 256 + value]
                if state < 0:
                    return None
        return state

    def lengths(self) -> list[int]:
        """Lengths in tokens that can match, up to LONGEST."""
        return [n for n in range(1, LONGEST + 1) if self.can_end(self.start, n)]


class Restricted:
    """An automaton for so many tokens, each of which is one of a set of its own.

    Args:
        automaton: what the tokens must match.
        allowed: for each token of the blank (V,) bool, what it may be; None: anything.
    """

    def __init__(self, automaton: Automaton, allowed: Sequence[Tensor | None]):
        self.automaton, self.allowed = automaton, list(allowed)
        self.vocabulary_size, self.start = automaton.vocabulary_size, automaton.start
        known: dict[int, tuple[Tensor, Tensor]] = {}
        self._ending = [automaton.ending(0)]  # number r: the states that can end in exactly r tokens, the last ones
        for number in reversed(range(len(self.allowed))):
            states = [automaton.start] if number == 0 else None  # only one is met there
            key = -1 if number == 0 else id(self.allowed[number])
            if key not in known:
                known[key] = self._pairs(self.allowed[number], states)
            before, after = known[key]
            ends = torch.zeros_like(self._ending[-1])
            ends[before[self._ending[-1][after]]] = True
            self._ending.append(ends)

    def _pairs(self, allowed: Tensor | None, states: list[int] | None) -> tuple[Tensor, Tensor]:
        """The pairs of states that are left, from all states or from some."""
        if allowed is None and states is None:
            return self.automaton.before, self.automaton.after
        sources, targets = [], []
        for state in self.automaton.states.tolist() if states is None else states:
            ids, after = self.automaton.row(state)
            targets.append(after.long() if allowed is None else after[allowed[ids]].long().unique())
            sources.append(torch.full_like(targets[-1], state))
        return torch.cat(sources), torch.cat(targets)

    def can_end(self, state: int, remaining: int) -> bool:
        """Whether some `remaining` more tokens end in a match."""
        return remaining < len(self._ending) and bool(self._ending[remaining][state])

    def mask(self, state: int, remaining: int) -> Tensor:
        """(V,) bool: the tokens after which `remaining - 1` more can end in a match."""
        out = self.automaton.leading(state, self._ending[remaining - 1])
        allowed = self.allowed[len(self.allowed) - remaining]
        return out if allowed is None else out & allowed

    def walk(self, tokens: Sequence[int]) -> int | None:
        """The state after some tokens from the start; None if they lead nowhere."""
        if any(
            allowed is not None and not allowed[token] for token, allowed in zip(tokens, self.allowed, strict=False)
        ):
            return None
        return self.automaton.walk(tokens)

    def lengths(self) -> list[int]:
        """Its one length, if it can match."""
        return [len(self.allowed)] if self.can_end(self.start, len(self.allowed)) else []
