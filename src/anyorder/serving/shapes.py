"""Answers in the shapes of OpenAI's API. Knows texts and tokens; no HTTP and no model."""

from __future__ import annotations

import json
import math
import secrets
import time
from collections.abc import Sequence
from typing import Any

from anyorder.serving.feeds import Growth, Token


def dumps(what: Any) -> str:
    """JSON in ASCII: half a character in an error's text harms nobody."""
    return json.dumps(what, allow_nan=False)


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def identifier(kind: str) -> str:
    """Of an answer."""
    return f"{kind}-{secrets.token_hex(12)}"


def usage(prompt: int, new: int) -> dict[str, int]:
    """How many tokens were read and written."""
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def finite(value: float) -> float | None:
    """JSON has no numbers that are not finite."""
    return value if math.isfinite(value) else None


class Completions:
    """`/v1/completions`.

    Args:
        model: its name.
        logprobs: the likeliest tokens to report; None: none, and no log-probabilities.
        name_of: the text of a token id.
    """

    kind, streamed = "text_completion", "text_completion"

    def __init__(self, model: str, logprobs: int | None, name_of: Any):
        self.id, self.created = identifier("cmpl"), int(time.time())
        self.model, self.logprobs, self.name_of = model, logprobs, name_of

    def whole(self, choices: Sequence[dict[str, Any]], used: dict[str, int]) -> dict[str, Any]:
        """The answer."""
        return self._head(self.kind) | {"choices": list(choices), "usage": used}

    def chunk(self, choices: Sequence[dict[str, Any]], used: dict[str, int] | None = None) -> dict[str, Any]:
        """A part of a stream."""
        return self._head(self.streamed) | {"choices": list(choices)} | ({} if used is None else {"usage": used})

    def choice(self, index: int, growth: Growth, before: str = "", read: Sequence[Token] = ()) -> dict[str, Any]:
        """A text, behind what of its prompt is said again."""
        return self._choice(index, before + growth.text, [*read, *growth.tokens], growth.ended, 0)

    def piece(self, index: int, text: str, tokens: Sequence[Token], offset: int) -> dict[str, Any]:
        """New text of a stream; `offset` is that of its first character."""
        return self._choice(index, text, tokens, None, offset)

    def end(self, index: int, growth: Growth) -> dict[str, Any]:
        """The last part of a text's stream."""
        return self._choice(index, "", [], growth.ended, len(growth.text))

    def begin(self, index: int) -> dict[str, Any] | None:
        """The first part of a text's stream, if there is one."""
        return None

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _choice(self, index: int, text: str, tokens: Sequence[Token], ended: str | None, offset: int) -> dict[str, Any]:
        logprobs = None if self.logprobs is None else self._logprobs(tokens, offset)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": ended}

    def _logprobs(self, tokens: Sequence[Token], offset: int) -> dict[str, Any]:
        offsets, best = [], []
        for token in tokens:
            offsets.append(offset)
            offset += len(token.text)
            own = {self.name_of(i): finite(p) for i, p in token.best}
            best.append(own | {self.name_of(token.id): finite(token.log_prob)} if own else None)
        return {
            "tokens": [self.name_of(token.id) for token in tokens],
            "token_logprobs": [finite(token.log_prob) for token in tokens],
            "top_logprobs": best if self.logprobs else None,
            "text_offset": offsets,
        }


class Chat(Completions):
    """`/v1/chat/completions`; arguments as of `Completions`."""

    kind, streamed = "chat.completion", "chat.completion.chunk"

    def __init__(self, model: str, logprobs: int | None, name_of: Any):
        super().__init__(model, logprobs, name_of)
        self.id = identifier("chatcmpl")

    def choice(self, index: int, growth: Growth, before: str = "", read: Sequence[Token] = ()) -> dict[str, Any]:
        message = {"role": "assistant", "content": growth.text, "refusal": None}
        return self._part(index, "message", message, growth.tokens, growth.ended)

    def piece(self, index: int, text: str, tokens: Sequence[Token], offset: int) -> dict[str, Any]:
        return self._part(index, "delta", {"content": text}, tokens, None)

    def begin(self, index: int) -> dict[str, Any] | None:
        return self._part(index, "delta", {"role": "assistant", "content": ""}, [], None)

    def end(self, index: int, growth: Growth) -> dict[str, Any]:
        return self._part(index, "delta", {}, [], growth.ended)

    def _part(
        self, index: int, name: str, said: dict[str, Any], tokens: Sequence[Token], ended: str | None
    ) -> dict[str, Any]:
        logprobs = None
        if self.logprobs is not None:
            logprobs = {"content": [self._token(token) for token in tokens], "refusal": None}
        return {"index": index, name: said, "logprobs": logprobs, "finish_reason": ended}

    def _token(self, token: Token) -> dict[str, Any]:
        best = [self._named(i, p) for i, p in token.best]
        return self._named(token.id, token.log_prob) | {"top_logprobs": best}

    def _named(self, token: int, log_prob: float) -> dict[str, Any]:
        text = self.name_of(token)
        return {"token": text, "logprob": finite(log_prob), "bytes": list(text.encode())}
