"""Which tokens masked diffusion masks: the absorbing process, as a factorization of one group a document.

Published (MDLM, arXiv 2406.07524; LLaDA, arXiv 2502.09992): t ~ U(0, 1) a document, each of its N tokens is masked with
probability t, its losses weigh 1/t. Here the number of masked tokens is drawn instead: k ~ U{1..N}, any k tokens alike,
weight N/k. That is the same process with t integrated out (P(k) = 1/(N+1), E[1/t | k] = (N+1)/k), so the expectation is
the same and the variance smaller; weights stay below N. LLaDA evaluates its likelihoods so.

Knows positions only: no tokens, no model.

Shapes: B rows, T columns, D documents in a row.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from anyorder.core.factorization import ABSENT, GIVEN, Factorization
from anyorder.core.rng import Generators, row_generators
from anyorder.core.validation import check_ids, real_tokens


def blanks(input_ids: Tensor, given: Tensor, attention_mask: Tensor | None = None) -> Factorization:
    """Everything that is not given, as one group, on the CPU.

    Args:
        input_ids: (B, T) int64.
        given: (B, T) bool: tokens that are never masked; the first of every row must be one.
        attention_mask: (B, T), 0 marks tokens that take no part; None: all do.

    Raises:
        ValueError: if the shapes differ, `given` is not bool, or a row has nothing given.
    """
    check_ids("input_ids", input_ids)
    if given.dtype != torch.bool or given.shape != input_ids.shape:
        raise ValueError(
            f"given must be bool of the shape of input_ids, {tuple(input_ids.shape)}; got {given.dtype} "
            f"{tuple(given.shape)}"
        )
    present = real_tokens(input_ids, attention_mask)
    return Factorization(torch.where(given.cpu(), GIVEN, 0).masked_fill(~present, ABSENT))


def noised(factorization: Factorization, generator: Generators = None) -> tuple[Factorization, Tensor]:
    """Mask some of the predicted tokens of each document, at least one; the others become given.

    In one row the levels k/N of its documents are spread evenly, each of them being uniform (as MDLM's low-discrepancy
    sampler).

    Args:
        factorization: which tokens may be masked: those that it predicts, whatever their groups.
        generator: as in `row_generators`; a row draws the same whatever its batch mates. None: torch's global one,
            which training restores when it resumes.

    Returns:
        the masked tokens as one group, and (B, T) float32 the weight N/k of each token's document.
    """
    sources = row_generators(generator, factorization.batch_size)
    place = factorization.regroup(1, "random", sources).group_ids  # of a predicted token in a random order
    level = torch.stack([_levels(row, source) for row, source in zip(factorization.documents, sources, strict=True)])
    count = _count(factorization)
    k = 1 + (level * count).floor().to(torch.int64).clamp(max=count - 1)
    open_, predicted = place < k, factorization.is_predicted
    ids = torch.where(predicted, torch.where(open_, 0, GIVEN), factorization.group_ids)
    return Factorization(ids, factorization.documents), (count / k).float()


def generator_of(input_ids: Tensor) -> torch.Generator:
    """A generator that is a function of the tokens, so that one batch is always measured under the same masks."""
    digest = hashlib.sha256(input_ids.cpu().contiguous().numpy().tobytes()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _levels(documents: Tensor, source: torch.Generator) -> Tensor:
    """(T,) float64 in [0, 1), one number a document: evenly spaced from a uniform offset."""
    offset = torch.rand(1, generator=source, dtype=torch.float64, device=source.device).cpu()
    return (offset + documents.cpu().double() / (int(documents.max()) + 1)) % 1


def _count(factorization: Factorization) -> Tensor:
    """(B, T) int64: how many tokens of each column's document are predicted, at least 1."""
    documents = factorization.documents
    counts = torch.zeros(documents.shape[0], int(documents.max()) + 1, dtype=torch.int64, device=documents.device)
    counts.scatter_add_(1, documents, factorization.is_predicted.to(torch.int64))
    return counts.gather(1, documents).clamp(min=1)
