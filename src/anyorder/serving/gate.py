"""What stands in front of every route: keys, the size of bodies, numbers and a line of log.

Keys are compared in constant time and never logged; a body that is too large is refused before it is read, and one that
does not come is not waited for.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import Callable, Sequence

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from anyorder.serving.metrics import Metrics

logger = logging.getLogger(__name__)

OPEN = ("/health", "/")
"""Paths that need no key."""


class _RefusedError(Exception):
    pass


class Gate:
    """Lets requests through, or refuses them.

    Args:
        app: what is behind it.
        keys: one of them must come as `Authorization: Bearer KEY`; none: anyone may pass.
        largest: bytes of a body at most.
        metrics: are told.
        paths: that there are; others are counted as one.
        refuse: makes an error of a status and a message.
        patience: seconds that a body may take to come.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Sequence[str],
        largest: int,
        metrics: Metrics,
        paths: set[str],
        refuse: Callable[[int, str], Response],
        patience: float,
    ):
        self.app, self.keys, self.largest = app, [key.encode() for key in keys], largest
        self.metrics, self.paths, self.refuse, self.patience = metrics, paths, refuse, patience

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Of ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, status = time.monotonic(), 0
        seen, whole = 0, False  # of the body: bytes, and whether they are all of it
        refused: tuple[int, str] | None = None

        async def limited() -> Message:
            nonlocal seen, whole, refused
            if whole:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), begun + self.patience - time.monotonic())
            except TimeoutError:
                refused = 408, f"the body has not come within {self.patience:g} seconds"
                raise _RefusedError from None
            seen, whole = seen + len(message.get("body", b"")), not message.get("more_body", False)
            if seen > self.largest:
                refused = 413, f"the body is larger than {self.largest} bytes"
                raise _RefusedError
            return message

        async def noting(message: Message) -> None:
            nonlocal status
            if refused is None:  # else what the application says of a body that it could not read is not sent
                status = message.get("status", status)
                await send(message)

        answer: ASGIApp = self.app
        headers = {name: value for name, value in scope["headers"]}
        length = headers.get(b"content-length", b"")
        try:
            if self.keys and scope["path"] not in OPEN and not self._has_key(headers):
                answer = self.refuse(401, "a key is needed: Authorization: Bearer KEY")
            elif length.isdigit() and int(length) > self.largest:
                answer = self.refuse(413, f"the body is larger than {self.largest} bytes")
            elif scope["method"] == "POST" and not headers.get(b"content-type", b"").startswith(b"application/json"):
                # A page elsewhere can have a browser post text to this machine unasked, but no JSON.
                answer = self.refuse(415, "Content-Type must be application/json")
            await answer(scope, limited, noting)
        except _RefusedError:
            pass
        finally:
            if refused is not None and not status:
                status = refused[0]
                await self.refuse(*refused)(scope, receive, send)
            self._note(scope, status, time.monotonic() - begun)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        path = scope["path"] if scope["path"] in self.paths else "other"
        self.metrics.requests.labels(path, str(status)).inc()
        self.metrics.whole.labels(path).observe(seconds)
        logger.info("%s", json.dumps({"path": path, "status": status, "ms": round(1000 * seconds)}))

    def _has_key(self, headers: dict[bytes, bytes]) -> bool:
        given = headers.get(b"authorization", b"").removeprefix(b"Bearer ")
        return any([hmac.compare_digest(given, key) for key in self.keys])  # all of them: time tells nothing
