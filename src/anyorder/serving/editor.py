"""`/infill` as llama.cpp's server has it, for the editors that speak it.

What stands before the cursor is `input_prefix` and, of the cursor's own line, `prompt`; `input_suffix` stands behind.
Files that the editor sends along come first. Long text is cut to what is near the cursor, so that an answer comes in
the time that editors wait. Where nothing stands behind the cursor the text just goes on.

This module knows the protocol's fields; filling is the service's business.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from anyorder.infill.pieces import Pieces
from anyorder.serving.errors import FieldError
from anyorder.serving.feeds import EnoughError, Growth, Placed, first_stop
from anyorder.serving.fields import EditorFields, Sampling, listed
from anyorder.serving.joining import JoinedRunner
from anyorder.serving.service import Piece, Put, Service

BEFORE, BEHIND, EXTRA = 256, 64, 128
"""Tokens before and behind the cursor and of other files that are read at most."""
LONGEST = 24
"""Tokens of a fill between two texts at most: what a line holds."""
SPARE = 8
"""Tokens that a text may begin with, and that cutting it may add."""


def sides(asked: EditorFields, pieces: Pieces, room: int) -> tuple[str, str]:
    """What is read before the cursor and behind it.

    Args:
        asked: the request.
        pieces: of the tokenizer.
        room: tokens of all of it at most.

    Raises:
        ValueError: if the prompt is no text.
    """
    if not isinstance(asked.prompt, str):
        raise FieldError("prompt", "prompt must be a text: what stands before the cursor on its line")
    extra = "".join(
        f"{one.filename}\n{one.text}\n\n" if one.filename else f"{one.text}\n\n" for one in asked.input_extra
    )
    before = _nearest(pieces, asked.input_prefix + asked.prompt, BEFORE, last=True)
    behind = _nearest(pieces, asked.input_suffix, BEHIND, last=False)
    own = len(pieces.encode(before)) + len(pieces.encode(behind))
    if own > room:  # in a small context both sides have their share of it
        before = _nearest(pieces, before, room * BEFORE // (BEFORE + BEHIND), last=True)
        behind = _nearest(pieces, behind, room * BEHIND // (BEFORE + BEHIND), last=False)
    return _nearest(pieces, extra, min(max(room - own, 0), EXTRA), last=True) + before, behind


def _nearest(pieces: Pieces, text: str, tokens: int, last: bool) -> str:
    """So many tokens of a text, the last or the first, and whole lines where there are any."""
    ids = pieces.encode(text)
    if len(ids) <= tokens:
        return text
    if tokens < 1:
        return ""
    kept = pieces.decode(ids[-tokens:] if last else ids[:tokens]).strip("\ufffd")
    if last:
        return kept.partition("\n")[2] or kept
    return kept.rpartition("\n")[0] + "\n" if "\n" in kept else kept


@dataclass(frozen=True)
class _Filled:
    """What came of it."""

    text: str
    ids: Sequence[int]
    how: str
    """It ended: "eos", "limit" or "word"."""
    word: str
    """The stop string, if it was one."""


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
    most = 128 if asked.n_predict < 0 else asked.n_predict
    before, behind = sides(asked, service.pieces, capacity - min(most, LONGEST) - SPARE)
    stops = listed(asked.stop)
    drawing = Sampling(
        temperature=max(asked.temperature, 0.0), top_k=min(max(asked.top_k, 0), 1_000_000),
        top_p=min(max(asked.top_p, 1e-3), 1.0), min_p=min(max(asked.min_p, 0.0), 1.0),
        seed=None if asked.seed < 0 else asked.seed % 2**63,
    )  # fmt: skip
    begun = time.monotonic()
    until = None if asked.t_max_predict_ms <= 0 else begun + asked.t_max_predict_ms / 1000

    def grow(runner: JoinedRunner) -> _Filled:
        prompt = service.prompt(before)
        late = _Late(put, until)
        room = max(capacity - len(prompt.ids), 0)
        growth: Growth = service.grow(prompt, min(most, room), drawing, [*stops, "\n"], 0, 0, late)(runner)
        how = "word" if growth.stopped_by else "eos" if growth.ended == "stop" else "limit"
        return _Filled(growth.text, [token.id for token in growth.tokens], how, growth.stopped_by)

    def fill(runner: JoinedRunner) -> _Filled:
        placed: list[Placed] = []
        late = _Late(placed.extend, until)
        try:
            (span,) = service.between(before, behind, min(most, LONGEST), drawing, late)(runner)[0].spans
            text, ids, how = span.text, list(span.ids), "eos"
        except EnoughError:  # from left to right: what there is stands at the front
            ids, how = [one.token for one in placed], "limit"
            text = service.pieces.decode(ids).rstrip("\ufffd")
            text = text.removeprefix(" ") if before.endswith(" ") else text
        cut, word = first_stop(text, stops)
        put(Piece(text[:cut], []))
        return _Filled(text[:cut], ids, "word" if word else how, word)

    def work(runner: JoinedRunner) -> dict[str, Any]:
        started = time.monotonic()
        asks = fill if behind.strip() else grow
        filled = asks(runner) if most else _Filled("", [], "limit", "")  # none: it wants context read beforehand
        return _answer(service, asked, before, behind, filled, (begun, started, time.monotonic()))

    return work


class _Late:
    """Passes on what there is, until the time is over."""

    def __init__(self, put: Put, until: float | None):
        self._put, self._until = put, until

    def __call__(self, what: Any) -> None:
        self._put(what)
        if self._until is not None and time.monotonic() >= self._until:
            raise EnoughError("t_max_predict_ms is over")


def part_of(piece: Piece) -> dict[str, Any]:
    """A part of a stream that is not the last."""
    return {"index": 0, "content": piece.text, "tokens": [token.id for token in piece.tokens], "stop": False,
            "id_slot": -1, "tokens_predicted": len(piece.tokens), "tokens_evaluated": 0}  # fmt: skip


def wanted(answer: dict[str, Any], fields: Sequence[str]) -> dict[str, Any]:
    """The parts of an answer that `response_fields` names, each under the name that it has there; none named: all."""
    if not fields:
        return answer
    found = {}
    for name in fields:
        value: Any = answer
        for key in name.split("/"):
            value = value.get(key, _NOTHING) if isinstance(value, dict) else _NOTHING
        if value is not _NOTHING:
            found[name] = value
    return found


_NOTHING = object()
_NEUTRAL: dict[str, Any] = {
    "dynatemp_range": 0.0, "dynatemp_exponent": 1.0, "top_n_sigma": -1.0, "xtc_probability": 0.0,
    "xtc_threshold": 0.1, "typical_p": 1.0, "repeat_last_n": 64, "repeat_penalty": 1.0, "presence_penalty": 0.0,
    "frequency_penalty": 0.0, "dry_multiplier": 0.0, "dry_base": 1.75, "dry_allowed_length": 2,
    "dry_penalty_last_n": -1, "dry_sequence_breakers": [], "mirostat": 0, "mirostat_tau": 5.0, "mirostat_eta": 0.1,
    "adaptive_target": -1.0, "adaptive_decay": 0.9, "n_keep": 0, "n_discard": 0, "ignore_eos": False,
    "logit_bias": [], "n_probs": 0, "min_keep": 0, "grammar": "", "grammar_lazy": False, "grammar_triggers": [],
    "preserved_tokens": [], "chat_format": "Content-only", "reasoning_format": "none", "reasoning_in_content": False,
    "generation_prompt": "", "samplers": ["top_k", "top_p", "min_p", "temperature"], "speculative.types": "none",
    "timings_per_token": False, "post_sampling_probs": False, "backend_sampling": False, "lora": [],
}  # fmt: skip
"""llama.cpp's settings that there are no such things for here, at the values that change nothing."""


