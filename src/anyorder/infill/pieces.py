"""Text in the middle of a text: encode and decode a piece as if something stood in front of it.

Byte-level vocabularies need nothing special. SentencePiece-style tokenizers put a space in front of whatever they
encode and drop one from whatever they decode; a piece behind a blank must have neither, so it is handled behind an
anchor that is taken off again.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

DOCUMENT_STARTS = ("<|endoftext|>",)
_SPACE_MARKS = ("Ġ", "▁")  # how byte-level and SentencePiece vocabularies write a leading space
_ANCHOR = "\n"


class Pieces:
    """A tokenizer for pieces of text.

    Args:
        tokenizer: of the base model.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer

    def encode(self, piece: str, at_start: bool = False) -> list[int]:
        """Ids of a piece, without special tokens; `at_start`: nothing but a start token stands in front of it."""
        if not piece:
            return []
        if at_start or not self._adds_space:
            return self.tokenizer.encode(piece, add_special_tokens=False)
        anchor = self.tokenizer.encode(_ANCHOR, add_special_tokens=False)
        ids = self.tokenizer.encode(_ANCHOR + piece, add_special_tokens=False)
        if ids[: len(anchor)] != anchor:  # the anchor grew together with the piece: the space is the lesser evil
            return self.tokenizer.encode(piece, add_special_tokens=False)
        return ids[len(anchor) :]

    def decode(self, ids: list[int], at_start: bool = False) -> str:
        """The text that the ids add to what stands in front of them."""
        if at_start or not self._adds_space:
            return self._decode(ids)
        anchor = self.tokenizer.encode(_ANCHOR, add_special_tokens=False)
        return self._decode(anchor + ids).removeprefix(self._decode(anchor))

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    @cached_property
    def _adds_space(self) -> bool:
        ids = self.tokenizer.encode("a", add_special_tokens=False)
        return bool(ids) and str(self.tokenizer.convert_ids_to_tokens(ids[0])).startswith(_SPACE_MARKS)

    def start_token(self) -> int:
        """The id that a text starts with: a document separator if there is one, else the start or end token.

        Raises:
            ValueError: if the tokenizer has none of them.
        """
        vocabulary = self.tokenizer.get_vocab()
        candidates = [vocabulary.get(name) for name in DOCUMENT_STARTS]
        for token_id in (*candidates, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token_id is not None:
                return int(token_id)
        raise ValueError("the tokenizer has no start or end token: pass start_token_id")

    def masks(self, vocabulary: int) -> tuple[Tensor, Tensor]:
        """(V,) bool: the tokens of ordinary text; and those of them that begin with a space.

        Raises:
            ValueError: if the tokenizer has ids that a vocabulary of this size does not.
        """
        tokens = self.tokenizer.get_vocab()
        if max(tokens.values(), default=0) >= vocabulary:
            raise ValueError(
                f"the tokenizer has ids up to {max(tokens.values())}, the model's vocabulary has {vocabulary}: "
                "they do not belong together"
            )
        text, space = torch.zeros(vocabulary, dtype=torch.bool), torch.zeros(vocabulary, dtype=torch.bool)
        added = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        special = added | set(self.tokenizer.all_special_ids)
        for token, token_id in tokens.items():
            if token_id not in special:
                text[token_id] = True
                space[token_id] = token.startswith(_SPACE_MARKS)
        return text, space
