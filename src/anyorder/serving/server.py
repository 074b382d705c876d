"""The server as a process: from a model to a port, and down again without losing a request."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Sequence
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
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
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
    server, thread = running(app, bound)

    def stop(number: int, frame: object) -> None:
        if not engine.draining:
            logger.info("stopping: requests that were taken have %g s", patience)
            threading.Thread(target=engine.drain, args=(patience,), daemon=True).start()
        server.should_exit = True  # it waits for answers that are still being written

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        engine.run()  # here, and the protocol in the other thread: see `joining.Joiner.run`
    finally:
        server.should_exit = True
        thread.join()
        for number, handler in before.items():
            signal.signal(number, handler)


def running(app: FastAPI, bound: socket.socket) -> tuple[uvicorn.Server, threading.Thread]:
    """A server in a thread of its own, started; its engine has to run, too. Set `should_exit` and join to stop it."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        threading.Event().wait(0.02)
    return server, thread


def addresses(bound: Sequence[socket.socket]) -> list[str]:
    """Where the sockets listen, as a browser takes it."""
    return [f"http://{host}:{port}" for host, port in (one.getsockname()[:2] for one in bound)]
