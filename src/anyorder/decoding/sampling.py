"""Logits -> tokens, as pure functions of logits, settings and uniforms.

Randomness comes in as one uniform number a position, drawn before decoding begins (`randomness`). So a row's result
depends neither on its batch mates nor on the order in which positions are filled, and no random state lives here.
Temperature, top-k, top-p, min-p and the repetition penalty are transformers' own.

Shapes: B batch, T columns, N predictions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Integral, Real

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

SMALLEST_TEMPERATURE = 1e-6
"""Below it, logits over temperature leave the range of float32."""


@dataclass(frozen=True)
class AllowedTokens:
    """Which tokens each position may take.

    Args:
        masks: (M, V) bool, the different sets of allowed tokens.
        index: (B, T) int64, the mask of each position.
    """

    masks: Tensor
    index: Tensor

    def __post_init__(self) -> None:
        if self.masks.dtype != torch.bool or self.masks.ndim != 2:
            raise ValueError(
                f"masks must be bool of shape (masks, vocabulary), got {self.masks.dtype} {tuple(self.masks.shape)}"
            )
        if self.index.dtype != torch.int64 or not bool(((self.index >= 0) & (self.index < len(self.masks))).all()):
            raise ValueError(f"index must hold int64 numbers of masks, 0..{len(self.masks) - 1}")
        empty = ~self.masks.any(dim=1)
        if bool(empty.any()):
            raise ValueError(f"mask {int(empty.nonzero()[0])} of the allowed tokens allows none")

    @classmethod
    def all(cls, vocabulary: int, shape: torch.Size) -> AllowedTokens:
        """Any token of V at each of (B, T) positions."""
        return cls(torch.ones(1, vocabulary, dtype=torch.bool), torch.zeros(shape, dtype=torch.int64))

    def without(self, tokens: Sequence[int], where: Tensor) -> AllowedTokens:
        """The same less some tokens, at positions where (B, T) bool `where`.

        Raises:
            ValueError: if that leaves a position nothing.
        """
        used, number = self.index[where].unique(return_inverse=True)
        masks = self.masks[used].clone()
        masks[:, list(tokens)] = False
        index = self.index.clone()
        index[where] = len(self.masks) + number
        return AllowedTokens(torch.cat([self.masks, masks]), index)

    def repeated(self, times: int) -> AllowedTokens:
        """For a batch in which each row stands `times` times in succession."""
        return replace(self, index=self.index.repeat_interleave(times, dim=0))


DRAWING = ("temperature", "top_k", "top_p", "min_p")
"""Settings that have an effect only where tokens are drawn."""


def does_sample(do_sample: bool | None, generator: object, settings: Mapping[str, object]) -> bool:
    """Whether tokens are drawn: as said, or if not said, if a generator or a setting of drawing is given.

    Temperature 0 is the most likely token, whatever else is said.
    """
    if is_number(settings.get("temperature")) and settings["temperature"] == 0:
        return False
    if do_sample is not None:
        return do_sample
    return generator is not None or any(settings.get(name) is not None for name in DRAWING)


@dataclass(frozen=True)
class Sampler:
    """How a token is drawn from logits.

    Args:
        do_sample: False takes the most likely token; True draws.
        temperature, top_k, top_p, min_p: as in transformers, None is off; they need `do_sample`. Temperature 0 is the
            most likely token: it turns `do_sample` and the others off. top_k=0 is off, too.
        repetition_penalty: as in transformers; applies to every token visible to the prediction, on both sides.
        allowed: restricts positions to sets of tokens.

    Raises:
        ValueError: naming the setting and its value.
    """

    do_sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    allowed: AllowedTokens | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.do_sample, bool):
            raise ValueError(f"do_sample must be True or False, got {self.do_sample!r}")
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            check_number(name, getattr(self, name))
        if self.top_k is not None and (not isinstance(self.top_k, Integral) or isinstance(self.top_k, bool)):
            raise ValueError(f"top_k must be a whole number, got {self.top_k!r}")
        if self.top_k == 0:
            object.__setattr__(self, "top_k", None)
        if self.temperature == 0:
            self._processors()  # a value that cannot be meant is refused, whether it has an effect or not
            for name in ("do_sample", *DRAWING):
                object.__setattr__(self, name, False if name == "do_sample" else None)
        elif self.temperature is not None and 0 < self.temperature < SMALLEST_TEMPERATURE:
            raise ValueError(f"temperature is {self.temperature}: for the most likely token say temperature=0")
        if not self.do_sample:
            for name in DRAWING:
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}={getattr(self, name)} has no effect with do_sample=False: leave one out")
        self._processors()  # transformers checks each value

    def _processors(self) -> list[LogitsProcessor]:
        processors: list[LogitsProcessor] = []
        for processor, value in (
            (RepetitionPenaltyLogitsProcessor, self.repetition_penalty),
            (TemperatureLogitsWarper, None if not self.temperature else float(self.temperature)),
            (TopKLogitsWarper, self.top_k),
            (TopPLogitsWarper, self.top_p),
            (MinPLogitsWarper, self.min_p),
        ):
            if value is not None:
                processors.append(processor(value))
        return processors

    @cached_property
    def _that_change(self) -> list[LogitsProcessor]:
        """Those that have an effect. They are called one by one: transformers' own list asks for each one's signature
        in every call, which takes longer than most of them."""
        return self._processors() if self.temperature != 1 else replace(self, temperature=None)._processors()

    def process(
        self,
        logits: Tensor,
        visible: Tensor,
        row: Tensor,
        column: Tensor,
        custom: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """(N, V) logits after every setting; what may not be drawn is -inf.

        Args:
            logits: (N, V) float32.
            visible: (N, any) int64: the tokens visible to each prediction, in any order, repeated or not.
            row, column: (N,) int64: where each prediction belongs.
            custom: changes the logits before temperature and truncation, where transformers has `logits_processor`.
        """
        if self.allowed is not None:
            masks = self.allowed.masks.to(logits.device)[self.allowed.index[row, column].to(logits.device)]
            logits = logits.masked_fill(~masks, -torch.inf)
        visible = visible.to(logits.device)
        penalties = 0 if self.repetition_penalty is None else 1
        for processor in self._that_change[:penalties]:
            logits = processor(visible, logits)
        logits = logits if custom is None else custom(logits)
        for processor in self._that_change[penalties:]:
            logits = processor(visible, logits)
        return logits

    def probs(self, logits: Tensor) -> Tensor | None:
        """(N, V) float32 that tokens are drawn by, of (N, V) processed logits; None: the most likely one is taken."""
        return logits.softmax(dim=-1, dtype=torch.float32) if self.do_sample else None

    def draw(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """(N,) tokens of (N, V) processed logits: see `drawn`."""
        return drawn(logits, self.probs(logits), uniform)


def drawn(logits: Tensor, probs: Tensor | None, uniform: Tensor) -> Tensor:
    """(N,) tokens: the argmax, or the inverse of the cumulative distribution at `uniform` in [0, 1).

    Args:
        logits: (N, V), processed.
        probs: (N, V) of `Sampler.probs`.
        uniform: (N,) float64; unused when greedy.
    """
    return logits.argmax(dim=-1) if probs is None else inverse_cdf(probs, uniform)


def inverse_cdf(weights: Tensor, uniform: Tensor) -> Tensor:
    """(N,) tokens: the inverse of the cumulative distribution at (N,) `uniform` in [0, 1).

    Args:
        weights: (N, V), at least 0, not all 0; they need not sum to 1.
        uniform: (N,) float64.
    """
    cumulative = in_double(weights).cumsum(dim=-1)
    threshold = uniform.to(cumulative.device)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0]


def in_double(tensor: Tensor) -> Tensor:
    """The same in float64, on the CPU if its device has none (MPS): sums over a vocabulary need it, in one order."""
    return (tensor if tensor.device.type in ("cpu", "cuda") else tensor.cpu()).double()


def is_number(value: object) -> bool:
    """Whether something is a finite number; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def check_number(name: str, value: object) -> None:
    """Raise ValueError unless it is a finite number, or None."""
    if value is not None and not is_number(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")


def token_log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """(N,) float32: log softmax of (N, V) logits at (N,) tokens."""
    return logits.float().log_softmax(dim=-1).gather(1, tokens[:, None])[:, 0]
