"""What goes wrong, as clients are told: a status, and an error in OpenAI's shape that names the field.

The same for an answer that is refused and for a stream that breaks off. What the server itself has done wrong goes to
its log and not to clients.
"""

from __future__ import annotations

import logging
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from anyorder.serving.engine import TimeIsOverError, TooBusyError, UnwantedError
from anyorder.serving.shapes import error_body

logger = logging.getLogger(__name__)

LONGEST = 1000
"""Characters of a message: what is wrong may be quoted in it, and may be long."""


class FieldError(ValueError):
    """A field's value cannot be.

    Args:
        param: the field.
        message: what is wrong with it.
    """

    def __init__(self, param: str, message: str):
        super().__init__(message)
        self.param = param


def told(raised: Exception, where: str) -> tuple[int, dict[str, Any]]:
    """The status and the body that an exception is answered with.

    Args:
        raised: the exception.
        where: the path, for the log.
    """
    match raised:
        case RequestValidationError() | ValidationError():
            return 400, _of_fields(raised)
        case HTTPException():
            return raised.status_code, error_body(raised.status_code, str(raised.detail))
        case ValueError():
            return 400, error_body(400, _cut(str(raised)), getattr(raised, "param", None))
        case TooBusyError():
            return 503, error_body(503, str(raised), code="overloaded")
        case TimeIsOverError():
            return 504, error_body(504, str(raised), code="timeout")
        case UnwantedError():
            return 503, error_body(503, str(raised), code="cancelled")
    logger.error("%s", where, exc_info=raised)
    return 500, error_body(500, "an error of the server's: see its log")


def _of_fields(raised: RequestValidationError | ValidationError) -> dict[str, Any]:
    """The first of the mistakes that pydantic has found."""
    first = raised.errors()[0]
    where = [str(part) for part in first["loc"] if part != "body"]
    name = ".".join(part for part in where if part.isidentifier() or part.isdigit()) or None
    message = "the body is no JSON" if first["type"] == "json_invalid" else first["msg"]
    return error_body(400, _cut(f"{name}: {message}" if name else message), name)


def _cut(message: str) -> str:
    return message if len(message) <= LONGEST else f"{message[: LONGEST - 3]}..."
