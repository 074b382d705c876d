"""Which factorizations a model is trained on, and when.

A *regime* is a distribution over factorizations of one document; a *stage* is a weighted mixture of regimes for a
number of sequences; a *curriculum* is a list of stages. Each document draws its own factorization from a generator
that is a function of (seed, sequence, document): the same whatever the batch, the workers or the interruptions.

Knows positions, sentence starts and a text's own blanks; no tokens, no model.
"""

from __future__ import annotations

import dataclasses
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from anyorder.core.factorization import Factorization

MIN_LENGTH = 2
"""A document shorter than this has nothing to predict."""


@dataclass(frozen=True)
class Document:
    """What a regime may look at: how long the document is, where its sentences start and where its blanks are."""

    length: int
    sentence_starts: tuple[int, ...] = ()
    """Ascending positions, the first sentence's included; empty: not known."""
    blanks: tuple[tuple[int, int], ...] = ()
    """Blanks that the text itself has: ascending positions of the first and behind the last, none at 0."""


class Regime(ABC):
    """A distribution over factorizations of a document; position 0 is always given.

    Attributes:
        name: as in YAML files and in logs.
    """

    name: ClassVar[str]

    @abstractmethod
    def draw(self, document: Document, generator: torch.Generator) -> Factorization:
        """One factorization with at least one predicted position."""


@dataclass(frozen=True)
class LeftToRight(Regime):
    """Contiguous groups from left to right, of one of `group_sizes`, each as likely."""

    name: ClassVar[str] = "left_to_right"
    group_sizes: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        _whole("group_sizes", self.group_sizes)

    def draw(self, document: Document, generator: torch.Generator) -> Factorization:
        return Factorization.left_to_right(document.length, _choose(self.group_sizes, generator))


@dataclass(frozen=True)
class RandomGroups(Regime):
    """Groups of random positions; a random fraction of the document, up to `given_up_to`, is given."""

    name: ClassVar[str] = "random_groups"
    group_sizes: tuple[int, ...] = (4,)
    given_up_to: float = 0.0

    def __post_init__(self) -> None:
        _whole("group_sizes", self.group_sizes)
        if not 0 <= self.given_up_to <= 1:
            raise ValueError(f"given_up_to must be between 0 and 1, got {self.given_up_to}")

    def draw(self, document: Document, generator: torch.Generator) -> Factorization:
        given = 1 + int(_uniform(generator) * self.given_up_to * (document.length - 2))
        order = torch.randperm(document.length - 1, generator=generator) + 1
        blank = torch.zeros(document.length, dtype=torch.bool)
        blank[order[: document.length - given]] = True
        return Factorization.infill(blank, _choose(self.group_sizes, generator), "random", [generator])


@dataclass(frozen=True)
class Spans(Regime):
    """One to `blanks` spans of `lengths` tokens are blank; they are filled from left to right."""

    name: ClassVar[str] = "spans"
    blanks: int = 3
    lengths: tuple[int, int] = (1, 16)
    group_sizes: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        _whole("blanks", (self.blanks,))
        _whole("lengths", self.lengths)
        _whole("group_sizes", self.group_sizes)
        if len(self.lengths) != 2 or self.lengths[0] > self.lengths[1]:
            raise ValueError(f"lengths must be the least and the greatest, got {self.lengths}")

    def draw(self, document: Document, generator: torch.Generator) -> Factorization:
        blank = torch.zeros(document.length, dtype=torch.bool)
        for _ in range(1 + int(_uniform(generator) * self.blanks)):
            low, high = self.lengths
            length = min(low + int(_uniform(generator) * (high - low + 1)), document.length - 1)
            start = 1 + int(_uniform(generator) * (document.length - length))
            blank[start : start + length] = True
        return Factorization.infill(blank, _choose(self.group_sizes, generator))


@dataclass(frozen=True)
class SentenceBlanks(Regime):
    """One to `blanks` whole sentences are blank; without known sentences, as `Spans`."""

    name: ClassVar[str] = "sentence_blanks"
    blanks: int = 1
    group_sizes: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        _whole("blanks", (self.blanks,))
        _whole("group_sizes", self.group_sizes)

    def draw(self, document: Document, generator: torch.Generator) -> Factorization:
        starts = [s for s in document.sentence_starts if s < document.length]
        if len(starts) < 2:
            return Spans(self.blanks, group_sizes=self.group_sizes).draw(document, generator)
        sentences = [(max(1, start), end) for start, end in zip(starts, [*starts[1:], document.length], strict=True)]
        blank = _some_of(sentences, min(self.blanks, len(starts) - 1), document.length, generator)
        return Factorization.infill(blank, _choose(self.group_sizes, generator))


