"""How likely a text is to a masked diffusion model, at most: a Monte Carlo bound with its spread.

    -log P(x | given) <= E_k E_{M, |M| = k} N/k * sum_{i in M} -log p(x_i | x outside M),    k ~ U{1..N}

(LLaDA, arXiv 2502.09992, appendix B.5). The right side is also the mean, over all orders of the N tokens, of the
negative log-likelihood of one token at a time: the any-order model's exact loss in random order is the same quantity.
With `group_size` the same holds for that many tokens a step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anyorder.core.factorization import Factorization
from anyorder.core.rng import Generators, row_generators
from anyorder.evaluation.baselines.masked_diffusion import MaskedDiffusionLM
from anyorder.evaluation.baselines.noise import blanks, noised


@dataclass(frozen=True)
class Bound:
    """An estimate of -ELBO of each row, in nats; that bounds -log P(predicted | given) from above."""

    mean: Tensor
    """(B,) float64: over samples. 0 where nothing is predicted."""
    standard_error: Tensor
    """(B,) float64: of that mean; the bound itself holds in expectation only."""


@torch.no_grad()
def negative_elbo(
    model: MaskedDiffusionLM,
    input_ids: Tensor,
    given: Tensor,
    samples: int = 128,
    generator: Generators = None,
    attention_mask: Tensor | None = None,
    group_size: int = 1,
) -> Bound:
    """Estimate the bound, one document a row.

    Args:
        model: in evaluation mode.
        input_ids: (B, T) int64.
        given: (B, T) bool: what is conditioned on, never masked.
        samples: masks a row, at least 2: as many forwards of the batch.
        generator: one a row, or one that seeds them: a row's estimate does not depend on its batch mates.
        attention_mask: (B, T), 0 marks tokens that take no part.
        group_size: tokens a step of the sampler that is bounded, in random order.

    Raises:
        ValueError: if ids, `given` and the model do not fit each other, for fewer than two samples or no token a step.
    """
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 2:
        raise ValueError(f"samples must be a whole number of at least 2 (a spread needs two), got {samples!r}")
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1:
        raise ValueError(f"group_size must be a whole number of at least 1, got {group_size!r}")
    order = blanks(input_ids, given, attention_mask)
    sources = row_generators(generator, order.batch_size)
    drawn = torch.stack([_sample(model, input_ids, *noised(order, sources, group_size)) for _ in range(samples)])
    return Bound(drawn.mean(dim=0), drawn.std(dim=0) / samples**0.5)


def _sample(model: MaskedDiffusionLM, input_ids: Tensor, masked: Factorization, weights: Tensor) -> Tensor:
    """(B,) float64 on the CPU: one weighted sum of losses a row."""
    found = model.predictions(input_ids, masked)
    losses = -model.predictor.log_probs(found, input_ids)
    return (losses.cpu() * weights.cpu()).double().sum(dim=1)
