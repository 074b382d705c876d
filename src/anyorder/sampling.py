"""Logits -> tokens, as pure functions of logits, settings and uniforms.

Randomness comes in as one uniform number a position, drawn before decoding begins from an explicit generator a row.
So a row's result depends neither on its batch mates nor on the order in which positions are filled, and no random
state lives here. Temperature, top-k, top-p, min-p and the repetition penalty are transformers' own.

Shapes: B batch, T columns, N predictions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


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
        empty = ~self.masks.any(dim=1)
        if bool(empty.any()):
            raise ValueError(f"mask {int(empty.nonzero()[0])} of the allowed tokens allows none")


@dataclass(frozen=True)
class Sampler:
    """How a token is drawn from logits.

    Args:
        do_sample: False takes the most likely token; True draws.
        temperature, top_k, top_p, min_p: as in transformers, None is off; they need `do_sample`.
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
        if self.temperature == 0:
            raise ValueError("temperature is 0: for the most likely token use do_sample=False without a temperature")
        if not self.do_sample:
            for name in ("temperature", "top_k", "top_p", "min_p"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}={getattr(self, name)} has no effect with do_sample=False: leave one out")
        self._processors()  # transformers checks each value

    def _processors(self) -> LogitsProcessorList:
        processors = LogitsProcessorList()
        for processor, value in (
            (RepetitionPenaltyLogitsProcessor, self.repetition_penalty),
            (TemperatureLogitsWarper, self.temperature),
            (TopKLogitsWarper, self.top_k),
            (TopPLogitsWarper, self.top_p),
            (MinPLogitsWarper, self.min_p),
        ):
            if value is not None:
                processors.append(processor(value))
        return processors

    def process(self, logits: Tensor, known: Tensor, row: Tensor, column: Tensor) -> Tensor:
        """(N, V) logits after every setting; what may not be drawn is -inf.

        Args:
            logits: (N, V) float32.
            known: (B, T) int64: the tokens visible to the prediction; unknown places repeat a visible one.
            row, column: (N,) int64: where each prediction belongs.
        """
        if self.allowed is not None:
            masks = self.allowed.masks.to(logits.device)[self.allowed.index[row, column].to(logits.device)]
            logits = logits.masked_fill(~masks, -torch.inf)
        processors = self._processors()
        return processors(known[row].to(logits.device), logits) if processors else logits

    def draw(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """(N,) tokens: the argmax, or the inverse of the cumulative distribution at `uniform` in [0, 1).

        Args:
            logits: (N, V), processed.
            uniform: (N,) float64; unused when greedy.
        """
        if not self.do_sample:
            return logits.argmax(dim=-1)
        cumulative = logits.softmax(dim=-1, dtype=torch.float32).double().cumsum(dim=-1)
        threshold = uniform.to(logits.device)[:, None] * cumulative[:, -1:]
        return torch.searchsorted(cumulative, threshold, right=True)[:, 0]


def uniforms(
    lengths: Sequence[int], columns: int, generator: torch.Generator | Sequence[torch.Generator] | None
) -> Tensor:
    """(B, T) float64 in [0, 1): one number a position.

    Args:
        lengths: of the B rows; a row draws exactly its own length, whatever the padding.
        columns: T.
        generator: one a row; or a single one, which seeds one a row; or None, the global generator.
    """
    if generator is None or isinstance(generator, torch.Generator):
        device = "cpu" if generator is None else generator.device
        seeds = [int(torch.randint(2**62, (1,), generator=generator, device=device)) for _ in lengths]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    else:
        generators = list(generator)
        if len(generators) != len(lengths):
            raise ValueError(f"{len(generators)} generators for {len(lengths)} rows: give one, or one a row")
    out = torch.zeros(len(lengths), columns, dtype=torch.float64)
    for row, length, source in zip(out, lengths, generators, strict=True):
        row[:length] = torch.rand(length, generator=source, dtype=torch.float64, device=source.device).cpu()
    return out
