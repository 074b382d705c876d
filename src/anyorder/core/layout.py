"""Factorization + token ids -> the rows of one forward, as pure index arithmetic.

The one primitive: sort the tokens of a sequence by *generation order* (given tokens, then group after
group; by position inside each), and every row of the forward reads one interval `[lo, hi)` of that order.

| row | lo | hi |
|---|---|---|
| content row of the token at rank r, `exact` | start of its document | r + 1 |
| content row of the token at rank r, `paper` | start of its document | end of its group |
| query row of a position in group k | start of its document | start of group k |
| padding | 0 | 1, and nothing reads it |

This module knows no model, no attention and no logits. Its tensors are small integers; they stay on the
device of the factorization.

Shapes: B rows in a batch, T columns, S ranks, R rows of a forward (C content rows first, then Q query rows).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from anyorder.core.factorization import ABSENT, Factorization

RECIPES = ("exact", "paper")
PADDING: dict[str, int | bool] = {"seed_ids": 0, "seeded": True, "positions": 0, "lo": 0, "hi": 1, "gates": False}
"""What rows hold that are padding, by field; all but their ranks: the store's spare one."""


@dataclass(frozen=True)
class Rows:
    """The rows of one forward. Content rows come first; keys and values exist for them alone."""

    seed_ids: Tensor
    """(B, R) int64: the token whose embedding starts the row, where `seeded`."""
    seeded: Tensor
    """(B, R) bool: False where the row starts from the query embedding w."""
    positions: Tensor
    """(B, R) int64: the RoPE position, counted within the document."""
    lo: Tensor
    """(B, R) int64: first rank that the row reads."""
    hi: Tensor
    """(B, R) int64: one past the last rank that the row reads."""
    gates: Tensor
    """(B, R) bool: False where the row stands exactly where the base model stands: it reads all of its left
    context 0..p and nothing else (p its RoPE position). Gated adapters act only where this is True."""
    ranks: Tensor
    """(B, C) int64: the rank at which each content row is stored; the store's spare rank for padding."""

    @property
    def content_count(self) -> int:
        return self.ranks.shape[1]

    @property
    def count(self) -> int:
        return self.lo.shape[1]

    def of(self, batch: Tensor) -> Rows:
        """Those of some rows of the batch, (A,) int64."""
        return Rows(*(getattr(self, field.name)[batch] for field in fields(self)))

    @property
    def frozen(self) -> Tensor:
        """(B, R) bool: rows that no gated adapter can change: their gate is closed, as is that of every row whose
        keys they read. For the rows of a whole parallel forward, whose content rows stand in the order of their ranks.
        """
        opened = torch.nn.functional.pad(self.gates[:, : self.content_count].cumsum(dim=1), (1, 0))
        return ~self.gates & (opened.gather(1, self.hi) == opened.gather(1, self.lo))

    @property
    def closed_start(self) -> int:
        """How many of the first rows are content rows with a closed gate, in the whole batch, and read none of the rows
        behind them: those may go first in a forward of their own."""
        C = self.content_count
        closed = ~self.gates[:, :C] & (self.hi[:, :C] <= self.ranks + 1)
        return int(closed.all(dim=0).long().cumprod(dim=0).sum())

    def split(self, count: int) -> tuple[Rows, Rows]:
        """The first rows, which are content rows, and those behind them."""
        halves = (slice(None, count), slice(count, None))
        first, second = (Rows(*(getattr(self, field.name)[:, half] for field in fields(self))) for half in halves)
        return first, second

    def take(self, chosen: Tensor, spare: int) -> tuple[Rows, Tensor]:
        """Some of the rows as a forward of their own, and (B, R) where in it a chosen row went.

        Args:
            chosen: (B, R) bool.
            spare: the rank that takes what padding writes.
        """
        C = self.content_count
        content, content_used, content_place = compact(chosen[:, :C])
        query, query_used, query_place = compact(chosen[:, C:])
        index, used = torch.cat([content, query + C], dim=1), torch.cat([content_used, query_used], dim=1)

        def pick(values: Tensor, filler: int | bool) -> Tensor:
            return torch.where(used, values.gather(1, index), filler)

        rows = Rows(
            **{name: pick(getattr(self, name), filler) for name, filler in PADDING.items()},
            ranks=torch.where(content_used, self.ranks.gather(1, content), spare),
        )
        return rows, torch.cat([content_place, content.shape[1] + query_place], dim=1)


