"""One generator a row, so that what happens to a row never depends on its batch mates."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator] | None


def seed_of(seed: int, *texts: str) -> int:
    """A seed for a text: the same on every machine and in every run."""
    digest = hashlib.blake2b("\0".join((str(seed), *texts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2


def row_generators(generator: Generators, rows: int) -> list[torch.Generator]:
    """A generator for each row.

    Args:
        generator: one a row; or a single one, which seeds one a row (the first rows alike, however many follow); or
            None: the global generator seeds them.
        rows: how many.

    Raises:
        ValueError: if the number of generators does not fit, or something is not a generator.
    """
    if generator is None or isinstance(generator, torch.Generator):
        device = "cpu" if generator is None else generator.device
        seeds = [int(torch.randint(2**62, (1,), generator=generator, device=device)) for _ in range(rows)]
        return [torch.Generator().manual_seed(seed) for seed in seeds]
    if not isinstance(generator, Sequence) or not all(isinstance(one, torch.Generator) for one in generator):
        raise ValueError(f"generator must be a torch.Generator or a list of them, got {generator!r}")
    if len(generator) != rows:
        raise ValueError(f"{len(generator)} generators for {rows} rows: give one, or one a row")
    return list(generator)


def uniforms(lengths: Sequence[int], columns: int, generator: Generators) -> Tensor:
    """(B, T) float64 in [0, 1): one number a position.

    Args:
        lengths: of the B rows; a row draws exactly its own length, whatever the padding.
        columns: T.
        generator: as in `row_generators`.
    """
    out = torch.zeros(len(lengths), columns, dtype=torch.float64)
    for row, length, source in zip(out, lengths, row_generators(generator, len(lengths)), strict=True):
        dtype = torch.float32 if source.device.type == "mps" else torch.float64  # there is no other there
        row[:length] = torch.rand(length, generator=source, dtype=dtype, device=source.device).cpu()
    return out
