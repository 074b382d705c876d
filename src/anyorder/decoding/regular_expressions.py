"""Regular expressions: read for what is not supported, and compiled to automata of bytes.

The whole text must match, so anchors where the text begins and ends say nothing, and are taken out; anywhere else they
are refused. Compiling is done in a process with bounds of memory and time (`regex_compiler`).

This module knows text and bytes; it knows no tokens.
"""

from __future__ import annotations

import array
import importlib.util
import json
import logging
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyorder.decoding import regex_compiler

MAX_STATES = 2**14
"""An automaton of bytes may have so many states: 1 KiB each. ".{1,1000}" has about 10,000."""
COMPILER_MEMORY = 2**30
"""Bytes that compiling one expression may take, where the system can bound them."""
COMPILER_SECONDS = 10
"""Processor time that compiling one expression may take. "\\w{1,60}" takes about 7."""
NOT_INSTALLED = "constraints need outlines-core: pip install 'anyorder[constraints]'"

_logger = logging.getLogger(__name__)

_ITEM = re.compile(
    r"""(?P<look_around>\(\?<?[=!])
    | (?P<back_reference>\(\?P=|\\[1-9]|\\k)
    | (?P<boundary>\\[bB<>])
    | (?P<start>\^|\\A) | (?P<end>\$|\\z)
    | (?P<flags>\(\?[a-zA-Z-]+\))
    | (?P<open>\((?:\?P?<\w[^>]*>|\?[a-zA-Z-]*:)?)
    | (?P<close>\)) | (?P<or>\|)
    | (?P<repeat>(?:[*+?]|\{\s*\d*\s*(?:,\s*\d*\s*)?\})\??)
    | (?P<atom>\\[pPxuU]\{[^}]*\}|\\.|\[|.)""",
    re.VERBOSE | re.DOTALL,
)
_REFUSED = {
    "look_around": "look-around is not supported",
    "back_reference": "a back-reference is not supported",
}


@dataclass(frozen=True)
class ByteAutomaton:
    """An automaton of the bytes of UTF-8; state 0 is the start."""

    after: array.array[int]
    """(states * 256,): the state after a byte in a state, -1 for none."""
    ends: tuple[int, ...]
    """The states in which a match may end."""

    @property
    def states(self) -> int:
        return len(self.after) // 256


def without_anchors(regex: str, name: str) -> str:
    """The same expression for a text that it must match as a whole.

    Args:
        regex: an expression.
        name: what errors call it.

    Raises:
        ValueError: if it holds what is not supported: look-around, back-references, anchors in the middle.
    """
    if not isinstance(regex, str):
        raise ValueError(f"a pattern is a string, got {regex!r}")
    items = _items(regex)
    for kind, text, position in items:
        if kind in _REFUSED:
            raise ValueError(f"{name} cannot be used: {_REFUSED[kind]}: {text!r} at {position}")
    starts, ends = _removable(items, "start", "open"), _removable(items[::-1], "end", "close")
    repeated = _repeated(items)
    for number, (kind, text, position) in enumerate(items):
        at_edge = number in starts if kind == "start" else len(items) - 1 - number in ends
        if kind in ("start", "end") and (not at_edge or number in repeated):
            where = "begins" if kind == "start" else "ends"
            raise ValueError(
                f"{name} cannot be used: {text!r} at {position} stands elsewhere than where the text {where}"
            )
    rest = "".join(text for kind, text, _ in items if kind not in ("start", "end"))
    if not rest:
        raise ValueError(
            f"{name} cannot be used: it is empty, and a blank holds at least one token; leave it out to allow anything"
        )
    return rest + "\n" * _is_verbose(items)  # what is put behind a last comment must not become a part of it


def _items(regex: str) -> list[tuple[str, str, int]]:
    """The parts of an expression: kind, text, position."""
    items: list[tuple[str, str, int]] = []
    position = 0
    while position < len(regex):
        found = _ITEM.match(regex, position)
        assert found is not None
        kind, end = str(found.lastgroup), found.end()
        if kind == "atom" and found[0] == "[":
            end = _class_end(regex, position)
        elif _is_verbose(items) and (found[0].isspace() or found[0] == "#"):
            kind, end = "space", end if found[0] != "#" else _line_end(regex, position)
        items.append((kind, regex[position:end], position))
        position = end
    return items


def _is_verbose(items: Sequence[tuple[str, str, int]]) -> bool:
    return any(kind in ("flags", "open") and re.match(r"\(\?[a-zA-Z]*x", text) for kind, text, _ in items)


def _line_end(regex: str, position: int) -> int:
    end = regex.find("\n", position)
    return len(regex) if end < 0 else end + 1


