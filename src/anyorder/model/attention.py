"""Intervals -> attention, inside an unmodified Hugging Face decoder.

`anyorder_attention` is registered with transformers' `AttentionInterface`. With a `Reads` object among its keyword
arguments it slices keys and values to the content rows, appends them to the store, and lets every row read its
interval: a boolean mask for SDPA, two comparisons in a `mask_mod` for FlexAttention. Without one it is the base
model's ordinary causal attention, so the wrapped model stays usable as such.

This module knows intervals, positions and windows. It does not know groups, recipes or tokens.

Shapes: B batch, H query heads, G key/value heads, R rows, C content rows, K keys, D head dimension.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from anyorder.core.layout import Rows
from anyorder.model.flex_attention import attend_by_flex
from anyorder.model.kv_cache import KeyValueStore
from anyorder.model.scores import Scores

NAME = "anyorder"
IMPLEMENTATIONS = ("sdpa", "flex_attention")

MASK_ELEMENTS = 1 << 22
"""Largest boolean mask, in elements, that one SDPA call is given."""

BLOCK_ROWS = 64
"""Rows of one SDPA call on the CPU: each block reads only the keys between its lowest and its highest interval, so
packed documents do not pay for each other, nor early tokens for late ones. Elsewhere a call costs more than what it
reads, and only MASK_ELEMENTS bounds the blocks."""

KEPT_ELEMENTS = 1 << 22
"""Masks of a forward that have no more elements in all are made once and kept for all its layers; larger ones are made
block by block in every layer, which costs little beside the attention itself, and let go at once."""

_UNSUPPORTED = ("s_aux", "position_bias", "sinks")


Block = tuple[slice, slice, Tensor | None]
"""Some rows of a forward, the keys they read, and which of those each of them reads."""


class Reads:
    """What the rows of one forward may read.

    Args:
        rows: the layout; its tensors may stand on the CPU whatever the model's device.
        key_positions: (B, K) int64, position within its document of the token at each rank (for windows).
        device: of the model.
        store: where content keys and values are kept, or None: this forward holds all of them itself.
        implementation: "sdpa" or "flex_attention".
    """

    def __init__(
        self,
        rows: Rows,
        key_positions: Tensor,
        device: torch.device,
        store: KeyValueStore | None = None,
        implementation: str = "sdpa",
    ):
        assert implementation in IMPLEMENTATIONS
        self.implementation = implementation
        self.row_count = rows.lo.numel()
        self.content_count = rows.content_count
        self.key_count = int(rows.hi.max())
        self.calls: list[tuple[int, int | None]] = []  # (layer, sliding window), in the order they came
        self._rows, self._key_positions, self._device, self._store = rows, key_positions, device, store
        self._ranks = rows.ranks.to(device) if store is not None else rows.ranks
        self._start = common_start(rows.ranks, store.capacity) if store is not None else None
        self._spans: dict[int, list[tuple[slice, slice]]] = {}
        self._kept: dict[tuple[int | None, int, torch.dtype], list[Block]] = {}
        self._block_masks: dict[int | None, Any] = {}

    @functools.cached_property
    def open_rows(self) -> Tensor | slice | None:
        """The rows with an open gate among the flattened rows: (N,) int64 numbers; or a slice, of all, or (without
        gradients) of neighbours; None: there are none. In training none is an empty tensor: adapters take part in every
        step, as several processes expect."""
        gates = self._rows.gates.flatten()
        if bool(gates.all()):
            return slice(None)
        numbers = gates.nonzero()[:, 0]
        if torch.is_grad_enabled():
            return numbers.to(self._device)
        if not len(numbers):
            return None
        first, end = int(numbers[0]), int(numbers[-1]) + 1
        return slice(first, end) if end - first == len(numbers) else numbers.to(self._device)

    def keys_values(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """(B, G, K, D) keys and values of the content rows, stored ones included, in generation order."""
        key, value = key[:, :, : self.content_count], value[:, :, : self.content_count]
        if self._store is not None:
            key, value = self._store.append(layer, key, value, self._ranks, self._start)
        return key[:, :, : self.key_count], value[:, :, : self.key_count]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        """(B, H, R, D): what the rows' queries read of keys and values, (B, G, K, D) of `keys_values`."""
        run = attend_by_flex if self.implementation == "flex_attention" else attend_by_blocks
        return run(self, query, key, value, scores)

    def stacks_heads(self, repeats: int) -> bool:
        """Whether `repeats` heads that share a key head are stacked as rows, each with its copy of the mask.

        A step of decoding then reads its keys once for all of them. SDPA's kernel for the CPU shares keys and masks
        among heads by itself, which is worth more where masks are large.
        """
        return self._device.type != "cpu" or self._are_small(repeats)

    def plan(self, window: int | None, repeats: int, dtype: torch.dtype) -> Iterator[Block]:
        """Blocks of rows, the keys each reads, and its mask (None: reads them all).

        Masks have shape (B, 1, repeats * rows, keys): `repeats` heads that share a key head are stacked as rows. On the
        CPU they are additive in `dtype`, which its kernel wants, unless that is boolean; elsewhere they are boolean.
        """
        kept = self._kept.get((window, repeats, dtype))
        if kept is not None:
            yield from kept
            return
        blocks, keep = self._blocks_of_rows(repeats), self._are_small(repeats)
        # Where gradients flow, every layer's attention keeps its masks for the backward pass: better the same ones.
        made: list[Block] | None = [] if keep or torch.is_grad_enabled() else None
        # Masks that grow from block to block would each leave a hole in the heap that the next one does not fit in.
        largest = max((rows.stop - rows.start) * (keys.stop - keys.start) for rows, keys in blocks)
        reused = made is None and self._device.type == "cpu"
        scratch = torch.empty(largest * repeats * len(self._rows.lo) if reused else 0, dtype=dtype)
        for rows, keys in blocks:
            block = rows, keys, self._mask(rows, keys, window, repeats, dtype, scratch)
            if made is not None:
                made.append(block)
                if len(made) == len(blocks):  # before the last is handed out: nobody may ask for another behind it
                    self._kept[window, repeats, dtype] = made
            yield block

    def _are_small(self, repeats: int) -> bool:
        """Whether the masks of all rows are worth keeping."""
        blocks = self._blocks_of_rows(repeats)
        elements = sum((rows.stop - rows.start) * (keys.stop - keys.start) for rows, keys in blocks)
        return elements * repeats * len(self._rows.lo) <= KEPT_ELEMENTS

    def _blocks_of_rows(self, repeats: int) -> list[tuple[slice, slice]]:
        """The rows in blocks, and for each the keys between its lowest and its highest interval."""
        if repeats in self._spans:
            return self._spans[repeats]
        B, R = self._rows.lo.shape
        size = max(1, MASK_ELEMENTS // (B * repeats * self.key_count))
        size = min(BLOCK_ROWS, size) if self._device.type == "cpu" else size
        C = self.content_count  # a block of the last content and the first queries would read everything
        blocks = self._spans[repeats] = []
        for begin, end in ((0, C), (C, R)):
            for first in range(begin, end, size):
                rows = slice(first, min(first + size, end))
                blocks.append((rows, slice(int(self._rows.lo[:, rows].min()), int(self._rows.hi[:, rows].max()))))
        return blocks

    def _mask(
        self, rows: slice, keys: slice, window: int | None, repeats: int, dtype: torch.dtype, scratch: Tensor
    ) -> Tensor | None:
        """The mask of `plan`; one of floats lies in `scratch` if that is not empty."""
        lo, hi = self._rows.lo[:, rows], self._rows.hi[:, rows]
        if window is None and bool((lo == keys.start).all()) and bool((hi == keys.stop).all()):
            return None
        if dtype == torch.bool or self._device.type != "cpu":
            return for_heads(self._which(rows, keys, window), repeats)
        parts = [keys]
        if window is None and int(lo.max()) < int(hi.min()):  # all rows read what lies between: often nearly everything
            parts = [slice(keys.start, int(lo.max())), slice(int(hi.min()), keys.stop)]
        shape = len(lo), 1, repeats, lo.shape[1], keys.stop - keys.start
        out = scratch[: math.prod(shape)].view(shape).zero_() if len(scratch) else torch.zeros(shape, dtype=dtype)
        for part in parts:
            unread = ~self._which(rows, part, window)[:, None, None]
            out[..., part.start - keys.start : part.stop - keys.start].masked_fill_(unread, -torch.inf)
        return out.flatten(2, 3)

    def _which(self, rows: slice, keys: slice, window: int | None) -> Tensor:
        """(B, R, K) bool on the model's device: which of these keys each of these rows reads."""
        rank = torch.arange(keys.start, keys.stop, device=self._device)
        lo, hi = self._rows.lo[:, rows], self._rows.hi[:, rows]
        tensors = lo, hi, self._rows.positions[:, rows], self._key_positions[:, keys]
        lo, hi, here, there = (tensor.to(self._device) for tensor in tensors)
        return which_are_read(lo, hi, rank, here, there, window)

    def block_mask(self, window: int | None) -> Any:
        """The same rule as a FlexAttention `BlockMask`, which skips the blocks that no row reads."""
        if window not in self._block_masks:
            from torch.nn.attention.flex_attention import and_masks, create_block_mask

            rows, device = self._rows, self._device
            lo, hi, here = rows.lo.to(device), rows.hi.to(device), rows.positions.to(device)
            there = self._key_positions.to(device)

            def interval(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
                return (k >= lo[b, q]) & (k < hi[b, q])

            def near(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
                assert window is not None
                return (here[b, q] - there[b, k]).abs() < window

            B, R = rows.lo.shape
            rule = interval if window is None else and_masks(interval, near)
            self._block_masks[window] = create_block_mask(rule, B, None, R, self.key_count, device=device)
        return self._block_masks[window]


def which_are_read(lo: Tensor, hi: Tensor, rank: Tensor, here: Tensor, there: Tensor, window: int | None) -> Tensor:
    """(B, R, K) bool: which keys each row reads, by its interval and, if there is one, the sliding window.

    Args:
        lo, hi: (B, R) int64, the intervals.
        rank: (K,) int64, of the keys.
        here, there: (B, R) and (B, K) int64, positions of rows and keys.
        window: positions; None: no window.
    """
    mask = (rank >= lo[:, :, None]) & (rank < hi[:, :, None])
    return mask if window is None else mask & ((here[:, :, None] - there[:, None]).abs() < window)


def for_heads(mask: Tensor, repeats: int) -> Tensor:
    """(B, R, K) -> (B, 1, repeats * R, K): the heads that share a key head are stacked as rows."""
    B, R, K = mask.shape
    return mask[:, None, None].expand(B, 1, repeats, R, K).reshape(B, 1, repeats * R, K)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as the numbers that are added to scores: 0, or -inf where it is False."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)


def anyorder_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    anyorder_reads: Reads | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function of transformers' interface: (B, H, R, D) queries in, (B, R, H, D) out.

    A row whose window holds none of the keys in its interval reads nothing and gets zeros.
    """
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(f"{type(module).__name__} uses {name}, which any-order attention does not implement")
    scores = Scores(scaling, dropout, sliding_window, softcap)
    if anyorder_reads is None:
        if softcap is not None:
            return _causal_softcap(query, key, value, attention_mask, scores), None
        kwargs.pop("is_causal", None)
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
        return out, None
    layer = _layer_index(module)
    anyorder_reads.calls.append((layer, sliding_window))
    key, value = anyorder_reads.keys_values(layer, key, value)
    out = anyorder_reads.attend(query, key, value, scores)
    return out.transpose(1, 2).contiguous(), None


def attend_by_blocks(reads: Any, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
    """`Reads.attend` by SDPA on the CPU or a GPU.

    Args:
        reads: with `plan` and `stacks_heads` of `Reads`.
    """
    B, H, R, D = query.shape
    G, is_capped = key.shape[1], scores.softcap is not None
    repeats = H // G if is_capped or reads.stacks_heads(H // G) else 1
    grouped = query.reshape(B, H // repeats, repeats, R, D)
    outputs: list[Tensor] = []
    whole: Tensor | None = None
    for rows, keys, mask in reads.plan(scores.window, repeats, torch.bool if is_capped else query.dtype):
        q = grouped[:, :, :, rows].reshape(B, H // repeats, -1, D)
        k, v = key[:, :, keys], value[:, :, keys]
        if is_capped:
            some = _explicit(q, k, v, mask, scores)
        else:
            some = nn.functional.scaled_dot_product_attention(
                q, k, v, mask, scores.dropout, scale=scores.scaling, enable_gqa=q.shape[1] != G
            )
        some = some.reshape(B, H, -1, value.shape[-1])
        if rows == slice(0, R):
            return some
        if torch.is_grad_enabled():
            outputs.append(some)
            continue
        if whole is None:
            whole = some.new_empty(B, H, R, some.shape[-1])
        whole[:, :, rows] = some
    return torch.cat(outputs, dim=2) if whole is None else whole


def _explicit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scores: Scores) -> Tensor:
    """Attention with capped scores (Gemma 2), which SDPA does not offer."""
    found = scores.capped((q @ k.transpose(-1, -2)) * scores.factor(q.shape[-1]))
    if mask is not None and mask.dtype != torch.bool:  # additive: someone else's, in the plain base model
        found = found + mask
    elif mask is not None:
        found = found.masked_fill(~mask, torch.finfo(found.dtype).min)
    wide = torch.promote_types(found.dtype, torch.float32)  # float64's least number is no number in float32
    weights = found.softmax(dim=-1, dtype=wide).to(q.dtype)
    if mask is not None and mask.dtype == torch.bool:
        weights = weights * mask  # a row that reads nothing gets zeros, as in SDPA
    return nn.functional.dropout(weights, scores.dropout) @ v


def _causal_softcap(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scores: Scores) -> Tensor:
    R, repeats = query.shape[2], query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    if mask is None:  # transformers leaves the mask out where causality says it all
        K = key.shape[2]
        mask = torch.ones(R, K, dtype=torch.bool, device=query.device).tril(K - R)
    return _explicit(query, key, value, mask, scores).transpose(1, 2).contiguous()


def _layer_index(module: nn.Module) -> int:
    index = getattr(module, "layer_idx", None)
    if index is None:
        raise ValueError(f"{type(module).__name__} has no layer_idx, by which its keys and values are stored")
    return int(index)


def common_start(ranks: Tensor, capacity: int) -> int | None:
    """The first rank, if every row of the batch stores the same (B, C) ranks one after the other; else None."""
    if ranks.shape[1] == 0:
        return 0
    start = int(ranks[0, 0])
    if start + ranks.shape[1] > capacity:
        return None
    if ranks.numel() == 1:  # one token at a time: nothing to compare
        return start
    expected = torch.arange(start, start + ranks.shape[1], device=ranks.device)
    return start if bool((ranks == expected).all()) else None


AttentionInterface.register(NAME, anyorder_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
