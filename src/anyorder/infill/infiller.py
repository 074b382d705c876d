"""Text with blanks -> text.

A blank is a set of positions, never a token id (`blanks`). The fixed pieces come back byte for byte: the result is
glued from the original strings and the decoded blanks.

What is unknown of the blanks, their lengths and the choices of strings, is found before they are filled (`seeking`).

This module knows text and tokenizers; how tokens are predicted is `decoding`'s business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from anyorder.core.factorization import Factorization
from anyorder.core.options import check_options
from anyorder.core.rng import Generators, row_generators
from anyorder.decoding.constraints import Automata, Constraint
from anyorder.decoding.events import Watcher
from anyorder.decoding.generate import generate_from
from anyorder.decoding.policies import Policy, speculative
from anyorder.decoding.sampling import DRAWING, does_sample
from anyorder.infill.chat import chat_prefix
from anyorder.infill.encoding import Blanks, Encoded, by_blank, check_context, columns_of
from anyorder.infill.lengths import DEFAULT, LengthPrior, candidates
from anyorder.infill.pieces import Pieces
from anyorder.infill.seeking import Seeker, Sought
from anyorder.infill.template import BLANK, Template
from anyorder.infill.token_bytes import TokenBytes
from anyorder.infill.token_rules import TokenRules
from anyorder.infill.tries import Variants, check_tries
from anyorder.model.compatibility import context_length
from anyorder.modeling import AnyOrderForCausalLM

MANY = 4
"""Blanks from which on short ones are drafted."""
_PASSED_ON = ("do_sample", *DRAWING, "repetition_penalty", "compile", "engine", "weights", "runner")


@dataclass(frozen=True)
class Span:
    """A filled blank."""

    text: str
    start: int
    """Offset of its first character in the filled text."""
    end: int
    """One past its last character."""
    log_prob: float
    """log p of its tokens, in the order they were generated, in nats."""
    tokens: int
    ids: tuple[int, ...]
    """The tokens themselves; the first may bring the space in front of the blank, which is not in the text."""
    probabilities: dict[str, float] | None = None
    """Of the strings of a choice, their numbers of tokens included (see `choices`); they sum to 1."""
    log_probs_given_length: dict[str, float] | None = None
    """Of the strings of a choice: log p of the tokens given how many there are and the fixed text, in nats, exact."""
    lengths: dict[int, float] | None = None
    """Where its length was sought: the calibrated probability of each that was tried."""


@dataclass(frozen=True)
class Infill:
    """A text with its blanks filled."""

    text: str
    ids: tuple[int, ...]
    """The tokens of the whole text, without those that it starts with; the tokenizer decodes them to the text."""
    spans: tuple[Span, ...]
    log_prob: float
    """log p of all blanks given the fixed text, in nats, under the model itself (before temperature and bans)."""
    forwards: int
    """Of the model: those that sought lengths and scored choices, and those that filled; of the batch as a whole."""


class Infiller:
    """Fills blanks in text with a converted model.

    Args:
        model: a converted model.
        tokenizer: the base model's.
        start_token_id: the token every text starts with; default: the document separator `<|endoftext|>` if the
            vocabulary has it, else the start token, else the end token.
        length_prior: for blanks of unknown length; default: the model's own, else a neutral one.
        messages: a conversation, as `apply_chat_template` takes it, that every text is the assistant's answer to: its
            tokens stand in front of a text in place of the start token.

    Attributes:
        pieces, token_bytes: the tokenizer's texts, and of each token its own.
        start_ids: the tokens that stand in front of a text.

    Raises:
        ValueError: if the tokenizer has no start token, or no chat template for the messages.
    """

    def __init__(
        self,
        model: AnyOrderForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        start_token_id: int | None = None,
        length_prior: LengthPrior | None = None,
        messages: Sequence[Mapping[str, str]] | None = None,
    ):
        self.model, self.pieces = model, Pieces(tokenizer)
        self.token_bytes = TokenBytes(self.pieces, model.vocabulary_size)
        self.start_token_id = self.pieces.start_token() if start_token_id is None else start_token_id
        start_ids = [self.start_token_id] if messages is None else chat_prefix(tokenizer, messages)
        self.start_ids = start_ids
        self._blanks = Blanks(self.pieces, start_ids)
        self._automata = Automata(self.token_bytes.of_text, model.vocabulary_size)
        self.seeker = Seeker(model, self._blanks, self._automata, length_prior)

    @overload
    def __call__(self, text: str, **options: Any) -> Infill: ...
    @overload
    def __call__(self, text: Sequence[str], **options: Any) -> list[Infill]: ...

    def __call__(self, text: str | Sequence[str], **options: Any) -> Infill | list[Infill]:
        """Fill every blank of one text, or of a batch of texts in one go.

        Options:
            blank: the marker, default "___" and any longer run of underscores.
            length: tokens of a blank: a number, a range (lo, hi) or "auto", for all or in a list with one for each.
                Default "auto". Where it is not a number, the model says how likely each is (see `lengths`), and the
                likeliest is taken, or where the blank opens a sentence the middle of their distribution; of a blank
                with a constraint, among what that allows.
            constraints: `constraints.Choice`, `Pattern` or `JsonSchema`: one for all blanks, or a list with one or None
                for each. Choices have lengths of their own and are decided first, from left to right.
            blank_order: numbers of blanks, from 0, in the order in which they are filled; blanks that it leaves out
                come last, from left to right.
            tries: at how many of its likeliest lengths a text is filled, of which that is kept whose whole text is
                likeliest from left to right (see `tries`); default 1.
            suppress_tokens: ids that no blank may hold.
            single_line: whether blanks hold no line end; default: those of texts that have none themselves, unless a
                pattern says what a blank holds.
            watch: is told of each step, such as a `trace.Recorder`.
            group_size: tokens predicted at a step, default 1.
            order: "left_to_right" (default) or "random" order of the blank positions.
            policy: see `policies`; default: the groups of that order. Many short blanks that are filled with the
                likeliest tokens from left to right are drafted, which changes no token.
            special_tokens: allow special tokens inside a blank, default False.
            generator: one, or one a text: of the random order and of the draws. A text's result does not depend on
                the others.
            do_sample, temperature, top_k, top_p, min_p, repetition_penalty: as in `generate`; a generator implies
                do_sample, unless it is False.
            compile, engine, weights, runner: as in `generate`.

        Raises:
            ValueError: no blank, a length that does not fit, an unknown option, a text longer than the context.
        """
        if not isinstance(text, (str, Sequence)):
            raise ValueError(f"text must be a string or a list of strings, got {type(text).__name__}")
        texts = [text] if isinstance(text, str) else list(text)
        if not texts:
            raise ValueError("no text to fill")
        check_options(options, self._fill, *_PASSED_ON, "blank", "length")
        blank, length = options.pop("blank", BLANK), options.pop("length", DEFAULT)
        templates = [Template.parse(text, blank) for text in texts]
        infills = self._fill(templates, [candidates(length, template.blanks) for template in templates], **options)
        return infills[0] if isinstance(text, str) else infills

    def _fill(
        self,
        templates: Sequence[Template],
        tried: Sequence[Sequence[tuple[int, ...]]],
        group_size: int = 1,
        order: str = "left_to_right",
        policy: Policy | None = None,
        special_tokens: bool = False,
        constraints: Constraint | Sequence[Constraint | None] | None = None,
        blank_order: Sequence[int] | None = None,
        suppress_tokens: Sequence[int] | None = None,
        single_line: bool | None = None,
        tries: int = 1,
        generator: Generators = None,
        watch: Watcher | None = None,
        **sampling: Any,
    ) -> list[Infill]:
        check_tries(tries, watch is not None)
        wanted = [_for_each_blank(constraints, template.blanks) for template in templates]
        rules = TokenRules(self.token_bytes, self._blanks, self._automata, special_tokens, suppress_tokens, single_line)
        templates = [rules.settle_spaces(*one) for one in zip(templates, wanted, tried, strict=True)]
        # One set for the order and the draws; without one the order alone must not turn sampling on.
        generators = row_generators(generator, len(templates)) if generator is not None or order == "random" else None
        do_sample = does_sample(sampling.get("do_sample"), generator, sampling)
        heat = (sampling.get("temperature") or 1.0) if do_sample else None
        sources = generators if generators is not None else [None] * len(templates)
        sought = self.seeker.seek(templates, tried, wanted, rules.suppressed, sources, heat, sampling.get("runner"))
        tried_at = Variants(sought, tries)
        sought, generators = tried_at.sought, tried_at.spread_generators(generators)
        templates, wanted = tried_at.spread(templates), tried_at.spread(wanted)
        encoded = self._encode(templates, sought)
        ids, blanks, mask, is_open = columns_of(encoded)
        f = Factorization.infill(is_open, group_size, order, generators, attention_mask=mask)
        if blank_order is not None:
            f = by_blank(f, blanks, blank_order, [template.blanks for template in templates], order, group_size)
        if policy is None and not do_sample and order == "left_to_right" and group_size == 1:
            policy = _drafted(is_open, blanks)
        own_order = isinstance(policy, Policy) and not policy.keeps_order
        prepared = policy.prepare(f) if isinstance(policy, Policy) else f
        allowed, must_match = rules.apply(templates, encoded, wanted, prepared, not own_order)
        if watch is not None:
            watch.blanks(blanks)
        output = generate_from(
            self.model,
            [own.encoded for own in sought],
            ids,
            f,
            policy,
            generator=None if generator is None else generators,
            eos_token_id=(),
            allowed_tokens=allowed,
            blank_constraints=must_match,
            return_dict_in_generate=True,
            watch=watch,
            **sampling,
        )
        assert not isinstance(output, Tensor)
        done = zip(templates, encoded, sought, output.sequences, output.log_probs, strict=True)
        infills = [self._decode(*one, output.forwards) for one in done]
        return infills if tries == 1 else self._likeliest(templates, infills, tried_at)

    def _likeliest(self, templates: Sequence[Template], infills: Sequence[Infill], tried_at: Variants) -> list[Infill]:
        rows = [self._row(template, infill.text) for template, infill in zip(templates, infills, strict=True)]
        return [infills[number] for number in tried_at.likeliest(self.model, rows)]

    def _encode(self, templates: Sequence[Template], sought: Sequence[Sought]) -> list[Encoded]:
        encoded = [
            self._blanks.encode(template, own.lengths, {k: decision.ids for k, decision in own.decisions.items()})
            for template, own in zip(templates, sought, strict=True)
        ]
        check_context(encoded, context_length(self.model.causal_lm.config))
        return encoded

    def _row(self, template: Template, text: str) -> list[int]:
        """The ids of a filled text, and of its end where nothing is known behind its last blank."""
        end = self.pieces.tokenizer.eos_token_id
        ids = [*self.start_ids, *self.pieces.encode(text, at_start=True)]
        return ids if template.pieces[-1] or end is None else [*ids, end]

    # ------------------------------------------------------------------ positions -> text

    def _decode(
        self,
        template: Template,
        encoded: Encoded,
        sought: Sought,
        ids: Tensor,
        log_probs: Tensor,
        forwards: int,
    ) -> Infill:
        blank = torch.tensor(encoded.blank)
        row, scores = ids[: len(blank)], log_probs[: len(blank)]
        fills, totals, decisions = [], [], sought.decisions
        for k in range(template.blanks):
            if k in decisions:
                fills.append(decisions[k].text)
                totals.append(decisions[k].log_prob)
                continue
            fills.append(self._blanks.decode_fill(template, k, row[blank == k].tolist()))
            totals.append(float(scores[blank == k].sum()))
        text, offsets = template.fill(fills)
        known = [decisions.get(k) for k in range(template.blanks)]
        spans = tuple(
            Span(
                fill, start, end, total, int((blank == k).sum()), tuple(row[blank == k].tolist()),
                None if choice is None else choice.probabilities,
                None if choice is None else choice.log_probs_given_length,
                sought.shares.get(k),
            )
            for k, (fill, total, choice, (start, end)) in enumerate(zip(fills, totals, known, offsets, strict=True))
        )  # fmt: skip
        return Infill(
            text,
            tuple(row[len(self._blanks.start_ids) :].tolist()),
            spans,
            sum(span.log_prob for span in spans),
            forwards + sought.forwards,
        )


def _drafted(is_open: Tensor, blanks: Tensor) -> Policy | None:
    """A policy of fewer forwards for (B, T) open positions in numbered blanks: what the next blanks hold hardly depends
    on this one, so drafts of them pass; those of the same blank pass too seldom."""
    tokens, count = int(is_open.sum()), int((blanks.amax(dim=1) + 1).sum())
    return speculative(draft="query", draft_length=4) if count >= MANY and tokens <= 2 * count else None


def _for_each_blank(
    constraints: Constraint | Sequence[Constraint | None] | None, blanks: int
) -> list[Constraint | None]:
    one = constraints is None or isinstance(constraints, Constraint)
    found = [constraints] * blanks if one else list(constraints)  # type: ignore[arg-type]
    if len(found) != blanks:
        raise ValueError(f"{len(found)} constraints for {blanks} blanks: give one, or one (or None) for each blank")
    for constraint in found:
        if constraint is not None and not isinstance(constraint, Constraint):
            raise ValueError(f"a constraint is a Choice, a Pattern or a JsonSchema, got {constraint!r}")
    return found  # type: ignore[return-value]
