"""A text at several lengths of its blanks, of which the likeliest is kept, its tokens included.

Seeking says how likely a length is before anything is filled, P(n | what is known). What stands there then has P(x | n,
what is known), exactly; the product is the probability of both. A line of program is near certain at its own length
and stumbles at any other, of which the token behind it tells little.

Shorter is likelier, other things being equal: every token costs something. So this is for blanks of which little is
uncertain but their length, and asked for (`tries`); sentences are rather met by the middle of the lengths.

This module knows lengths and their probabilities; it fills nothing.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch

from anyorder.infill.seeking import Sought

T = TypeVar("T")


def check_tries(tries: int, watched: bool) -> None:
    """ValueError for a number of tries that is none, or that cannot be watched."""
    if not isinstance(tries, int) or isinstance(tries, bool) or tries < 1:
        raise ValueError(f"tries must be a whole number from 1 up, got {tries!r}")
    if watched and tries > 1:
        raise ValueError(f"a watcher is told of one filling of a text, not of {tries}: watch with tries=1")


class Variants:
    """Texts at the lengths found for their blanks, and at the likeliest others.

    Args:
        sought: what was found for each text.
        tries: variants of a text; as many as there are, where there are fewer.

    Attributes:
        sought: of each variant.
    """

    def __init__(self, sought: Sequence[Sought], tries: int):
        several = [list(itertools.islice(_variants(own), tries)) for own in sought]
        self._origins = [number for number, own in enumerate(several) for _ in own]
        self.sought = [variant for own in several for variant in own]

    def spread(self, of_texts: Sequence[T]) -> list[T]:
        """What belongs to each text, for each variant."""
        return [of_texts[number] for number in self._origins]

    def spread_generators(self, of_texts: list[torch.Generator] | None) -> list[torch.Generator] | None:
        """The same; variants of a text draw alike, the first from the text's own generator."""
        if of_texts is None:
            return None
        found: dict[int, torch.Generator] = {}
        return [
            _copy(of_texts[number]) if number in found else found.setdefault(number, of_texts[number])
            for number in self._origins
        ]

    def likeliest(self, log_probs: Sequence[float]) -> list[int]:
        """Of each text the number of the variant that is likeliest, the first where several are.

        Args:
            log_probs: of each variant's tokens, given their lengths, in nats.
        """
        best: dict[int, tuple[float, int]] = {}
        for number, (origin, own, log_prob) in enumerate(zip(self._origins, self.sought, log_probs, strict=True)):
            score = log_prob + _log_share(own)
            if origin not in best or score > best[origin][0]:
                best[origin] = score, number
        return [best[origin][1] for origin in sorted(best)]


def _variants(sought: Sought) -> Iterator[Sought]:
    yield sought
    for lengths in _by_probability(sought):
        if lengths != {k: sought.lengths[k] for k in lengths}:
            own = [lengths.get(k, n) for k, n in enumerate(sought.lengths)]
            yield dataclasses.replace(sought, lengths=own, encoded=None)


def _by_probability(sought: Sought) -> Iterator[dict[int, int]]:
    """Lengths of the blanks whose length was sought, all together, the likeliest first, as far as any is possible."""
    ranked = {
        k: sorted(((p, n) for n, p in shares.items() if p > 0), reverse=True) for k, shares in sought.shares.items()
    }
    blanks = sorted(ranked)

    def cost(places: tuple[int, ...]) -> float:
        return -sum(math.log(ranked[k][place][0]) for k, place in zip(blanks, places, strict=True))

    first = (0,) * len(blanks)
    heap, seen = [(cost(first), first)], {first}
    while heap:
        _, places = heapq.heappop(heap)
        yield {k: ranked[k][place][1] for k, place in zip(blanks, places, strict=True)}
        for number, k in enumerate(blanks):
            further = (*places[:number], places[number] + 1, *places[number + 1 :])
            if further[number] < len(ranked[k]) and further not in seen:
                seen.add(further)
                heapq.heappush(heap, (cost(further), further))


def _log_share(sought: Sought) -> float:
    """log P of the lengths of a text's blanks that were sought, in nats."""
    return sum(math.log(max(shares[sought.lengths[k]], math.ulp(0.0))) for k, shares in sought.shares.items())


def _copy(generator: torch.Generator) -> torch.Generator:
    return torch.Generator(generator.device).set_state(generator.get_state())
