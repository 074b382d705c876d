"""A Ray cluster on this machine, for tests: small, closed to others, and gone afterwards."""

from __future__ import annotations

import importlib.util
import os
import secrets
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil
import pytest

if importlib.util.find_spec("ray") is None:
    pytest.skip("pip install 'anyorder[ray]'", allow_module_level=True)
os.environ |= {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),  # else Ray writes one into the user's home
}
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's imports warn of what pydantic deprecates
    import ray
    from ray import serve
__all__ = ["cluster", "kill", "serve", "workers"]


@contextmanager
def cluster(cpus: int = 2) -> Iterator[None]:
    """One node, whose workers are children of this process; the one that there is, if there is one."""
    if ray.is_initialized():
        yield
        return
    ray.init(num_cpus=cpus, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


def workers(title: str, above: int | None = None) -> list[int]:
    """Ids of processes that are at work on something, of the cluster that a process has begun, by default this one."""
    return [child.pid for child in _below(above) if _title(child).startswith(f"ray::{title}")]


def kill(process: int) -> None:
    """A process and the cluster that it has begun, at once."""
    for one in [psutil.Process(process), *_below(process)]:
        with suppress(psutil.NoSuchProcess):
            one.kill()


def _below(process: int | None) -> list[psutil.Process]:
    return psutil.Process(process).children(recursive=True)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""
