"""Which position is predicted at which step.

A factorization splits the positions of a sequence into *given* positions and an ordered list of
disjoint *groups* (design: log P(x | given) = sum over groups of the sum inside each group). This
module builds, checks, combines and draws factorizations. It knows positions only: no tokens, no
model, no attention.

Shapes: B rows in a batch, T columns, D documents in a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

from anyorder.core.rng import Generators, uniforms

GIVEN = -1
"""Group id of a position whose token is given: it is read, never predicted."""

ABSENT = -2
"""Group id of a position that takes no part: padding, or a token that a conditional leaves out."""

_ORDERS = ("left_to_right", "random")


@dataclass(frozen=True, eq=False, repr=False)
class Factorization:
    """Given positions and ordered groups, for a batch of rows of unequal length.

    Args:
        group_ids: (B, T) int64. `GIVEN` (-1), `ABSENT` (-2), or the step 0..K-1 at which the
            position is predicted. Steps are contiguous within a document.
        document_ids: (B, T) int64, non-decreasing along a row: which document a column belongs to.
            Default: one document a row. Steps count from 0 in every document, and every document
            has at least one given position.

    Raises:
        ValueError: naming the row (and document) that breaks a rule, and how to mend it.
    """

    group_ids: Tensor
    document_ids: Tensor | None = None

    def __post_init__(self) -> None:
        group_ids = torch.as_tensor(self.group_ids)
        if group_ids.ndim != 2 or group_ids.is_floating_point() or group_ids.dtype == torch.bool:
            raise ValueError(
                f"group_ids must be an integer tensor of shape (batch, length), got {group_ids.dtype} of shape "
                f"{tuple(group_ids.shape)}"
            )
        object.__setattr__(self, "group_ids", group_ids.to(torch.int64))
        documents = (
            torch.zeros_like(self.group_ids) if self.document_ids is None else torch.as_tensor(self.document_ids)
        )
        if documents.shape != group_ids.shape:
            raise ValueError(
                f"document_ids has shape {tuple(documents.shape)}, group_ids has shape {tuple(group_ids.shape)}: "
                "they must be equal"
            )
        object.__setattr__(self, "document_ids", documents.to(device=group_ids.device, dtype=torch.int64))
        self._check()

    # ------------------------------------------------------------------ constructors

    @classmethod
    def left_to_right(cls, length: int, group_size: int = 1, given: int = 1) -> Factorization:
        """Contiguous groups from left to right; group size 1 is the ordinary autoregressive order.

        Args:
            length: number of positions.
            group_size: positions predicted at a step (the last group may be smaller).
            given: number of leading positions that are given.
        """
        _check_sizes(length, group_size, given)
        steps = torch.arange(length - given) // group_size
        return cls(torch.cat([torch.full((given,), GIVEN), steps])[None])

    @classmethod
    def random(
        cls, length: int, group_size: int = 4, given: int = 1, generator: torch.Generator | None = None
    ) -> Factorization:
        """Groups of `group_size` in a uniformly random order of the positions behind the first `given`."""
        _check_sizes(length, group_size, given)
        rank = torch.randperm(length - given, generator=generator).argsort()
        return cls(torch.cat([torch.full((given,), GIVEN), rank // group_size])[None])

    @classmethod
    def from_groups(cls, groups: Iterable[Iterable[int]]) -> Factorization:
        """Explicit lists of positions: the given ones first, then the groups in order.

        `from_groups([[0, 1, 2], [5, 3], [4]])` gives positions 0 to 2, predicts 5 and 3 together, then 4.
        Order inside a list does not matter.
        """
        lists = _integer_lists(groups)
        flat = [position for positions in lists for position in positions]
        if not lists or not lists[0]:
            raise ValueError("groups[0] is empty: at least one position must be given (usually 0, the start token)")
        for step, positions in enumerate(lists):
            if not positions:
                raise ValueError(f"groups[{step}] is empty: leave it out")
        ids = torch.full((len(flat),), ABSENT)
        for step, positions in enumerate(lists):
            for position in positions:
                if not 0 <= position < len(flat):
                    raise ValueError(
                        f"position {position} in groups[{step}] is outside 0..{len(flat) - 1}: the {len(flat)} listed "
                        "positions must be exactly 0..N-1, each once"
                    )
                if ids[position] != ABSENT:
                    raise ValueError(f"position {position} appears twice, the second time in groups[{step}]")
                ids[position] = step - 1
        return cls(ids[None])

    @classmethod
    def infill(
        cls,
        blank: Tensor,
        group_size: int = 1,
        order: str = "left_to_right",
        generator: Generators = None,
        attention_mask: Tensor | None = None,
    ) -> Factorization:
        """Predict the blank positions, given all others.

        Args:
            blank: (B, T) or (T,) bool, True where the token is to be predicted.
            group_size: blank positions predicted at a step; groups follow `order` and may span two blanks.
            order: "left_to_right" or "random" order of the blank positions.
            generator: for the random order: one a row, or one that seeds them.
            attention_mask: (B, T), 0 marks padding, which takes no part.
        """
        blank = torch.as_tensor(blank)
        blank = blank[None] if blank.ndim == 1 else blank
        if blank.dtype != torch.bool or blank.ndim != 2:
            raise ValueError(
                f"blank must be a bool tensor of shape (batch, length), got {blank.dtype} {tuple(blank.shape)}"
            )
        present = torch.ones_like(blank) if attention_mask is None else torch.as_tensor(attention_mask).bool()
        if present.shape != blank.shape:
            raise ValueError(f"attention_mask has shape {tuple(present.shape)}, blank has {tuple(blank.shape)}")
        ids = torch.where(blank, 0, GIVEN).masked_fill(~present, ABSENT)
        return cls(ids).regroup(group_size, order, generator)

    @classmethod
    def conditional(
        cls,
        targets: Sequence[int],
        given: Sequence[int],
        length: int,
        group_size: int = 1,
        order: str = "left_to_right",
    ) -> Factorization:
        """P(targets | given): every other position of the sequence is absent, neither read nor predicted."""
        ids = torch.full((1, length), ABSENT)
        for name, positions, group in (("given", given, GIVEN), ("targets", targets, 0)):
            for position in positions:
                if not isinstance(position, Integral) or not 0 <= position < length:
                    raise ValueError(f"{name} position {position} is not one of 0..{length - 1}")
                if ids[0, position] != ABSENT:
                    raise ValueError(f"position {position} is named twice in targets and given together")
                ids[0, position] = group
        return cls(ids).regroup(group_size, order)

    # ------------------------------------------------------------------ combining

    @classmethod
    def stack(cls, factorizations: Sequence[Factorization]) -> Factorization:
        """One batch out of several; shorter rows are padded with `ABSENT` on the right."""
        if not factorizations or not all(isinstance(f, Factorization) for f in factorizations):
            raise ValueError("stack needs factorizations, at least one")
        length = max(f.length for f in factorizations)
        ids, documents = [], []
        for f in factorizations:
            extra = (0, length - f.length)
            ids.append(torch.nn.functional.pad(f.group_ids, extra, value=ABSENT))
            last = f.documents[:, -1:].expand(-1, length - f.length)
            documents.append(torch.cat([f.documents, last], dim=1))
        return cls(torch.cat(ids), torch.cat(documents))

    def unstack(self) -> list[Factorization]:
        """One factorization a row, each cut to its own length: the inverse of `stack`."""
        return [
            Factorization(self.group_ids[b : b + 1, :n], self.documents[b : b + 1, :n])
            for b, n in enumerate(self.lengths.tolist())
        ]

    @classmethod
    def pack(cls, factorizations: Sequence[Factorization]) -> Factorization:
        """One row that holds several documents side by side; none reads another."""
        rows = [row for f in factorizations for row in f.unstack()]
        if not rows:
            raise ValueError("pack needs at least one factorization")
        documents, count = [], 0
        for row in rows:
            documents.append(row.documents + count)
            count += int(row.documents[0, -1]) + 1
        return cls(torch.cat([row.group_ids for row in rows], dim=1), torch.cat(documents, dim=1))

    def regroup(self, group_size: int, order: str | None = None, generator: Generators = None) -> Factorization:
        """The same given positions, the others cut anew into groups of `group_size`.

        Args:
            order: None keeps this factorization's own order (inside a group: left to right);
                "left_to_right" and "random" choose another.
            generator: for the random order: one a row, or one that seeds them.
        """
        _check_positive("group_size", group_size)
        if order is not None and order not in _ORDERS:
            raise ValueError(f"order must be one of {', '.join(_ORDERS)}, got {order!r}")
        predicted, T = self.is_predicted, self.length
        if order == "random":
            key = uniforms(self.lengths.tolist(), T, generator).to(predicted.device)
        elif order == "left_to_right":
            key = torch.arange(T, device=predicted.device).expand_as(predicted)
        else:
            key = self.group_ids
        rank = _rank_in_document(key, predicted, self.documents, self.document_starts)
        return Factorization(torch.where(predicted, rank // group_size, self.group_ids), self.documents)

    # ------------------------------------------------------------------ reading

    @property
    def documents(self) -> Tensor:
        """(B, T) int64: `document_ids`, never None."""
        assert self.document_ids is not None
        return self.document_ids

    @property
    def document_starts(self) -> Tensor:
        """(B, T) int64: the first column of the document that each column belongs to."""
        columns = torch.arange(self.length, device=self.device).expand_as(self.group_ids)
        changes = self.documents.diff(dim=1, prepend=self.documents[:, :1]) != 0
        return (columns * changes).cummax(dim=1).values

    @property
    def batch_size(self) -> int:
        return self.group_ids.shape[0]

    @property
    def length(self) -> int:
        """Columns, padding included."""
        return self.group_ids.shape[1]

    @property
    def lengths(self) -> Tensor:
        """(B,) int64: columns of each row up to its last present position."""
        columns = torch.arange(1, self.length + 1, device=self.group_ids.device)
        return (columns * self.is_present).amax(dim=1)

    @property
    def is_given(self) -> Tensor:
        """(B, T) bool."""
        return self.group_ids == GIVEN

    @property
    def is_predicted(self) -> Tensor:
        """(B, T) bool."""
        return self.group_ids >= 0

    @property
    def is_present(self) -> Tensor:
        """(B, T) bool: given or predicted."""
        return self.group_ids != ABSENT

    @property
    def num_groups(self) -> Tensor:
        """(B,) int64: the number of steps of each row (of its longest document)."""
        return self.group_ids.amax(dim=1).clamp(min=-1) + 1

    @property
    def device(self) -> torch.device:
        return self.group_ids.device

    def to(self, device: torch.device | str) -> Factorization:
        return Factorization(self.group_ids.to(device), self.documents.to(device))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Factorization):
            return NotImplemented
        return torch.equal(self.group_ids.cpu(), other.group_ids.cpu()) and torch.equal(
            self.documents.cpu(), other.documents.cpu()
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        steps = self.num_groups.tolist()
        return f"Factorization(batch_size={self.batch_size}, length={self.length}, num_groups={steps})"

    def describe(self, tokens: Sequence[Sequence[str]] | None = None) -> str:
        """Order and groups as text: one line a step, `#` where a position is predicted, `=` where it is known.

        Args:
            tokens: for each row the text of each position, printed behind the step that predicts it.
        """
        lines = []
        for b, (ids, length) in enumerate(zip(self.group_ids.tolist(), self.lengths.tolist(), strict=True)):
            ids = ids[:length]
            if self.batch_size > 1:
                lines.append(f"row {b}")
            words = list(tokens[b]) if tokens is not None else None
            for step in range(GIVEN, max(ids) + 1):
                picture = "".join("#" if g == step else "." if g > step or g == ABSENT else "=" for g in ids)
                members = [i for i, g in enumerate(ids) if g == step]
                name = "given " if step == GIVEN else f"{step:5d} "
                text = " ".join(map(str, members) if words is None else (repr(words[i]) for i in members))
                lines.append(f"{name} {picture.replace('#', '=') if step == GIVEN else picture}  {text}")
        return "\n".join(lines)

    # ------------------------------------------------------------------ checking

    def _check(self) -> None:
        ids, documents = self.group_ids, self.documents
        B, T = ids.shape
        if B == 0 or T == 0:
            raise ValueError(f"a factorization needs at least one row and one position, got shape {(B, T)}")
        if (ids < ABSENT).any():
            b, t = (ids < ABSENT).nonzero()[0].tolist()
            raise ValueError(
                f"row {b}, position {t}: group id {int(ids[b, t])}; "
                f"use {GIVEN} (given), {ABSENT} (absent) or a step from 0"
            )
        if (documents[:, 0] != 0).any() or ((documents.diff(dim=1) < 0) | (documents.diff(dim=1) > 1)).any():
            raise ValueError("document_ids must start at 0 in every row and grow by 0 or 1 from column to column")
        D = int(documents.max()) + 1
        where = torch.arange(B, device=ids.device)[:, None] * D + documents  # (B, T): flat (row, document)
        exists = torch.zeros(B * D, dtype=torch.bool, device=ids.device)
        exists[where[self.is_present]] = True
        exists[torch.arange(B, device=ids.device) * D] = True
        given = torch.zeros_like(exists)
        given[where[self.is_given]] = True
        if (exists & ~given).any():
            raise ValueError(
                f"{_place(exists & ~given, D)} has no given position: every document needs at least one "
                "(usually the start token)"
            )
        highest = torch.full((B * D,), -1, device=ids.device)
        highest.scatter_reduce_(0, where.flatten(), ids.flatten(), "amax")
        pairs = torch.unique(torch.stack([where[self.is_predicted], ids[self.is_predicted]]), dim=1)
        distinct = torch.bincount(pairs[0], minlength=B * D)
        if (distinct != highest.clamp(min=-1) + 1).any():
            raise ValueError(
                f"{_place(distinct != highest.clamp(min=-1) + 1, D)} skips a step: its group ids must be exactly "
                "0..K-1, each used at least once"
            )


def _place(bad: Tensor, documents: int) -> str:
    b, d = divmod(int(bad.nonzero()[0]), documents)
    return f"row {b}" if documents == 1 else f"row {b}, document {d}"


def _check_sizes(length: int, group_size: int, given: int) -> None:
    for name, value in (("length", length), ("group_size", group_size), ("given", given)):
        _check_positive(name, value)
    if not 1 <= given <= length:
        raise ValueError(f"given must be between 1 and the length {length}, got {given}")


def _check_positive(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be at least 1, got {value!r}")


def _integer_lists(groups: Iterable[Iterable[int]]) -> list[list[int]]:
    lists: list[list[int]] = []
    try:
        for positions in groups:
            lists.append([])
            for position in positions:
                if not isinstance(position, Integral) or isinstance(position, bool):
                    raise ValueError(f"groups[{len(lists) - 1}] holds {position!r}: positions are integers")
                lists[-1].append(int(position))
    except (TypeError, OverflowError) as error:
        raise ValueError(f"groups must be a list of lists of positions: {error}") from error
    return lists


def _rank_in_document(key: Tensor, chosen: Tensor, documents: Tensor, starts: Tensor) -> Tensor:
    """(B, T) int64: how many chosen columns of the same document come before each, by (key, column)."""
    T = key.shape[1]
    by_key = key.argsort(dim=1, stable=True)
    # Chosen columns first within their document; two stable sorts make one lexicographic one.
    place = (documents * 2 + (~chosen)).gather(1, by_key)
    by_place = place.argsort(dim=1, stable=True)
    columns = by_key.gather(1, by_place)
    rank = torch.empty_like(columns).scatter_(
        1, columns, torch.arange(T, device=key.device).expand_as(columns).contiguous()
    )
    return rank - starts
