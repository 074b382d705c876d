"""The objective is the likelihood; training learns, and goes on as if it had not been interrupted."""

from __future__ import annotations

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from anyorder import AnyOrderForCausalLM, Factorization
from anyorder.model import lm_head as head
from anyorder.model.adapters import Adapter
from anyorder.model.coupling import Coupling
from anyorder.training.curriculum import (
    BUILT_IN,
    Curriculum,
    Document,
    LeftToRight,
    RandomGroups,
    SentenceBlanks,
    Stage,
    seeded,
)
from architectures import VOCABULARY, base_model, converted

pytest.importorskip("datasets", reason="training needs the train extra")

from anyorder.training.data import Sequences, collate
from anyorder.training.texts import TokenDocument
from training_data import documents


@pytest.mark.parametrize("recipe", ["exact", "paper"])
def test_the_objective_is_the_likelihood(recipe, monkeypatch):
    model = converted("gemma2", recipe)  # its head caps logits: the chunks must go through it
    data = Sequences([documents()], 16, BUILT_IN["exact"], count=100)
    batch = collate([data[i] for i in range(3)])
    ids, groups, docs = batch["input_ids"], batch["group_ids"], batch["document_ids"]
    order = Factorization(groups, docs)
    expected = model.log_likelihood(ids, order)
    grads = []
    for size in (512, 5):
        monkeypatch.setattr(head, "CHUNK", size)
        loss = model(ids, order, labels=ids).loss
        torch.testing.assert_close(-loss, expected[order.is_predicted].mean(), atol=1e-5, rtol=0)
        grads.append(torch.autograd.grad(loss, model.causal_lm.get_input_embeddings().weight)[0])
    torch.testing.assert_close(grads[0], grads[1], atol=1e-6, rtol=1e-4)


class LogitRows(TorchDispatchMode):
    """Remembers of how many rows the logits were that any operation made."""

    def __init__(self):
        super().__init__()
        self.made = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.made |= set(map(logit_rows, filter(torch.is_tensor, pytree.tree_leaves(result)))) - {0}
        return result


