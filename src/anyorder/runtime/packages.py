"""Compiled code on disk: a function of a model, compiled for the CPU once and loaded by every later process.

AOTInductor compiles what torch.export traces, with the weights frozen into the code as its kernels want them, so that a
package of code is about as large as the model. Packages are kept in `compiled` under the cache directory, a folder for
each state of a model: weights, configuration, modules and their numbers, the processor, the number of threads, and the
versions of whatever wrote the code. Packages that were read longest ago make room for new ones, on disk and in memory.

A package is executable code, so it is loaded only from a folder that belongs to this user and that nobody else writes
to.

This module knows a model's state and a folder; what the functions compute it does not.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import platform
import secrets
import stat
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
import torch._inductor
from torch import Tensor, nn
from torch._inductor.package.package import package_aoti
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from anyorder.hub.cache_dir import cache_directory
from anyorder.model.base import AnyOrderPreTrainedModel
from anyorder.runtime.runner import plain_tensors
from anyorder.runtime.static_shapes import StaticRunner

logger = logging.getLogger(__name__)

MOST_BYTES = 16 << 30
"""Of all packages on disk together."""
MOST_LOADED_BYTES = 8 << 30
"""Of the weights in all loaded functions of a model together: each holds them about twice."""
LEAST_LOADED = 4
"""Loaded functions that are kept however large the model: a step alternates between its forward and its head."""
_WRITERS = ("torch", "transformers", "peft", "torchao")


ON_CPU: dict[str, Any] = {
    "freezing": True,
    "cpp.enable_concat_linear": True,  # linears of the same rows as one
    "max_autotune": True,  # oneDNN's or generated code, by trial: for one row the latter is twice as fast
    "max_autotune_gemm_backends": "CPP,ATEN",
    "max_autotune_report_choices_stats": False,
    "autotune_num_choices_displayed": 0,
}
"""Inductor's settings."""


class PackagedRunner(StaticRunner):
    """Steps as compiled code for the CPU.

    A shape takes one to three minutes the first time (SmolLM2-135M on two cores), a second ever after.
    """

    def __init__(self, model: AnyOrderPreTrainedModel):
        super().__init__(model)
        self._packages: Packages | None = None
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        self.most_built = max(LEAST_LOADED, MOST_LOADED_BYTES // (2 * weights))

    def build(self, name: str, function: Callable[..., Tensor], inputs: tuple[Any, ...]) -> Callable[..., Tensor]:
        if self._packages is None:
            self._packages = Packages(self.model, dict(ON_CPU))
        return self._packages.load(name, function, inputs)


class Packages:
    """The compiled functions of a model as it is now, on disk.

    Args:
        model: on the CPU; a folder of its own is found by all that its functions depend on.
        settings: inductor's.
    """

    def __init__(self, model: PreTrainedModel, settings: dict[str, Any]):
        self.model, self.settings = model, settings
        self.folder = cache_directory() / "compiled" / state_of(model, settings)

    def load(self, name: str, function: Callable[..., Tensor], inputs: tuple[Any, ...]) -> Callable[..., Tensor]:
        """The compiled function, from the disk if a package of that name is there.

        Args:
            name: of the package; distinguishes functions of the model and shapes of their inputs.
            function: of tensors and lists of them, some of which it may write to; it may read the model.
            inputs: contiguous; the compiled function takes inputs of exactly these shapes, dtypes and strides, and
                does not check them.

        Raises:
            ValueError: if the folder cannot be written to, or others than this user could have written to it.
        """
        file = self.folder / f"{name}.pt2"
        if not zipfile.is_zipfile(file):
            if file.exists():
                logger.warning("%s is damaged: it is compiled anew", file)
            self._write(file, function, inputs)
        for path in (self.folder, file):
            _check_owner(path)
        with suppress(OSError):  # a cache that cannot be written to still serves
            os.utime(file)
        return cast(Callable[..., Tensor], torch._inductor.aoti_load_package(str(file)))

    def _write(self, file: Path, function: Callable[..., Tensor], inputs: tuple[Any, ...]) -> None:
        with self._folder_errors():
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir(mode=0o700, exist_ok=True)
        _check_owner(self.folder)
        logger.info("compiling %s once, to %s", file.stem, self.folder)
        # Quantised weights cannot be traced in inference mode, in which decoding runs.
        with torch.inference_mode(False), torch.no_grad(), torch._inductor.config.patch(self.settings):
            inputs = tree_map(torch.zeros_like, inputs)
            exported = torch.export.export(_Whole(self.model, function), inputs, strict=False)
            options = {**self.settings, "aot_inductor.package": True}
            made: Any = torch._inductor.aot_compile(exported.module(check_guards=False), inputs, options=options)
        part = file.with_name(f"{file.stem}.{secrets.token_hex(8)}.part.pt2")  # process ids repeat on other hosts
        try:
            with self._folder_errors():
                package_aoti(str(part), made)
                os.chmod(part, 0o600)
                os.replace(part, file)
        finally:
            part.unlink(missing_ok=True)
            for path in made:  # inductor's own copy
                if isinstance(path, str) and path.endswith(".so"):
                    Path(path).unlink(missing_ok=True)
        _make_room(file)

    @contextmanager
    def _folder_errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError) as error:  # PyTorch's writer raises the latter
            raise ValueError(
                f"cannot keep compiled code in {self.folder}: {error}. Give it room, name another folder in "
                "ANYORDER_CACHE, or do without compile"
            ) from error


