"""The directory of a run: may it be written to, what was it begun with, which checkpoint goes it on from.

Knows the files of `anyorder adapt` and its options; no model and no data.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from anyorder.training import checkpoints

RUN_FILE = "run.json"
CHECKPOINTS = "checkpoints"
_NOT_OF_THE_RUN = {
    "run", "command", "as_typed", "debug", "json", "resume", "output", "device", "save_every", "log_every",
    "attn_implementation", "base_model", "plan", "devices", "device_flops", "utilisation",
}  # fmt: skip
"""Options that may differ when a run is resumed."""


def check(options: argparse.Namespace) -> str | None:
    """Check the output directory against --resume, and write nothing; the checkpoint to resume from, if any.

    Raises:
        ValueError: if there is something else in the directory, or nothing to resume, or a run with other options.
    """
    directory: Path = options.output
    found = checkpoints.complete(directory / CHECKPOINTS) if options.resume else []
    newest = str(found[-1]) if found else None
    if not _speaks():
        return newest
    if not options.resume:
        if directory.exists() and any(directory.iterdir()):
            raise ValueError(f"{directory} is not empty: add --resume to go on, or choose another directory")
        return None
    if not (directory / RUN_FILE).is_file():
        raise ValueError(f"nothing to resume in {directory}: it has no {RUN_FILE}")
    before = json.loads((directory / RUN_FILE).read_text())
    for name, value in _described(options).items():
        if before.get(name) != value:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"the run in {directory} has {option} {before.get(name)}, not {value}: use the same")
    if newest is None:
        print("no checkpoint yet: starting from the beginning", file=sys.stderr)
    return newest


@contextlib.contextmanager
def begun(options: argparse.Namespace) -> Iterator[None]:
    """Writes the options of a new run; if what is inside fails, the run has not begun and nothing of it stays."""
    directory: Path = options.output
    if options.resume or not _speaks():
        yield
        return
    there = directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    (directory / RUN_FILE).write_text(json.dumps(_described(options), indent=1) + "\n")
    try:
        yield
    except BaseException:
        (directory / RUN_FILE).unlink()
        with contextlib.suppress(OSError):  # not empty: somebody else's
            (directory / CHECKPOINTS).rmdir()
        if not there:
            with contextlib.suppress(OSError):
                directory.rmdir()
        raise


def _speaks() -> bool:
    """Of several processes the first checks and writes for all; if it fails, all end."""
    return int(os.environ.get("RANK", "0")) == 0


def _described(options: argparse.Namespace) -> dict[str, Any]:
    described = {name: value for name, value in vars(options).items() if name not in _NOT_OF_THE_RUN}
    return json.loads(json.dumps(described, default=str))