def logit_rows(tensor):
    """Rows of a tensor of logits, 0 for any other; the head's own weights, (E, V) when transposed, are none."""
    is_logits = tensor.dim() > 1 and tensor.shape[-1] == VOCABULARY and tensor.shape[-2] != 32
    return tensor.numel() // VOCABULARY if is_logits else 0


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("adapter", ["full", "gated"])
def test_no_logits_are_kept_in_training(adapter, monkeypatch):
    """A chunk's logits exist while its losses are made, and again while their gradients are; none wait in between."""
    monkeypatch.setattr(head, "CHUNK", 4)
    model = fresh(adapter).train()
    assert model.causal_lm.config.hidden_size == 32
    ids, order = torch.ones(1, 20, dtype=torch.int64), Factorization.left_to_right(20)
    kept = set()

    def keep(tensor):
        kept.add(logit_rows(tensor))
        return tensor

    with LogitRows() as seen, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(ids, order, labels=ids)
    assert output.logits is None
    assert kept == {0}
    assert max(seen.made) == 4
    with LogitRows() as seen:
        output.loss.backward()
    assert max(seen.made, default=0) == (4 if adapter == "full" else 0)  # a frozen head's gradients are made already
    torch.testing.assert_close(output.loss, model.eval()(ids, order, labels=ids).loss)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("adapter", ["full", "lora", "gated"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_packed_losses_are_those_of_each_document_alone(architecture, adapter):
    model = fresh(adapter, architecture)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    data = Sequences([documents()], 16, BUILT_IN["exact"], count=8)
    batch = collate([data[i] for i in range(8)])
    order = Factorization(batch["group_ids"], batch["document_ids"])
    together = model(batch["input_ids"], order, labels=batch["labels"]).token_losses[0]
    for document in batch["document_ids"].unique():
        here = batch["document_ids"][0] == document
        ids = batch["input_ids"][:, here]
        alone = model(ids, Factorization(batch["group_ids"][:, here]), labels=ids).token_losses[0]
        torch.testing.assert_close(together[here], alone, atol=2e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("adapter", ["full", "lora"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_groups_of_one_from_left_to_right_are_plain_fine_tuning(architecture, adapter):
    """The autoregressive control: loss and gradients of transformers' own forward on each document of a packed row."""
    model = fresh(adapter, architecture).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # else the first factor has no gradient
            torch.nn.init.normal_(parameter, std=0.1)
    control = Curriculum((Stage((LeftToRight((1,)),), (1.0,)),))
    data = Sequences([documents()], 16, control, count=8)
    batch = collate([data[i] for i in range(8)])
    ids, docs = batch["input_ids"], batch["document_ids"]
    loss = model(ids, Factorization(batch["group_ids"], docs), labels=batch["labels"]).loss
    total, count = torch.zeros(()), 0
    for document in docs.unique():
        own = ids[docs == document][None]
        number = own.shape[1] - 1
        total = total + model.causal_lm(input_ids=own, labels=own, use_cache=False).loss * number
        count += number
    torch.testing.assert_close(loss, total / count, atol=1e-5, rtol=1e-5)
    learn = {name: p for name, p in model.causal_lm.named_parameters() if p.requires_grad}
    assert len(learn) > 10
    for name, a, b in zip(
        learn, *(torch.autograd.grad(of, list(learn.values())) for of in (loss, total / count)), strict=True
    ):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-3, msg=name)


ORDERS = Curriculum((Stage((RandomGroups((1,)),), (1.0,)),))


def trainer(tmp_path, model, steps, curriculum=None, documents=documents(10), length=16, **options):  # noqa: B008
    from transformers import TrainingArguments

    from anyorder.training.trainer import AnyOrderTrainer

    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=steps, report_to="none", use_cpu=True, remove_unused_columns=False,
        disable_tqdm=True, logging_steps=1, lr_scheduler_type="constant", weight_decay=0.0, **options,
    )  # fmt: skip
    count = steps * arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    data = Sequences([documents], length, curriculum or ORDERS, count=count)
    return AnyOrderTrainer(model=model, args=arguments, train_dataset=data)


def losses(run):
    return [record["loss"] for record in run.state.log_history if "loss" in record]


def fresh(adapter, architecture="llama", rank=8, **sizes):
    kinds = {"full": None, "lora": Adapter("lora", rank), "gated": Adapter("gated", rank)}
    torch.manual_seed(0)
    kind = kinds[adapter.removesuffix(", coupled")]
    model = AnyOrderForCausalLM.from_causal_lm(base_model(architecture, **sizes), adapter=kind)
    if adapter.endswith(", coupled"):
        model.couple(Coupling(width=32, rank=16))
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("adapter", ["full", "lora", "gated", "gated, coupled"])
def test_interrupted_and_resumed_is_uninterrupted(adapter, tmp_path):
    options = {"per_device_train_batch_size": 2, "learning_rate": 1e-2, "save_steps": 3}
    groups = Curriculum((Stage((LeftToRight((3,)), RandomGroups((1, 3))), (1.0, 1.0)),))
    whole = trainer(tmp_path / "a", fresh(adapter), 6, groups, **options)
    whole.train()
    again = trainer(tmp_path / "a", fresh(adapter), 6, groups, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert losses(again)[-3:] == losses(whole)[-3:]
    for (name, a), (_, b) in zip(whole.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


class OneOrder(RandomGroups):
    """Every sentence in a random order of its own, the same at every visit: so that it can be learned by heart."""

    def draw(self, document, generator):
        return super().draw(document, seeded([document.length]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("adapter", ["full", pytest.param("lora", marks=pytest.mark.slow), "gated"])
def test_ten_sentences_are_learned_by_heart_in_random_order(adapter, tmp_path):
    g = torch.Generator().manual_seed(1)
    ten = [TokenDocument(torch.randint(3, VOCABULARY, (n,), generator=g), Document(n, (1,))) for n in range(12, 22)]
    by_heart = Curriculum((Stage((OneOrder((1,)),), (1.0,)),))
    run = trainer(
        tmp_path, fresh(adapter, rank=32, hidden_size=64, head_dim=16), 150, by_heart, documents=ten, length=170,
        per_device_train_batch_size=1, learning_rate=3e-3 if adapter == "full" else 6e-3, save_strategy="no",
    )  # fmt: skip
    run.train()
    assert max(losses(run)[-5:]) < 0.3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["full", "full, coupled"])
def test_what_a_token_says_of_its_neighbour_is_learned_by_coupled_groups_alone(kind, tmp_path):
    """The second of each pair follows from the first, which nothing in front of the pair tells."""
    g, pairs = torch.Generator().manual_seed(1), []
    for _ in range(1000):
        first = torch.randint(3, VOCABULARY, (8,), generator=g)
        ids = torch.stack([first, (first * 5 + 1) % VOCABULARY], dim=1).flatten()
        pairs.append(TokenDocument(torch.cat([torch.tensor([1]), ids]), Document(17, (1,))))
    groups = Curriculum((Stage((LeftToRight((2,)),), (1.0,)),))
    run = trainer(tmp_path, fresh(kind), 100, groups, documents=pairs, length=170,
                  per_device_train_batch_size=1, learning_rate=5e-3, save_strategy="no")  # fmt: skip
    run.train()
    known = sum(losses(run)[-5:]) / 5 < 2.3  # log 34 = 3.5 for each of the two, or for the first alone
    assert known == kind.endswith("coupled"), losses(run)[-5:]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("adapter", ["full", "gated"])
def test_accumulated_forwards_are_one_large_batch(adapter, tmp_path):
    curves, weights = [], []
    for size, forwards in ((4, 1), (2, 2), (1, 4)):
        run = trainer(
            tmp_path, fresh(adapter), 5, BUILT_IN["exact"], per_device_train_batch_size=size,
            gradient_accumulation_steps=forwards, learning_rate=1e-2, save_strategy="no",
        )  # fmt: skip
        run.train()
        curves.append(losses(run))
        weights.append(run.model.query_embedding.detach())
    for curve, weight in zip(curves[1:], weights[1:], strict=True):
        assert curve == pytest.approx(curves[0], abs=1e-4)
        torch.testing.assert_close(weight, weights[0], atol=1e-4, rtol=0)


@pytest.mark.filterwarnings("ignore")
def test_several_visible_devices_are_not_several_batches(tmp_path, monkeypatch, caplog):
    """transformers would wrap the model in DataParallel and give it as many batches a step as there are devices."""
    from transformers import TrainingArguments

    finish = TrainingArguments.__post_init__

    def with_three(self):
        finish(self)
        assert self.n_gpu == 0  # that it is looked up once
        self._n_gpu = 3

    monkeypatch.setattr(TrainingArguments, "__post_init__", with_three)
    run = trainer(tmp_path, fresh("gated"), 3, per_device_train_batch_size=2, save_strategy="no",
                  include_num_input_tokens_seen="all")  # fmt: skip
    assert "3 devices are visible, one is used; for all of them: torchrun" in caplog.text
    run.train()
    assert run.state.num_input_tokens_seen == sum(len(run.train_dataset[i]["input_ids"]) for i in range(6))


@pytest.mark.filterwarnings("ignore")
def test_losses_are_logged_by_regime(tmp_path):
    mixed = Curriculum((Stage((SentenceBlanks(), LeftToRight((2,))), (1.0, 1.0)),))
    model = fresh("full")
    run = trainer(tmp_path, model, 4, mixed, per_device_train_batch_size=3, learning_rate=0.0, save_strategy="no",
                  gradient_accumulation_steps=2)  # fmt: skip
    run.train()
    records = [record for record in run.state.log_history if "loss" in record]
    for step, record in enumerate(records):
        batch = collate([run.train_dataset[i] for i in range(6 * step, 6 * step + 6)])
        order = Factorization(batch["group_ids"], batch["document_ids"])
        values = model(batch["input_ids"], order, labels=batch["labels"]).token_losses
        for number, name in enumerate(("sentence_blanks", "left_to_right")):
            of_it = (batch["regime_ids"] == number) & order.is_predicted
            assert (f"loss_{name}" in record) == bool(of_it.any())
            if of_it.any():
                assert record[f"loss_{name}"] == pytest.approx(float(values[of_it].mean()), abs=1e-5)
        assert record["loss"] == pytest.approx(float(values[order.is_predicted].mean()), abs=1e-5)
        assert record["tokens_per_second"] > 0
    assert {"loss_sentence_blanks", "loss_left_to_right"} <= set().union(*records)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_a_frozen_head_gives_the_gradient_of_a_trained_one(architecture):
    causal_lm = base_model(architecture)  # gemma2 caps its logits
    hidden = torch.randn(11, causal_lm.config.hidden_size, generator=torch.Generator().manual_seed(0)) * 3
    targets = torch.randint(VOCABULARY, (11,), generator=torch.Generator().manual_seed(1))
    targets[[2, 7]] = -100
    weights = torch.arange(11.0)
    found = []
    for trained in (True, False):
        causal_lm.requires_grad_(trained)
        states = hidden.clone().requires_grad_()
        losses = head.negative_log_likelihoods(causal_lm, states, targets)
        found.append((losses.detach(), torch.autograd.grad(losses @ weights, states)[0]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert not found[1][0][[2, 7]].any()
    assert not found[1][1][[2, 7]].any()
