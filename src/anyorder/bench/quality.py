"""How good the continuations are: the base model's own judgement, variety, and likeness to a reference, averaged."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from torch import Tensor
from transformers import PreTrainedModel

from anyorder.evaluation import text_metrics
from anyorder.evaluation.judge import nats_of_ids


def nats_per_token(base: PreTrainedModel, sequences: Sequence[Tensor], new: int) -> float:
    """Mean negative log-likelihood of the last `new` tokens of each sequence under a causal LM: see `judge`."""
    total = sum(nats_of_ids(base, [ids.tolist() for ids in sequences], [len(ids) - new for ids in sequences]))
    return total / (len(sequences) * new)


def distinct(sequences: Sequence[Tensor], new: int, n: int = 2) -> float:
    """Share of different n-grams among all n-grams of the new tokens of each sequence, averaged."""
    return mean(text_metrics.distinct(ids[-new:].tolist(), n) for ids in sequences)


def rouge_l(texts: Sequence[str], references: Sequence[str]) -> float:
    """Mean ROUGE-L F1: see `text_metrics.rouge`."""
    pairs = zip(texts, references, strict=True)
    return mean(text_metrics.rouge(text, reference)["rougeL"] for text, reference in pairs)
