"""From works that run in threads to answers: results that are waited for, parts that are streamed, clients that go.

A client that goes takes its request along: what was submitted for it is cancelled.

This module knows tickets and server-sent events; what is in them is `answers`' business.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from anyorder.serving.engine import Ticket, UnwantedError
from anyorder.serving.errors import told
from anyorder.serving.shapes import dumps

ASK_AGAIN = 0.25
"""Seconds after which it is looked whether a client is still there."""
END = object()
"""What a queue gives when a work has ended."""


class Queue:
    """What works put, from their threads to the event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
        self.get = self._queue.get

    def of(self, index: int) -> Callable[[Any], None]:
        """Puts what belongs to one of the works."""
        return lambda what: self._put(index, what)

    def ignore(self, what: Any) -> None:
        """Nobody listens."""

    def finish(self, index: int, ticket: Ticket[Any]) -> None:
        """Tell when a work has ended."""
        ticket.future.add_done_callback(lambda _: self._put(index, END))

    def _put(self, index: int, what: Any) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, what))


async def results(tickets: Sequence[Ticket[Any]], request: Request) -> list[Any]:
    """The results of some works; if the client goes, or one of them fails, the others are cancelled.

    Raises:
        UnwantedError: if the client has gone.
    """
    waiting = {asyncio.wrap_future(ticket.future) for ticket in tickets}
    try:
        while waiting:
            done, waiting = await asyncio.wait(waiting, timeout=ASK_AGAIN, return_when=asyncio.FIRST_EXCEPTION)
            for one in done:
                one.result()
            if waiting and await request.is_disconnected():
                raise UnwantedError("the client has gone")
    finally:
        for ticket in tickets:
            ticket.cancel()
        for one in waiting:
            one.add_done_callback(lambda future: future.exception())  # nobody asks for it any more
    return [ticket.future.result() for ticket in tickets]


async def stream(
    parts: AsyncIterator[dict[str, Any]], tickets: Sequence[Ticket[Any]], request: Request, done: bool = True
) -> Response:
    """Parts as server-sent events.

    The answer begins when there is a first part, so that what goes wrong before it has a status of its own.

    Args:
        parts: of the answer.
        tickets: of the works that bring them.
        request: whose answer it is.
        done: whether `[DONE]` ends it.
    """
    waiting = asyncio.ensure_future(anext(parts))
    try:
        while not waiting.done():
            await asyncio.wait([waiting], timeout=ASK_AGAIN)
            if not waiting.done() and await request.is_disconnected():
                raise UnwantedError("the client has gone")
        first = waiting.result()
    except BaseException:
        waiting.cancel()
        for ticket in tickets:
            ticket.cancel()
        raise

    async def lines() -> AsyncIterator[str]:
        yield f"data: {dumps(first)}\n\n"
        try:
            async for part in parts:
                yield f"data: {dumps(part)}\n\n"
        except Exception as raised:  # the status has been sent
            yield f"data: {dumps(told(raised, request.url.path)[1])}\n\n"
        if done:
            yield "data: [DONE]\n\n"

    return _Stream(lines(), tickets)


class _Stream(StreamingResponse):
    """Cancels what it waits for, however it ends."""

    def __init__(self, lines: AsyncIterator[str], tickets: Sequence[Ticket[Any]]):
        super().__init__(lines, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._tickets = tickets

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for ticket in self._tickets:
                ticket.cancel()
