"""Forwards of many requests as one, at the seam between the engine and the forward.

Each request is decoded by a thread of its own, by the same loop as anywhere else. Its runner hands what it needs to the
thread that executes: as soon as every request at work waits for something, what is of one kind is put together. So
requests of any policy, order, length and constraint share forwards, and none knows of the others.

This module knows rows and hidden states; which requests are at work is the engine's business.

Shapes: B slots of a forward, R rows of it (C content rows, then Q query rows), N hidden states, M members.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from anyorder.core.layout import PADDING, Rows
from anyorder.model.kv_cache import KeyValueStore
from anyorder.runtime.runner import ModelRunner
from anyorder.serving.slots import Prefixes, Slots

T = TypeVar("T")
LEAST_PATIENCE, MOST_PATIENCE = 0.02, 0.2
"""Seconds: those that wait are joined by others that come before another forward would have been done, within these
bounds; a request that comes later, such as one that compiles a pattern, is not waited for until it asks again."""
RANKS_COPIED = 400
"""As many ranks of a slot are copied in the time that a row takes."""
TURN = 0.05
"""Seconds: requests compute one after the other between two forwards, as Python's threads, were they all to do so at
once, would take twice as long by taking its lock from each other; one that computes longer goes on beside others."""
KINDS = ("function", "logits", "coupled_logits", "draft_logits", "hidden")
"""Of calls, in the order in which they are executed: who has got logits draws while a forward goes on."""
FORWARD = 8
"""What a forward costs before its first row, in rows: two forwards where one would have more padding than that."""


@dataclass(eq=False)  # one is itself: arguments are tensors
class _Call:
    """What a request waits for."""

    kind: str
    slot: int | None
    arguments: tuple[Any, ...]
    since: float
    done: threading.Event = field(default_factory=threading.Event)
    result: Any = None
    error: BaseException | None = None


class Joiner:
    """Executes what requests wait for, in the thread that calls `run`.

    Args:
        runner: of the model.
        slots: of the requests.
        capacity: tokens of a request at most.

    Attributes:
        forwards, rows: how many were executed, and how many requests' rows were in them.
    """

    def __init__(self, runner: ModelRunner, slots: Slots, capacity: int):
        self.runner, self.slots, self.capacity = runner, slots, capacity
        self.forwards = self.rows = 0
        self._changed = threading.Condition()
        self._waiting: list[_Call] = []
        self._awaited: set[int] = set()  # slots whose next call is waited for
        self._closed = False
        self._ended = 0.0
        self._patience = MOST_PATIENCE
        self._turn = threading.Lock()
        self._held = threading.local()

    def enter(self, slot: int) -> None:
        """A request begins to work."""
        with self._changed:
            self._awaited.add(slot)

    def leave(self, slot: int) -> None:
        """It works no more."""
        self.rest()
        with self._changed:
            self._awaited.discard(slot)
            self.slots.free(slot)
            self._changed.notify_all()

    def close(self) -> None:
        """Execute what is waited for, and no more: then `run` returns."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def call(self, kind: str, slot: int | None, *arguments: Any) -> Any:
        """Wait for the result of a call; kinds are the methods of this class that take several calls at once.

        Args:
            slot: of the request that asks; None: no request does.
        """
        call = _Call(kind, slot, arguments, time.monotonic())
        with self._changed:
            if self._closed:
                raise RuntimeError("the server is closed")
            self._waiting.append(call)
            if slot is not None:
                self._awaited.add(slot)
            if len(self._waiting) == 1 or kind == "function" or not self._missing():
                self._changed.notify_all()  # nobody is woken for less: each time costs those who draw
        self.rest()
        call.done.wait()
        self._held.here = self._turn.acquire(timeout=TURN)
        if call.error is not None:
            raise call.error
        return call.result

    def rest(self) -> None:
        """The request of this thread has nothing to compute for now."""
        if getattr(self._held, "here", False):
            self._held.here = False
            self._turn.release()

    def run(self) -> None:
        """Execute, until closed.

        Run it in the thread that has loaded the model, if you can: where several threads have worked on tensors, OpenMP
        has helpers for each, takes the machine for overbooked and lets all of them sleep between two operations, which
        makes a forward of few rows a third slower.
        """
        with torch.inference_mode():
            while True:
                with self._changed:
                    while not (calls := self._due()):
                        if self._closed and not self._waiting:
                            return
                        self._changed.wait(self._time_left() if self._waiting else None)
                    self._waiting = [call for call in self._waiting if call not in calls]
                for kind in sorted({call.kind for call in calls}, key=KINDS.index):
                    self._execute(kind, [call for call in calls if call.kind == kind])
                self._ended = time.monotonic()

    def _missing(self) -> set[int]:
        return self._awaited - {call.slot for call in self._waiting if call.slot is not None}

    def _time_left(self) -> float:
        """Seconds for which those that wait go on waiting, from the end of the last forward on: those that were in it
        draw before they ask again. Else there would be two halves for ever, each of which waits for the other's."""
        return max(self._waiting[0].since, self._ended) + self._patience - time.monotonic()

    def _due(self) -> list[_Call]:
        """What to execute now.

        Forwards are dear and wait for what is cheap: requests that draw the members of a group one after the other, and
        those that have none to draw, then go on together.
        """
        functions = [call for call in self._waiting if call.kind == "function"]
        if functions or not self._waiting:
            return functions
        late = self._missing()
        if late and not self._closed:
            if self._time_left() > 0:
                return []
            self._awaited -= late
        cheap = [call for call in self._waiting if call.kind != "hidden"]
        forwards = [call for call in self._waiting if call.kind == "hidden"]
        if cheap and forwards and time.monotonic() < forwards[0].since + self._patience:
            return cheap
        return self._waiting

    def _execute(self, kind: str, calls: list[_Call]) -> None:
        """Calls of one kind; where they fail together each is tried alone, so that one's error is nobody else's."""
        try:
            results = getattr(self, f"_{kind}")([call.arguments for call in calls])
        except BaseException as error:
            if len(calls) > 1:
                for call in calls:
                    self._execute(kind, [call])
                return
            calls[0].error = error
        else:
            for call, result in zip(calls, results, strict=True):
                call.result = result
        for call in calls:
            call.done.set()

    # ------------------------------------------------------------------ kinds

    def _function(self, calls: Sequence[tuple[Callable[[], Any]]]) -> list[Any]:
        return [function() for (function,) in calls]

    def _hidden(self, calls: Sequence[tuple[int, Rows, Tensor]]) -> list[Tensor]:
        """Final hidden states of the rows of slots, each call (slot, its rows, its key positions)."""
        begun = time.monotonic()
        for slot, rows, _ in calls:
            self.slots.use(slot, int(rows.hi.max()))  # what a row writes it reads
        self.slots.fit()
        sizes = [(slot, rows.content_count, rows.count - rows.content_count) for slot, rows, _ in calls]
        copy = (self.slots.capacity + 1) / RANKS_COPIED
        out: dict[int, Tensor] = {}
        for numbers in batches(sizes, copy):
            chosen = sorted(calls[n][0] for n in numbers)
            if _is_read_in_place([sizes[n] for n in numbers], copy):
                chosen = list(range(chosen[0], chosen[-1] + 1))
            out |= self._forward(chosen, {slot: part for slot, *part in (calls[n] for n in numbers)})
        self._patience = min(max(time.monotonic() - begun, LEAST_PATIENCE), MOST_PATIENCE)
        return [out[slot] for slot, *_ in calls]

    def _forward(self, chosen: list[int], parts: dict[int, list[Any]]) -> dict[int, Tensor]:
        """Final hidden states of the rows of some of the chosen slots, of each its rows and its key positions."""
        is_run = chosen[-1] - chosen[0] + 1 == len(chosen)
        store = self.slots[chosen[0] : chosen[-1] + 1] if is_run else self.slots.of(chosen)
        placed = {chosen.index(slot): part for slot, part in parts.items()}
        rows, positions = stack(placed, len(chosen), self.slots.capacity)
        hidden = self.runner.hidden(rows, positions, store)
        self.forwards, self.rows = self.forwards + 1, self.rows + len(parts)
        out = {}
        for place, (own, _) in placed.items():
            C, Q = own.content_count, own.count - own.content_count
            content, query = hidden[place : place + 1].tensor_split([rows.content_count], dim=1)
            out[chosen[place]] = torch.cat([content[:, :C], query[:, :Q]], dim=1)
        return out

    def _logits(self, calls: Sequence[tuple[Tensor]]) -> list[Tensor]:
        states = [hidden for (hidden,) in calls]
        return _split(self.runner.logits(torch.cat(states)), states)

    def _coupled_logits(self, calls: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]]) -> list[Tensor]:
        hidden, logits, members, distances = zip(*calls, strict=True)
        found = self.runner.coupled_logits(torch.cat(hidden), torch.cat(logits), _wide(members), _wide(distances))
        return _split(found, hidden)

    def _draft_logits(self, calls: Sequence[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
        hidden, members, distances = zip(*calls, strict=True)
        return _split(self.runner.draft_logits(torch.cat(hidden), _wide(members), _wide(distances)), hidden)


class JoinedRunner(ModelRunner):
    """The runner of one request, one row at a time.

    Args:
        joiner: executes.
        slot: of the request.
        prefixes: what many texts begin with.
        check: raises if the request is no longer wanted; asked before every forward.
    """

    keeps_batch = takes_over = True

    def __init__(self, joiner: Joiner, slot: int, prefixes: Prefixes, check: Callable[[], None]):
        self.model = joiner.runner.model
        self._joiner, self._slot, self._prefixes, self._wanted = joiner, slot, prefixes, check
        self._fresh = False

    def capacity(self, columns: int) -> int:
        if columns > self._joiner.capacity:
            raise ValueError(
                f"the text has {columns} tokens, new ones included; this server takes at most {self._joiner.capacity}"
            )
        return self._joiner.slots.most

    def new_store(self, rows: int, capacity: int) -> KeyValueStore:
        assert rows == 1, "a request is one row"
        self._fresh = True
        return self._joiner.slots[self._slot : self._slot + 1]

    def hidden(self, rows: Rows, key_positions: Tensor, store: KeyValueStore) -> Tensor:
        self._wanted()
        start = _start(rows) if self._fresh and self.model.recipe == "exact" else rows.seed_ids[0, :0]
        self._fresh = False
        known = self._prefixes.longest(start[: rows.content_count - 1]) if len(start) else None
        skipped = 0 if known is None else len(known.ids)
        if known is not None:
            store.begin_with([known.store])
            rows = Rows(*(getattr(rows, name.name)[:, skipped:] for name in fields(rows)))
        hidden = cast(Tensor, self._joiner.call("hidden", self._slot, self._slot, rows, key_positions))
        self._prefixes.keep(start, store)
        # Rows of a start that stands in the text predict nothing but its last one's: what reads all of it.
        return torch.nn.functional.pad(hidden, (0, 0, skipped, 0)) if skipped else hidden

    def logits(self, hidden: Tensor) -> Tensor:
        return cast(Tensor, self._joiner.call("logits", self._slot, hidden))

    def coupled_logits(self, hidden: Tensor, logits: Tensor, members: Tensor, distances: Tensor) -> Tensor:
        return cast(Tensor, self._joiner.call("coupled_logits", self._slot, hidden, logits, members, distances))

    def draft_logits(self, hidden: Tensor, members: Tensor, distances: Tensor) -> Tensor:
        return cast(Tensor, self._joiner.call("draft_logits", self._slot, hidden, members, distances))

    def run(self, function: Callable[[], T]) -> T:
        """What a function returns that uses the model itself, between two forwards."""
        self._wanted()
        return cast(T, self._joiner.call("function", self._slot, function))

    def check(self) -> None:
        self._joiner.runner.check()


def _start(rows: Rows) -> Tensor:
    """(n,) ids of the leading content rows that stand as in any left-to-right text, from its first token on."""
    every = torch.arange(rows.content_count)
    content = slice(0, rows.content_count)
    plain = (rows.ranks[0] == every) & (rows.positions[0, content] == every) & (rows.lo[0, content] == 0)
    plain &= (rows.hi[0, content] == every + 1) & ~rows.gates[0, content]
    return rows.seed_ids[0, : int(plain.long().cumprod(dim=0).sum())]


def batches(calls: Sequence[tuple[int, int, int]], copy: float) -> list[list[int]]:
    """Which calls to put into a forward together, by their numbers: what costs least in all.

    A forward costs `FORWARD` rows and those of its slots, each with as many content rows and as many query rows as any
    of its calls: either all slots from its first to its last, or those alone that have a call, and a copy of each.
    Calls of about as many rows go together.

    Args:
        calls: of each its slot, its content rows and its query rows.
        copy: what the copy of a slot costs, in rows.
    """
    order = sorted(range(len(calls)), key=lambda n: (calls[n][1] + calls[n][2], calls[n]))
    # Of the first calls of the order: their cost, and where the last of their forwards begins.
    least, begins = [0.0], [0]
    for end in range(1, len(order) + 1):
        parts = ([calls[n] for n in order[start:end]] for start in range(end))
        cost, start = min((least[start] + FORWARD + min(_rows(part, copy)), start) for start, part in enumerate(parts))
        least.append(cost)
        begins.append(start)
    made, end = [], len(order)
    while end:
        made.append(sorted(order[begins[end] : end]))
        end = begins[end]
    return made[::-1]


def _rows(calls: Sequence[tuple[int, int, int]], copy: float) -> tuple[float, float]:
    """What a forward's slots cost, in rows: all from the first to the last, or copies of those that have a call."""
    slots, content, query = zip(*calls, strict=True)
    rows = max(content) + max(query)
    return (max(slots) - min(slots) + 1) * rows, len(calls) * (rows + copy)


def _is_read_in_place(calls: Sequence[tuple[int, int, int]], copy: float) -> bool:
    in_place, copied = _rows(calls, copy)
    return in_place <= copied


def stack(parts: Mapping[int, Sequence[Any]], count: int, spare: int) -> tuple[Rows, Tensor]:
    """Rows of single texts as those of a batch, and (B, K) their key positions; slots without any are padding.

    Args:
        parts: for each slot its rows, of a batch of one, and its (1, any) key positions.
        count: B.
        spare: the rank that takes what padding writes.
    """
    C = max(rows.content_count for rows, _ in parts.values())
    Q = max(rows.count - rows.content_count for rows, _ in parts.values())
    K = max(int(rows.hi.max()) for rows, _ in parts.values())
    content: list[int] = []  # where content rows go among those of all slots
    every: list[int] = []  # where rows go among all
    for slot, (rows, _) in parts.items():
        content += range(slot * C, slot * C + rows.content_count)
        every += range(slot * (C + Q), slot * (C + Q) + rows.content_count)
        every += range(slot * (C + Q) + C, slot * (C + Q) + C + rows.count - rows.content_count)

    def placed(name: str, places: Tensor, width: int, filler: int | bool) -> Tensor:
        values = torch.cat([getattr(rows, name)[0] for rows, _ in parts.values()])
        return values.new_full((count * width,), filler).index_copy_(0, places, values).view(count, width)

    at = torch.tensor(every)
    made = {name: placed(name, at, C + Q, filler) for name, filler in PADDING.items()}
    # A request's own spare rank is none of the buffers': they may be shorter.
    ranks = placed("ranks", torch.tensor(content, dtype=torch.int64), C, spare).clamp_(max=spare)
    positions = torch.zeros(count, K, dtype=torch.int64)
    for slot, (_, own) in parts.items():
        positions[slot, : own.shape[1]] = own[0, :K]
    return Rows(**made, ranks=ranks), positions


def _split(found: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    return list(found.split([len(part) for part in like]))


def _wide(parts: Sequence[Tensor]) -> Tensor:
    """(N, M): tables of members, padded to the widest."""
    most = max(part.shape[1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, most - part.shape[1])) for part in parts])