def _answer(
    service: Service, asked: EditorFields, before: str, behind: str, filled: _Filled, times: tuple[float, float, float]
) -> dict[str, Any]:
    begun, started, ended = times
    new = len(filled.ids)
    read = len(service.pieces.encode(before)) + len(service.pieces.encode(behind))
    prompt_ms, predicted_ms = (started - begun) * 1000, max(ended - started, 1e-6) * 1000
    settings = {
        "seed": asked.seed % 2**32, "temperature": asked.temperature, "top_k": asked.top_k, "top_p": asked.top_p,
        "min_p": asked.min_p, "stop": listed(asked.stop),
        "max_tokens": asked.n_predict, "n_predict": asked.n_predict, "stream": asked.stream,
    }  # fmt: skip
    return {
        "index": 0, "content": filled.text, "tokens": [], "id_slot": 0, "stop": True, "model": service.name,
        "tokens_predicted": new, "tokens_evaluated": read, "tokens_cached": read + new,
        "generation_settings": _NEUTRAL | settings, "prompt": before, "has_new_line": "\n" in filled.text,
        "truncated": False, "stop_type": filled.how, "stopping_word": filled.word,
        "timings": {
            "cache_n": 0, "prompt_n": read, "prompt_ms": prompt_ms, "prompt_per_token_ms": prompt_ms / max(read, 1),
            "prompt_per_second": read / max(prompt_ms, 1e-3) * 1000, "predicted_n": new, "predicted_ms": predicted_ms,
            "predicted_per_token_ms": predicted_ms / max(new, 1), "predicted_per_second": new / predicted_ms * 1000,
        },
    }  # fmt: skip
