"""Names of options, checked. Imports no torch, so that reading a command line may."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
from collections.abc import Callable, Collection, Iterable
from typing import Any


def check_options(given: Iterable[str], function: Callable[..., Any], *more: str) -> None:
    """Raise ValueError for a name that is neither a keyword of `function` nor in `more`."""
    parameters = inspect.signature(function).parameters.values()
    known = [p.name for p in parameters if p.default is not p.empty] + list(more)
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known options: {', '.join(known)}"
            raise ValueError(f"unknown option {name!r}; {hint}")


def parse_options(text: str, what: str) -> dict[str, Any]:
    """Options written as `NAME=VALUE,NAME=VALUE`: values as JSON has them, and words.

    Args:
        text: the options; an empty one has none.
        what: they are of, for the error.

    Raises:
        ValueError: for one without a value.
    """
    options: dict[str, Any] = {}
    for pair in filter(None, text.split(",")):
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"{what} {pair!r} must be NAME=VALUE")
        try:
            options[name] = json.loads(value)
        except json.JSONDecodeError:  # a word
            options[name] = value
    return options


def check_saved_fields(fields: Collection[str], cls: type[Any], what: str) -> None:
    """Raise ValueError for a saved field that the dataclass does not have."""
    known = [field.name for field in dataclasses.fields(cls)]
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise ValueError(
            f"{what} has fields that this version does not know ({', '.join(unknown)}); known: "
            f"{', '.join(known)}; a newer anyorder may have written them"
        )
