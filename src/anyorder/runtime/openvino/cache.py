"""Prepared graphs on disk: a folder for each state of a model and precision, data and no code.

A folder is named after all that its graphs depend on. It is written beside its place and moved there whole, so that no
process ever sees half of one; what is in it is checked against its own list before it is used. Folders that were read
longest ago make room for new ones.

A graph cannot run code, but it can answer what its writer wants: it is read only from a folder that belongs to this
user, or to root, and that nobody else may write to.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from anyorder.hub.cache_dir import cache_directory
from anyorder.runtime.runner import plain_tensors

logger = logging.getLogger(__name__)

FILES = ("rows.xml", "rows.bin", "head.xml", "head.bin")
"""What every folder holds; a coupled model's has more."""
MOST_BYTES = 16 << 30
"""Of all folders together."""
_LIST = "files.json"
_WRITERS = ("anyorder", "openvino", "torch", "transformers", "peft")
_OF_ANY_MODULE = frozenset(vars(nn.Module()))
_OLD = 24 * 3600
"""Seconds after which a folder that was begun and never finished is deleted."""


class DamagedError(Exception):
    """Files of a folder are not those that were written."""


def place_of(model: PreTrainedModel, weights: str) -> Path:
    """The folder of a model as it is now, whether it is there or not; its name begins with `kind_of(model)`."""
    return root() / f"{kind_of(model)}-{state_of(model)}-{weights}"


def root() -> Path:
    """Where all folders are."""
    return cache_directory() / "openvino"


def kind_of(model: PreTrainedModel) -> str:
    """A name for all that graphs depend on but the weights' values; quickly made."""
    digest = hashlib.sha256()
    config = {key: value for key, value in model.config.to_dict().items() if key not in ("base", "_name_or_path")}
    versions = {name: version(name) for name in _WRITERS if importlib.util.find_spec(name)}
    digest.update(json.dumps([config, versions, str(model)], sort_keys=True, default=str).encode())
    package = Path(__file__).parents[2]
    for folder in ("core", "model", "runtime/openvino"):
        for source in sorted((package / folder).glob("*.py")):
            digest.update(source.read_bytes())
    for name, module in model.named_modules():
        digest.update(f"{name} {_numbers(module)}\n".encode())
    return digest.hexdigest()[:12]


def state_of(model: PreTrainedModel) -> str:
    """A name for the values of all weights."""
    digest = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        for plain in plain_tensors(tensor):
            digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}\n".encode())
            digest.update(plain.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:24]


def _numbers(module: nn.Module) -> list[tuple[str, Any]]:
    """Plain numbers that a module holds (scales, windows, whether it is off, ...), and tables; not PyTorch's own,
    which number hooks through a process, nor empty tables, which a model gets by being used."""
    plain = (bool, int, float)
    found = {name: value for name, value in vars(module).items() if isinstance(value, (*plain, dict))}
    return sorted(
        (name, repr(value))
        for name, value in found.items()
        if name not in _OF_ANY_MODULE
        and (not isinstance(value, dict) or (value and all(isinstance(p, plain) for p in value.values())))
    )


def find(folder: Path) -> bool:
    """Whether a folder is there and whole.

    Raises:
        ValueError: if it is not this user's own.
    """
    try:
        check(folder)
    except FileNotFoundError:
        return False
    except DamagedError as error:
        logger.warning("%s is damaged (%s): it counts as not prepared", folder, error)
        return False
    with suppress(OSError):  # a cache that cannot be written to still serves
        os.utime(folder)
    return True


def check(folder: Path) -> None:
    """Check that a folder is this user's own and that its files are those that were written.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if others than this user could have written to it.
        DamagedError: if a file is.
    """
    for path in (folder, *folder.iterdir()):
        _check_owner(path)
    try:
        listed = json.loads((folder / _LIST).read_text())
        for name in {*FILES, *listed}:
            if _described(folder / name) != listed[name]:
                raise DamagedError(f"{name} is not what was written")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{type(error).__name__}: {error}") from error


def write(folder: Path, fill: Callable[[Path], None]) -> None:
    """Make a folder: whole, or not at all.

    Args:
        folder: its place.
        fill: writes `FILES`, and more, into a folder that it is given.

    Raises:
        ValueError: if there is no room, or no right to write there.
    """
    part = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.part")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _delete_unfinished(folder.parent)
        part.mkdir(mode=0o700)
        fill(part)
        files = sorted(part.iterdir())
        for file in files:
            os.chmod(file, 0o600)
        (part / _LIST).touch(mode=0o600)
        (part / _LIST).write_text(json.dumps({file.name: _described(file) for file in files}, indent=1))
        _move(part, folder)
    except OSError as error:
        raise ValueError(
            f"cannot keep prepared graphs in {folder}: {error}. Give it room, name another folder in ANYORDER_CACHE, "
            "or use engine='eager'"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    _make_room(folder)


def _move(part: Path, folder: Path) -> None:
    """Put a finished folder in its place, instead of what is there: another process's, or a damaged one."""
    for _ in range(3):
        try:
            os.rename(part, folder)
            return
        except OSError:
            if not folder.exists():
                raise
            with suppress(DamagedError, FileNotFoundError):
                check(folder)
                return  # another process was first
            aside = part.with_name(part.name + ".damaged")
            with suppress(FileNotFoundError):
                os.rename(folder, aside)
            shutil.rmtree(aside, ignore_errors=True)
    os.rename(part, folder)


def _described(file: Path) -> list[Any]:
    with open(file, "rb") as opened:
        return [file.stat().st_size, hashlib.file_digest(opened, "sha256").hexdigest()]


def _check_owner(path: Path) -> None:
    """Raise ValueError unless a path belongs to this user or root and nobody else may write to it."""
    found = path.stat()
    if not hasattr(os, "getuid"):
        return
    if found.st_uid not in (os.getuid(), 0) or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ValueError(
            f"prepared graphs in {path} are not loaded: others than you can write there. Delete it, or name a folder "
            "of your own in ANYORDER_CACHE"
        )


def _delete_unfinished(parent: Path) -> None:
    for left in parent.glob(".*.part*"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > _OLD:
                shutil.rmtree(left, ignore_errors=True)


def _make_room(newest: Path) -> None:
    """Delete the folders read longest ago until the rest holds no more than `MOST_BYTES`."""
    found = []
    for folder in newest.parent.glob("[!.]*"):
        with suppress(OSError):  # another process may have deleted it meanwhile
            size = sum(file.stat().st_size for file in folder.iterdir())
            found.append((folder.stat().st_mtime, size, folder))
    total = sum(size for _, size, _ in found)
    for _, size, folder in sorted(found):
        if folder != newest and total > MOST_BYTES:
            logger.info("deleting the prepared graphs in %s to make room", folder)
            shutil.rmtree(folder, ignore_errors=True)
            total -= size
