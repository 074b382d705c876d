"""Which tokens masked diffusion masks: the absorbing process, as a factorization of one group a document.

Published (MDLM, arXiv 2406.07524; LLaDA, arXiv 2502.09992): t ~ U(0, 1) a document, each of its N tokens is masked with
probability t, its losses weigh 1/t. Here the number of masked tokens is drawn instead: k ~ U{1..N}, any k tokens alike,
weight N/k. That is the same process with t integrated out (P(k) = 1/(N+1), E[1/t | k] = (N+1)/k), so the expectation is
the same and the variance smaller; weights stay at N or below. LLaDA evaluates its likelihoods so.

That is the process in which one token is unmasked at a time. With `group_size` g a step unmasks g tokens, the last one
what is left: of its S = ceil(N/g) steps one is drawn, k tokens are masked before it, it unmasks m of them, and the
weight is S m/k. So quality at fewer steps has a bound, too.

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


def noised(
    factorization: Factorization, generator: Generators = None, group_size: int = 1
) -> tuple[Factorization, Tensor]:
    """Mask some of the predicted tokens of each document, at least one; the others become given.

    In one row the steps of its documents are spread evenly, each of them being uniform (as MDLM's low-discrepancy
    sampler).

    Args:
        factorization: which tokens may be masked: those that it predicts, whatever their groups.
        generator: as in `row_generators`; a row draws the same whatever its batch mates.
        group_size: tokens that a step unmasks.

    Returns:
        the masked tokens as one group, and (B, T) float32 the weight of each token's document.
    """
    sources = row_generators(generator, factorization.batch_size)
    place = factorization.regroup(1, "random", sources).group_ids  # of a predicted token in a random order
    level = torch.stack([_levels(row, source) for row, source in zip(factorization.documents, sources, strict=True)])
    count = _count(factorization)
    steps = (count + group_size - 1) // group_size
    k = count - group_size * (level * steps).floor().to(torch.int64).clamp(max=steps - 1)
    ids = torch.where(factorization.is_predicted, torch.where(place < k, 0, GIVEN), factorization.group_ids)
    return Factorization(ids, factorization.documents), (steps * k.clamp(max=group_size) / k).float()


def largest_group(factorization: Factorization) -> int:
    """Tokens of the largest group of any document; 1 where nothing is predicted."""
    predicted, documents = factorization.is_predicted, factorization.documents
    row, _ = predicted.nonzero(as_tuple=True)
    members = torch.stack([row, documents[predicted], factorization.group_ids[predicted]])
    return int(members.unique(dim=1, return_counts=True)[1].max()) if len(row) else 1


def generator_of(input_ids: Tensor, number: int = 0) -> torch.Generator:
    """A generator that is a function of the tokens and a number: of several processes with the same number each has its
    own."""
    digest = hashlib.sha256(input_ids.cpu().contiguous().numpy().tobytes() + number.to_bytes(8, "big")).digest()
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
