"""Attention of rows to their intervals by PyTorch's FlexAttention.

Knows what `attention.Reads` says of rows by `block_mask`, and nothing else of them.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from anyorder.model.scores import Scores


def attend_by_flex(reads: Any, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
    """`attention.Reads.attend`, by intervals as they are: no mask is made.

    Raises:
        ValueError: for dropout, which the kernel does not have.
    """
    if scores.dropout:
        raise ValueError(f"flex_attention has no dropout: set the model's attention dropout ({scores.dropout}) to 0")
    # Under autocast rotated queries and keys are float32 and values are not; SDPA casts them by itself.
    query, key = query.to(value.dtype), key.to(value.dtype)
    repeats = query.shape[1] // key.shape[1]
    if repeats & (repeats - 1):  # FlexAttention shares key heads only among powers of two
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    cap = None if scores.softcap is None else functools.partial(_cap, scores)
    return _flex_kernel(query.device.type)(
        query,
        key,
        value,
        score_mod=cap,
        block_mask=reads.block_mask(scores.window),
        scale=scores.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        # The kernel for few queries (decoding) does not exist for every shape.
        kernel_options={"FORCE_USE_FLEX_ATTENTION": True} if query.is_cuda else None,
    )


@functools.cache
def _flex_kernel(device_type: str) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    # Compiled, it never stores a score matrix. On the CPU the plain one serves: compiling takes longer than it saves.
    return torch.compile(flex_attention) if device_type == "cuda" else flex_attention


def _cap(scores: Scores, score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return scores.capped(score)
