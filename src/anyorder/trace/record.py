"""What decoding did, step by step, as data: recorded, saved, loaded.

Knows commits and the text of single tokens; nothing of models, terminals or pictures.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import Tensor

from anyorder.decoding.events import Commit, Watcher

LIKELINESS_BOUNDS = (0.1, 0.5)
"""Of the probability of a token: below the first it is unlikely, from the second on it is likely."""
OPEN = "·"
"""How a position without a token is shown."""


@dataclass(frozen=True)
class Filled:
    """One token that was committed."""

    position: int
    text: str
    log_prob: float
    """Under the model itself, in nats."""
    step: int

    @property
    def likeliness(self) -> int:
        """0, 1 or 2."""
        return sum(math.exp(self.log_prob) >= bound for bound in LIKELINESS_BOUNDS)


@dataclass
class Trace:
    """One row of a run."""

    given: list[str | None]
    """Text of each position; None where there was none."""
    filled: list[Filled] = field(default_factory=list)

    @property
    def steps(self) -> int:
        return max((one.step for one in self.filled), default=-1) + 1

    def at(self, step: int) -> list[str | Filled | None]:
        """Each position as it was when so many steps were done."""
        state: list[str | Filled | None] = list(self.given)
        for one in self.filled:
            if one.step < step:
                state[one.position] = one
        return state

    def save(self, file: Path) -> None:
        """Write JSON that `load` reads."""
        file.write_text(json.dumps({"given": self.given, "filled": [asdict(one) for one in self.filled]}) + "\n")

    @classmethod
    def load(cls, file: Path) -> Trace:
        """Raises ValueError if the file holds no trace."""
        try:
            data = json.loads(file.read_text())
            return cls(list(data["given"]), [Filled(**one) for one in data["filled"]])
        except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} holds no trace, as --trace writes it: {error}") from error


class Recorder(Watcher):
    """Keeps a trace of each row.

    Args:
        text: of a token id.

    Attributes:
        traces: one a row.
    """

    def __init__(self, text: Callable[[int], str]):
        self.text = text
        self.traces: list[Trace] = []

    def begin(self, ids: Tensor, is_open: Tensor) -> None:
        rows = zip(ids.tolist(), is_open.tolist(), strict=True)
        self.traces = [
            Trace([None if blank else self.text(token) for token, blank in zip(*row, strict=True)]) for row in rows
        ]

    def step(self, commits: Sequence[Commit]) -> None:
        for one in commits:
            filled = Filled(one.position, self.text(one.token), one.log_prob, one.step)
            self.traces[one.row].filled.append(filled)


def as_text(part: str | Filled | None) -> str:
    """A position's text as it is at some step."""
    return OPEN if part is None else part.text if isinstance(part, Filled) else part
