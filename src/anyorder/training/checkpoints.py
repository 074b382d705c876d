"""Checkpoints that are whole or not there, and one clear error for those that are damaged.

Trainer writes `trainer_state.json` last: a checkpoint without it was cut while it was written, and is passed over.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

logger = logging.getLogger(__name__)

_WRITING = (SafetensorError, OSError, RuntimeError)  # torch.save and safetensors wrap what the disk says
_ZIPPED = (".pt", ".pth", ".bin")  # what torch.save writes is a zip file with checksums
_OWN = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-\d+")


def step_of(checkpoint: Path) -> int:
    """The step after which it was written."""
    return int(checkpoint.name.rpartition("-")[2])


def complete(folder: Path) -> list[Path]:
    """The checkpoints in a folder that were written to their end, oldest first; others' folders are left alone."""
    own = (path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir() and _OWN.fullmatch(path.name))
    whole = []
    for path in sorted(own, key=step_of):
        try:
            json.loads((path / TRAINER_STATE_NAME).read_text())
            whole.append(path)
        except (OSError, ValueError):
            logger.warning("%s was not written to its end: passed over", path)
    return whole


@contextmanager
def reading(checkpoint: Path) -> Iterator[None]:
    """If reading fails and a file is damaged: one ValueError that says which, and how to go on.

    Whatever else went wrong (no memory, no right to read, another model) is told as it is.
    """
    try:
        yield
    except Exception as error:
        damage = _damage(checkpoint) or (_line(error) if isinstance(error, FileNotFoundError) else None)
        if damage is None:
            raise
        older = [path.name for path in complete(checkpoint.parent) if step_of(path) < step_of(checkpoint)]
        way_out = f"delete it to go on from {older[-1]}" if older else "there is no older one: start anew"
        raise ValueError(f"checkpoint {checkpoint} is damaged ({damage}); {way_out}") from error


def _damage(checkpoint: Path) -> str | None:
    """What is wrong with the first file that is not what was written; read by itself, whatever the caller met."""
    for file in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt"):  # its header says how long it is
                    pass
            elif file.suffix == ".json":
                json.loads(file.read_text())
            elif file.suffix in _ZIPPED:
                with zipfile.ZipFile(file) as parts:
                    if (broken := parts.testzip()) is not None:
                        return f"{file.name}: {broken} is not what was written"
        except (SafetensorError, zipfile.BadZipFile, ValueError, EOFError) as error:
            return f"{file.name}: {_line(error)}"
        except OSError:  # that it cannot be read does not say that it is damaged
            continue
    return None


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
