"""Requests as texts: what each of them does with the model, and what comes of it.

Each method checks what it is asked, encodes it and returns the work that the engine is to do; the work tells `put` what
there is on the way. This module knows texts, tokens and the model's face; no HTTP and no names of protocols.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from anyorder.core.factorization import Factorization
from anyorder.core.text import check_text
from anyorder.decoding import policies
from anyorder.decoding.constraints import Choice, JsonSchema, Pattern
from anyorder.decoding.constraints import Constraint as BlankConstraint
from anyorder.decoding.policies import Policy
from anyorder.decoding.request import end_ids
from anyorder.infill.chat import chat_prefix
from anyorder.infill.infiller import Infill, Infiller
from anyorder.infill.lengths import AUTO
from anyorder.infill.prompt import Prompt
from anyorder.modeling import AnyOrderForCausalLM
from anyorder.serving.errors import FieldError
from anyorder.serving.feeds import Alternatives, EnoughError, Growth, Placed, Placing, Settled, Token
from anyorder.serving.fields import Constraint, InfillFields, Message, Sampling, ScoreFields
from anyorder.serving.joining import JoinedRunner

MOST_BLANKS = 64
Put = Callable[[Any], None]


@dataclass(frozen=True)
class Piece:
    """New text of a continuation."""

    text: str
    tokens: list[Token]


@dataclass(frozen=True)
class Scored:
    """A token of a text that was scored."""

    token: int
    text: str
    start: int
    end: int
    role: str
    """"target", "given" or "ignored"."""
    log_prob: float | None
    """In nats, of targets."""


class Service:
    """What the model can be asked.

    Args:
        model: a converted model.
        tokenizer: the base model's.
        name: of the model.
    """

    def __init__(self, model: AnyOrderForCausalLM, tokenizer: PreTrainedTokenizerBase, name: str):
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self._uncoupled = model.uncoupled()
        self.infiller = Infiller(model, tokenizer)
        self.pieces = self.infiller.pieces
        self._special = set(tokenizer.all_special_ids)

    def _asked(self, asked: Sampling | ScoreFields, runner: JoinedRunner) -> AnyOrderForCausalLM:
        """The model with or without its coupling, as it is asked for, and as its runner takes it from now on."""
        model = self.model if asked.coupling else self._uncoupled
        runner.model = model
        return model

    # ------------------------------------------------------------------ text that grows

    def prompt(self, prompt: str | Sequence[int]) -> Prompt:
        """Of a text, or of token ids.

        Raises:
            ValueError: for ids outside the vocabulary, or a lone surrogate.
        """
        if isinstance(prompt, str):
            return Prompt.of(self.pieces, prompt)
        bad = [
            i
            for i in prompt
            if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < self.model.vocabulary_size
        ]
        if bad:
            raise FieldError("prompt", f"prompt holds {bad[0]!r}: token ids are 0..{self.model.vocabulary_size - 1}")
        ids = list(prompt) or [self.pieces.start_token()]
        return Prompt(self.tokenizer.decode(ids), ids, False, self.pieces)

    def chat(self, messages: Sequence[Message]) -> Prompt:
        """Of a conversation that the assistant is to answer."""
        return Prompt("", chat_prefix(self.tokenizer, _said(messages)), False, self.pieces)

    def grow(
        self, prompt: Prompt, new: int, asked: Sampling, stops: Sequence[str], best: int, number: int, put: Put
    ) -> Callable[[JoinedRunner], Growth]:
        """Continue a prompt.

        Args:
            prompt: the text.
            new: tokens at most.
            asked: how they are drawn.
            stops: strings that end the text.
            best: likeliest tokens to report of each position.
            number: of this text among several of one request: each is drawn with a seed of its own.
            put: gets each `Piece`.
        """
        policy, drawing = policy_of(asked), drawing_of(asked, number)

        def work(runner: JoinedRunner) -> Growth:
            found: dict[int, tuple[tuple[int, float], ...]] = {}
            ends, start = end_ids(self.model), len(prompt.ids)
            watch = Settled(
                prompt.stream(), start, ends, self._special, stops, found, lambda text, tokens: put(Piece(text, tokens))
            )
            try:
                if new:
                    self._asked(asked, runner).generate(
                        torch.tensor([prompt.ids]), max_new_tokens=new, policy=policy, runner=runner, watch=watch,
                        allowed_tokens=prompt.allowed_tokens(self.infiller.token_bytes, new),
                        logits_processor=[Alternatives(best, found)] if best else None, **drawing,
                    )  # fmt: skip
            except EnoughError:
                pass
            return watch.close()

        return work

    def prompt_tokens(self, prompt: Prompt) -> Callable[[JoinedRunner], list[Token]]:
        """The tokens of a prompt and their log-probabilities from left to right; that of the first is NaN."""

        def work(runner: JoinedRunner) -> list[Token]:
            ids = torch.tensor([prompt.ids])
            order = Factorization.left_to_right(len(prompt.ids), given=1)
            known = runner.run(lambda: self.model.log_likelihood(ids, order))[0].tolist() if ids.shape[1] > 1 else [0.0]
            stream = self.pieces_of(prompt.ids)
            return [Token(i, text, p) for i, text, p in zip(prompt.ids, stream, [torch.nan, *known[1:]], strict=True)]

        return work

    def pieces_of(self, ids: Sequence[int]) -> list[str]:
        """The text of each token by itself; special ones as they are written."""
        return [self.tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in ids]

    # ------------------------------------------------------------------ blanks

    def infill(self, asked: InfillFields, put: Put) -> Callable[[JoinedRunner], tuple[Infill, list[Placed]]]:
        """Fill the blanks of a text; `put` gets lists of `Placed`.

        Raises:
            ValueError: naming what cannot be.
        """
        policy, drawing = policy_of(asked), drawing_of(asked, 0)
        check_text("text", asked.text)
        blanks = asked.text.count(asked.blank)
        if blanks > MOST_BLANKS:
            raise FieldError("text", f"the text has {blanks} blanks: at most {MOST_BLANKS} are filled at once")
        messages = None if asked.messages is None else _said(asked.messages)
        infiller = self.infiller if messages is None else Infiller(self.model, self.tokenizer, messages=messages)
        length = _lengths(asked.length)
        constraints = _constraints(asked.constraints)

        def work(runner: JoinedRunner) -> tuple[Infill, list[Placed]]:
            self._asked(asked, runner)
            watch = Placing(self._text_of, len(infiller.start_ids), asked.top_logprobs, put)
            filled = infiller(
                asked.text, blank=asked.blank, length=length, constraints=constraints, order=asked.order,
                group_size=1 if policy else asked.group_size, policy=policy, single_line=asked.single_line,
                runner=runner, watch=watch, **drawing,
            )  # fmt: skip
            return filled, watch.trace

        return work

    def between(
        self, before: str, behind: str, most: int, asked: Sampling, put: Put
    ) -> Callable[[JoinedRunner], tuple[Infill, list[Placed]]]:
        """Fill what is missing between two texts, in at most so many tokens."""
        mark = f"<{secrets.token_hex(12)}>"  # stands in neither text
        length: Any = "auto" if most >= AUTO[-1] else [1, most]
        fields = asked.model_dump(include=set(Sampling.model_fields))
        return self.infill(InfillFields(text=before + mark + behind, blank=mark, length=length, **fields), put)

    def _text_of(self, token: int) -> str:
        return "" if token in self._special else self.pieces.decode([token])

    # ------------------------------------------------------------------ likelihoods

    def score(self, asked: ScoreFields) -> Callable[[JoinedRunner], list[Scored]]:
        """The likelihood of some tokens of a text given others."""
        check_text("text", asked.text)
        if not asked.text:
            raise FieldError("text", "text is empty: nothing to score")
        encoded = self.tokenizer(asked.text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        targets = _touched(offsets, asked.targets, "targets", len(asked.text))
        given = _touched(offsets, asked.given, "given", len(asked.text))
        if targets is None:
            targets = set(range(len(ids))) - (given or set())
        given = set(range(len(ids))) - targets if given is None else given
        both = sorted(targets & given)
        if both:
            start, end = offsets[both[0]]
            raise FieldError("given", f"the token {asked.text[start:end]!r} at {start} is both a target and given")
        if not targets:
            raise FieldError("targets", "targets holds no token: nothing to score")

        def work(runner: JoinedRunner) -> list[Scored]:
            whole = torch.tensor([[self.pieces.start_token(), *ids]])
            order = Factorization.conditional(
                [i + 1 for i in sorted(targets)], [0, *(i + 1 for i in sorted(given))], whole.shape[1]
            ).regroup(asked.group_size, asked.order, torch.Generator().manual_seed(asked.seed))
            runner.capacity(whole.shape[1])
            model = self._asked(asked, runner)
            found = runner.run(lambda: model.log_likelihood(whole, order))[0, 1:].tolist()
            return [
                Scored(token, asked.text[start:end], start, end, "target", found[n])
                if n in targets
                else Scored(token, asked.text[start:end], start, end, "given" if n in given else "ignored", None)
                for n, (token, (start, end)) in enumerate(zip(ids, offsets, strict=True))
            ]

        return work


def policy_of(asked: Sampling) -> Policy | None:
    """The policy of a request.

    Raises:
        ValueError: if there is none of that name, or the group size says something else.
    """
    if asked.policy is None:
        return None if asked.group_size == 1 else policies.groupwise(asked.group_size)
    if asked.group_size != 1:
        raise FieldError(
            "group_size", f"group_size {asked.group_size} and policy both say what a step commits: choose one"
        )
    try:
        return policies.parse(asked.policy)
    except ValueError as error:
        raise FieldError("policy", f"policy: {error}") from error


def drawing_of(asked: Sampling, number: int) -> dict[str, Any]:
    """How tokens are drawn, as options of `generate`; without a seed by chance."""
    seed = secrets.randbits(62) if asked.seed is None else asked.seed
    penalty = {} if asked.repetition_penalty == 1 else {"repetition_penalty": asked.repetition_penalty}
    generator = torch.Generator().manual_seed((seed + number) % 2**63)
    if asked.temperature == 0:
        return penalty | {"do_sample": False, "generator": generator}
    drawing = {"temperature": None if asked.temperature == 1 else asked.temperature, "top_k": asked.top_k or None,
               "top_p": None if asked.top_p == 1 else asked.top_p, "min_p": asked.min_p or None}  # fmt: skip
    given = {name: value for name, value in drawing.items() if value is not None}
    return penalty | given | {"do_sample": True, "generator": generator}


def _said(messages: Sequence[Message]) -> list[dict[str, str]]:
    """A conversation as chat templates take it."""
    return [{"role": message.role, "content": message.text} for message in messages]


def _lengths(length: Any) -> Any:
    """A length, or one for each blank: two numbers are the bounds of one."""
    if not isinstance(length, list):
        return length
    if len(length) == 2 and all(isinstance(n, int) for n in length):
        return tuple(length)
    return [tuple(one) if isinstance(one, list) else one for one in length]


def _constraints(asked: Constraint | Sequence[Constraint | None] | None) -> Any:
    if asked is None or isinstance(asked, Constraint):
        return None if asked is None else _constraint(asked)
    return [None if one is None else _constraint(one) for one in asked]


def _constraint(asked: Constraint) -> BlankConstraint:
    given = sorted(name for name, value in asked if value is not None)
    if len(given) != 1:
        raise FieldError(
            "constraints", f"a constraint is one of choices, pattern and json_schema, got {given or 'none'}"
        )
    if asked.choices is not None:
        return Choice(*asked.choices)
    return Pattern(asked.pattern) if asked.pattern is not None else JsonSchema(asked.json_schema or {})


def _touched(
    offsets: Sequence[tuple[int, int]], ranges: Sequence[tuple[int, int]] | None, name: str, length: int
) -> set[int] | None:
    """Numbers of the tokens that have a character in some ranges."""
    if ranges is None:
        return None
    for start, end in ranges:
        if not start < end <= length:
            raise FieldError(name, f"{name} holds [{start}, {end}]: ranges are [start, end) within {length} characters")
    return {n for n, (a, b) in enumerate(offsets) for start, end in ranges if a < end and b > start}
