"""What tasks ask, asked of a masked diffusion model: a bound in place of a likelihood, its own sampler in place of a
policy.

Importing this module lets `questions.answer` and `questions.write` take such a model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from anyorder.core.factorization import Factorization
from anyorder.decoding.policies import Policy
from anyorder.decoding.policies.dynamic import Dynamic
from anyorder.evaluation.baselines.diffusion_bound import negative_elbo
from anyorder.evaluation.baselines.diffusion_sampling import ORDERS, fill
from anyorder.evaluation.baselines.masked_diffusion import MaskedDiffusionLM
from anyorder.evaluation.baselines.noise import generator_of
from anyorder.evaluation.batches import padded
from anyorder.evaluation.questions import Question, Written, answer, of_like_length, write
from anyorder.evaluation.task import Task
from anyorder.scoring import TOKENS_AT_ONCE

SAMPLES = 8
"""Masks a question; as many forwards, where an any-order model takes one."""


def check(tasks: Sequence[Task], policy: Policy, engine: str = "auto") -> None:
    """Raise ValueError for a task that masked diffusion cannot be asked, or a policy or engine that it has not."""
    if engine not in ("auto", "eager"):
        raise ValueError(f"a masked diffusion model has no steps for engine={engine!r}: leave it out")
    for task in tasks:
        if not task.of_controls:
            raise ValueError(f"task {task.name} asks for what a masked diffusion model has not: leave it out")
    _how(policy)


@answer.register
def _(
    model: MaskedDiffusionLM,
    questions: Sequence[Question],
    group_size: int = 1,
    tokens_at_once: int = TOKENS_AT_ONCE,
) -> list[float]:
    """Estimates of a lower bound of log P of each question's targets, in random order, `group_size` tokens a step; the
    masks of each are a function of its tokens."""
    found: dict[int, float] = {}
    for numbers in of_like_length(questions, tokens_at_once):
        some = [questions[n] for n in numbers]
        ids, given, present = _asked(some)
        sources = [generator_of(torch.tensor(one.ids)) for one in some]
        bound = negative_elbo(model, ids, given, SAMPLES, sources, present, group_size)
        found |= zip(numbers, (-bound.mean).tolist(), strict=True)
    return [found[n] for n in range(len(questions))]


@write.register
def _(
    model: MaskedDiffusionLM,
    questions: Sequence[Question],
    policy: Policy,
    *,
    do_sample: bool = True,
    temperature: float = 1.0,
    generator: Sequence[torch.Generator] | None = None,
    suppress_tokens: Sequence[int] = (),
) -> list[Written]:
    """Fill each question's targets by the sampler of masked diffusion; questions that take equally many steps share
    its forwards."""
    order, size = _how(policy)
    steps = [-(-len(question.targets) // size) for question in questions]
    found: dict[int, Written] = {}
    for count in sorted(set(steps)):
        numbers = [n for n, own in enumerate(steps) if own == count]
        ids, given, present = _asked([questions[n] for n in numbers])
        filled = fill(
            model, ids, given, count, order, temperature if do_sample else 0.0,
            None if generator is None else [generator[n] for n in numbers], present, suppress_tokens,
        )  # fmt: skip
        for row, n in enumerate(numbers):
            found[n] = Written(filled.ids[row, list(questions[n].targets)].tolist(), count)
    return [found[n] for n in range(len(questions))]


def _asked(questions: Sequence[Question]) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T) ids, bool what is given, and bool what takes part."""
    order = Factorization.stack([question.order() for question in questions])
    return padded([question.ids for question in questions]), order.is_given, order.is_present


def _how(policy: Policy) -> tuple[str, int]:
    """The sampler's order and tokens a step; ValueError for a policy that is none of its own."""
    if isinstance(policy, Dynamic):
        plain = policy == Dynamic(policy.criterion, policy.step_size)
        if plain and policy.criterion in ORDERS:
            return policy.criterion, policy.step_size or 1
    raise ValueError(
        f"a masked diffusion model fills in an order of its own, not by {policy!r}: --policy "
        + " or ".join(f"dynamic:criterion={order},step_size=1" for order in ORDERS)
    )
