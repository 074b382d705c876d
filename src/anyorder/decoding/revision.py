"""Changing finished text: spans drawn anew given both sides, and the weakest places found and improved.

`revise` is one Gibbs step of the model's own conditional; a trained model's conditionals need not belong to one joint
distribution, so repeating it need not lead anywhere in particular. With `accept="metropolis"` it does: the step leaves
the distribution of one chosen factorization exactly as it is (Metropolis-Hastings; Chib and Greenberg 1995).

This module knows token ids and likelihoods, not text.

Shapes: B batch, T columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from anyorder.core.factorization import Factorization
from anyorder.core.rng import Generators, row_generators, uniforms
from anyorder.core.validation import check_ids, left_to_right
from anyorder.decoding.generate import generate
from anyorder.decoding.policies import Policy
from anyorder.model.base import AnyOrderPreTrainedModel
from anyorder.scoring import log_likelihood

Accept = Literal["gibbs", "metropolis"]
_OF_GENERATE_ALONE = ("num_return_sequences", "return_dict_in_generate", "seed")
"""Options of `generate` that would give something else than one revised row a row, or other random numbers."""
_NOT_OF_THE_DISTRIBUTION = ("compile", "engine", "weights", "pad_token_id", "watch")
"""Options that leave alone what the proposal of "metropolis" is drawn from."""


@dataclass(frozen=True)
class Revision:
    """What `revise` returns."""

    sequences: Tensor
    """(B, T) int64."""
    accepted: Tensor
    """(B,) bool: whether the proposal was taken; with "gibbs" always."""
    forwards: int


@dataclass(frozen=True)
class Refinement:
    """What `refine` returns."""

    sequences: Tensor
    """(B, T) int64: for each row the best that was found."""
    scores: Tensor
    """(B, rounds + 1) float32, in nats: the best score after each round, the first before any."""


def revise(
    model: AnyOrderPreTrainedModel,
    input_ids: Tensor,
    blank: Tensor,
    *,
    attention_mask: Tensor | None = None,
    accept: Accept = "gibbs",
    target: Factorization | None = None,
    group_size: int = 1,
    order: str = "left_to_right",
    policy: Policy | None = None,
    generator: Generators = None,
    **options: Any,
) -> Revision:
    """Draw the tokens at some positions anew, given all others.

    Args:
        model: a converted model.
        input_ids: (B, T) int64.
        blank: (B, T) bool, what is drawn anew; a row without any stays as it is.
        attention_mask: (B, T), 0 marks padding.
        accept: "gibbs" takes every proposal; "metropolis" takes it with probability
            min(1, P(new) Q(old | rest) / (P(old) Q(new | rest))), where P is the likelihood of the whole row under
            `target` and Q the proposal's: P stays invariant.
        target: of "metropolis"; what is blank must be predicted in it. Default: left to right, one at a time.
        group_size, order: of the proposal.
        policy: as in `generate`; with "metropolis" one whose order is fixed beforehand (groupwise, speculative).
        generator: one, or one a row.
        options: further ones of `generate`. With "metropolis" none that changes the distribution of the proposal.

    Raises:
        ValueError: if the arguments do not fit each other.
    """
    blank = torch.as_tensor(blank)
    _check_request(input_ids, blank, accept, options)
    if attention_mask is not None:
        attention_mask = attention_mask.to(blank.device)
    generators = row_generators(generator, len(input_ids))
    proposal = Factorization.infill(blank, group_size, order, generators, attention_mask)
    if accept == "metropolis":
        target = left_to_right(input_ids, attention_mask) if target is None else target
        _check_metropolis(proposal, target, policy, options)
    settings: dict[str, Any] = {"do_sample": True, "eos_token_id": ()} | options
    # Without drawing too: a policy may choose positions at random.
    settings |= {"generator": generators, "return_dict_in_generate": True}
    output = generate(model, input_ids, proposal, policy, **settings)
    assert not isinstance(output, Tensor)
    new = torch.where(proposal.is_present.to(input_ids.device), output.sequences, input_ids)  # padding stays
    if accept == "gibbs":
        return Revision(new, torch.ones(len(new), dtype=torch.bool, device=new.device), output.forwards)
    assert target is not None
    fixed = proposal if policy is None else policy.prepare(proposal)
    ratio = (log_likelihood(model, new, target) - log_likelihood(model, input_ids, target)).cpu().double().sum(dim=1)
    ratio += (log_likelihood(model, input_ids, fixed) - output.log_probs).cpu().double().sum(dim=1)
    uniform = uniforms([1] * len(generators), 1, generators)[:, 0]
    accepted = (uniform.log() < ratio).to(new.device)
    return Revision(torch.where(accepted[:, None], new, input_ids), accepted, output.forwards + 3)


def _check_request(input_ids: Tensor, blank: Tensor, accept: Accept, options: dict[str, Any]) -> None:
    if accept not in get_args(Accept):
        raise ValueError(f"accept must be one of {', '.join(get_args(Accept))}, got {accept!r}")
    check_ids("input_ids", input_ids)
    for name in _OF_GENERATE_ALONE:
        if name in options:
            raise ValueError(f"{name} is an option of generate, not of revise; leave it out")
    if blank.shape != input_ids.shape:
        raise ValueError(f"blank has shape {tuple(blank.shape)}, input_ids has {tuple(input_ids.shape)}")


def _check_metropolis(
    proposal: Factorization, target: Factorization, policy: Policy | None, options: dict[str, Any]
) -> None:
    if policy is not None and not policy.keeps_order:
        raise ValueError(f"accept='metropolis' needs an order that is fixed beforehand, which {policy!r} does not have")
    for name, value in options.items():
        same = value is None or name in _NOT_OF_THE_DISTRIBUTION or (name, value) == ("do_sample", True)
        if not same and not (name == "eos_token_id" and value == ()):
            raise ValueError(
                f"accept='metropolis' proposes from the model's own distribution: leave out {name}={value!r}"
            )
    if target.group_ids.shape != proposal.group_ids.shape:
        raise ValueError(
            f"the target has shape {tuple(target.group_ids.shape)}, the text {tuple(proposal.group_ids.shape)}"
        )
    _check_padding(target, proposal.is_present)
    outside = proposal.is_predicted & ~target.is_predicted.to(proposal.device)
    if bool(outside.any()):
        row, position = outside.nonzero()[0].tolist()
        raise ValueError(
            f"row {row}, position {position} is revised, but the target does not predict it: P says nothing about it"
        )


def _check_padding(target: Factorization, present: Tensor) -> None:
    """Raise ValueError if a target holds what is padding: its likelihood would be the padding's too."""
    padding = target.is_present & ~present.to(target.device)
    if bool(padding.any()):
        row, position = padding.nonzero()[0].tolist()
        raise ValueError(f"row {row}, position {position} is padding, but the target holds it: make it absent there")


