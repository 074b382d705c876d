"""The process that turns a regular expression into an automaton of bytes, run as a script of its own.

A short expression can make an automaton that fills any memory ("[ab]*a[ab]{40}"), and a library that is asked for it
does not stop halfway. So it is asked in a process whose memory and time are bounded (`regular_expressions` starts it),
and which imports nothing but that library: it is up within a tenth of a second.

Reads a request in JSON from standard input; writes a line of JSON to standard output, and the automaton behind it. This
module knows bytes; it knows no tokens.
"""

from __future__ import annotations

import array
import contextlib
import json
import sys
from typing import Any

MARK = 0
"""The byte that ends a match. outlines-core loses ways that lead on from where a match could end ("1" to "1." in
numbers), so no match may end before a byte that no text holds."""


def automaton(regex: str, max_states: int) -> tuple[list[int], list[int]] | int:
    """Each state's 256 states after a byte, -1 for none, one state behind the other; and the states that a match ends
    in. State 0 is the start. Or the number of states, if there are more than `max_states`.

    Raises:
        ValueError: if the expression cannot be compiled.
    """
    from outlines_core import Index, Vocabulary

    end = 256
    index = Index(f"(?:{regex})\\x{MARK:02x}", Vocabulary(end, {bytes([value]): [value] for value in range(end)}))
    final = index.get_final_states()
    numbers = {index.get_initial_state(): 0}
    order, after, ends = list(numbers), [], []
    for state in order:  # grows
        row = [-1] * 256
        for value in index.get_allowed_tokens(state) or ():
            following = None if value == end else index.get_next_state(state, value)
            if value == MARK and following in final:
                ends.append(numbers[state])
            elif value not in (MARK, end):
                row[value] = numbers.setdefault(following, len(numbers))
                if row[value] == len(order):
                    order.append(following)
        if len(order) > max_states:
            return len(order)
        after += row
    return after, ends


def _limit(memory: int, seconds: int) -> None:
    """Bound this process, where the system can: Windows has no such limits."""
    with contextlib.suppress(ImportError):
        import resource

        for kind, value in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_CPU, seconds)):
            with contextlib.suppress(ValueError, OSError):  # macOS has no bound of memory; or there is a lower one
                resource.setrlimit(kind, (value, value))


def main() -> None:
    """Answer the request."""
    request: dict[str, Any] = json.load(sys.stdin)
    sys.path[:] = request["path"]
    _limit(request["memory"], request["seconds"])
    answer: dict[str, Any] = {}
    table = b""
    try:
        found = automaton(request["regex"], request["max_states"])
        if isinstance(found, int):
            answer = {"states": found}
        else:
            answer, table = {"ends": found[1]}, array.array("i", found[0]).tobytes()
    except MemoryError:
        raise
    except BaseException as error:  # what Rust panics with is no Exception
        answer = {"error": f"{type(error).__name__}: {error}"}
    sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n" + table)


if __name__ == "__main__":
    main()
