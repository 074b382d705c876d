"""`/infill` as llama.cpp's server has it, for the editors that speak it.

What stands before the cursor is `input_prefix` and, of the cursor's own line, `prompt`; `input_suffix` stands behind.
Files that the editor sends along come first. Long text is cut to what is near the cursor, so that an answer comes in
the time that editors wait. Where nothing stands behind the cursor the text just goes on.

This module knows the protocol's fields; filling is the service's business.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from anyorder.infill.pieces import Pieces
from anyorder.serving.feeds import EnoughError, Growth, Placed, first_stop
from anyorder.serving.fields import EditorFields, Sampling
from anyorder.serving.joining import JoinedRunner
from anyorder.serving.service import Piece, Put, Service

BEFORE, BEHIND, EXTRA = 256, 64, 128
"""Tokens before and behind the cursor and of other files that are read at most."""
LONGEST = 24
"""Tokens of a fill between two texts at most: what a line holds."""


def sides(asked: EditorFields, pieces: Pieces) -> tuple[str, str]:
    """What is read before the cursor and behind it.

    Raises:
        ValueError: if the prompt is no text.
    """
    if not isinstance(asked.prompt, str):
        raise ValueError("prompt must be a text: what stands before the cursor on its line")
    extra = "".join(
        f"{one.filename}\n{one.text}\n\n" if one.filename else f"{one.text}\n\n" for one in asked.input_extra
    )
    before = _nearest(pieces, asked.input_prefix + asked.prompt, BEFORE, last=True)
    return _nearest(pieces, extra, EXTRA, last=True) + before, _nearest(pieces, asked.input_suffix, BEHIND, last=False)


def _nearest(pieces: Pieces, text: str, tokens: int, last: bool) -> str:
    """So many tokens of a text, the last or the first, and whole lines where there are any."""
    ids = pieces.encode(text)
    if len(ids) <= tokens:
        return text
    kept = pieces.decode(ids[-tokens:] if last else ids[:tokens]).strip("\ufffd")
    if last:
        return kept.partition("\n")[2] or kept
    return kept.rpartition("\n")[0] + "\n" if "\n" in kept else kept


def work_of(service: Service, asked: EditorFields, capacity: int, put: Put) -> Callable[[JoinedRunner], dict[str, Any]]:
    """The answer's fields; `put` gets text as it settles.

    Args:
        service: fills.
        asked: the request.
        capacity: tokens of a request at most.
        put: gets text as it settles.

    Raises:
        ValueError: naming what cannot be.
    """
    before, behind = sides(asked, service.pieces)
    stops = [asked.stop] if isinstance(asked.stop, str) else list(asked.stop)
    drawing = Sampling(
        temperature=max(asked.temperature, 0.0), top_k=max(asked.top_k, 0), top_p=min(max(asked.top_p, 1e-3), 1.0),
        min_p=min(max(asked.min_p, 0.0), 1.0), seed=None if asked.seed < 0 else asked.seed,
    )  # fmt: skip
    begun = time.monotonic()
    until = None if asked.t_max_predict_ms <= 0 else begun + asked.t_max_predict_ms / 1000
    most = 128 if asked.n_predict < 0 else asked.n_predict

    def grow(runner: JoinedRunner) -> tuple[str, int, str, str]:
        prompt = service.prompt(before)
        late = _Late(put, until)
        room = max(capacity - len(prompt.ids), 0)
        growth: Growth = service.grow(prompt, min(most, room), drawing, [*stops, "\n"], 0, 0, late)(runner)
        return growth.text, len(growth.tokens), "word" if growth.stopped_by else "limit", growth.stopped_by

    def fill(runner: JoinedRunner) -> tuple[str, int, str, str]:
        placed: list[Placed] = []
        late = _Late(placed.extend, until)
        try:
            filled, _ = service.between(before, behind, min(max(most, 1), LONGEST), drawing, late)(runner)
        except EnoughError:
            text = "".join(one.text for one in placed)  # from left to right: what there is stands at the front
            return text, len(placed), "limit", ""
        text = filled.spans[0].text
        cut, word = first_stop(text, stops)
        put(Piece(text[:cut], []))
        return text[:cut], filled.spans[0].tokens, "word" if word else "eos", word

    def work(runner: JoinedRunner) -> dict[str, Any]:
        started = time.monotonic()
        text, new, how, word = (fill if behind.strip() else grow)(runner)
        return _answer(service, asked, before, behind, text, new, how, word, (begun, started, time.monotonic()))

    return work


class _Late:
    """Passes on what there is, until the time is over."""

    def __init__(self, put: Put, until: float | None):
        self._put, self._until = put, until

    def __call__(self, what: Any) -> None:
        self._put(what)
        if self._until is not None and time.monotonic() >= self._until:
            raise EnoughError("t_max_predict_ms is over")


def _answer(
    service: Service, asked: EditorFields, before: str, behind: str, text: str, new: int, how: str, word: str,
    times: tuple[float, float, float],
) -> dict[str, Any]:  # fmt: skip
    begun, started, ended = times
    read = len(service.pieces.encode(before)) + len(service.pieces.encode(behind))
    prompt_ms, predicted_ms = (started - begun) * 1000, max(ended - started, 1e-6) * 1000
    return {
        "index": 0, "content": text, "tokens": [], "id_slot": 0, "stop": True, "model": service.name,
        "tokens_predicted": new, "tokens_evaluated": read, "tokens_cached": 0,
        "generation_settings": {"n_predict": asked.n_predict, "temperature": asked.temperature, "top_k": asked.top_k,
                                "top_p": asked.top_p, "min_p": asked.min_p, "seed": asked.seed, "stop": asked.stop},
        "prompt": before, "has_new_line": "\n" in text, "truncated": False, "stop_type": how, "stopping_word": word,
        "timings": {
            "prompt_n": read, "prompt_ms": prompt_ms, "prompt_per_token_ms": prompt_ms / max(read, 1),
            "prompt_per_second": read / max(prompt_ms, 1e-3) * 1000, "predicted_n": new, "predicted_ms": predicted_ms,
            "predicted_per_token_ms": predicted_ms / max(new, 1), "predicted_per_second": new / predicted_ms * 1000,
        },
    }  # fmt: skip
