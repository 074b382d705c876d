"""Text with blanks -> text.

A blank is a set of positions, never a token id. The fixed pieces are tokenised one by one, so that nothing beside a
blank is retokenised into something else, and they come back byte for byte: the result is glued from the original
strings and the decoded blanks.

A single space in front of a blank belongs to the fixed text, but to the first token of the blank in nearly every
vocabulary (" cat" is one token). So the space is left out of the tokens, the blank's first token must bring it, and
the decoded blank is printed without it.

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

from anyorder.factorization import Factorization
from anyorder.options import check_options
from anyorder.pieces import Pieces
from anyorder.policies import Policy
from anyorder.randomness import Generators, row_generators
from anyorder.sampling import AllowedTokens
from anyorder.support import context_length
from anyorder.template import Template

if TYPE_CHECKING:
    from anyorder.modeling import AnyOrderForCausalLM

DEFAULT_LENGTH = 8
_SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")


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

    @overload
    def __call__(self, text: str, **options: Any) -> Infill: ...
    @overload
    def __call__(self, text: Sequence[str], **options: Any) -> list[Infill]: ...

    def __call__(self, text: str | Sequence[str], **options: Any) -> Infill | list[Infill]:
        """Fill every blank of one text, or of a batch of texts in one go.

        Options:
            blank: the marker, default "___".
            length: tokens of a blank: one number for all, or a list with one for each blank. Default 8.
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
        generator: Generators = None,
        **sampling: Any,
    ) -> list[Infill]:
        templates = [Template.parse(text, blank) for text in texts]
        encoded = [self._encode(template, _lengths(length, template.blanks)) for template in templates]
        self._check_context(encoded)
        ids, blanks = _pad([e.ids for e in encoded], 0), _pad([e.blank for e in encoded], -1)
        mask = _pad([[1] * len(e.ids) for e in encoded], 0)
        # One set for the order and the draws; without one the order alone must not turn sampling on.
        generators = row_generators(generator, len(texts)) if generator is not None or order == "random" else None
        f = Factorization.infill(blanks >= 0, group_size, order, generators, attention_mask=mask)
        output = self.model.generate(
            ids,
            factorization=f,
            policy=policy,
            generator=None if generator is None else generators,
            eos_token_id=(),
            allowed_tokens=self._allowed(encoded, blanks, special_tokens),
            return_dict_in_generate=True,
            **sampling,
        )
        assert not isinstance(output, Tensor)
        rows = zip(templates, encoded, output.sequences, output.log_probs, strict=True)
        return [self._decode(t, e, row, log_probs, output.forwards) for t, e, row, log_probs in rows]

    # ------------------------------------------------------------------ text -> positions

    def _encode(self, template: Template, lengths: list[int]) -> _Encoded:
        ids, blank, eats_space = [self.start_token_id], [-1], []
        for k, piece in enumerate(template.pieces):
            eats = k < template.blanks and bool(self._space_mask.any()) and _ends_in_one_space(piece)
            tokens = self.pieces.encode(piece[:-1] if eats else piece, at_start=k == 0)
            ids += tokens
            blank += [-1] * len(tokens)
            if k < template.blanks:
                ids += [0] * lengths[k]
                blank += [k] * lengths[k]
                eats_space.append(eats)
        return _Encoded(ids, blank, eats_space)

    def _allowed(self, encoded: list[_Encoded], blanks: Tensor, special_tokens: bool) -> AllowedTokens:
        """Mask 0: text. Mask 1: text that brings its own leading space."""
        text = torch.ones_like(self._text_mask) if special_tokens else self._text_mask
        spaced = text & self._space_mask
        index = torch.zeros_like(blanks)
        for row, e in enumerate(encoded):
            for k, eats in enumerate(e.eats_space):
                if eats:
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

    def _decode(self, template: Template, encoded: _Encoded, ids: Tensor, log_probs: Tensor, forwards: int) -> Infill:
        blank = torch.tensor(encoded.blank)
        row, scores = ids[: len(blank)], log_probs[: len(blank)]
        fills = []
        for k in range(template.blanks):
            at_start = k == 0 and not template.pieces[0]
            fill = self.pieces.decode(row[blank == k].tolist(), at_start)
            fills.append(fill.removeprefix(" ") if encoded.eats_space[k] else fill)
        text, offsets = template.fill(fills)
        spans = tuple(
            Span(fill, start, end, float(scores[blank == k].sum()), int((blank == k).sum()))
            for k, (fill, (start, end)) in enumerate(zip(fills, offsets, strict=True))
        )
        return Infill(text, spans, sum(span.log_prob for span in spans), forwards)


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
