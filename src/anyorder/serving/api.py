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

import logging
from collections.abc import Sequence

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from anyorder.serving.answers import Answers
from anyorder.serving.engine import Engine, TimeIsOverError, TooBusyError, UnwantedError
from anyorder.serving.fields import ChatFields, CompletionFields, EditorFields, InfillFields, ScoreFields
from anyorder.serving.gate import Gate
from anyorder.serving.metrics import Metrics
from anyorder.serving.page import PAGE
from anyorder.serving.service import Service
from anyorder.serving.shapes import dumps, error_body

logger = logging.getLogger(__name__)

LARGEST = 1 << 20
"""Bytes of a request's body at most."""


def create_app(
    service: Service, engine: Engine, keys: Sequence[str] = (), seconds: float = 300, largest: int = LARGEST
) -> FastAPI:
    """The application.

    Args:
        service: what the model can be asked.
        engine: does it.
        keys: one of them must come as `Authorization: Bearer KEY`; none: anyone may ask.
        seconds: that a request may take.
        largest: bytes of a body at most.
    """
    metrics = Metrics(engine)
    answers = Answers(service, engine, metrics, seconds)
    app = FastAPI(title="anyorder", docs_url=None, redoc_url=None)
    _errors(app)
    _routes(app, answers, metrics)
    paths = {getattr(route, "path", "") for route in app.routes}
    app.add_middleware(Gate, keys=tuple(keys), largest=largest, metrics=metrics, paths=paths, refuse=error)
    return app


def _routes(app: FastAPI, answers: Answers, metrics: Metrics) -> None:
    engine, service = answers.engine, answers.service

    @app.post("/v1/completions")
    async def completions(fields: CompletionFields, request: Request) -> Response:
        return await answers.completions(fields, request)

    @app.post("/v1/chat/completions")
    async def chat(fields: ChatFields, request: Request) -> Response:
        return await answers.chat(fields, request)

    @app.post("/v1/infill")
    async def infill(fields: InfillFields, request: Request) -> Response:
        return await answers.infill(fields, request)

    @app.post("/v1/score")
    async def score(fields: ScoreFields, request: Request) -> Response:
        return await answers.score(fields, request)

    @app.post("/infill")
    async def editor(fields: EditorFields, request: Request) -> Response:
        return await answers.editor(fields, request)

    @app.get("/v1/models")
    async def models() -> Response:
        one = {"id": service.name, "object": "model", "created": answers.since, "owned_by": "anyorder"}
        return Response(dumps({"object": "list", "data": [one]}), media_type="application/json")

    @app.get("/health")
    async def health() -> Response:
        if engine.draining:
            return error(503, "the server is shutting down")
        state = {"status": "ok", "queued": engine.queued, "at_work": engine.at_work}
        return Response(dumps(state), media_type="application/json")

    @app.get("/metrics")
    async def numbers() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/")
    async def page() -> Response:
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
    @app.exception_handler(RequestValidationError)
    async def of_fields(request: Request, raised: RequestValidationError) -> Response:
        first = raised.errors()[0]
        where = [str(part) for part in first["loc"] if part != "body"]
        name = ".".join(part for part in where if part.isidentifier() or part.isdigit()) or None
        message = "the body is no JSON" if first["type"] == "json_invalid" else first["msg"]
        return error(400, f"{name}: {message}" if name else message, param=name)

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, raised: HTTPException) -> Response:
        return error(raised.status_code, str(raised.detail))

    @app.exception_handler(ValueError)
    async def of_value(request: Request, raised: ValueError) -> Response:
        return error(400, str(raised))

    @app.exception_handler(TooBusyError)
    async def of_busy(request: Request, raised: TooBusyError) -> Response:
        return error(503, str(raised), code="overloaded")

    @app.exception_handler(UnwantedError)
    async def of_time(request: Request, raised: UnwantedError) -> Response:
        late = isinstance(raised, TimeIsOverError)
        return error(504 if late else 503, str(raised), code="timeout" if late else "cancelled")

    @app.exception_handler(Exception)
    async def of_others(request: Request, raised: Exception) -> Response:
        logger.error("%s", request.url.path, exc_info=raised)
        return error(500, "an error of the server's: see its log")
