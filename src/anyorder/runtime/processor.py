"""What the processor has, and what that means for decoding on it.

Knows no engine: `openvino.processor` says what one is told because of it.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

CLASSES = ("amx", "avx512_vnni", "avx512", "avx2", "other")
"""From the most capable one on; figures are told by class."""


def processor_class() -> str:
    """Of `CLASSES`, what PyTorch finds on this machine."""
    if torch.cpu._is_amx_tile_supported():
        return "amx"
    if torch.cpu._is_vnni_supported() and torch.cpu._is_avx512_supported():
        return "avx512_vnni"
    if torch.cpu._is_avx512_supported():
        return "avx512"
    return "avx2" if torch.cpu._is_avx2_supported() else "other"


def has_amx() -> bool:
    """Whether products of bfloat16 are faster than those of float32: elsewhere they are slower."""
    return processor_class() == "amx"


def threads() -> int:
    """As many as PyTorch takes, but no more than there are physical cores to run on: a second thread on a core waits
    for the first."""
    return max(1, min(torch.get_num_threads(), _physical_cores()))


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Let PyTorch take so many threads for what this thread asks of it; None: as many as it takes. Costs less than a
    microsecond."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count is not None:
            torch.set_num_threads(before)


def describe() -> str:
    """The processor in words: its name, its class, cores and threads."""
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name} ({processor_class()}), {_physical_cores()} cores, {torch.get_num_threads()} threads"


def _physical_cores() -> int:
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = set()
    for number in allowed:
        topology = Path(f"/sys/devices/system/cpu/cpu{number}/topology")
        try:
            core = tuple((topology / name).read_text() for name in ("physical_package_id", "core_id"))
        except OSError:
            core = (str(number),)
        cores.add(core)
    return len(cores)
