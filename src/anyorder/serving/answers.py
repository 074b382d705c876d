"""Requests of the API as answers: whole, or as a stream of server-sent events.

A request's work runs in the engine; what it puts on the way comes here through a queue. A client that goes takes its
request along: it is cancelled.

This module knows fields, shapes and the service; routes and errors are the API's business.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from anyorder.infill.infiller import Infill
from anyorder.infill.prompt import Prompt
from anyorder.serving import editor
from anyorder.serving.engine import Engine, Ticket
from anyorder.serving.feeds import Growth, Placed, Token, first_stop
from anyorder.serving.fields import ChatFields, CompletionFields, EditorFields, InfillFields, ScoreFields
from anyorder.serving.joining import JoinedRunner
from anyorder.serving.metrics import Metrics
from anyorder.serving.service import Piece, Put, Service
from anyorder.serving.shapes import Chat, Completions, dumps, error_body, finite, identifier, usage

ASK_AGAIN = 0.25
"""Seconds after which it is looked whether a client is still there."""
_END = object()


@dataclass(frozen=True)
class _Text:
    """One of the texts that a request asks for."""

    prompt: Prompt | None
    """None: it stands between two texts."""
    read: int
    """Tokens."""
    work: Callable[..., Growth]
    """Of a runner; `put` gets pieces."""


class Answers:
    """Answers requests.

    Args:
        service: what the model can be asked.
        engine: does it.
        metrics: are told.
        seconds: that a request may take.
    """

    def __init__(self, service: Service, engine: Engine, metrics: Metrics, seconds: float):
        self.service, self.engine, self.metrics, self.seconds = service, engine, metrics, seconds
        self.since = int(time.time())

    # ------------------------------------------------------------------ texts that grow

    async def completions(self, fields: CompletionFields, request: Request) -> Response:
        """`/v1/completions`."""
        if fields.best_of not in (None, fields.n):
            raise ValueError(f"best_of: {fields.best_of} texts of which {fields.n} are returned are not served; use n")
        shape = Completions(self.service.name, fields.logprobs, self._name_of)
        if fields.suffix:
            return await self._answer(self._between(fields), fields, shape, request)
        prompts = [self.service.prompt(one) for one in _prompts(fields.prompt)]
        texts = [
            self._growing(prompt, fields.max_tokens, fields, fields.logprobs or 0, number)
            for prompt in prompts
            for number in range(fields.n)
        ]
        return await self._answer(texts, fields, shape, request)

    async def chat(self, fields: ChatFields, request: Request) -> Response:
        """`/v1/chat/completions`."""
        if fields.top_logprobs and not fields.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        prompt = self.service.chat(fields.messages)
        room = self.engine.capacity - len(prompt.ids)
        new = fields.max_completion_tokens or fields.max_tokens or max(min(room, 512), 1)
        texts = [self._growing(prompt, new, fields, fields.top_logprobs, number) for number in range(fields.n)]
        shape = Chat(self.service.name, fields.top_logprobs if fields.logprobs else None, self._name_of)
        return await self._answer(texts, fields, shape, request)

    def _growing(
        self, prompt: Prompt, new: int, fields: CompletionFields | ChatFields, best: int, number: int
    ) -> _Text:
        if len(prompt.ids) + new > self.engine.capacity:
            raise ValueError(
                f"max_tokens: the prompt's {len(prompt.ids)} tokens and {new} new ones are more than the "
                f"{self.engine.capacity} that this server takes"
            )

        def work(runner: JoinedRunner, put: Put) -> Growth:
            return self.service.grow(prompt, new, fields, fields.stops, best, number, put)(runner)

        return _Text(prompt, len(prompt.ids), work)

    def _between(self, fields: CompletionFields) -> list[_Text]:
        if not isinstance(fields.prompt, str):
            raise ValueError("prompt: with a suffix it is one text")
        if fields.logprobs is not None or fields.echo:
            raise ValueError("logprobs, echo: not with a suffix; /v1/infill tells log-probabilities of blanks")
        before, behind = fields.prompt, fields.suffix or ""
        read = len(self.service.pieces.encode(before)) + len(self.service.pieces.encode(behind))

        def fill(number: int) -> Callable[..., Growth]:
            asked = fields if fields.seed is None else fields.model_copy(update={"seed": fields.seed + number})

            def work(runner: JoinedRunner, put: Put) -> Growth:
                ask = self.service.between(before, behind, max(fields.max_tokens, 1), asked, lambda _: None)
                filled, trace = ask(runner)
                text = filled.spans[0].text
                cut, stop = first_stop(text, fields.stops)
                put(Piece(text[:cut], []))
                tokens = {one.position: Token(one.token, one.text, one.logprob) for one in trace}
                return Growth(text[:cut], [tokens[position] for position in sorted(tokens)], "stop", stop)

            return work

        return [_Text(None, read, fill(number)) for number in range(fields.n)]

    async def _answer(
        self, texts: Sequence[_Text], fields: CompletionFields | ChatFields, shape: Completions, request: Request
    ) -> Response:
        if len(texts) > 64:
            raise ValueError(f"prompt: {len(texts)} texts in one request: at most 64")
        read = sum({id(text.prompt): text.read for text in texts}.values())
        echo = isinstance(fields, CompletionFields) and fields.echo
        if fields.stream:
            if echo:
                raise ValueError("echo: not in a stream")
            tell = fields.stream_options is not None and fields.stream_options.include_usage
            return self._stream(self._parts(texts, shape, read, tell, request))
        queue = _Queue()
        tickets = [self._submit(partial(text.work, put=queue.ignore), request) for text in texts]
        grown: list[Growth] = await self._all(tickets, request)
        choices = []
        for index, (text, growth) in enumerate(zip(texts, grown, strict=True)):
            before, tokens = "", []
            if echo and text.prompt is not None:
                before = text.prompt.text
                if shape.logprobs is not None:
                    work = self.service.prompt_tokens(text.prompt)
                    (tokens,) = await self._all([self._submit(work, request)], request)
            choices.append(shape.choice(index, growth, before, tokens))
        new = sum(len(growth.tokens) for growth in grown)
        self._count(read, new)
        return _json(shape.whole(choices, usage(read, new)))

    async def _parts(
        self, texts: Sequence[_Text], shape: Completions, read: int, tell: bool, request: Request
    ) -> AsyncIterator[dict[str, Any]]:
        queue, begun, offsets, new = _Queue(), time.monotonic(), [0] * len(texts), 0
        tickets: list[Ticket[Growth]] = []
        for index, text in enumerate(texts):
            tickets.append(self._submit(partial(text.work, put=queue.of(index)), request))
            queue.finish(index, tickets[-1])
        try:
            for index in range(len(texts)):
                if (begin := shape.begin(index)) is not None:
                    yield shape.chunk([begin])
            left = len(texts)
            while left:
                index, what = await queue.get()
                if isinstance(what, Piece):
                    if not any(offsets):
                        self.metrics.first.observe(time.monotonic() - begun)
                    yield shape.chunk([shape.piece(index, what.text, what.tokens, offsets[index])])
                    offsets[index] += len(what.text)
                elif what is _END:
                    left -= 1
                    growth = tickets[index].future.result()
                    new += len(growth.tokens)
                    yield shape.chunk([shape.end(index, growth)])
            if tell:
                yield shape.chunk([], usage(read, new))
            self._count(read, new)
        finally:
            for ticket in tickets:
                ticket.cancel()

    # ------------------------------------------------------------------ blanks and likelihoods

    async def infill(self, fields: InfillFields, request: Request) -> Response:
        """`/v1/infill`."""
        queue = _Queue()
        work = self.service.infill(fields, queue.of(0) if fields.stream else queue.ignore)
        name = identifier("infill")
        if fields.stream:
            return self._stream(self._blanks(queue, self._submit(work, request), name))
        ((filled, trace),) = await self._all([self._submit(work, request)], request)
        return _json(self._filled(name, filled, trace))

    async def _blanks(
        self, queue: _Queue, ticket: Ticket[tuple[Infill, list[Placed]]], name: str
    ) -> AsyncIterator[dict[str, Any]]:
        queue.finish(0, ticket)
        try:
            while (what := (await queue.get())[1]) is not _END:
                for one in what:
                    yield asdict(one) | {"final": False}
            yield self._filled(name, *ticket.future.result()) | {"final": True}
        finally:
            ticket.cancel()

    def _filled(self, name: str, filled: Infill, trace: Sequence[Placed]) -> dict[str, Any]:
        self._count(0, sum(span.tokens for span in filled.spans))
        spans = [
            asdict(span) | {"lengths": None if span.lengths is None else {str(n): p for n, p in span.lengths.items()}}
            for span in filled.spans
        ]
        return {
            "id": name, "object": "infill", "created": int(time.time()), "model": self.service.name,
            "text": filled.text, "spans": spans, "log_prob": finite(filled.log_prob), "forwards": filled.forwards,
            "trace": [asdict(one) for one in trace],
        }  # fmt: skip

    async def score(self, fields: ScoreFields, request: Request) -> Response:
        """`/v1/score`."""
        (found,) = await self._all([self._submit(self.service.score(fields), request)], request)
        own = [one.log_prob for one in found if one.log_prob is not None]
        self._count(len(found), 0)
        answer = {
            "id": identifier("score"), "object": "score", "created": int(time.time()), "model": self.service.name,
            "log_prob": finite(sum(own)), "tokens": len(own), "nats_per_token": finite(-sum(own) / len(own)),
            "order": fields.order, "group_size": fields.group_size, "details": [asdict(one) for one in found],
        }  # fmt: skip
        return _json(answer)

    async def editor(self, fields: EditorFields, request: Request) -> Response:
        """`/infill`."""
        queue = _Queue()
        work = editor.work_of(
            self.service, fields, self.engine.capacity, queue.of(0) if fields.stream else queue.ignore
        )
        ticket = self._submit(work, request)
        if not fields.stream:
            (answer,) = await self._all([ticket], request)
            self._count(answer["tokens_evaluated"], answer["tokens_predicted"])
            return _json(answer)

        async def parts() -> AsyncIterator[dict[str, Any]]:
            queue.finish(0, ticket)
            try:
                while (what := (await queue.get())[1]) is not _END:
                    yield {"content": what.text, "stop": False}
                yield ticket.future.result() | {"content": ""}
            finally:
                ticket.cancel()

        return self._stream(parts(), done=False)

    # ------------------------------------------------------------------ requests

    def _submit(self, work: Callable[[JoinedRunner], Any], request: Request) -> Ticket[Any]:
        key = request.headers.get("authorization") or (request.client.host if request.client else "")
        return self.engine.submit(work, key, self.seconds)

    async def _all(self, tickets: Sequence[Ticket[Any]], request: Request) -> list[Any]:
        """The results of some requests; if the client goes, or one of them fails, the others are cancelled."""
        waiting = {asyncio.wrap_future(ticket.future) for ticket in tickets}
        try:
            while waiting:
                done, waiting = await asyncio.wait(waiting, timeout=ASK_AGAIN, return_when=asyncio.FIRST_EXCEPTION)
                for one in done:
                    one.result()
                if waiting and await request.is_disconnected():
                    break
        finally:
            for ticket in tickets:
                ticket.cancel()
            for one in waiting:
                one.add_done_callback(lambda future: future.exception())  # nobody asks for it any more
        return [] if waiting else [ticket.future.result() for ticket in tickets]

    def _stream(self, parts: AsyncIterator[dict[str, Any]], done: bool = True) -> Response:
        async def lines() -> AsyncIterator[str]:
            try:
                async for part in parts:
                    yield f"data: {dumps(part)}\n\n"
            except Exception as raised:  # the status has been sent
                yield f"data: {dumps(error_body(500, str(raised)))}\n\n"
            if done:
                yield "data: [DONE]\n\n"

        return StreamingResponse(lines(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    def _count(self, read: int, new: int) -> None:
        self.metrics.tokens.labels("read").inc(read)
        self.metrics.tokens.labels("written").inc(new)

    def _name_of(self, token: int) -> str:
        return self.service.pieces_of([token])[0]


class _Queue:
    """What works put, from their threads to the event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
        self.get = self._queue.get

    def of(self, index: int) -> Callable[[Any], None]:
        """Puts what belongs to one of the texts."""
        return lambda what: self._put(index, what)

    def ignore(self, what: Any) -> None:
        """Nobody listens."""

    def finish(self, index: int, ticket: Ticket[Any]) -> None:
        """Tell when a work has ended."""
        ticket.future.add_done_callback(lambda _: self._put(index, _END))

    def _put(self, index: int, what: Any) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, what))


def _prompts(prompt: str | list[Any]) -> list[Any]:
    """The texts of OpenAI's `prompt`: a text, several, the tokens of one, or of several."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise ValueError("prompt is an empty list")
    if all(isinstance(one, (str, list)) for one in prompt):
        return [*prompt]
    return [[*prompt]]


def _json(what: dict[str, Any]) -> Response:
    return Response(dumps(what), media_type="application/json")