class Arrangement:
    """The tokens of a batch in generation order, filled as they become known.

    A parallel forward fills it at once from a factorization; decoding appends group after group. Either way
    the rows come from the same two methods, so that cached and parallel decoding cannot drift apart.

    Tables have one spare entry, number T, that takes what padding writes.
    """

    def __init__(self, input_ids: Tensor, factorization: Factorization, recipe: str):
        assert recipe in RECIPES
        B, T = input_ids.shape
        table = torch.zeros((B, T + 1), dtype=torch.int64, device=input_ids.device)
        self.recipe = recipe
        self.spare = T
        self.ids = input_ids  # decoding fills it in place
        self.starts = torch.nn.functional.pad(factorization.document_starts, (0, 1))
        self.ranks = table + T  # column -> rank; T where it is not known yet
        self.columns = table  # rank -> column
        self.ends = table.clone()  # rank -> end of its group
        self.reach = table.clone()  # rank -> highest column up to it
        self.counts = table[:, 0].clone()  # ranks in use

    @classmethod
    def whole(cls, input_ids: Tensor, factorization: Factorization, recipe: str) -> tuple[Arrangement, Tensor]:
        """Everything known at once, and (B, T) the rank at which each column's group starts."""
        self = cls(input_ids, factorization, recipe)
        groups = factorization.group_ids
        B, T = groups.shape
        late = torch.where(groups == ABSENT, T, groups)  # absent tokens come last in their document
        columns = late.argsort(dim=1, stable=True)
        columns = columns.gather(1, factorization.documents.gather(1, columns).argsort(dim=1, stable=True))
        every = torch.arange(T, device=groups.device).expand(B, T)
        groups, documents = late.gather(1, columns), factorization.documents.gather(1, columns)
        new = (groups.diff(dim=1) != 0) | (documents.diff(dim=1) != 0)
        first = torch.nn.functional.pad(new, (1, 0), value=True)
        group_start = torch.where(first, every, 0).cummax(dim=1).values
        last = torch.nn.functional.pad(new, (0, 1), value=True)
        self.ends[:, :T] = torch.where(last, every + 1, T).flip(1).cummin(dim=1).values.flip(1)
        self.columns[:, :T] = columns
        self.ranks.scatter_(1, columns, every)
        self.reach[:, :T] = columns.cummax(dim=1).values
        self.counts = ((every + 1) * (groups < T)).amax(dim=1)
        return self, group_start.gather(1, self.ranks[:, :T])

    def append(self, columns: Tensor, counts: Tensor, together: bool = True) -> None:
        """Give the next ranks to `counts[b]` columns of each row.

        Args:
            columns: (B, C) int64, of one group ascending along a row; entries from `counts[b]` on are ignored.
            counts: (B,) int64.
            together: as one group; False: each is one, in this order.
        """
        offset = torch.arange(columns.shape[1], device=columns.device)
        used = offset < counts[:, None]
        rank = torch.where(used, self.counts[:, None] + offset, self.spare)
        columns = torch.where(used, columns, self.spare)
        reach = self.reach.gather(1, (self.counts[:, None] - 1).clamp(min=0)).maximum(columns.cummax(dim=1).values)
        self.counts = self.counts + counts
        self.columns.scatter_(1, rank, columns)
        self.ranks.scatter_(1, columns, rank)
        self.ends.scatter_(1, rank, self.counts[:, None].expand_as(rank) if together else rank + 1)
        self.reach.scatter_(1, rank, reach)

    def retract(self, counts: Tensor) -> None:
        """Take back the ranks from `counts[b]` on."""
        self.ranks.masked_fill_(self.ranks >= counts[:, None], self.spare)
        self.counts = counts

    # ------------------------------------------------------------------ rows

    def content(self, first: Tensor, count: Tensor) -> _Half:
        """Content rows of the ranks `first[b] .. first[b] + count[b] - 1` of each row, padded to the longest."""
        C = int(count.max())
        rank = first[:, None] + torch.arange(C, device=first.device)
        used = rank < (first + count)[:, None]
        rank = torch.where(used, rank, 0)
        column = self.columns.gather(1, rank)
        lo = self.starts.gather(1, column)
        hi = rank + 1 if self.recipe == "exact" else self.ends.gather(1, rank)
        return self._half(self.ids.gather(1, column), torch.ones_like(used), column - lo, lo, hi, used, rank)

    def queries(self, columns: Tensor, used: Tensor, hi: Tensor) -> _Half | None:
        """Query rows of (B, Q) columns, each reading up to rank `hi`; `used` is False for padding. None of none: most
        steps of one token at a time ask for none, and building what is empty takes as long as building what is not."""
        if not columns.shape[1]:
            return None
        lo = self.starts.gather(1, columns)
        position = columns - lo
        if self.recipe == "paper":
            seeded = torch.zeros_like(used)
            ids = torch.zeros_like(columns)
        else:
            # A predicted position 0 has no place to its left to stand on: it stands on its own, unseeded.
            left = (columns - 1).clamp(min=0)
            seeded = (position > 0) & (self.ranks.gather(1, left) < hi)
            ids = self.ids.gather(1, left)
            position = (position - 1).clamp(min=0)
        return self._half(ids, seeded, position, lo, hi, used, torch.zeros_like(columns))

    def free(self, columns: Tensor, hi: Tensor) -> Tensor:
        """(B, Q) bool: columns whose query row would equal the content row of rank `hi - 1`.

        In the exact recipe the query row of column i starts from token i-1, at its position. If that token is
        the last one read, its content row reads the same interval: the two rows are one.
        """
        if self.recipe != "exact":
            return torch.zeros_like(columns, dtype=torch.bool)
        left = (columns - 1).clamp(min=0)
        return (columns > self.starts.gather(1, columns)) & (self.ranks.gather(1, left) == hi - 1)

    def _half(
        self, ids: Tensor, seeded: Tensor, position: Tensor, lo: Tensor, hi: Tensor, used: Tensor, rank: Tensor
    ) -> _Half:
        lo, hi = torch.where(used, lo, 0), torch.where(used, hi, 1)
        position = torch.where(used, position, 0)
        reach = self.reach.gather(1, hi - 1)
        at_home = (hi - lo == position + 1) & (reach == lo + position)
        return _Half(
            ids=torch.where(used & seeded, ids, 0),
            seeded=seeded,
            position=position,
            lo=lo,
            hi=hi,
            gate=used & ~at_home,
            rank=torch.where(used, rank, self.spare),
        )


