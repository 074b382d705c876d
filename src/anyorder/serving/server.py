"""The server as a process: from a model to a port, and down again without losing a request."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from anyorder.serving.engine import Engine

logger = logging.getLogger(__name__)

KEYS = "ANYORDER_API_KEYS"
"""The environment variable that holds keys, separated by commas."""


def read_keys(file: Path | None) -> list[str]:
    """Keys of a file, one a line, and of the environment.

    Raises:
        ValueError: if the file cannot be read or holds none.
    """
    keys = [key.strip() for key in os.environ.get(KEYS, "").split(",")]
    if file is not None:
        try:
            own = [line.strip() for line in file.read_text().splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--api-keys {file}: {error}") from error
        if not own:
            raise ValueError(f"--api-keys {file} holds no key: one a line")
        keys += own
    return [key for key in keys if key]


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound.

    Raises:
        ValueError: if it cannot be.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, address = found[0]
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise ValueError(f"--host {host} --port {port} cannot be listened on: {error.strerror}") from error
    return bound


def serve(app: FastAPI, engine: Engine, bound: socket.socket, patience: float) -> None:
    """Serve until SIGTERM or SIGINT; then take no more requests, and let those that were taken end.

    Args:
        app: of `api.create_app`.
        engine: of the same.
        bound: of `listen`.
        patience: seconds that requests may still take when the server is told to stop.
    """
    server = _Server(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=None))
    server.engine, server.patience = engine, patience
    server.run(sockets=[bound])
    engine.drain(0)


class _Server(uvicorn.Server):
    """Told to stop, it lets the engine drain first: uvicorn waits for answers that are still being written."""

    engine: Engine
    patience: float

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: object) -> None:
        if not self.should_exit:
            logger.info("stopping: requests that were taken have %g s", self.patience)
            threading.Thread(target=self.engine.drain, args=(self.patience,), daemon=True).start()
        self.should_exit = True


def running(app: FastAPI, bound: socket.socket) -> tuple[uvicorn.Server, threading.Thread]:
    """A server in a thread of its own, started; for tests and notebooks. Set `should_exit` and join to stop it."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        threading.Event().wait(0.02)
    return server, thread


def addresses(bound: Sequence[socket.socket]) -> list[str]:
    """Where the sockets listen, as a browser takes it."""
    return [f"http://{host}:{port}" for host, port in (one.getsockname()[:2] for one in bound)]
