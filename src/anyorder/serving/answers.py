"""Requests of the API as answers: whole, or as a stream of server-sent events.

A request's work runs in the engine; what it puts on the way comes here through a queue.

This module knows fields, shapes and the service; routes and errors are the API's business.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from fastapi import Request, Response

from anyorder.infill.infiller import Infill
from anyorder.infill.prompt import Prompt
from anyorder.serving import editor
from anyorder.serving.engine import Engine, Ticket
from anyorder.serving.errors import FieldError
from anyorder.serving.feeds import Growth, Placed, Token, first_stop
from anyorder.serving.fields import ChatFields, CompletionFields, EditorFields, InfillFields, ScoreFields
from anyorder.serving.joining import JoinedRunner
from anyorder.serving.metrics import Metrics
from anyorder.serving.service import Piece, Put, Service
from anyorder.serving.shapes import Chat, Completions, dumps, finite, identifier, usage
from anyorder.serving.streams import END, Queue, results, stream


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
            raise FieldError(
                "best_of", f"best_of: {fields.best_of} texts of which {fields.n} are returned are not served; use n"
            )
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
            raise FieldError("top_logprobs", "top_logprobs needs logprobs: true")
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
            raise FieldError(
                "max_tokens",
                f"max_tokens: the prompt's {len(prompt.ids)} tokens and {new} new ones are more than the "
                f"{self.engine.capacity} that this server takes",
            )

        def work(runner: JoinedRunner, put: Put) -> Growth:
            return self.service.grow(prompt, new, fields, fields.stops, best, number, put)(runner)

        return _Text(prompt, len(prompt.ids), work)

    def _between(self, fields: CompletionFields) -> list[_Text]:
        if not isinstance(fields.prompt, str):
            raise FieldError("prompt", "prompt: with a suffix it is one text")
        if fields.logprobs is not None or fields.echo:
            name = "echo" if fields.echo else "logprobs"
            raise FieldError(name, f"{name}: not with a suffix; /v1/infill tells log-probabilities of blanks")
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
            raise FieldError("prompt", f"prompt: {len(texts)} texts in one request: at most 64")
        read = sum({id(text.prompt): text.read for text in texts}.values())
        echo = isinstance(fields, CompletionFields) and fields.echo
        if fields.stream and echo:
            raise FieldError("echo", "echo: not in a stream")
        queue = Queue()
        puts = [queue.of(index) if fields.stream else queue.ignore for index in range(len(texts))]
        works = [partial(text.work, put=put) for text, put in zip(texts, puts, strict=True)]
        tickets = self._submit(works, request)
        if fields.stream:
            tell = fields.stream_options is not None and fields.stream_options.include_usage
            return await stream(self._parts(queue, tickets, shape, read, tell), tickets, request)
        grown: list[Growth] = await results(tickets, request)
        choices = []
        for index, (text, growth) in enumerate(zip(texts, grown, strict=True)):
            before, tokens = "", []
            if echo and text.prompt is not None:
                before = text.prompt.text
                if shape.logprobs is not None:
                    work = self.service.prompt_tokens(text.prompt)
                    (tokens,) = await results(self._submit([work], request), request)
            choices.append(shape.choice(index, growth, before, tokens))
        new = sum(len(growth.tokens) for growth in grown)
        self._count(read, new)
        return _json(shape.whole(choices, usage(read, new)))

    async def _parts(
        self, queue: Queue, tickets: Sequence[Ticket[Growth]], shape: Completions, read: int, tell: bool
    ) -> AsyncIterator[dict[str, Any]]:
        begun, offsets, new = time.monotonic(), [0] * len(tickets), 0
        for index, ticket in enumerate(tickets):
            queue.finish(index, ticket)
        begins = [begin for index in range(len(tickets)) if (begin := shape.begin(index)) is not None]
        left = len(tickets)
        while left:
            index, what = await queue.get()
            growth = tickets[index].future.result() if what is END else None
            for begin in begins:  # now that nothing has gone wrong yet
                yield shape.chunk([begin])
            begins = []
            if growth is not None:
                left -= 1
                new += len(growth.tokens)
                yield shape.chunk([shape.end(index, growth)])
            elif isinstance(what, Piece):
                if not any(offsets):
                    self.metrics.first.observe(time.monotonic() - begun)
                yield shape.chunk([shape.piece(index, what.text, what.tokens, offsets[index])])
                offsets[index] += len(what.text)
        if tell:
            yield shape.chunk([], usage(read, new))
        self._count(read, new)

    # ------------------------------------------------------------------ blanks and likelihoods

    async def infill(self, fields: InfillFields, request: Request) -> Response:
        """`/v1/infill`."""
        queue = Queue()
        work = self.service.infill(fields, queue.of(0) if fields.stream else queue.ignore)
        name, tickets = identifier("infill"), self._submit([work], request)
        if fields.stream:
            return await stream(self._blanks(queue, tickets[0], name), tickets, request)
        ((filled, trace),) = await results(tickets, request)
        return _json(self._filled(name, filled, trace))

    async def _blanks(
        self, queue: Queue, ticket: Ticket[tuple[Infill, list[Placed]]], name: str
    ) -> AsyncIterator[dict[str, Any]]:
        queue.finish(0, ticket)
        while (what := (await queue.get())[1]) is not END:
            for one in what:
                yield asdict(one) | {"final": False}
        yield self._filled(name, *ticket.future.result()) | {"final": True}

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
        (found,) = await results(self._submit([self.service.score(fields)], request), request)
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
        queue = Queue()
        put = queue.of(0) if fields.stream else queue.ignore
        tickets = self._submit([editor.work_of(self.service, fields, self.engine.capacity, put)], request)

        async def parts() -> AsyncIterator[dict[str, Any]]:
            queue.finish(0, tickets[0])
            while (what := (await queue.get())[1]) is not END:
                yield editor.part_of(what)
            yield editor.wanted(tickets[0].future.result() | {"content": ""}, fields.response_fields)

        if fields.stream:
            return await stream(parts(), tickets, request, done=False)
        (answer,) = await results(tickets, request)
        self._count(answer["tokens_evaluated"], answer["tokens_predicted"])
        return _json(editor.wanted(answer, fields.response_fields))

    # ------------------------------------------------------------------ requests

    def _submit(self, works: Sequence[Callable[[JoinedRunner], Any]], request: Request) -> list[Ticket[Any]]:
        """All of them or none."""
        key = request.headers.get("authorization") or (request.client.host if request.client else "")
        tickets: list[Ticket[Any]] = []
        try:
            for work in works:
                tickets.append(self.engine.submit(work, key, self.seconds))
        except BaseException:
            for ticket in tickets:
                ticket.cancel()
            raise
        return tickets

    def _count(self, read: int, new: int) -> None:
        self.metrics.tokens.labels("read").inc(read)
        self.metrics.tokens.labels("written").inc(new)

    def _name_of(self, token: int) -> str:
        return self.service.pieces_of([token])[0]


def _prompts(prompt: str | list[Any]) -> list[Any]:
    """The texts of OpenAI's `prompt`: a text, several, the tokens of one, or of several."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise FieldError("prompt", "prompt is an empty list")
    if all(isinstance(one, (str, list)) for one in prompt):
        return [*prompt]
    return [[*prompt]]


def _json(what: dict[str, Any]) -> Response:
    return Response(dumps(what), media_type="application/json")
