"""Batches of rows of unequal length, as large as memory and the user allow. Knows lengths and ids only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def batches(rows: Iterable[T], length: Callable[[T], int], tokens: int, most: int | None) -> Iterator[list[T]]:
    """The rows in their order, in batches.

    Args:
        rows: best sorted by length, for a batch is padded to its longest row.
        length: of a row.
        tokens: at most so many in a batch, padding included, unless one row alone is longer.
        most: at most so many rows in a batch; None: any number.
    """
    batch: list[T] = []
    longest = 0
    for row in rows:
        longest = max(longest, length(row))
        if batch and ((len(batch) + 1) * longest > tokens or len(batch) == most):
            yield batch
            batch, longest = [], length(row)
        batch.append(row)
    if batch:
        yield batch


def padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """(B, T) int64 ids of rows of unequal length, zeros behind the shorter ones."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
