"""Text with blanks -> text.

A blank is a set of positions, never a token id (`blanks`). The fixed pieces come back byte for byte: the result is
glued from the original strings and the decoded blanks.

A blank that is a choice of strings is decided before the others are filled (`choices`). So is the length of a blank of
unknown length, by one forward over all that are tried (`lengths`); several such blanks are settled from left to right.

This module knows text and tokenizers; how tokens are predicted is `decoding`'s business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, overload

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from anyorder.core.factorization import Factorization
from anyorder.core.rng import Generators, row_generators
from anyorder.core.validation import check_options
from anyorder.decoding.constraints import Automata, BlankConstraint, BlankConstraints, Choice, Constraint
from anyorder.decoding.events import Watcher
from anyorder.decoding.policies import Policy
from anyorder.decoding.sampling import DRAWING, AllowedTokens, does_sample
from anyorder.infill.choices import Decision, decide
from anyorder.infill.encoding import Blanks, Encoded, by_blank, check_context, pad
from anyorder.infill.lengths import DEFAULT, LengthPrior, Tries, candidates, median, provisional
from anyorder.infill.pieces import Pieces
from anyorder.infill.template import Template
from anyorder.model.compatibility import context_length
from anyorder.modeling import AnyOrderForCausalLM

_PASSED_ON = ("do_sample", *DRAWING, "repetition_penalty", "compile")


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
    probabilities: dict[str, float] | None = None
    """Of the strings of a choice given the fixed text, exact up to one factor, which makes their sum 1."""
    lengths: dict[int, float] | None = None
    """Where its length was sought: the calibrated probability of each that was tried."""


@dataclass(frozen=True)
class Infill:
    """A text with its blanks filled."""

    text: str
    spans: tuple[Span, ...]
    log_prob: float
    """log p of all blanks given the fixed text, in nats, under the model itself (before temperature and bans)."""
    forwards: int


class Infiller:
    """Fills blanks in text with a converted model.

    Args:
        model: a converted model.
        tokenizer: the base model's.
        start_token_id: the token every text starts with; default: the document separator `<|endoftext|>` if the
            vocabulary has it, else the start token, else the end token.
        length_prior: for blanks of unknown length; default: the one of the shipped model.
    """

    def __init__(
        self,
        model: AnyOrderForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        start_token_id: int | None = None,
        length_prior: LengthPrior | None = None,
    ):
        self.model, self.pieces = model, Pieces(tokenizer)
        self.length_prior = LengthPrior.load() if length_prior is None else length_prior
        self._text_mask, self._space_mask = self.pieces.masks(model.vocabulary_size)
        self.start_token_id = self.pieces.start_token() if start_token_id is None else start_token_id
        self._blanks = Blanks(self.pieces, self.start_token_id, bool(self._space_mask.any()))
        self._automata = Automata(self._token_texts, model.vocabulary_size)

    @overload
    def __call__(self, text: str, **options: Any) -> Infill: ...
    @overload
    def __call__(self, text: Sequence[str], **options: Any) -> list[Infill]: ...

    def __call__(self, text: str | Sequence[str], **options: Any) -> Infill | list[Infill]:
        """Fill every blank of one text, or of a batch of texts in one go.

        Options:
            blank: the marker, default "___".
            length: tokens of a blank: a number, a range (lo, hi) or "auto", for all or in a list with one for each.
                Default 8. Where it is not a number, the model says how likely each is (see `lengths`), and the middle
                of that distribution is taken.
            constraints: `constraints.Choice`, `Pattern` or `JsonSchema`: one for all blanks, or a list with one or None
                for each. Choices have lengths of their own and are decided first, from left to right.
            blank_order: numbers of blanks, from 0, in the order in which they are filled; blanks that it leaves out
                come last, from left to right.
            suppress_tokens: ids that no blank may hold.
            watch: is told of each step, such as a `trace.Recorder`.
            group_size: tokens predicted at a step, default 1.
            order: "left_to_right" (default) or "random" order of the blank positions.
            policy: see `policies`; default: the groups of that order.
            special_tokens: allow special tokens inside a blank, default False.
            generator: one, or one a text: of the random order and of the draws. A text's result does not depend on
                the others.
            do_sample, temperature, top_k, top_p, min_p, repetition_penalty: as in `generate`; a generator implies
                do_sample, unless it is False.
            compile: as in `generate`.

        Raises:
            ValueError: no blank, a length that does not fit, an unknown option, a text longer than the context.
        """
        if not isinstance(text, (str, Sequence)):
            raise ValueError(f"text must be a string or a list of strings, got {type(text).__name__}")
        texts = [text] if isinstance(text, str) else list(text)
        if not texts:
            raise ValueError("no text to fill")
        check_options(options, self._fill, *_PASSED_ON, "blank", "length")
        blank, length = options.pop("blank", "___"), options.pop("length", DEFAULT)
        templates = [Template.parse(text, blank) for text in texts]
        tried = [candidates(length, template.blanks) for template in templates]
        sought = [self._seek(*row, options) for row in zip(templates, tried, strict=True)]
        filled = self._fill(templates, [lengths for lengths, _ in sought], **options)
        infills = [_with_lengths(one, found) for one, (_, found) in zip(filled, sought, strict=True)]
        return infills[0] if isinstance(text, str) else infills

    # ------------------------------------------------------------------ unknown lengths

    def _seek(
        self, template: Template, tried: list[tuple[int, ...]], options: dict[str, Any]
    ) -> tuple[list[int], dict[int, dict[int, float]]]:
        """A length for each blank, and of those that were sought the probability of every length tried."""
        constraints = _for_each_blank(options.get("constraints"), template.blanks)
        suppressed = tuple(options.get("suppress_tokens", ()))
        lengths = [provisional(one) for one in tried]
        found: dict[int, dict[int, float]] = {}
        for k, one in enumerate(tried):
            if len(one) > 1 and not isinstance(constraints[k], Choice):
                one = self._possible(template, lengths, k, one, constraints[k], suppressed)
                shares = self.length_prior.probabilities(self._tries(template, lengths, k, one))
                lengths[k], found[k] = one[median(shares)], dict(zip(one, shares.tolist(), strict=True))
        return lengths, found

    def _tries(self, template: Template, lengths: list[int], k: int, tried: Sequence[int]) -> Tries:
        """What speaks for each length of blank k, the other blanks having the lengths given."""
        encoded = self._blanks.encode(template, [*lengths[:k], tried[0], *lengths[k + 1 :]], {})
        fixed = [column for column, blank in enumerate(encoded.blank) if blank < 0]
        start = encoded.columns(k)[0]
        given = [column for column in fixed if column < start]
        opens = template.opens_a_sentence(k)
        if len(tried) == 1 or len(given) == len(fixed):
            return Tries(torch.tensor(tried), torch.zeros(len(tried)), opens)
        behind = fixed[len(given)]
        targets = [behind + n - tried[0] for n in tried]
        ids = [[*encoded.ids[:start], *[0] * (target - start), encoded.ids[behind]] for target in targets]
        orders = [Factorization.conditional([target], given, target + 1) for target in targets]
        rows, order = pad(ids, 0), Factorization.stack(orders)
        # Decoding rather than scoring: what all rows begin with is encoded once.
        output = self.model.generate(
            rows, factorization=order, forced_ids=rows, eos_token_id=(), return_dict_in_generate=True
        )
        assert not isinstance(output, Tensor)
        return Tries(torch.tensor(tried), output.log_probs.sum(dim=1), opens)

    def _possible(
        self,
        template: Template,
        lengths: list[int],
        k: int,
        tried: tuple[int, ...],
        constraint: Constraint | None,
        suppressed: tuple[int, ...],
    ) -> tuple[int, ...]:
        """The lengths that fit into the context and the blank's pattern; if none does, one, which is then refused."""
        limit = context_length(self.model.causal_lm.config)
        fixed = len(self._blanks.encode(template, lengths, {}).ids) - lengths[k]
        automaton = self._automata.of(constraint, self._blanks.eats_space(template, k), suppressed)
        return tuple(
            n
            for n in tried
            if (limit is None or fixed + n <= limit)
            and (automaton is None or automaton.can_end(automaton.start, n))
        ) or tried[:1]  # fmt: skip

    def _fill(
        self,
        templates: Sequence[Template],
        lengths: Sequence[Sequence[int]],
        group_size: int = 1,
        order: str = "left_to_right",
        policy: Policy | None = None,
        special_tokens: bool = False,
        constraints: Constraint | Sequence[Constraint | None] | None = None,
        blank_order: Sequence[int] | None = None,
        suppress_tokens: Sequence[int] = (),
        generator: Generators = None,
        watch: Watcher | None = None,
        **sampling: Any,
    ) -> list[Infill]:
        wanted = [_for_each_blank(constraints, template.blanks) for template in templates]
        # One set for the order and the draws; without one the order alone must not turn sampling on.
        generators = row_generators(generator, len(templates)) if generator is not None or order == "random" else None
        do_sample = does_sample(sampling.get("do_sample"), generator, sampling)
        heat = (sampling.get("temperature") or 1.0) if do_sample else None
        sources = generators if generators is not None else [None] * len(templates)
        rows = zip(templates, lengths, wanted, sources, strict=True)
        decisions = [decide(self.model, self._blanks, *row, heat) for row in rows]
        encoded = [
            self._blanks.encode(template, own, {k: decision.ids for k, decision in decided.items()})
            for template, own, decided in zip(templates, lengths, decisions, strict=True)
        ]
        check_context(encoded, context_length(self.model.causal_lm.config))
        ids, blanks = pad([e.ids for e in encoded], 0), pad([e.blank for e in encoded], -1)
        mask = pad([[1] * len(e.ids) for e in encoded], 0)
        is_open = pad([[int(k >= 0 and k not in e.decided) for k in e.blank] for e in encoded], 0).bool()
        f = Factorization.infill(is_open, group_size, order, generators, attention_mask=mask)
        if blank_order is not None:
            f = by_blank(f, blanks, blank_order, [template.blanks for template in templates], order, group_size)
        output = self.model.generate(
            ids,
            factorization=f,
            policy=policy,
            generator=None if generator is None else generators,
            eos_token_id=(),
            allowed_tokens=self._allowed(encoded, blanks, special_tokens, suppress_tokens),
            blank_constraints=self._blank_constraints(encoded, wanted, blanks.shape, suppress_tokens),
            return_dict_in_generate=True,
            watch=watch,
            **sampling,
        )
        assert not isinstance(output, Tensor)
        done = zip(templates, encoded, decisions, output.sequences, output.log_probs, strict=True)
        return [self._decode(*one, output.forwards) for one in done]

    # ------------------------------------------------------------------ text -> positions

    def _blank_constraints(
        self,
        encoded: list[Encoded],
        constraints: list[list[Constraint | None]],
        shape: torch.Size,
        suppress_tokens: Sequence[int],
    ) -> BlankConstraints | None:
        found = []
        for row, (e, kinds) in enumerate(zip(encoded, constraints, strict=True)):
            for k, kind in enumerate(kinds):
                automaton = self._automata.of(kind, e.eats_space[k], tuple(suppress_tokens))
                if automaton is not None:
                    found.append(BlankConstraint(row, e.columns(k), automaton))
        return BlankConstraints(found, shape) if found else None

    def _token_texts(self) -> dict[int, str]:
        """What each token of text stands for; part of a character is no text, and stays out of patterns."""
        texts = ((i, self.pieces.decode([i])) for i in self._text_mask.nonzero()[:, 0].tolist())
        return {i: text for i, text in texts if text and "\ufffd" not in text}

    def _allowed(
        self, encoded: list[Encoded], blanks: Tensor, special_tokens: bool, suppress_tokens: Sequence[int]
    ) -> AllowedTokens:
        """Mask 0: text. Mask 1: text that brings its own leading space."""
        text = torch.ones_like(self._text_mask) if special_tokens else self._text_mask.clone()
        for token in suppress_tokens:
            if not isinstance(token, Integral) or isinstance(token, bool) or not 0 <= token < len(text):
                raise ValueError(f"suppress_tokens holds {token!r}: not a token id of this model")
            text[token] = False
        spaced = text & self._space_mask
        index = torch.zeros_like(blanks)
        for row, e in enumerate(encoded):
            for k, eats in enumerate(e.eats_space):
                if eats and k not in e.decided:
                    index[row, e.blank.index(k)] = 1
        return AllowedTokens(torch.stack([text, spaced]) if index.any() else text[None], index)

    # ------------------------------------------------------------------ positions -> text

    def _decode(
        self,
        template: Template,
        encoded: Encoded,
        decisions: dict[int, Decision],
        ids: Tensor,
        log_probs: Tensor,
        forwards: int,
    ) -> Infill:
        blank = torch.tensor(encoded.blank)
        row, scores = ids[: len(blank)], log_probs[: len(blank)]
        fills, totals = [], []
        for k in range(template.blanks):
            if k in decisions:
                fills.append(decisions[k].text)
                totals.append(decisions[k].log_prob)
                continue
            fills.append(self._blanks.decode_fill(template, k, row[blank == k].tolist()))
            totals.append(float(scores[blank == k].sum()))
        text, offsets = template.fill(fills)
        choices = [decisions[k].probabilities if k in decisions else None for k in range(template.blanks)]
        spans = tuple(
            Span(fill, start, end, total, int((blank == k).sum()), shares)
            for k, (fill, total, shares, (start, end)) in enumerate(zip(fills, totals, choices, offsets, strict=True))
        )
        return Infill(text, spans, sum(span.log_prob for span in spans), forwards)


def _with_lengths(infill: Infill, found: dict[int, dict[int, float]]) -> Infill:
    spans = tuple(replace(span, lengths=found.get(k)) for k, span in enumerate(infill.spans))
    return replace(infill, spans=spans, forwards=infill.forwards + len(found))


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
