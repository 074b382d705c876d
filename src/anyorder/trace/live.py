"""A run shown while it goes on, in a terminal or a log."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from typing import TextIO

from torch import Tensor

from anyorder.decoding.events import Commit
from anyorder.trace.record import Filled, Recorder, as_text

_ANSI = ("\x1b[31m", "\x1b[33m", "\x1b[32m")


class Live(Recorder):
    """Shows the first row as it fills: in a terminal in place and in colours, elsewhere one line a step.

    Args:
        text: of a token id.
        out: where to; default: standard error.
    """

    def __init__(self, text: Callable[[int], str], out: TextIO | None = None):
        super().__init__(text)
        self.out = sys.stderr if out is None else out
        self._height = 0

    def begin(self, ids: Tensor, is_open: Tensor) -> None:
        super().begin(ids, is_open)
        self._show()

    def step(self, commits: Sequence[Commit]) -> None:
        super().step(commits)
        self._show()

    def _show(self) -> None:
        state = self.traces[0].at(self.traces[0].steps)
        if not self.out.isatty():
            self.out.write("".join(map(as_text, state)).replace("\n", " ") + "\n")
            return
        plain = "".join(map(as_text, state))
        width = shutil.get_terminal_size().columns
        up = f"\x1b[{self._height - 1}A" if self._height > 1 else ""
        self.out.write(f"\r{up}\x1b[J" + "".join(map(_coloured, state)))
        self._height = sum(max(1, -(-len(line) // width)) for line in plain.split("\n"))
        self.out.flush()

    def close(self) -> None:
        """Leave the line, in a terminal."""
        if self.out.isatty():
            self.out.write("\n")


def _coloured(part: str | Filled | None) -> str:
    return f"{_ANSI[part.likeliness]}{part.text}\x1b[0m" if isinstance(part, Filled) else as_text(part)
