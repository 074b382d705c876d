"""Timing decoders side by side.

Runs are interleaved: every batch of prompts goes through all decoders, in turn, before the next one does, so that a
slow moment of the machine falls on all alike, and ratios are taken batch by batch. A ratio is to the first decoder of
the same engine: one engine beside another would credit the method with what the engine does. How much faster than
other people's decoders each is stands beside it. Knows nothing of quality.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from anyorder.bench.decoders import Decoder


@dataclass
class Measured:
    """One decoder at one batch size."""

    decoder: str
    batch_size: int
    new_tokens: int
    """Of each row."""
    warm_up: float = 0.0
    """Seconds of the runs that are not counted."""
    seconds: list[float] = field(default_factory=list)
    """Of each batch."""
    ratios: list[float] = field(default_factory=list)
    """Speed over that of `ratio_to`, on the same batch."""
    ratio_to: str = ""
    """The decoder that it is compared with."""
    forwards: list[int | None] = field(default_factory=list)
    sequences: list[Tensor] = field(default_factory=list)
    """Of all prompts, (P + N,) each."""
    quality: dict[str, float] = field(default_factory=dict)
    same_as_alone: int | None = None
    """How many prompts have the same continuation as at the smallest batch size; None: not comparable."""
    engine: str = "eager"
    times: dict[str, list[float]] = field(default_factory=dict)
    """Speed over that of each reference, on the same batch."""

    @property
    def tokens_per_second(self) -> list[float]:
        return [self.batch_size * self.new_tokens / second for second in self.seconds]

    @property
    def forwards_per_token(self) -> float | None:
        known = [count for count in self.forwards if count is not None]
        return statistics.mean(known) / self.new_tokens if known else None

    def record(self) -> dict[str, object]:
        """Numbers alone, for JSON and CSV."""
        speed, forwards = self.tokens_per_second, self.forwards_per_token
        return {
            "decoder": self.decoder,
            "engine": self.engine,
            "batch_size": self.batch_size,
            "tokens_per_second": statistics.median(speed),
            "tokens_per_second_min": min(speed),
            "tokens_per_second_max": max(speed),
            "ratio_to": self.ratio_to,
            "ratio": statistics.median(self.ratios),
            "ratio_min": min(self.ratios),
            "ratio_max": max(self.ratios),
            **{f"times {name}": statistics.median(times) for name, times in self.times.items()},
            "forwards_per_token": forwards,
            "ms_per_forward": None
            if forwards is None
            else 1000 * statistics.median(self.seconds) / (forwards * self.new_tokens),
            "warm_up_seconds": self.warm_up,
            **self.quality,
            "prompts": len(self.sequences),
            "same_as_alone": self.same_as_alone,
        }


def measure(
    decoders: Sequence[Decoder],
    prompts: Tensor,
    new: int,
    batch_sizes: Sequence[int],
    seed: int = 0,
    warm_up: float = 0.0,
) -> list[Measured]:
    """Every decoder at every batch size, on all prompts that fill whole batches.

    Args:
        decoders: ratios are taken to the first one of each engine, and to each reference.
        prompts: (M, P) int64.
        new: tokens to add.
        batch_sizes: each at most M.
        seed: prompt number m is continued with seed + m, whatever batch it is in.
        warm_up: seconds in which each decoder goes on after its first run before any is measured.

    Raises:
        ValueError: if a batch size is greater than the number of prompts.
    """
    too_many = [size for size in batch_sizes if size > len(prompts)]
    if too_many:
        raise ValueError(f"batch size {too_many[0]} needs as many prompts; there are {len(prompts)}")
    results = []
    for size in batch_sizes:
        found = [Measured(decoder.name, size, new, engine=decoder.engine) for decoder in decoders]
        first_of = {result.engine: result for result in reversed(found)}
        references = [result for decoder, result in zip(decoders, found, strict=True) if decoder.is_reference]
        for decoder, result in zip(decoders, found, strict=True):
            result.ratio_to = first_of[decoder.engine].decoder
            started = time.perf_counter()
            decoder(prompts[:size], new, range(seed, seed + size))  # which may load or prepare something
            ready = time.perf_counter()
            while time.perf_counter() < ready + warm_up:
                decoder(prompts[:size], new, range(seed, seed + size))
            result.warm_up = time.perf_counter() - started
        for first in tqdm(range(0, len(prompts) - size + 1, size), desc=f"batch size {size}", disable=None):
            for decoder, result in zip(decoders, found, strict=True):
                _run(decoder, result, prompts[first : first + size], range(seed + first, seed + first + size))
            for result in found:
                result.ratios.append(first_of[result.engine].seconds[-1] / result.seconds[-1])
                for one in references:
                    result.times.setdefault(one.decoder, []).append(one.seconds[-1] / result.seconds[-1])
        results += found
    _compare_batch_sizes(decoders, results)
    return results


def _run(decoder: Decoder, result: Measured, ids: Tensor, seeds: range) -> None:
    started = time.perf_counter()
    out = decoder(ids, result.new_tokens, seeds)
    if out.sequences.device.type == "cuda":
        torch.cuda.synchronize()
    result.seconds.append(time.perf_counter() - started)
    result.forwards.append(out.forwards)
    result.sequences += list(out.sequences.cpu())


def _compare_batch_sizes(decoders: Sequence[Decoder], results: list[Measured]) -> None:
    comparable = {decoder.name for decoder in decoders if decoder.by_row}
    smallest = min(result.batch_size for result in results)
    alone = {result.decoder: result.sequences for result in results if result.batch_size == smallest}
    for result in results:
        if result.decoder in comparable and result.batch_size > smallest:
            pairs = zip(result.sequences, alone[result.decoder], strict=False)
            result.same_as_alone = sum(torch.equal(a, b) for a, b in pairs)
