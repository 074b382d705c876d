"""Text with blanks -> text.

A blank is a set of positions, never a token id. The fixed pieces are tokenised one by one, so that nothing beside a
blank is retokenised into something else, and they come back byte for byte: the result is glued from the original
strings and the decoded blanks.

A single space in front of a blank belongs to the fixed text, but to the first token of the blank in nearly every
vocabulary (" cat" is one token). So the space is left out of the tokens, the blank's first token must bring it, and
the decoded blank is printed without it.

A blank that is a choice of strings is decided before the others are filled, by the exact likelihood of each string
given all fixed text.

This module knows text and tokenizers; how tokens are predicted is `decoding`'s business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from anyorder.constraints import Automaton, Choice, Constraint, JsonSchema, Pattern, Slot, Slots
from anyorder.decoding import Watcher
from anyorder.factorization import ABSENT, GIVEN, Factorization
from anyorder.options import check_options
from anyorder.pieces import Pieces
from anyorder.policies import Policy
from anyorder.randomness import Generators, row_generators
from anyorder.sampling import DRAWING, AllowedTokens, does_sample
from anyorder.support import context_length
from anyorder.template import Template

if TYPE_CHECKING:
    from anyorder.modeling import AnyOrderForCausalLM

DEFAULT_LENGTH = 8
_SAMPLING = ("do_sample", *DRAWING, "repetition_penalty")


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


@dataclass(frozen=True)
class Infill:
    """A text with its blanks filled."""

    text: str
    spans: tuple[Span, ...]
    log_prob: float
    """log p of all blanks given the fixed text, in nats, under the model itself (before temperature and bans)."""
    forwards: int


@dataclass(frozen=True)
class _Encoded:
    ids: list[int]
    blank: list[int]  # for each position the number of its blank, -1 for fixed text
    eats_space: list[bool]  # for each blank: its first token brings the space in front of it
    decided: frozenset[int] = frozenset()  # blanks whose tokens are there already


@dataclass(frozen=True)
class _Decision:
    """What a choice came to."""

    text: str
    ids: list[int]
    log_prob: float
    probabilities: dict[str, float]


class Infiller:
    """Fills blanks in text with a converted model.

    Args:
        model: a converted model.
        tokenizer: the base model's.
        start_token_id: the token every text starts with; default: the document separator `<|endoftext|>` if the
            vocabulary has it, else the start token, else the end token.
    """

    def __init__(
        self, model: AnyOrderForCausalLM, tokenizer: PreTrainedTokenizerBase, start_token_id: int | None = None
    ):
        self.model, self.pieces = model, Pieces(tokenizer)
        self.start_token_id = self.pieces.start_token() if start_token_id is None else start_token_id
        self._text_mask, self._space_mask = self.pieces.masks(model.vocabulary_size)
        self._texts: dict[int, str] | None = None  # of the tokens that patterns are made of
        self._automata: dict[tuple[str, tuple[int, ...]], Automaton] = {}

    @overload
    def __call__(self, text: str, **options: Any) -> Infill: ...
    @overload
    def __call__(self, text: Sequence[str], **options: Any) -> list[Infill]: ...

    def __call__(self, text: str | Sequence[str], **options: Any) -> Infill | list[Infill]:
        """Fill every blank of one text, or of a batch of texts in one go.

        Options:
            blank: the marker, default "___".
            length: tokens of a blank: one number for all, or a list with one for each blank. Default 8.
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

        Raises:
            ValueError: no blank, a length that does not fit, an unknown option, a text longer than the context.
        """
        if not isinstance(text, (str, Sequence)):
            raise ValueError(f"text must be a string or a list of strings, got {type(text).__name__}")
        texts = [text] if isinstance(text, str) else list(text)
        if not texts:
            raise ValueError("no text to fill")
        check_options(options, self._fill, *_SAMPLING)
        filled = self._fill(texts, **options)
        return filled[0] if isinstance(text, str) else filled

    def _fill(
        self,
        texts: list[str],
        blank: str = "___",
        length: int | Sequence[int] = DEFAULT_LENGTH,
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
        templates = [Template.parse(text, blank) for text in texts]
        wanted = [_for_each_blank(constraints, template.blanks) for template in templates]
        # One set for the order and the draws; without one the order alone must not turn sampling on.
        generators = row_generators(generator, len(texts)) if generator is not None or order == "random" else None
        lengths = [_lengths(length, template.blanks) for template in templates]
        do_sample = does_sample(sampling.get("do_sample"), generator, sampling)
        heat = (sampling.get("temperature") or 1.0) if do_sample else None
        sources = generators if generators is not None else [None] * len(texts)
        decisions = [self._decide(*parts, heat) for parts in zip(templates, lengths, wanted, sources, strict=True)]
        encoded = [self._encode(*parts) for parts in zip(templates, lengths, decisions, strict=True)]
        self._check_context(encoded)
        ids, blanks = _pad([e.ids for e in encoded], 0), _pad([e.blank for e in encoded], -1)
        mask = _pad([[1] * len(e.ids) for e in encoded], 0)
        is_open = _pad([[int(k >= 0 and k not in e.decided) for k in e.blank] for e in encoded], 0).bool()
        f = Factorization.infill(is_open, group_size, order, generators, attention_mask=mask)
        if blank_order is not None:
            f = _by_blank(f, blanks, blank_order, [template.blanks for template in templates], order, group_size)
        output = self.model.generate(
            ids,
            factorization=f,
            policy=policy,
            generator=None if generator is None else generators,
            eos_token_id=(),
            allowed_tokens=self._allowed(encoded, blanks, special_tokens, suppress_tokens),
            slots=self._slots(encoded, wanted, blanks.shape, suppress_tokens),
            return_dict_in_generate=True,
            watch=watch,
            **sampling,
        )
        assert not isinstance(output, Tensor)
        rows = zip(templates, encoded, decisions, output.sequences, output.log_probs, strict=True)
        return [self._decode(t, e, d, row, log_probs, output.forwards) for t, e, d, row, log_probs in rows]

    # ------------------------------------------------------------------ choices and patterns

    def _decide(
        self,
        template: Template,
        lengths: list[int],
        constraints: list[Constraint | None],
        generator: torch.Generator | None,
        temperature: float | None,
    ) -> dict[int, _Decision]:
        """What each choice of a text comes to, from left to right, given its fixed text and earlier choices.

        Without a temperature the likeliest string, else one that is drawn.
        """
        decisions: dict[int, _Decision] = {}
        for k, constraint in enumerate(constraints):
            if not isinstance(constraint, Choice):
                continue
            eats, at_start = self._eats_space(template, k), k == 0 and not template.pieces[0]
            own = [self.pieces.encode(" " * eats + text, at_start) for text in constraint.options]
            tried = [
                self._encode(template, lengths, decisions | {k: _Decision(text, ids, 0.0, {})})
                for text, ids in zip(constraint.options, own, strict=True)
            ]
            self._check_context(tried)
            groups = []
            for e in tried:
                step = iter(range(len(e.ids)))
                state = [ABSENT if b not in {-1, *e.decided} else next(step) if b == k else GIVEN for b in e.blank]
                groups.append(Factorization(torch.tensor([state])))
            order = Factorization.stack(groups)
            scores = self.model.log_likelihood(_pad([e.ids for e in tried], 0), order).double().sum(dim=1).cpu()
            shares = scores.softmax(dim=0)
            best = int(scores.argmax())
            if temperature is not None:
                best = int(torch.multinomial((scores / temperature).softmax(dim=0), 1, generator=generator))
            named = dict(zip(constraint.options, shares.tolist(), strict=True))
            decisions[k] = _Decision(constraint.options[best], own[best], float(scores[best]), named)
        return decisions

    def _slots(
        self,
        encoded: list[_Encoded],
        constraints: list[list[Constraint | None]],
        shape: torch.Size,
        suppress_tokens: Sequence[int],
    ) -> Slots | None:
        slots = []
        for row, (e, kinds) in enumerate(zip(encoded, constraints, strict=True)):
            for k, kind in enumerate(kinds):
                kind = kind.pattern if isinstance(kind, JsonSchema) else kind
                if isinstance(kind, Pattern):
                    regex = f" (?:{kind.regex})" if e.eats_space[k] else kind.regex
                    columns = tuple(i for i, b in enumerate(e.blank) if b == k)
                    slots.append(Slot(row, columns, self._automaton(regex, tuple(suppress_tokens))))
        return Slots(slots, shape) if slots else None

    def _automaton(self, regex: str, suppressed: tuple[int, ...]) -> Automaton:
        if (regex, suppressed) not in self._automata:
            if self._texts is None:
                ids = self._text_mask.nonzero()[:, 0].tolist()
                texts = ((i, self.pieces.decode([i])) for i in ids)
                # Part of a character is no text: such tokens stay out of patterns.
                self._texts = {i: text for i, text in texts if text and "\ufffd" not in text}
            tokens = {i: text for i, text in self._texts.items() if i not in suppressed}
            self._automata[regex, suppressed] = Automaton(regex, tokens, self.model.vocabulary_size)
        return self._automata[regex, suppressed]

    # ------------------------------------------------------------------ text -> positions

    def _eats_space(self, template: Template, k: int) -> bool:
        return bool(self._space_mask.any()) and _ends_in_one_space(template.pieces[k])

    def _encode(self, template: Template, lengths: list[int], decisions: dict[int, _Decision]) -> _Encoded:
        ids, blank, eats_space = [self.start_token_id], [-1], []
        for k, piece in enumerate(template.pieces):
            eats = k < template.blanks and self._eats_space(template, k)
            tokens = self.pieces.encode(piece[:-1] if eats else piece, at_start=k == 0)
            ids += tokens
            blank += [-1] * len(tokens)
            if k < template.blanks:
                own = decisions[k].ids if k in decisions else [0] * lengths[k]
                ids += own
                blank += [k] * len(own)
                eats_space.append(eats)
        return _Encoded(ids, blank, eats_space, frozenset(decisions))

    def _allowed(
        self, encoded: list[_Encoded], blanks: Tensor, special_tokens: bool, suppress_tokens: Sequence[int]
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

    def _check_context(self, encoded: list[_Encoded]) -> None:
        limit = context_length(self.model.causal_lm.config)
        for number, e in enumerate(encoded):
            if limit is not None and len(e.ids) > limit:
                raise ValueError(
                    f"text {number} has {len(e.ids)} tokens with its blanks; the model's context is {limit}: shorten it"
                )

    # ------------------------------------------------------------------ positions -> text

    def _decode(
        self,
        template: Template,
        encoded: _Encoded,
        decisions: dict[int, _Decision],
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
            at_start = k == 0 and not template.pieces[0]
            fill = self.pieces.decode(row[blank == k].tolist(), at_start)
            fills.append(fill.removeprefix(" ") if encoded.eats_space[k] else fill)
            totals.append(float(scores[blank == k].sum()))
        text, offsets = template.fill(fills)
        choices = [decisions[k].probabilities if k in decisions else None for k in range(template.blanks)]
        spans = tuple(
            Span(fill, start, end, total, int((blank == k).sum()), shares)
            for k, (fill, total, shares, (start, end)) in enumerate(zip(fills, totals, choices, offsets, strict=True))
        )
        return Infill(text, spans, sum(span.log_prob for span in spans), forwards)


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


def _by_blank(
    f: Factorization, blanks: Tensor, wanted: Sequence[int], counts: list[int], order: str, group_size: int
) -> Factorization:
    """The blanks one after the other in a wanted order, each from left to right; groups do not span two of them."""
    if order != "left_to_right":
        raise ValueError(f"blank_order says in which order blanks are filled, order={order!r} too: choose one")
    groups = f.group_ids.clone()
    for row, count in enumerate(counts):
        if len(set(wanted)) < len(wanted) or not all(isinstance(k, Integral) and 0 <= k < count for k in wanted):
            raise ValueError(f"blank_order must hold different numbers of blanks, 0 to {count - 1}, got {list(wanted)}")
        step = 0
        for k in [*wanted, *(k for k in range(count) if k not in wanted)]:
            columns = ((blanks[row] == k) & (f.group_ids[row] >= 0)).nonzero()[:, 0]
            groups[row, columns] = step + torch.arange(len(columns)) // group_size
            step += -(-len(columns) // group_size)
    return Factorization(groups)


def _lengths(length: int | Sequence[int], blanks: int) -> list[int]:
    lengths = [length] * blanks if isinstance(length, Integral) else length
    if not isinstance(lengths, list) or any(
        isinstance(n, bool) or not isinstance(n, Integral) or int(n) < 1 for n in lengths
    ):
        raise ValueError(
            f"length must be a number of tokens from 1 up, or a list with one for each blank, got {length!r}"
        )
    if len(lengths) != blanks:
        raise ValueError(f"{len(lengths)} lengths for {blanks} blanks: give one number, or one for each blank")
    return [int(n) for n in lengths]


def _ends_in_one_space(piece: str) -> bool:
    return piece.endswith(" ") and not piece[:-1][-1:].isspace()


def _pad(rows: list[list[int]], value: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])
