"""What users pass in, checked: token ids, masks, and whether a factorization fits them."""

from __future__ import annotations

import torch
from torch import Tensor

from anyorder.core.factorization import ABSENT, Factorization


def check_ids(name: str, ids: Tensor) -> None:
    """Raise ValueError unless `ids` are integers in rows."""
    if not isinstance(ids, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(ids).__name__}")
    if ids.ndim != 2 or 0 in ids.shape or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"{name} must be integers of shape (batch, length), got {ids.dtype} {tuple(ids.shape)}")


def real_tokens(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """(B, T) bool on the CPU: False where the mask marks padding."""
    check_ids("input_ids", input_ids)
    if attention_mask is None:
        return torch.ones(input_ids.shape, dtype=torch.bool)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, input_ids has {tuple(input_ids.shape)}"
        )
    return attention_mask.bool().cpu()


def left_to_right(input_ids: Tensor, attention_mask: Tensor | None = None) -> Factorization:
    """The default order of a batch: one token at a time, given the first; padding only on the right."""
    mask = real_tokens(input_ids, attention_mask)
    columns = torch.arange(mask.shape[1])
    if not bool((mask == (columns < mask.sum(dim=1)[:, None])).all()):
        raise ValueError("attention_mask must mark padding on the right: set tokenizer.padding_side = 'right'")
    return Factorization((columns - 1).expand(mask.shape).masked_fill(~mask, ABSENT))


def fitting_ids(input_ids: Tensor, factorization: Factorization, vocabulary: int, limit: int | None) -> Tensor:
    """(B, T) ids on the factorization's device, 0 where absent.

    Args:
        input_ids, factorization: what the user gave.
        vocabulary: ids are below it.
        limit: the longest document that the model can stand on; None: any.

    Raises:
        ValueError: naming the row, the position and the value that do not fit.
    """
    if not isinstance(factorization, Factorization):
        raise ValueError(f"factorization must be a Factorization, got {type(factorization).__name__}")
    check_ids("input_ids", input_ids)
    if input_ids.shape != factorization.group_ids.shape:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)}, the factorization {tuple(factorization.group_ids.shape)}"
        )
    ids = input_ids.to(factorization.device).masked_fill(~factorization.is_present, 0)
    bad = (ids < 0) | (ids >= vocabulary)
    if bool(bad.any()):
        b, t = bad.nonzero()[0].tolist()
        raise ValueError(
            f"row {b}, position {t}: token id {int(ids[b, t])} is outside the vocabulary 0..{vocabulary - 1}"
        )
    columns = torch.arange(factorization.length, device=factorization.device)
    longest = int(((columns - factorization.document_starts) * factorization.is_present).max()) + 1
    if limit is not None and longest > limit:
        raise ValueError(f"{longest} tokens, blanks and new ones included; the model's context is {limit}")
    return ids