@dataclass(frozen=True)
class OwnBlanks(Regime):
    """One to `blanks` of the blanks that the text itself has; without any, as `Spans`."""

    name: ClassVar[str] = "own_blanks"
    blanks: int = 1
    group_sizes: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        _whole("blanks", (self.blanks,))
        _whole("group_sizes", self.group_sizes)

    def draw(self, document: Document, generator: torch.Generator) -> Factorization:
        own = document.blanks
        if not own:
            return Spans(self.blanks, group_sizes=self.group_sizes).draw(document, generator)
        blank = _some_of(own, min(self.blanks, len(own)), document.length, generator)
        return Factorization.infill(blank, _choose(self.group_sizes, generator))


@dataclass(frozen=True)
class PrefixSuffix(Regime):
    """A prefix and a suffix are given, each as long as chance will have it; the middle is filled from left to right."""

    name: ClassVar[str] = "prefix_suffix"
    group_sizes: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        _whole("group_sizes", self.group_sizes)

    def draw(self, document: Document, generator: torch.Generator) -> Factorization:
        first, last = sorted(1 + int(_uniform(generator) * (document.length - 1)) for _ in range(2))
        blank = torch.zeros(document.length, dtype=torch.bool)
        blank[first : last + 1] = True
        return Factorization.infill(blank, _choose(self.group_sizes, generator))


REGIMES: dict[str, type[Regime]] = {
    regime.name: regime for regime in (LeftToRight, RandomGroups, Spans, SentenceBlanks, OwnBlanks, PrefixSuffix)
}


@dataclass(frozen=True)
class Stage:
    """A mixture of regimes for a number of sequences.

    Args:
        regimes: what is mixed.
        weights: as many, not all zero.
        share: this stage's part of the whole run, relative to the other stages': tokens, steps or percent, as you like.
    """

    regimes: tuple[Regime, ...]
    weights: tuple[float, ...]
    share: float = 1.0

    def __post_init__(self) -> None:
        if not self.regimes or len(self.regimes) != len(self.weights):
            raise ValueError(f"{len(self.weights)} weights for {len(self.regimes)} regimes: give one each")
        if min(self.weights) < 0 or sum(self.weights) <= 0:
            raise ValueError(f"weights must be at least 0 and not all 0, got {self.weights}")
        if self.share <= 0:
            raise ValueError(f"share must be above 0, got {self.share}")