class _Whole(nn.Module):
    """A function with the model whose weights it reads, as torch.export wants it."""

    def __init__(self, model: nn.Module, function: Callable[..., Tensor]):
        super().__init__()
        self.model, self.function = model, function

    def forward(self, *inputs: Any) -> Tensor:
        return self.function(*inputs)


def state_of(model: PreTrainedModel, settings: dict[str, Any]) -> str:
    """A name for all that compiled code depends on: equal names, equal code."""
    digest = hashlib.sha256()
    config = {key: value for key, value in model.config.to_dict().items() if key not in ("base", "_name_or_path")}
    facts = [config, settings, _versions(), torch.get_num_threads(), _processor(), str(model)]
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    for package in ("core", "model", "runtime"):
        for source in sorted((Path(__file__).parents[1] / package).glob("*.py")):
            digest.update(source.read_bytes())
    for name, module in model.named_modules():
        digest.update(f"{name} {_numbers(module)}\n".encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        for plain in plain_tensors(tensor):
            digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}\n".encode())
            digest.update(plain.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:24]


def _versions() -> dict[str, str]:
    return {name: version(name) for name in _WRITERS if importlib.util.find_spec(name)}


def _numbers(module: nn.Module) -> list[tuple[str, Any]]:
    """Plain numbers that a module holds (scales, windows, ...), and tables of them."""
    found = {name: value for name, value in vars(module).items() if isinstance(value, (bool, int, float, dict))}
    plain = (bool, int, float)
    return sorted(
        (name, repr(value))
        for name, value in found.items()
        if not isinstance(value, dict) or all(isinstance(part, plain) for part in value.values())
    )


def _processor() -> str:
    """What the code is compiled for: its instructions are those of the very processor."""
    described = Path("/proc/cpuinfo")
    if not described.is_file():
        return f"{platform.machine()} {platform.processor()}"
    lines = described.read_text().split("\n\n")[0].splitlines()
    return "\n".join(line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part")))


def _check_owner(path: Path) -> None:
    """Raise ValueError unless a path belongs to this user and nobody else may write to it."""
    if not hasattr(os, "getuid"):
        return
    found = path.stat()
    if found.st_uid not in (os.getuid(), 0) or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ValueError(
            f"compiled code in {path} is not loaded: others than you can write there. Delete it, or name a folder of "
            "your own in ANYORDER_CACHE"
        )


def _make_room(newest: Path) -> None:
    """Delete the packages read longest ago until the rest holds no more than `MOST_BYTES`."""
    found = []
    for file in newest.parent.parent.glob("*/*.pt2"):
        with suppress(FileNotFoundError):  # another process may have deleted or renamed it meanwhile
            found.append((file.stat().st_mtime, file.stat().st_size, file))
    total = sum(size for _, size, _ in found)
    for _, size, file in sorted(found):
        if file != newest and total > MOST_BYTES:
            logger.info("deleting the compiled code in %s to make room", file)
            file.unlink(missing_ok=True)
            total -= size
            with suppress(OSError):  # other packages of the same model may remain
                file.parent.rmdir()
