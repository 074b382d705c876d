"""A text filled at several lengths of its blanks, of which the one is kept whose whole text is likeliest.

What is known around a blank says how likely each of its lengths is, and at a length what stands there. But a model that
is told a wrong length is sure of wrong things, so that the two multiplied prefer few tokens. The whole text read from
left to right, the base model's own reading in the exact recipe, is told no length: by Bayes

    P(fill | prefix, suffix) is in proportion to P(prefix fill suffix),

for fills of any length, and none of them needs a prior. So lengths and their likeliest tokens propose, and the whole
text decides: a noisy channel in the terms of Brown et al. (Computational Linguistics 19(2), 1993).

This module fills nothing.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch

from anyorder.core.factorization import ABSENT, GIVEN, Factorization
from anyorder.infill.encoding import pad
from anyorder.infill.seeking import Sought
from anyorder.model.base import AnyOrderPreTrainedModel
from anyorder.scoring import compared_by_base, log_likelihood

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

    def likeliest(self, model: AnyOrderPreTrainedModel, rows: Sequence[Sequence[int]]) -> list[int]:
        """Of each text the number of the variant whose ids are likeliest, the first where several are.

        Args:
            model: a converted model, which reads from left to right.
            rows: of each variant the ids of its whole text, behind a start token or more.
        """
        return [max(own, key=_log_probs(model, rows, own).__getitem__) for own in self._numbers()]

    def _numbers(self) -> Iterator[list[int]]:
        """The variants of each text."""
        for _, own in itertools.groupby(range(len(self._origins)), self._origins.__getitem__):
            yield list(own)


def _log_probs(
    model: AnyOrderPreTrainedModel, rows: Sequence[Sequence[int]], numbers: Sequence[int]
) -> dict[int, float]:
    """log P of some rows, but for what they begin with alike, in nats; 0 where they are the same."""
    own = [rows[number] for number in numbers]
    if all(row == own[0] for row in own):
        return dict.fromkeys(numbers, 0.0)
    alike = next((n for n, ids in enumerate(zip(*own, strict=False)) if len(set(ids)) > 1), min(map(len, own)))
    ids, there = pad(own, 0), pad([[1] * len(row) for row in own], 0).bool()
    columns = torch.arange(ids.shape[1]).expand_as(ids)
    predicted = there & (columns >= max(alike, 1))
    if model.recipe == "exact":
        log_probs = compared_by_base(model, ids, predicted)
    else:
        order = torch.where(predicted, columns - max(alike, 1), torch.where(there, GIVEN, ABSENT))
        log_probs = log_likelihood(model, ids, Factorization(order))
    return dict(zip(numbers, log_probs.double().sum(dim=1).tolist(), strict=True))


def _variants(sought: Sought) -> Iterator[Sought]:
    yield sought
    for lengths in _by_probability(sought):
        if lengths != {k: sought.lengths[k] for k in lengths}:
            yield _at(sought, [lengths.get(k, n) for k, n in enumerate(sought.lengths)])


def _at(sought: Sought, lengths: list[int]) -> Sought:
    """The same at other lengths; what was encoded in front of the first blank that has another still holds."""
    encoded = sought.encoded
    if encoded is not None:
        first = next(k for k, (n, own) in enumerate(zip(lengths, sought.lengths, strict=True)) if n != own)
        encoded = encoded.first_of(0, min(encoded.capacity, sought.known[first]))
    return dataclasses.replace(sought, lengths=lengths, encoded=encoded)


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


def _copy(generator: torch.Generator) -> torch.Generator:
    return torch.Generator(generator.device).set_state(generator.get_state())
