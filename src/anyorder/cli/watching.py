"""Seeing the order of generation: shown while it goes on, or kept for `anyorder plot`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from anyorder.cli.options import check_file_to_write

if TYPE_CHECKING:
    from anyorder.infill.pieces import Pieces
    from anyorder.trace.record import Recorder, Trace


def add_watching(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("--watch", action="store_true", help="show the text as it fills, coloured by probability")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write what each step did, for anyorder plot")


def check_watching(options: argparse.Namespace, texts: list[str]) -> None:
    """Raise ValueError if there is more than one text to trace, or nowhere to write."""
    if options.trace is None:
        return
    if len(texts) > 1:
        raise ValueError(f"--trace takes one text, got {len(texts)}")
    check_file_to_write("--trace", options.trace)


@contextmanager
def watching(options: argparse.Namespace, pieces: Pieces) -> Iterator[Recorder | None]:
    """Something that watches one text, if it was asked for."""
    from anyorder.trace.live import Live
    from anyorder.trace.record import Recorder

    special = set(pieces.tokenizer.all_special_ids)

    def text(token: int) -> str:
        return "" if token in special else pieces.decode([token])

    watcher = Live(text) if options.watch else Recorder(text) if options.trace is not None else None
    try:
        yield watcher
    finally:
        if isinstance(watcher, Live):
            watcher.close()


def trace_of(options: argparse.Namespace, watcher: Recorder | None) -> Trace | None:
    """What is to be written, if anything is."""
    return None if options.trace is None or watcher is None else watcher.traces[0]
