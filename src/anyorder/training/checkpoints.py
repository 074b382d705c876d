"""Checkpoints that are whole or not there, and one clear error for those that are damaged.

Trainer writes `trainer_state.json` last: a checkpoint without it was cut while it was written, and is passed over.
"""

from __future__ import annotations

import json
import logging
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

logger = logging.getLogger(__name__)

_READING = (SafetensorError, pickle.UnpicklingError, EOFError, OSError, RuntimeError, ValueError)
_WRITING = (SafetensorError, OSError, RuntimeError)  # torch.save and safetensors wrap what the disk says


def step_of(checkpoint: Path) -> int:
    """The step after which it was written."""
    return int(checkpoint.name.rpartition("-")[2])


def complete(folder: Path) -> list[Path]:
    """The checkpoints in a folder that were written to their end, oldest first."""
    found = sorted((path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()), key=step_of)
    whole = []
    for path in found:
        try:
            json.loads((path / TRAINER_STATE_NAME).read_text())
            whole.append(path)
        except (OSError, ValueError):
            logger.warning("%s was not written to its end: passed over", path)
    return whole


@contextmanager
def reading(checkpoint: Path) -> Iterator[None]:
    """Turns whatever damaged files raise into one ValueError that says how to go on."""
    try:
        yield
    except _READING as error:
        older = [path.name for path in complete(checkpoint.parent) if step_of(path) < step_of(checkpoint)]
        way_out = f"delete it to go on from {older[-1]}" if older else "there is no older one: start anew"
        raise ValueError(f"checkpoint {checkpoint} is damaged ({_line(error)}); {way_out}") from error


@contextmanager
def writing(checkpoint: Path) -> Iterator[None]:
    """If a checkpoint cannot be written: removes what there is of it and says what is left to resume from."""
    try:
        yield
    except _WRITING as error:
        shutil.rmtree(checkpoint, ignore_errors=True)
        kept = [path.name for path in complete(checkpoint.parent)]
        left = f"{kept[-1]} is intact: make room and go on with --resume" if kept else "there is no earlier one"
        raise ValueError(f"checkpoint {checkpoint} could not be written ({_line(error)}); {left}") from error


def _line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