def _class_end(regex: str, position: int) -> int:
    """One past a class of characters that opens at a position; classes nest in Rust's syntax."""
    depth, at = 0, position
    while at < len(regex):
        if regex[at] == "\\":
            at += 1
        elif regex[at] == "[":
            depth += 1
            at += regex[at + 1 : at + 2] == "^"
            at += regex[at + 1 : at + 2] == "]"  # the first one is a character
        elif regex[at] == "]":
            depth -= 1
            if depth == 0:
                return at + 1
        at += 1
    return len(regex)


def _removable(items: Sequence[tuple[str, str, int]], anchor: str, opens: str) -> set[int]:
    """Numbers of the anchors in front of which nothing can stand. Read backwards, brackets close where they open."""
    found, edge, groups = set(), True, [True]
    for number, (kind, _, _) in enumerate(items):
        if kind == anchor and edge:
            found.add(number)
        elif kind == opens:
            groups.append(edge)
        elif kind in ("open", "close"):
            edge = False
            if len(groups) > 1:
                groups.pop()
        elif kind == "or":
            edge = groups[-1]
        elif kind in ("atom", "boundary"):
            edge = False
    return found


def _repeated(items: Sequence[tuple[str, str, int]]) -> set[int]:
    """Numbers of the items that are repeated, alone or in a group."""
    found: set[int] = set()
    opened: list[int] = []
    for number, (kind, _, _) in enumerate(items):
        first = number - 1
        if kind == "open":
            opened.append(number)
        elif kind == "close":
            start = opened.pop() if opened else 0
            following = items[number + 1] if number + 1 < len(items) else ("", "", 0)
            if following[0] == "repeat" and not following[1].startswith("?"):
                found.update(range(start, number))
        elif kind == "repeat" and first >= 0 and items[first][0] != "close":
            found.add(first)
    return found


def compiled(regex: str, name: str, before: str = "") -> ByteAutomaton:
    """The automaton of the texts that match an expression as a whole.

    Args:
        regex: of Rust's regex syntax, without anchors (`without_anchors`).
        name: what errors call it.
        before: a string that stands in front of each text.

    Raises:
        ValueError: if the expression is none, nothing matches it, or its automaton is too large.
    """
    if importlib.util.find_spec("outlines_core") is None:
        raise ValueError(NOT_INSTALLED)
    if not _is_balanced(regex):  # or the brackets put around it would close it
        raise ValueError(f"{name} cannot be used: its brackets do not match")
    whole = f"{re.escape(before)}(?:{regex})" if before else regex
    limits = {"memory": COMPILER_MEMORY, "seconds": COMPILER_SECONDS, "max_states": MAX_STATES}
    began = time.perf_counter()
    answer = _ask({"regex": whole, "path": sys.path, **limits})
    if answer is None:
        raise ValueError(
            f"{name} cannot be used: compiling it takes more than {COMPILER_SECONDS} seconds or "
            f"{COMPILER_MEMORY / 2**30:g} GiB of memory; repeat less, or write it shorter"
        )
    head, after = answer
    if "states" in head:
        raise ValueError(
            f"{name} cannot be used: its automaton has more than {MAX_STATES:,} states; repeat less, or write it "
            "shorter"
        )
    if "error" in head:
        raise ValueError(f"{name} cannot be used: {_reason(regex, head['error'])}")
    if not head["ends"]:
        raise ValueError(f"{name} cannot be used: no text matches it")
    found = ByteAutomaton(after, tuple(head["ends"]))
    _logger.debug("%s: %d states of bytes in %.2f s", name, found.states, time.perf_counter() - began)
    return found


def _ask(request: dict[str, Any]) -> tuple[dict[str, Any], array.array[int]] | None:
    """What the compiler answers; None if it met its limits."""
    command = [sys.executable, "-I", str(Path(regex_compiler.__file__))]
    # A clock too, for systems without limits; wide, as other work may run beside it.
    wait = 10.0 * request["seconds"]
    try:
        ran = subprocess.run(command, input=json.dumps(request).encode(), capture_output=True, timeout=wait)
    except subprocess.TimeoutExpired:
        return None
    if ran.returncode:
        _logger.debug("the compiler of patterns ended with %d: %s", ran.returncode, ran.stderr.decode(errors="replace"))
        return None
    line, _, table = ran.stdout.partition(b"\n")
    after = array.array("i")
    after.frombytes(table)
    return json.loads(line), after


def _is_balanced(regex: str) -> bool:
    depth = 0
    for kind, _, _ in _items(regex):
        depth += (kind == "open") - (kind == "close")
        if depth < 0:
            return False
    return depth == 0


def _reason(regex: str, error: str) -> str:
    """Why an expression cannot be compiled, in the user's terms: the library tells of its own wrapping."""
    if "word boundaries" in error or "start state" in error:
        return "word boundaries (\\b) are not supported: leave them out where the text begins or ends"
    if "incompatible with the regex" in error:
        return "a part of it matches nothing"
    try:
        re.compile(regex)
    except re.error as reason:  # another syntax, which shares most mistakes with Rust's
        return reason.msg
    if "building NFA" in error:
        return "it is no regular expression of Rust's syntax"
    return error