@dataclass(frozen=True)
class Curriculum:
    """Stages, one after the other."""

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("a curriculum needs at least one stage")

    def stage(self, progress: float) -> Stage:
        """The stage at `progress` in [0, 1] of the run."""
        total, passed = sum(stage.share for stage in self.stages), 0.0
        for stage in self.stages:
            passed += stage.share / total
            if progress < passed:
                return stage
        return self.stages[-1]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the kinds of regimes, each once."""
        return tuple(dict.fromkeys(regime.name for stage in self.stages for regime in stage.regimes))

    def draw(self, document: Document, progress: float, seed: Sequence[int | str]) -> tuple[Factorization, str]:
        """A factorization of a document and the name of the regime it is from; the same for the same arguments.

        Args:
            document: at least `MIN_LENGTH` long.
            progress: in [0, 1].
            seed: whatever tells this draw from all others, usually (seed, sequence, document).
        """
        generator = seeded(seed)
        stage = self.stage(progress)
        index = int(torch.multinomial(torch.tensor(stage.weights, dtype=torch.float64), 1, generator=generator))
        return stage.regimes[index].draw(document, generator), stage.regimes[index].name

    @classmethod
    def load(cls, name: str) -> Curriculum:
        """`exact`, `paper` or `infill`; or a YAML file.

        Raises:
            ValueError: if there is neither such a name nor such a file, or the file breaks a rule.
        """
        if name in BUILT_IN:
            return BUILT_IN[name]
        if not name.endswith((".yaml", ".yml")) or not Path(name).is_file():
            raise ValueError(f"no curriculum {name!r}: use {', '.join(BUILT_IN)} or a .yaml file")
        import yaml

        try:
            return cls.from_dict(yaml.safe_load(Path(name).read_text()))
        except yaml.YAMLError as error:
            raise ValueError(f"{name} is not YAML: {error}") from error

    @classmethod
    def from_dict(cls, data: Any) -> Curriculum:
        """`{"stages": [{"share": 1, "mixture": [{"regime": "spans", "weight": 2, "blanks": 3}]}]}`."""
        stages = []
        _only(data, {"stages"}, "the file")
        for i, entry in enumerate(_list(data, "stages", "the file")):
            where = f"stages[{i}]"
            _only(entry, {"share", "mixture"}, where)
            regimes, weights = [], []
            for j, part in enumerate(_list(entry, "mixture", where)):
                regime, weight = _regime(part, f"{where}.mixture[{j}]")
                regimes.append(regime)
                weights.append(weight)
            stages.append(Stage(tuple(regimes), tuple(weights), entry.get("share", 1.0)))
        return cls(tuple(stages))


def seeded(seed: Sequence[int | str]) -> torch.Generator:
    """A generator that is a function of some numbers, independent for different ones."""
    digest = hashlib.sha256(",".join(map(str, seed)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _some_of(ranges: Sequence[tuple[int, int]], most: int, length: int, generator: torch.Generator) -> Tensor:
    """(length,) bool: True in one to `most` of some ranges of positions, each number and each range as likely."""
    blank = torch.zeros(length, dtype=torch.bool)
    count = 1 + int(_uniform(generator) * most)
    for k in torch.randperm(len(ranges), generator=generator)[:count].tolist():
        blank[slice(*ranges[k])] = True
    return blank


def _choose(values: tuple[int, ...], generator: torch.Generator) -> int:
    return values[int(torch.randint(len(values), (1,), generator=generator))]


def _uniform(generator: torch.Generator) -> float:
    return float(torch.rand(1, generator=generator, dtype=torch.float64))


def _whole(name: str, values: tuple[int, ...]) -> None:
    if not values or any(not isinstance(value, int) or value < 1 for value in values):
        raise ValueError(f"{name} must hold whole numbers from 1 up, got {values}")


def _only(entry: Any, known: set[str], where: str) -> None:
    if not isinstance(entry, dict):
        raise ValueError(f"{where} must be a mapping with {', '.join(sorted(known))}, got {entry!r}")
    for key in entry:
        if key not in known:
            raise ValueError(f"unknown key {key!r} in {where}; known: {', '.join(sorted(known))}")


def _list(entry: dict[str, Any], key: str, where: str) -> list[Any]:
    value = entry.get(key)
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where} needs a list {key!r} that is not empty")
    return value


def _regime(part: Any, where: str) -> tuple[Regime, float]:
    if not isinstance(part, dict) or part.get("regime") not in REGIMES:
        raise ValueError(f"{where} needs a 'regime' out of {', '.join(REGIMES)}, got {part!r}")
    kind, weight = REGIMES[part["regime"]], part.get("weight", 1.0)
    known = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    _only(part, known | {"regime", "weight"}, where)
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in part.items() if key in known}
    try:
        return kind(**fields), float(weight)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


BUILT_IN = {
    # A3 (arXiv 2601.13228): AR initialisation; groups 1 -> 2 -> 4; random groups of 4, then 8.
    "paper": Curriculum(
        (
            Stage((LeftToRight((1,)),), (1.0,)),
            Stage((LeftToRight((1, 2)),), (1.0,)),
            Stage((LeftToRight((2, 4)),), (1.0,)),
            Stage((RandomGroups((4,)),), (1.0,)),
            Stage((RandomGroups((8,)),), (1.0,)),
        )
    ),
    # The exact recipe starts where the paper's first stage ends; requests are mostly spans.
    "exact": Curriculum(
        (
            Stage(
                (
                    SentenceBlanks(2),
                    Spans(3, (1, 24), (1, 1, 2, 4)),
                    PrefixSuffix(),
                    LeftToRight((2, 4, 8)),
                    RandomGroups((1, 2, 4, 8), given_up_to=0.8),
                ),
                (0.3, 0.15, 0.1, 0.25, 0.2),
            ),
        )
    ),
    "infill": Curriculum((Stage((SentenceBlanks(2), Spans(3, (1, 24)), PrefixSuffix()), (0.5, 0.3, 0.2)),)),
}
