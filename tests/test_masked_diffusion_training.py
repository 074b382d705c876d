"""Masked diffusion, trained by the same trainer and command: it learns, and resumed it is uninterrupted."""

from __future__ import annotations

import pytest
import torch

from anyorder import load
from anyorder.evaluation.baselines.diffusion_bound import negative_elbo
from anyorder.evaluation.baselines.diffusion_sampling import fill
from anyorder.evaluation.baselines.masked_diffusion import MaskedDiffusionLM
from anyorder.model.adapters import Adapter
from architectures import VOCABULARY
from test_masked_diffusion import diffusion


def trained(tmp_path, model, steps, texts, **options):
    pytest.importorskip("datasets", reason="training needs the train extra")
    from anyorder.training.curriculum import Document
    from anyorder.training.texts import TokenDocument
    from test_training import trainer

    documents = [TokenDocument(text, Document(len(text), (1,))) for text in texts]
    return trainer(tmp_path, model, steps, documents=documents, **options)


@pytest.mark.filterwarnings("ignore")
def test_ten_sentences_are_learned_by_heart_and_sampled(tmp_path):
    g = torch.Generator().manual_seed(1)
    ten = [torch.cat([torch.tensor([20 + i]), torch.randint(3, 20, (5 + i % 3,), generator=g)]) for i in range(10)]
    model = diffusion(hidden_size=64, head_dim=16)
    run = trained(
        tmp_path, model, 160, ten * 4, length=320, per_device_train_batch_size=1, learning_rate=3e-3, save_strategy="no"
    )
    run.train()
    losses = [record["loss"] for record in run.state.log_history if "loss" in record]
    assert sum(losses[-20:]) / 20 < 0.2 < 2 < losses[0]
    model.eval()
    ids = torch.nn.utils.rnn.pad_sequence(ten, batch_first=True)
    present = torch.arange(ids.shape[1]) < torch.tensor([[len(text)] for text in ten])
    given = (torch.arange(ids.shape[1]) == 0).expand(ids.shape)
    bound = negative_elbo(model, ids, given, 8, torch.Generator().manual_seed(0), present)
    assert (bound.mean / (present.sum(dim=1) - 1)).mean() < 0.2
    for order in ("confidence", "random"):
        filled = fill(model, ids, given, 7, order, 0, torch.Generator().manual_seed(0), present)
        assert torch.equal(filled.ids, ids), order


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("adapter", [None, Adapter("lora", 4)])
def test_interrupted_and_resumed_is_uninterrupted(adapter, tmp_path):
    g = torch.Generator().manual_seed(1)
    some = [torch.randint(3, VOCABULARY, (7,), generator=g) for _ in range(10)]
    options = {"per_device_train_batch_size": 2, "learning_rate": 1e-2, "save_steps": 3}
    runs = [trained(tmp_path, diffusion(adapter=adapter), 6, some, **options) for _ in range(2)]
    runs[0].train()
    runs[1].train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    curves = [[record["loss"] for record in run.state.log_history if "loss" in record] for run in runs]
    assert len(set(curves[0])) == 6
    assert curves[1][-3:] == curves[0][-3:]
    for (name, a), (_, b) in zip(runs[0].model.named_parameters(), runs[1].model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.filterwarnings("ignore")
def test_the_command_trains_it(checkpoint, stories, tmp_path, capsys):
    pytest.importorskip("datasets", reason="training needs the train extra")
    from training_runs import adapt, curve

    objective = ("--objective", "masked_diffusion")
    assert adapt(checkpoint, stories, tmp_path / "a", *objective) == 2
    assert "use adapter='lora'" in capsys.readouterr().err
    more = (*objective, "--adapter", "lora", "--eval-file", stories, "--eval-every", 30)
    assert adapt(checkpoint, stories, tmp_path / "a", *more) == 0
    losses = curve(tmp_path / "a")
    assert len(losses) == 30
    assert sum(losses[-5:]) < sum(losses[:5])
    names = ("left_to_right_1", "random_1", "left_to_right_4", "random_4")
    held_out = [curve(tmp_path / "a", f"eval_{name}") for name in names]
    assert held_out[0] == held_out[1] != held_out[2] == held_out[3]  # the size of groups counts, not their order
    assert all(losses[-1] < losses[0] for losses in held_out)
    model, _ = load(str(tmp_path / "a"), model_class=MaskedDiffusionLM)
    assert model.config.adapter["kind"] == "lora"
    assert adapt(checkpoint, stories, tmp_path / "b", *more, "--coupling") == 2
    assert "it takes no coupling" in capsys.readouterr().err
    assert adapt(checkpoint, stories, tmp_path / "b", *more, "--plan") == 2
    assert "leave --objective masked_diffusion out" in capsys.readouterr().err
