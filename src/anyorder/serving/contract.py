"""What answers hold, for `/openapi.json`: one model for each endpoint's answer, and the errors that all of them share.

Answers are made in `shapes`, `answers` and `editor`; the tests hold them to these models.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class _Answer(BaseModel):
    model_config = ConfigDict(protected_namespaces=(), extra="forbid")


class ErrorDetail(_Answer):
    """What is wrong, and with which field."""

    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    code: str | None


class ErrorAnswer(_Answer):
    """An error in OpenAI's shape."""

    error: ErrorDetail


class Usage(_Answer):
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(_Answer):
    """Of the tokens of a text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float | None] | None] | None
    text_offset: list[int]


class CompletionChoice(_Answer):
    """A text."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class CompletionAnswer(_Answer):
    """`/v1/completions`; parts of a stream have the same fields, `usage` in the last if it was asked for."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class TopLogprob(_Answer):
    """A token that might have stood there."""

    token: str
    logprob: float | None
    bytes: list[int]


class ChatToken(TopLogprob):
    """A token of an answer."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(_Answer):
    """Of the tokens of an answer."""

    content: list[ChatToken]
    refusal: None


class ChatMessage(_Answer):
    """What the model says."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(_Answer):
    """An answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class ChatAnswer(_Answer):
    """`/v1/chat/completions`; parts of a stream are `chat.completion.chunk` objects with `delta` for `message`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Alternative(_Answer):
    """A token that might have stood there."""

    text: str
    token: int
    logprob: float | None


class PlacedToken(_Answer):
    """A token of a blank, in the order in which they are drawn."""

    blank: int
    position: int
    text: str
    token: int
    logprob: float
    step: int
    top_logprobs: list[Alternative] | None


class FilledSpan(_Answer):
    """A filled blank."""

    text: str
    start: int
    end: int
    log_prob: float
    tokens: int
    ids: list[int]
    probabilities: dict[str, float] | None
    log_probs_given_length: dict[str, float] | None
    lengths: dict[str, float] | None


class InfillAnswer(_Answer):
    """`/v1/infill`; a stream has each token of `trace` as an event with `final: false`, and this with `final: true`."""

    id: str
    object: Literal["infill"]
    created: int
    model: str
    text: str
    spans: list[FilledSpan]
    log_prob: float | None
    forwards: int
    trace: list[PlacedToken]


class ScoredToken(_Answer):
    """A token of a text that was scored."""

    token: int
    text: str
    start: int
    end: int
    role: Literal["target", "given", "ignored"]
    log_prob: float | None


class ScoreAnswer(_Answer):
    """`/v1/score`."""

    id: str
    object: Literal["score"]
    created: int
    model: str
    log_prob: float | None
    tokens: int
    nats_per_token: float | None
    order: Literal["left_to_right", "random"]
    group_size: int
    details: list[ScoredToken]


class Timings(_Answer):
    """Of a fill."""

    cache_n: int
    prompt_n: int
    prompt_ms: float
    prompt_per_token_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: float
    predicted_per_token_ms: float
    predicted_per_second: float


class EditorAnswer(_Answer):
    """`/infill`, as llama.cpp's server has it. With `response_fields` these alone, flat: `timings/prompt_n`."""

    model_config = ConfigDict(extra="allow")
    content: str | None = None
    stop: bool | None = None
    timings: Timings | None = None


class ModelEntry(_Answer):
    """The model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelsAnswer(_Answer):
    """`/v1/models`."""

    object: Literal["list"]
    data: list[ModelEntry]


class HealthAnswer(_Answer):
    """`/health`."""

    status: Literal["ok"]
    queued: int
    at_work: int


_ERRORS: dict[int | str, str] = {
    400: "the body is no JSON, or a field of it cannot be",
    401: "the server wants a key: Authorization: Bearer KEY",
    408: "the body does not come",
    413: "the body is too large",
    415: "the body is not application/json",
    503: "too many requests wait already, or the server is shutting down",
    504: "the time that a request may take is over",
    "default": "any other error",
}


def responses(answer: type[BaseModel] | None, streamed: bool = False, asked: bool = True) -> dict[int | str, Any]:
    """FastAPI's `responses` of an endpoint.

    Args:
        answer: what it answers.
        streamed: whether it may answer by server-sent events.
        asked: whether it takes a body.
    """
    errors = _ERRORS if asked else {status: _ERRORS[status] for status in (401, 503, "default")}
    found: dict[int | str, Any] = {
        status: {"model": ErrorAnswer, "description": text} for status, text in errors.items()
    }
    if answer is not None:
        found[200] = {"model": answer, "description": "the answer"}
    if streamed:
        events = {"schema": {"type": "string", "description": "with `stream`: server-sent events"}}
        found[200] |= {"content": {"text/event-stream": events}}
    return found
