"""The server: routes, errors, limits and keys.

| path | what |
|---|---|
| `POST /v1/completions`, `/v1/chat/completions`, `GET /v1/models` | OpenAI's |
| `POST /v1/infill`, `/v1/score` | blanks, and likelihoods of any part of a text given any other |
| `POST /infill` | llama.cpp's, for editors |
| `GET /health`, `/metrics`, `/` | whether it serves, Prometheus' numbers, the page |

Errors have OpenAI's shape and name the field. This module knows HTTP; what is answered `answers` says.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, PlainTextResponse
from starlette.exceptions import HTTPException

from anyorder.serving import contract
from anyorder.serving.answers import Answers
from anyorder.serving.engine import Engine, TooBusyError, UnwantedError
from anyorder.serving.errors import told
from anyorder.serving.fields import ChatFields, CompletionFields, EditorFields, InfillFields, ScoreFields
from anyorder.serving.gate import Gate
from anyorder.serving.metrics import Metrics
from anyorder.serving.page import PAGE
from anyorder.serving.service import Service
from anyorder.serving.shapes import dumps, error_body

LARGEST = 1 << 20
"""Bytes of a request's body at most."""


def create_app(
    service: Service,
    engine: Engine,
    keys: Sequence[str] = (),
    seconds: float = 300,
    largest: int = LARGEST,
    body_seconds: float = 30,
) -> FastAPI:
    """The application.

    Args:
        service: what the model can be asked.
        engine: does it.
        keys: one of them must come as `Authorization: Bearer KEY`; none: anyone may ask.
        seconds: that a request may take.
        largest: bytes of a body at most.
        body_seconds: that a body may take to come.
    """
    metrics = Metrics(engine)
    answers = Answers(service, engine, metrics, seconds)
    app = FastAPI(title="anyorder", docs_url=None, redoc_url=None)
    _errors(app)
    _routes(app, answers, metrics)
    paths = {getattr(route, "path", "") for route in app.routes}
    app.add_middleware(
        Gate, keys=tuple(keys), largest=largest, metrics=metrics, paths=paths, refuse=error, patience=body_seconds
    )
    return app


def _routes(app: FastAPI, answers: Answers, metrics: Metrics) -> None:
    engine, service = answers.engine, answers.service

    @app.post("/v1/completions", responses=contract.responses(contract.CompletionAnswer, streamed=True))
    async def completions(fields: CompletionFields, request: Request) -> Response:
        """Continue texts, or fill what is between two."""
        return await answers.completions(fields, request)

    @app.post("/v1/chat/completions", responses=contract.responses(contract.ChatAnswer, streamed=True))
    async def chat(fields: ChatFields, request: Request) -> Response:
        """Answer a conversation."""
        return await answers.chat(fields, request)

    @app.post("/v1/infill", responses=contract.responses(contract.InfillAnswer, streamed=True))
    async def infill(fields: InfillFields, request: Request) -> Response:
        """Fill the blanks of a text."""
        return await answers.infill(fields, request)

    @app.post("/v1/score", responses=contract.responses(contract.ScoreAnswer))
    async def score(fields: ScoreFields, request: Request) -> Response:
        """The likelihood of some of a text's tokens given others."""
        return await answers.score(fields, request)

    @app.post("/infill", responses=contract.responses(contract.EditorAnswer, streamed=True))
    async def editor(fields: EditorFields, request: Request) -> Response:
        """Fill at a cursor, as llama.cpp's server does."""
        return await answers.editor(fields, request)

    @app.get("/v1/models", responses=contract.responses(contract.ModelsAnswer, asked=False))
    async def models() -> Response:
        """The model."""
        one = {"id": service.name, "object": "model", "created": answers.since, "owned_by": "anyorder"}
        return Response(dumps({"object": "list", "data": [one]}), media_type="application/json")

    @app.get("/health", responses=contract.responses(contract.HealthAnswer, asked=False))
    async def health() -> Response:
        """Whether it serves."""
        if engine.draining:
            return error(503, "the server is shutting down")
        state = {"status": "ok", "queued": engine.queued, "at_work": engine.at_work}
        return Response(dumps(state), media_type="application/json")

    @app.get("/metrics", response_class=PlainTextResponse, responses=contract.responses(None, asked=False))
    async def numbers() -> Response:
        """Prometheus' numbers."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/", response_class=HTMLResponse)
    async def page() -> Response:
        """The page."""
        return Response(PAGE.read_bytes(), media_type="text/html; charset=utf-8", headers=_PAGE_HEADERS)


_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


def error(status: int, message: str, param: str | None = None, code: str | None = None) -> Response:
    """An error in OpenAI's shape."""
    return Response(dumps(error_body(status, message, param, code)), status, media_type="application/json")


def _errors(app: FastAPI) -> None:
    async def answer(request: Request, raised: Exception) -> Response:
        status, body = told(raised, request.url.path)
        return Response(dumps(body), status, media_type="application/json")

    for kind in (RequestValidationError, HTTPException, ValueError, TooBusyError, UnwantedError, Exception):
        app.exception_handler(kind)(answer)
