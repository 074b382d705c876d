"""What a coupling and its drafts are taught by: the base, and the model itself one at a time."""

from __future__ import annotations

import pytest
import torch

from anyorder import Factorization
from architectures import couple, coupled, gated
from decoding_runs import IDS, T, generator, repeated


def test_the_teacher_is_the_base_given_the_same_tokens():
    model = couple(gated("llama"))
    for order in (Factorization.left_to_right(T, group_size=4), Factorization.random(T, 3, generator=generator())):
        found = model.predictions(IDS, repeated(order, 3), taught=True)
        taught = found.spread(found.base.which.float()).bool()
        columns, groups = torch.arange(T), order.group_ids[0]
        own = (groups[1:] == groups[:-1]) & (groups[1:] >= 0)
        visible = torch.tensor(
            [set(((groups < groups[i]) | ((groups == groups[i]) & (columns < i))).nonzero()[:, 0].tolist()) ==
             set(range(i)) for i in range(T)]
        )  # fmt: skip
        expected = torch.cat([torch.zeros(1, dtype=torch.bool), own]) & visible
        assert torch.equal(taught, expected.expand(3, T))
        base = model.causal_lm(input_ids=IDS, use_cache=False).logits
        teacher = model.predictor.logits(found.base.hidden)
        torch.testing.assert_close(teacher, base[:, :-1][expected[1:].expand(3, T - 1)], atol=1e-5, rtol=1e-5)


def test_elsewhere_the_teacher_is_the_model_itself_one_at_a_time_in_the_same_order():
    model = couple(gated("llama"))
    orders = [Factorization.random(T, 3, generator=generator()), Factorization.left_to_right(T, 1)]
    orders += [Factorization.left_to_right(T, 4), Factorization.infill(torch.arange(T) % 3 > 0, 2)]
    order, ids = Factorization.pack(orders), IDS[:1].repeat(1, len(orders))
    found = model.predictions(ids, order, taught=True)
    groups = order.group_ids[0] + 100 * order.documents[0]
    later = torch.tensor([g in groups[:i] for i, g in enumerate(groups.tolist())]) & order.is_predicted[0]
    assert torch.equal(
        found.spread(found.itself.which.float())[0].bool(), later & ~found.spread(found.base.which.float())[0].bool()
    )
    log_p = model.predictor.logits(found.itself.hidden).log_softmax(-1)
    own = ids[found.where][found.itself.which]
    alone = model.log_likelihood(ids, order.regroup(1))[found.where][found.itself.which]
    torch.testing.assert_close(log_p.gather(1, own[:, None])[:, 0], alone, atol=1e-5, rtol=1e-5)
    assert not found.itself.hidden.requires_grad


@pytest.mark.parametrize("order", ["left to right", "scattered"])
def test_the_trained_distance_is_kl_from_the_teacher_and_its_gradient_autograds(order):
    model = couple(gated("llama"))
    order = (
        Factorization.random(T, 4, generator=generator()) if order == "scattered" else Factorization.left_to_right(T, 4)
    )
    order = repeated(order, 3)
    model.train()
    model.coupling.drafts = None
    found = model.predictions(IDS, order, taught=True)
    log_p = model.predictor.logits(found.hidden).log_softmax(-1)
    losses = -log_p.gather(1, IDS[found.where][:, None])[:, 0]
    apart = losses.clone()
    for teacher in (found.base, found.itself):
        if teacher is not None and teacher.which.any():
            log_q = model.predictor.logits(teacher.hidden).log_softmax(-1)
            apart[teacher.which] = (log_q.exp() * (log_q - log_p[teacher.which])).sum(-1)
    output = model(IDS, order, labels=IDS, taught=True)
    torch.testing.assert_close(output.loss, apart.mean(), atol=1e-5, rtol=0)
    torch.testing.assert_close(output.token_losses[found.where], losses.detach(), atol=1e-5, rtol=0)
    learning = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(apart.mean(), learning, retain_graph=True, materialize_grads=True)
    for ours, theirs in zip(torch.autograd.grad(output.loss, learning), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)


def test_in_mixed_precision_losses_are_those_of_float32():
    model, order = couple(gated("llama")).train(), repeated(Factorization.left_to_right(T, group_size=4), 3)
    expected = model(IDS, order, labels=IDS, taught=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(IDS, order, labels=IDS, taught=True)
    assert output.loss.dtype == output.token_losses.dtype == torch.float32
    torch.testing.assert_close(output.loss, expected.loss, atol=0, rtol=2e-2)
    output.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_without_a_frozen_base_nothing_is_taught():
    model, order = coupled("llama"), repeated(Factorization.left_to_right(T, group_size=4), 3)
    plain, taught = (model(IDS, order, labels=IDS, taught=flag).loss for flag in (False, True))
    assert torch.equal(plain, taught)


def test_what_drafts_are_trained_on_is_their_distance_from_the_base():
    """Of members of contiguous groups, from the state of the row of their group's first."""
    model, order = couple(gated("llama")), repeated(Factorization.left_to_right(T, group_size=4), 3)
    found = model.predictions(IDS, order, taught=True)
    base = model.causal_lm.get_decoder()(input_ids=IDS, use_cache=False).last_hidden_state
    at = 0
    for b in range(3):
        for i in range(1, T):
            j = (i - 1) % 4
            if not j:
                continue
            members = IDS[b : b + 1, i - j : i].flip(1)
            state = base[b, i - j - 1][None]
            own = model.coupling.drafts(state, members, torch.arange(1, j + 1)[None], model.get_input_embeddings())
            torch.testing.assert_close(found.drafts[at : at + 1], own, atol=1e-5, rtol=1e-4)
            at += 1
    assert at == len(found.drafts)
    with_drafts, trained = model.train()(IDS, order, labels=IDS, taught=True).loss, found.where.sum()
    model.coupling.drafts, drafts = None, model.coupling.drafts
    log_p = model.predictor.logits(found.drafts).log_softmax(-1)
    log_q = model.predictor.logits(found.base.hidden).log_softmax(-1)
    apart = (log_q.exp() * (log_q - log_p)).sum() / trained
    without = model(IDS, order, labels=IDS, taught=True).loss
    model.coupling.drafts = drafts
    torch.testing.assert_close(with_drafts - without, apart, atol=1e-4, rtol=1e-4)


def test_every_parameter_gets_a_gradient_whatever_the_groups():
    """As DistributedDataParallel demands: a batch of groups of one leaves none out."""
    model = couple(gated("llama")).train()
    for order in (Factorization.left_to_right(T), Factorization.random(T, 1, generator=generator())):
        model.zero_grad()
        model(IDS, repeated(order, 3), labels=IDS, taught=True).loss.backward()
        assert all(p.grad is not None for p in model.coupling.parameters())
