"""Runs a program that a model has written: in a process of its own, with limits, and without a network.

It is still somebody else's program: this keeps accidents from spreading, not an attacker. Knows Linux; no task.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import sys
import tempfile

SECONDS = 5
MEMORY = 1 << 30
"""Bytes of address space."""
_NEW_USER, _NEW_NETWORK = 0x10000000, 0x40000000  # flags of unshare(2)


def passes(program: str, seconds: float = SECONDS) -> bool:
    """Whether a Python program ends by itself, without an error.

    Args:
        program: its source.
        seconds: after which it has failed.

    Raises:
        ValueError: where a process cannot be cut off from the network.
    """
    with tempfile.TemporaryDirectory() as directory:
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", program],
                cwd=directory,
                env={"PATH": "", "HOME": directory},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                preexec_fn=_shut_in,  # the child is single-threaded up to exec, and only calls the system
                start_new_session=True,
            )
        except subprocess.SubprocessError as error:
            raise ValueError(
                "this system does not let a process be cut off from the network (unshare), so programs of models are "
                "not run here: leave out --execute-code"
            ) from error
        try:
            return process.wait(seconds) == 0
        except subprocess.TimeoutExpired:
            return False
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with whatever it has begun
            process.wait()


def _shut_in() -> None:
    """In the child: no network, little memory, no large files; no further processes, unless it is root's."""
    if ctypes.CDLL(None, use_errno=True).unshare(_NEW_USER | _NEW_NETWORK) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    for limit, value in (
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_CPU, SECONDS + 1),
        (resource.RLIMIT_FSIZE, 1 << 20),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(limit, (value, value))
    os.umask(0o077)