@dataclass(frozen=True)
class _Half:
    """The content half or the query half of the rows; every field is (B, C) or (B, Q)."""

    ids: Tensor
    seeded: Tensor
    position: Tensor
    lo: Tensor
    hi: Tensor
    gate: Tensor
    rank: Tensor

    def same_start(self, counts: Tensor) -> int:
        """How many leading rows are the same in the whole batch; `counts[b]` are in use."""
        same = torch.arange(self.lo.shape[1], device=counts.device) < counts.min()
        for field in fields(self):
            values = getattr(self, field.name)
            same &= (values == values[:1]).all(dim=0)
        return int(same.long().cumprod(dim=0).sum())

    def alone(self) -> Rows:
        """As a forward of content rows."""
        return Rows(*(getattr(self, field.name) for field in fields(self)))

    def first_row(self, count: int) -> Rows:
        """The leading rows of the batch's first row alone, as a forward of content rows."""
        return Rows(*(getattr(self, field.name)[:1, :count] for field in fields(self)))


def join(content: _Half, query: _Half | None) -> Rows:
    """Content rows, then query rows, if there are any."""
    if query is None:
        return content.alone()

    def both(name: str) -> Tensor:
        return torch.cat([getattr(content, name), getattr(query, name)], dim=1)

    return Rows(both("ids"), both("seeded"), both("position"), both("lo"), both("hi"), both("gate"), ranks=content.rank)


@dataclass(frozen=True)
class Layout:
    """A whole forward: its rows, where each prediction comes out, and each key's position."""

    rows: Rows
    logit_rows: Tensor
    """(B, T) int64: the row of the forward whose output predicts the column; -1 where nothing is predicted."""
    key_columns: Tensor
    """(B, S) int64: the column of the token at each rank."""
    key_positions: Tensor
    """(B, S) int64: its position within its document."""
    ranks: Tensor
    """(B, T) int64: the rank of each column in generation order."""
    group_starts: Tensor
    """(B, T) int64: the rank at which its group starts."""

    def earlier(self, window: int) -> tuple[Tensor, Tensor]:
        """The members of each column's own group before it, the nearest in generation order first.

        Returns:
            (B, T, window) int64 columns, and how far to the left of the column each stands; 0 where there is none.
        """
        rank = self.ranks[..., None] - torch.arange(1, window + 1, device=self.ranks.device)
        there = (rank >= self.group_starts[..., None]) & (self.logit_rows >= 0)[..., None]
        S = self.key_columns.shape[1]
        columns = self.key_columns.gather(1, rank.clamp(0, S - 1).flatten(1)).view(rank.shape)
        own = torch.arange(self.ranks.shape[1], device=self.ranks.device)[:, None]
        return columns.masked_fill(~there, 0), (own - columns).masked_fill(~there, 0)

    @property
    def taught(self) -> Tensor:
        """(B, T) int64: the content row that stands where the base model stands when it predicts the column, given all
        that the column's own prediction may read and the members of its group before it; -1 where there is none.

        That is the row of the left neighbour, where it comes just before in generation order and reads all of its left
        context and nothing else, every row that it reads doing the same.
        """
        left = self.ranks - 1
        own = torch.arange(self.ranks.shape[1], device=self.ranks.device)
        row = left.clamp(0, self.rows.content_count - 1)
        there = (self.logit_rows >= 0) & (self.logit_rows != left) & (left >= 0)
        there &= self.key_columns.gather(1, row) == own - 1
        return row.masked_fill(~(there & self.rows.frozen.gather(1, row)), -1)


