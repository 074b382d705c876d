"""How good the continuations are: the base model's own judgement, variety, and likeness to a reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

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
    """Share of different n-grams among all n-grams of the new tokens of each sequence, averaged (Li et al. 2016)."""
    shares = []
    for ids in sequences:
        grams = ids[-new:].unfold(0, n, 1)
        shares.append(len(grams.unique(dim=0)) / len(grams))
    return sum(shares) / len(shares)


def rouge_l(texts: Sequence[str], references: Sequence[str]) -> float:
    """Mean ROUGE-L F1 by Google's rouge-score, with stemming.

    Raises:
        ValueError: if rouge-score is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ValueError("ROUGE needs rouge-score: pip install 'anyorder[bench]'") from error
    score: Callable[[str, str], dict[str, tuple[float, float, float]]] = RougeScorer(["rougeL"], use_stemmer=True).score
    return sum(score(reference, text)["rougeL"][2] for text, reference in zip(texts, references, strict=True)) / len(
        texts
    )
