"""How good the continuations are: the base model's own judgement, variety, and likeness to a reference."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

import torch
from torch import Tensor
from transformers import PreTrainedModel

from anyorder.evaluation import text_metrics

ROWS = 4
"""Sequences that are scored in one forward."""


@torch.inference_mode()
def nats_per_token(base: PreTrainedModel, sequences: Sequence[Tensor], new: int) -> float:
    """Mean negative log-likelihood of the last `new` tokens of each sequence under a left-to-right model.

    Lower is likelier, not better: the model's own samples have its entropy, and text that repeats itself less.
    """
    total = 0.0
    for ids in torch.stack(list(sequences)).split(ROWS):
        ids = ids.to(base.device)
        logits = base(ids, use_cache=False, logits_to_keep=new + 1).logits[:, :-1].float()
        total -= float(logits.log_softmax(-1).gather(2, ids[:, -new:, None]).double().sum())
    return total / (len(sequences) * new)


def distinct(sequences: Sequence[Tensor], new: int, n: int = 2) -> float:
    """Share of different n-grams among all n-grams of the new tokens of each sequence, averaged."""
    return mean(text_metrics.distinct(ids[-new:].tolist(), n) for ids in sequences)


def rouge_l(texts: Sequence[str], references: Sequence[str]) -> float:
    """Mean ROUGE-L F1: see `text_metrics.rouge`."""
    pairs = zip(texts, references, strict=True)
    return mean(text_metrics.rouge(text, reference)["rougeL"] for text, reference in pairs)
