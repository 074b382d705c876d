"""Prompts to text, in batches, under any decoding policy.

What a request says is read as the stock backend of lm-evaluation-harness reads it: `until`, the names of a number of
new tokens, and greedy decoding unless `do_sample` or a temperature asks for drawing. Everything else goes to
`generate`, which refuses what it does not know. A draw depends on the seed, the request and how often it was made
before; not on its batch.

This module knows models, tokens and text; it knows no harness.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation.stopping_criteria import StoppingCriteria

from anyorder.core.factorization import ABSENT
from anyorder.core.rng import seed_of
from anyorder.decoding.request import end_ids
from anyorder.decoding.sampling import DRAWING
from anyorder.evaluation.batches import batches
from anyorder.evaluation.harness.encoding import TextEncoder
from anyorder.evaluation.harness.settings import Settings
from anyorder.infill.pieces import Pieces
from anyorder.modeling import AnyOrderForCausalLM

_LOGGER = logging.getLogger(__name__)
_NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_BYTES_OF_A_CHARACTER = 4


@dataclass(frozen=True)
class Wanted:
    """What a request says beside its prompt."""

    until: tuple[str, ...]
    """Text ends in front of the first of these."""
    new_tokens: int
    options: dict[str, Any] = field(hash=False)
    """Of `generate`."""

    @classmethod
    def of(cls, said: Mapping[str, Any], settings: Settings) -> Wanted:
        """What a request says and the settings overrule.

        Raises:
            ValueError: for a value that cannot be meant.
        """
        options = {name: value for name, value in said.items() if value is not None}
        until = options.pop("until", [])
        until = [until] if isinstance(until, str) else list(until)
        if not all(isinstance(one, str) for one in until):
            raise ValueError(f"until must be a text or a list of texts, got {until!r}")
        numbers = [options.pop(name) for name in _NEW_TOKENS if name in options]
        drawing = {name: float(options[name]) if name == "temperature" else options[name]
                   for name in DRAWING if name in options}  # fmt: skip
        do_sample = options.get("do_sample", drawing.get("temperature", 0.0) > 0)
        if settings.drawing:
            drawing, do_sample = drawing | settings.drawing, True
        do_sample = bool(do_sample) and drawing.get("temperature") != 0
        options = {name: value for name, value in options.items() if name not in DRAWING}
        options |= (drawing if do_sample else {}) | {"do_sample": do_sample}
        new_tokens = int(numbers[0]) if numbers else settings.max_gen_toks
        return cls(tuple(filter(None, until)), new_tokens, options)


@dataclass(frozen=True)
class _Job:
    """A request, ready to run."""

    number: int
    ids: list[int]
    wanted: Wanted
    seed: int


class EndOfText(StoppingCriteria):
    """Ends a row as soon as the text behind its prompt holds one of the stops.

    Args:
        pieces: the tokenizer.
        stops: texts.
        prompts: of the rows; a row is recognised by the longest prompt that it begins with.
    """

    def __init__(self, pieces: Pieces, stops: Sequence[str], prompts: Sequence[Sequence[int]]):
        self.pieces, self.stops = pieces, stops
        self.prompts = {tuple(prompt) for prompt in prompts}
        self.lengths = sorted({len(prompt) for prompt in prompts}, reverse=True)
        # Enough tokens for any stop that ends in the last one.
        self.tail = _BYTES_OF_A_CHARACTER * max(map(len, stops), default=0) + 4

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """(B,) bool for (B, T) ids without padding."""
        ended = [self._ends(row) for row in input_ids.tolist()]
        return torch.tensor(ended, dtype=torch.bool, device=input_ids.device)

    def _ends(self, row: list[int]) -> bool:
        start = next((n for n in self.lengths if n < len(row) and tuple(row[:n]) in self.prompts), 0)
        text = self.pieces.decode(row[max(start, len(row) - self.tail) :])
        return any(stop in text for stop in self.stops)


class Continuer:
    """Prompts to what follows them.

    Args:
        model: a converted model.
        encoder: of its tokenizer.
        settings: the policy, how tokens are drawn, and how large a batch may be.
        context: tokens that the model can stand on.
    """

    def __init__(self, model: AnyOrderForCausalLM, encoder: TextEncoder, settings: Settings, context: int):
        self.model, self.encoder, self.settings, self.context = model, encoder, settings, context
        self.tokenizer: PreTrainedTokenizerBase = encoder.tokenizer
        self.policy = settings.decoding_policy()
        own = self.tokenizer.eos_token_id
        self.end_ids = sorted({*end_ids(model), *([] if own is None else [own])})

    def __call__(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> Iterator[tuple[int, str]]:
        """The number and the continuation of each request, as they come: long prompts first.

        Args:
            requests: a prompt and what else is said of it.
        """
        groups: dict[str, list[_Job]] = {}
        made: Counter[tuple[str, str]] = Counter()
        for number, (context, said) in enumerate(requests):
            kind = json.dumps(said, sort_keys=True, default=repr)
            seed = seed_of(self.settings.seed, context, kind, str(made[context, kind]))
            made[context, kind] += 1
            groups.setdefault(kind, []).append(self._job(number, context, Wanted.of(said, self.settings), seed))
        for jobs in groups.values():
            jobs.sort(key=lambda job: -len(job.ids))
            limits = self.settings.tokens_at_once, self.settings.most_rows()
            for batch in batches(jobs, lambda job: len(job.ids) + job.wanted.new_tokens, *limits):
                yield from zip((job.number for job in batch), self._continue(batch), strict=True)

    def _job(self, number: int, context: str, wanted: Wanted, seed: int) -> _Job:
        room = self.context - wanted.new_tokens
        if room < 1:
            raise ValueError(
                f"{wanted.new_tokens} new tokens and a prompt do not fit a context of {self.context}: ask for fewer, "
                "with --gen_kwargs max_gen_toks=N, or where the task names no number, --model_args max_gen_toks=N"
            )
        ids = self.encoder.prompt(context)
        if len(ids) > room:
            _LOGGER.warning("a prompt of %d tokens is cut from the left to the %d that fit", len(ids), room)
        return _Job(number, ids[-room:], wanted, seed)

    def _continue(self, batch: Sequence[_Job]) -> list[str]:
        wanted, prompts = batch[0].wanted, [job.ids for job in batch]
        columns = max(map(len, prompts))
        ids = torch.zeros(len(batch), columns, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, (ids_of_row, mask_of_row) in zip(prompts, zip(ids, mask, strict=True), strict=True):
            ids_of_row[columns - len(row) :] = torch.tensor(row)
            mask_of_row[columns - len(row) :] = 1
        options = dict(wanted.options)
        if options["do_sample"] or self.policy.selects_at_random:
            options["generator"] = [torch.Generator().manual_seed(job.seed) for job in batch]
        if wanted.until and self.policy.keeps_order:  # in another order only the whole text can be cut
            options["stopping_criteria"] = [EndOfText(self.encoder.pieces, wanted.until, prompts)]
        output = self.model.generate(
            ids,
            attention_mask=mask,
            policy=self.policy,
            max_new_tokens=wanted.new_tokens,
            eos_token_id=self.end_ids,
            return_dict_in_generate=True,
            **options,
        )
        assert not isinstance(output, Tensor)
        new = zip(output.sequences[:, columns:], output.steps[:, columns:], strict=True)
        return [self._text(row[steps.cpu() != ABSENT].tolist(), wanted.until) for row, steps in new]

    def _text(self, ids: list[int], until: Sequence[str]) -> str:
        """What the ids say in front of the first stop, without special tokens."""
        low, high = 0, len(ids)
        if any(stop in self.encoder.pieces.decode(ids) for stop in until):
            while low < high:  # the fewest tokens that hold a stop
                middle = (low + high) // 2
                held = self.encoder.pieces.decode(ids[:middle])
                low, high = (low, middle) if any(stop in held for stop in until) else (middle + 1, high)
        text = str(self.tokenizer.decode(ids[:high], skip_special_tokens=True))
        return text[: min((text.find(stop) for stop in until if stop in text), default=len(text))]
