"""Hidden states -> logits, or losses without keeping them, by the base model's own forward over an identity decoder.

Whatever a family does to its logits (caps, scales, biases) is done by its own code, without a copy of it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

CHUNK = 256
"""Predictions whose logits exist at the same time in `negative_log_likelihoods`: 256 x 49,152 floats are 50 MB."""
CHUNK_ON_DEVICE = 1024
"""The same on an accelerator, where small products leave most of it idle."""


@dataclass
class _IdentityOutput(ModelOutput):
    """Every field that some causal LM's forward reads from its decoder's output."""

    last_hidden_state: Tensor | None = None
    past_key_values: Any = None
    hidden_states: Any = None
    attentions: Any = None
    cross_attentions: Any = None
    router_logits: Any = None


class _IdentityDecoder(nn.Module):
    def forward(self, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> _IdentityOutput:
        return _IdentityOutput(last_hidden_state=inputs_embeds)


class _WithoutHooks(nn.Module):
    """What a module computes, without what its hooks do."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self._module = (module,)  # a tuple: its parameters are not this one's

    def forward(self, *args: Any) -> Tensor:
        (module,) = self._module
        return cast(Tensor, type(module).forward(module, *args))


def head_of(causal_lm: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """A function from (N, E) final hidden states to (N, V) logits."""
    head = copy.copy(causal_lm)
    head._modules = dict(causal_lm._modules)
    head._modules[causal_lm.base_model_prefix] = _IdentityDecoder()
    for name, module in head._modules.items():
        if isinstance(module, FSDPModule):  # see `negative_log_likelihoods`
            head._modules[name] = _WithoutHooks(cast(nn.Module, module))

    def logits(hidden: Tensor) -> Tensor:
        # The class's forward: one that a hook has put on the instance is bound to the whole model.
        return cast(Tensor, type(head).forward(head, inputs_embeds=hidden[None], use_cache=False).logits[0])

    return logits


def logits_of(causal_lm: PreTrainedModel, hidden: Tensor) -> Tensor:
    """(N, V) logits of (N, E) final hidden states."""
    return head_of(causal_lm)(hidden)


@dataclass(frozen=True)
class Teacher:
    """Rows that predict tokens given more than the rows that are to learn from them see."""

    which: Tensor
    """(N,) bool: the predictions that it teaches."""
    hidden: Tensor
    """(K, E) its hidden states for these, in their order."""


@dataclass(frozen=True)
class Predictions:
    """Hidden states of the rows of one forward that predict something."""

    hidden: Tensor
    """(N, E), row by row of the batch, column by column."""
    where: Tensor
    """(B, T) bool on the same device: which tokens they predict."""
    base: Teacher | None = None
    """The base model's own rows in the same forward; None: not looked for."""
    itself: Teacher | None = None
    """Of others: the model's own rows in the same order one token at a time; None: not looked for."""
    drafts: Tensor | None = None
    """(K, E): what drafts the tokens that `base` teaches from the row of the first member of their groups; None:
    nothing does."""

    def spread(self, values: Tensor) -> Tensor:
        """(B, T, ...): (N, ...) values where they belong, 0 elsewhere."""
        out = values.new_zeros(*self.where.shape, *values.shape[1:])
        out[self.where] = values
        return out


class Predictor:
    """The one place where logits and log-probabilities come from hidden states; targets are teacher-forced.

    Args:
        causal_lm: the base model, whose head it is.
    """

    def __init__(self, causal_lm: PreTrainedModel):
        self.causal_lm = causal_lm

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, V) logits of (N, E) final hidden states."""
        return logits_of(self.causal_lm, hidden)

    def losses(self, found: Predictions, targets: Tensor) -> Tensor:
        """(N,) float32: -log p of (B, T) target ids at the predicted positions, in nats; 0 where the target is -100."""
        chosen = targets.to(found.hidden.device)[found.where]
        return negative_log_likelihoods(self.causal_lm, found.hidden, chosen)

    def distilled(self, found: Predictions, targets: Tensor) -> tuple[Tensor, Tensor]:
        """What is trained on, and the losses: both (N,) float32, in nats, 0 where the target is -100.

        A prediction that has a teacher is trained on KL(teacher || model): one token is a sample of the distribution
        that the teacher has whole; what drafts the same token is trained on its own distance beside it. Every other
        prediction is trained on its loss. The head must be frozen.
        """
        ids = targets.to(found.hidden.device)[found.where]
        trained, reported = found.hidden.new_zeros(2, len(ids), dtype=torch.float32).unbind()
        alone = torch.ones_like(ids, dtype=torch.bool)
        for teacher, drafts in ((found.base, found.drafts), (found.itself, None)):
            if teacher is None:
                continue
            students = [found.hidden[teacher.which]] + ([] if drafts is None else [drafts])
            apart, losses = _divergences(self.causal_lm, students, ids[teacher.which], teacher.hidden)
            trained, reported[teacher.which] = trained.index_put((teacher.which,), apart), losses
            alone &= ~teacher.which
        losses = negative_log_likelihoods(self.causal_lm, found.hidden[alone], ids[alone])
        trained, reported[alone] = trained.index_put((alone,), losses), losses.detach()
        return trained, reported

    def log_probs(self, found: Predictions, targets: Tensor) -> Tensor:
        """(B, T) float32: log p of (B, T) target ids, in nats; 0 where nothing is predicted."""
        return found.spread(-self.losses(found, targets).float())

    @torch.no_grad()
    def log_probs_and_best(self, found: Predictions, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`log_probs`; (B, T) bool: whether the target is what a greedy choice takes; and (B, T) float32: log p of what
        it takes, in nats. False and 0 where nothing is predicted."""
        chosen, hidden = targets.to(found.hidden.device)[found.where], found.hidden
        size = CHUNK if hidden.device.type == "cpu" else CHUNK_ON_DEVICE
        losses = hidden.new_zeros(len(chosen), dtype=torch.float32)
        greatest, best = torch.zeros_like(losses), torch.zeros_like(losses, dtype=torch.bool)
        for these in torch.arange(len(chosen), device=hidden.device).split(size):
            logits = self.logits(hidden[these]).float()
            losses[these] = nn.functional.cross_entropy(logits, chosen[these], reduction="none")
            top, ids = logits.max(dim=-1)
            best[these] = ids == chosen[these]
            greatest[these] = top - logits.gather(1, chosen[these, None])[:, 0] - losses[these]
        return found.spread(-losses), found.spread(best), found.spread(greatest)