def lay_out(input_ids: Tensor, factorization: Factorization, recipe: str) -> Layout:
    """The rows of one parallel forward.

    Args:
        input_ids: (B, T) int64, on the factorization's device. Absent positions may hold any valid id.
        factorization: of the same shape.
        recipe: "exact" or "paper".
    """
    arrangement, group_start = Arrangement.whole(input_ids, factorization, recipe)
    S = int(arrangement.counts.max())
    B, T = input_ids.shape
    content = arrangement.content(torch.zeros_like(arrangement.counts), arrangement.counts)
    predicted = factorization.is_predicted
    every = torch.arange(T, device=input_ids.device).expand(B, T)
    free = predicted & arrangement.free(every, group_start)
    columns, used, place = compact(predicted & ~free)
    query = arrangement.queries(columns, used, group_start.gather(1, columns))
    logit_rows = torch.where(free, group_start - 1, S + place).masked_fill(~predicted, -1)
    key_columns = arrangement.columns[:, :S]
    key_positions = key_columns - arrangement.starts.gather(1, key_columns)
    ranks = arrangement.ranks[:, :T]
    return Layout(join(content, query), logit_rows, key_columns, key_positions, ranks, group_start)


def compact(chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The chosen columns of each row, moved to the front.

    Args:
        chosen: (B, T) bool.

    Returns:
        columns (B, Q), used (B, Q) bool (False: padding), and place (B, T): where in Q a chosen column went.
        Q is the largest number of chosen columns in a row.
    """
    if len(chosen) == 1:
        columns = chosen.nonzero()[:, 1][None]
        return columns, torch.ones_like(columns, dtype=torch.bool), chosen.cumsum(dim=1) - 1
    Q = int(chosen.sum(dim=1).max())
    columns = (~chosen).to(torch.int8).argsort(dim=1, stable=True)[:, :Q]
    return columns, chosen.gather(1, columns), chosen.cumsum(dim=1) - 1


def describe(layout: Layout, names: list[list[str]]) -> str:
    """The rows of a forward as text: where each starts and stands, and which tokens it reads.

    Args:
        layout: from `lay_out`.
        names: for each row of the batch, how to print the token of each column.
    """
    rows, lines = layout.rows, []
    for b, name in enumerate(names):
        if len(names) > 1:
            lines.append(f"row {b}")
        order = layout.key_columns[b].tolist()
        used = int((rows.ranks[b] < layout.logit_rows.shape[1]).sum())
        head = " ".join(name[column] for column in order[:used])
        width = max(len("starts from"), *map(len, name)) + 2
        lines.append(f"{'row':9}{'predicts':{width}}{'starts from':{width}}{'at':>3}   reads  {head}")
        predicts: dict[int, list[int]] = {}
        for column, r in enumerate(layout.logit_rows[b].tolist()):
            if r >= 0:
                predicts.setdefault(r, []).append(column)
        for r in range(rows.count):
            kind = "content" if r < rows.content_count else "query"
            if r >= used and r not in predicts:
                continue
            lo, hi = int(rows.lo[b, r]), int(rows.hi[b, r])
            picture = " ".join(
                ("#" if lo <= k < hi else ".") * len(name[column]) for k, column in enumerate(order[:used])
            )
            position = int(rows.positions[b, r])
            start = name[int(layout.rows.lo[b, r]) + position] if bool(rows.seeded[b, r]) else "w"
            outputs = ", ".join(name[column] for column in predicts.get(r, []))
            lines.append(f"{kind:9}{outputs:{width}}{start:{width}}{position:3d}          {picture}")
    return "\n".join(lines)
