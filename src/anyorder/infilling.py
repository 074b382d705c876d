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

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from anyorder.factorization import Factorization
from anyorder.policies import Policy
from anyorder.sampling import AllowedTokens
from anyorder.support import context_length
from anyorder.template import Template

if TYPE_CHECKING:
    from anyorder.modeling import AnyOrderForCausalLM

DEFAULT_LENGTH = 8
_DOCUMENT_STARTS = ("<|endoftext|>",)
_SPACE_MARKS = ("Ġ", "▁")  # how byte-level and SentencePiece vocabularies write a leading space


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
        self.model, self.tokenizer = model, tokenizer
        self.start_token_id = start_token(tokenizer) if start_token_id is None else start_token_id
        self._text_mask, self._space_mask = _vocabulary_masks(tokenizer, model.vocabulary_size)

    @overload
    def __call__(self, text: str, **options: Any) -> Infill: ...
    @overload
    def __call__(self, text: Sequence[str], **options: Any) -> list[Infill]: ...

    def __call__(self, text: str | Sequence[str], **options: Any) -> Infill | list[Infill]:
        """Fill every blank of one text, or of a batch of texts in one go.

        Options:
            blank: the marker, default "___".
            length: tokens of a blank: one number for all, or one for each blank of the text. Default 8.
            group_size: tokens predicted at a step, default 1.
            order: "left_to_right" (default) or "random" order of the blank positions.
            policy: see `policies`; default: the groups of that order.
            special_tokens: allow special tokens inside a blank, default False.
            generator, do_sample, temperature, top_k, top_p, min_p, repetition_penalty: as in `generate`.

        Raises:
            ValueError: no blank, a length that does not fit, an unknown option, a text longer than the context.
        """
        texts = [text] if isinstance(text, str) else list(text)
        if not texts:
            raise ValueError("no text to fill")
        filled = self._fill(texts, **_checked(options))
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
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        **sampling: Any,
    ) -> list[Infill]:
        templates = [Template.parse(text, blank) for text in texts]
        encoded = [self._encode(template, _lengths(length, template.blanks)) for template in templates]
        self._check_context(encoded)
        ids, blanks = _pad([e.ids for e in encoded], 0), _pad([e.blank for e in encoded], -1)
        mask = _pad([[1] * len(e.ids) for e in encoded], 0)
        order_generator = generator if isinstance(generator, torch.Generator) else None
        f = Factorization.infill(blanks >= 0, group_size, order, order_generator, attention_mask=mask)
        output = self.model.generate(
            ids,
            factorization=f,
            policy=policy,
            generator=generator,
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
            tokens = self.tokenizer.encode(piece[:-1] if eats else piece, add_special_tokens=False)
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
                    f"text {number} has {len(e.ids)} tokens with its blanks, the model's context is {limit}: shorten it"
                )

    # ------------------------------------------------------------------ positions -> text

    def _decode(self, template: Template, encoded: _Encoded, ids: Tensor, log_probs: Tensor, forwards: int) -> Infill:
        blank = torch.tensor(encoded.blank)
        row, scores = ids[: len(blank)], log_probs[: len(blank)]
        fills = []
        for k in range(template.blanks):
            fill = self.tokenizer.decode(row[blank == k].tolist(), clean_up_tokenization_spaces=False)
            fills.append(fill.removeprefix(" ") if encoded.eats_space[k] else fill)
        text, offsets = template.fill(fills)
        spans = tuple(
            Span(fill, start, end, float(scores[blank == k].sum()), int((blank == k).sum()))
            for k, (fill, (start, end)) in enumerate(zip(fills, offsets, strict=True))
        )
        return Infill(text, spans, sum(span.log_prob for span in spans), forwards)


def start_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that a text starts with: a document separator if there is one, else the start or end token.

    Raises:
        ValueError: if the tokenizer has none of them.
    """
    vocabulary = tokenizer.get_vocab()
    candidates = [vocabulary.get(name) for name in _DOCUMENT_STARTS]
    for token_id in (*candidates, tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    raise ValueError("the tokenizer has no start or end token: pass start_token_id")


def _vocabulary_masks(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> tuple[Tensor, Tensor]:
    """(V,) bool: ordinary text tokens; and tokens that begin with a space."""
    text, space = torch.zeros(vocabulary, dtype=torch.bool), torch.zeros(vocabulary, dtype=torch.bool)
    special = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    for token, token_id in tokenizer.get_vocab().items():
        if token_id < vocabulary and token_id not in special:
            text[token_id] = True
            space[token_id] = token.startswith(_SPACE_MARKS)
    return text, space


def _checked(options: dict[str, Any]) -> dict[str, Any]:
    known = ["blank", "length", "group_size", "order", "policy", "special_tokens", "generator", "do_sample",
             "temperature", "top_k", "top_p", "min_p", "repetition_penalty"]  # fmt: skip
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ValueError(
                f"unknown option {name!r}; " + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}")
            )
    return options


def _lengths(length: int | Sequence[int], blanks: int) -> list[int]:
    lengths = [length] * blanks if isinstance(length, int) else list(length)
    if isinstance(length, str) or not all(isinstance(n, int) and n >= 1 for n in lengths):
        raise ValueError(f"length must be a number of tokens from 1 up, or one for each blank, got {length!r}")
    if len(lengths) != blanks:
        raise ValueError(f"{len(lengths)} lengths for {blanks} blanks: give one number, or one for each blank")
    return lengths


def _ends_in_one_space(piece: str) -> bool:
    return piece.endswith(" ") and piece != " " and not piece[:-1][-1:].isspace()


def _pad(rows: list[list[int]], value: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])