def negative_log_likelihoods(causal_lm: PreTrainedModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """(N,) float32 cross-entropy of (N,) target ids, in nats; 0 where the target is -100.

    A few times CHUNK x V floats exist at a time. With a frozen head the gradient of each loss by its own hidden state
    is made together with the loss; otherwise each chunk's logits are made again in the backward pass.
    """

    def chunk(states: Tensor, ids: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits_of(causal_lm, states).float(), ids, reduction="none")

    def chunks(hidden: Tensor) -> Tensor:
        size = CHUNK if hidden.device.type == "cpu" else CHUNK_ON_DEVICE
        pairs = zip(hidden.split(size), targets.split(size), strict=True)
        if not torch.is_grad_enabled():
            return torch.cat([chunk(states, ids) for states, ids in pairs])
        if hidden.requires_grad and not any(parameter.requires_grad for parameter in head.parameters()):
            return torch.cat([_FrozenHeadLoss.apply(states, ids, causal_lm, None)[0] for states, ids in pairs])
        return torch.cat([checkpoint(chunk, states, ids, use_reentrant=False) for states, ids in pairs])

    if not hidden.shape[0]:
        return (hidden.sum() * hidden.new_zeros(0)).float()
    head = cast(nn.Module, causal_lm.get_output_embeddings())
    return _as_one_call(head, chunks, hidden) if isinstance(head, FSDPModule) else chunks(hidden)


def _as_one_call(module: nn.Module, function: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    """The function, run as if it were the module's forward: FSDP gathers the module's weights before a call and lets
    them go after that call's backward, in which every chunk needs them."""
    module.forward = function
    try:
        return cast(Tensor, module(inputs))
    finally:
        del module.forward


def _divergences(
    causal_lm: PreTrainedModel, students: list[Tensor], targets: Tensor, teacher: Tensor
) -> tuple[Tensor, Tensor]:
    """(N,) the sum of KL(teacher || student) over students of (N, E) hidden states each, and the losses of the first
    student, without gradient; (N, E) hidden states of the teacher."""
    size = CHUNK if teacher.device.type == "cpu" else CHUNK_ON_DEVICE
    apart, losses = [], []
    for ids, base, *states in zip(*(t.split(size) for t in (targets, teacher, *students)), strict=True):
        log_q = logits_of(causal_lm, base).float().log_softmax(dim=-1)
        q = log_q.exp()
        known = q, log_q.mul_(q).sum(dim=-1)  # no second tensor of that size: chunks are as large as memory is fast
        found = [_FrozenHeadLoss.apply(student, ids, causal_lm, known) for student in states]
        apart.append(torch.stack([distance for distance, _ in found]).sum(dim=0))
        losses.append(found[0][1])
    return torch.cat(apart), torch.cat(losses)


class _FrozenHeadLoss(torch.autograd.Function):
    """Each loss depends on its own hidden state alone, so its gradient needs no logits once it is made.

    By the logits it is p - q, q being 1 at the target or the teacher's distribution, from one softmax; autograd would
    keep three more tensors of their size. `known` is that distribution, (N, V), and the negative of its entropy, (N,).
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, ids: Tensor, causal_lm: PreTrainedModel, known: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            states = states.detach().requires_grad_()
            logits = logits_of(causal_lm, states)
        counts = ids != -100
        target = ids.where(counts, 0)[:, None]
        with torch.autocast(logits.device.type, enabled=False):  # it would round sums over the vocabulary
            scores = logits.detach().float()
            p = scores.softmax(dim=-1)
            # The greatest p is never 0, so neither is its logarithm lost, as a small target's own would be.
            log_sum = scores.amax(dim=-1) - p.amax(dim=-1).log()
            losses = (log_sum - scores.gather(1, target)[:, 0]) * counts
            if known is None:
                trained = losses.clone()
                p.scatter_add_(1, target, p.new_full((1, 1), -1.0).expand(len(ids), 1))
            else:
                q, negative_entropy = known
                trained = (negative_entropy + log_sum - torch.einsum("nv,nv->n", q, scores)) * counts
                p -= q
            p *= counts[:, None]
            (gradient,) = torch.autograd.grad(logits, states, p.to(logits.dtype))
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(losses)
        return trained, losses

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outputs[0][:, None].to(gradient.dtype), None, None, None