def _free_spans(input_ids: Tensor, target: Factorization, mask: Tensor, length: int) -> Tensor:
    """(B, starts) bool: where spans begin of which the target predicts every token."""
    if target.group_ids.shape != input_ids.shape:
        raise ValueError(f"the target has shape {tuple(target.group_ids.shape)}, the text {tuple(input_ids.shape)}")
    _check_padding(target, mask)
    free = target.is_predicted[:, :0]
    if length <= target.length:
        free = target.is_predicted.unfold(1, length, 1).all(dim=2)
    if not bool(free.any(dim=1).all()):
        row = int((~free.any(dim=1)).nonzero()[0])
        raise ValueError(f"row {row} has no {length} neighbouring tokens to revise: choose a smaller length")
    return free


def refine(
    model: AnyOrderPreTrainedModel,
    input_ids: Tensor,
    *,
    rounds: int = 8,
    length: int = 1,
    attention_mask: Tensor | None = None,
    target: Factorization | None = None,
    generator: Generators = None,
    **options: Any,
) -> Refinement:
    """Find the least likely span of each row, draw it anew given both sides, keep it if the row became likelier.

    A span that did not help is not tried again before another one has. Likelier is not better: models like repetition.

    Args:
        model: a converted model.
        input_ids: (B, T) int64.
        rounds: spans that are tried.
        length: tokens of a span.
        attention_mask: (B, T), 0 marks padding.
        target: its likelihood is the score, and only what it predicts is revised. Default: left to right, one at a
            time, given the first token.
        generator: one, or one a row.
        options: further ones of `revise`; default do_sample=False, the most likely tokens.

    Raises:
        ValueError: if a row predicts fewer than `length` neighbouring tokens, or arguments do not fit.
    """
    check_ids("input_ids", input_ids)
    for name, value in (("rounds", rounds), ("length", length)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a whole number, at least 1, got {value!r}")
    if "accept" in options:
        raise ValueError("accept is an option of revise: refine keeps what makes a row likelier; leave it out")
    target = left_to_right(input_ids, attention_mask) if target is None else target.to("cpu")
    mask = target.is_present if attention_mask is None else attention_mask.bool().cpu()
    free = _free_spans(input_ids, target, mask, length)
    options = {"do_sample": False} | options
    random = generator is not None or options["do_sample"]
    generators = row_generators(generator, len(input_ids)) if random else None
    best, tokens = input_ids, log_likelihood(model, input_ids, target).cpu()
    scores, tried, columns = [tokens.sum(dim=1)], torch.zeros_like(free), torch.arange(target.length)
    for _ in range(rounds):
        weakness = tokens.unfold(1, length, 1).sum(dim=2).masked_fill(~free | tried, torch.inf)
        open_rows = weakness.isfinite().any(dim=1)  # others have tried everything
        if not bool(open_rows.any()):
            break
        start = weakness.argmin(dim=1, keepdim=True)
        blank = (columns >= start) & (columns < start + length) & open_rows[:, None]
        new = revise(model, best, blank, attention_mask=mask, generator=generators, **options).sequences
        found = log_likelihood(model, new, target).cpu()
        better = found.sum(dim=1) > scores[-1]
        tried[torch.arange(len(tried)), start[:, 0]] = True
        tried &= ~better[:, None]
        best = torch.where(better.to(best.device)[:, None], new, best)
        tokens = torch.where(better[:, None], found, tokens)
        scores.append(tokens.sum(dim=1))
    scores += scores[-1:] * (rounds + 1 - len(scores))
    return Refinement(best, torch.stack(scores, dim=1).to(input_ids.device))
