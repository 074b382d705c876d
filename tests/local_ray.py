"""A Ray cluster on this machine, for tests: small, closed to others, and gone afterwards."""

from __future__ import annotations

import importlib.util
import os
import secrets
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

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
__all__ = ["cluster", "serve", "workers"]


@contextmanager
def cluster(cpus: int = 2) -> Iterator[None]:
    """One node, whose workers are children of this process."""
    ray.init(num_cpus=cpus, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


def workers(title: str) -> list[int]:
    """Ids of the cluster's processes that are at work on something."""
    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            if child.cmdline()[:1] and child.cmdline()[0].startswith(f"ray::{title}"):
                found.append(child.pid)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found
