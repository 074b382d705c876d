"""`anyorder adapt`: its golden trajectory, what it leaves behind, interruptions and mistakes."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch

pytest.importorskip("datasets", reason="training needs the train extra")

from transformers import AutoTokenizer

from anyorder import AnyOrderForCausalLM, Infiller, load
from anyorder.model.coupling import Coupling
from anyorder.training.heldout import REGIMES, HeldOut
from anyorder.training.texts import tokenize
from anyorder.training.trainer import AnyOrderTrainer
from training_runs import ALL_CHECKPOINTS, adapt, curve

pytestmark = pytest.mark.filterwarnings("ignore")

GOLDEN = [5.4387, 4.9066, 4.0666]  # first, sixth, thirtieth step


def test_adapt_follows_its_golden_trajectory_and_saves_a_model_that_infills(trained_run):
    curve_ = curve(trained_run)
    assert len(curve_) == 30
    assert [curve_[0], curve_[5], curve_[29]] == pytest.approx(GOLDEN, abs=0.02)
    assert curve(trained_run, "eval_random_1") == []
    assert curve(trained_run, "num_input_tokens_seen")[-1] == 1005
    model, tokenizer = load(str(trained_run))
    assert model.config.adapter["kind"] == "gated"
    assert Infiller(model, tokenizer)("a ___ b", length=2).text.startswith("a ")


def test_held_out_loss_is_measured_in_four_regimes_and_drawn(checkpoint, stories, tmp_path, trained_run):
    output = tmp_path / "run"
    assert adapt(checkpoint, stories, output, "--eval-file", stories, "--eval-every", 15) == 0
    assert curve(output) == curve(trained_run)  # measuring changes nothing
    curves = {name: curve(output, f"eval_{name}") for name in REGIMES}
    assert {len(values) for values in curves.values()} == {3}  # at the start, after 15 steps, after 30
    assert len(set(curves["left_to_right_1"])) == 1  # gated: the base model's, whatever was trained
    for name in ("left_to_right_4", "random_1", "random_4"):
        assert curves[name][-1] < curves[name][0]
    names = (output / "curves.csv").read_text().splitlines()[0].split(",")
    assert {"step", "loss", "loss_spans", "eval_random_4", "tokens_per_second", "learning_rate"} <= set(names)
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list(output.glob("*.part"))
    model, tokenizer = load(str(output))
    texts = [json.loads(line)["text"] for line in stories.read_text().splitlines()]
    held_out = HeldOut(tokenize(texts, tokenizer, 32))
    assert len(held_out) == 12
    assert held_out.losses(model) == pytest.approx({name: values[-1] for name, values in curves.items()}, abs=1e-4)
    with pytest.raises(ValueError, match="no documents to measure on"):
        HeldOut([])


@pytest.fixture
def whole_run(request, trained_run, checkpoint, stories, tmp_path):
    """What a run with these options gives when it is not cut."""
    if request.getfixturevalue("more") == ALL_CHECKPOINTS:
        return trained_run
    assert adapt(checkpoint, stories, tmp_path / "whole", *request.getfixturevalue("more")) == 0
    return tmp_path / "whole"


@pytest.mark.parametrize(
    ("more", "number"),
    [(ALL_CHECKPOINTS, signal.SIGINT), (("--streaming",), signal.SIGTERM)],
    ids=["ctrl-c", "sigterm"],
)
def test_a_signal_saves_and_resume_goes_on_as_if_nothing_had_happened(
    more, number, whole_run, checkpoint, stories, tmp_path, capsys, monkeypatch
):
    step = AnyOrderTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 13:
            os.kill(os.getpid(), number)
        return step(self, *args, **kwargs)

    def code(*own):
        try:
            return adapt(checkpoint, stories, output, *more, *own)
        except SystemExit as end:  # as a program ends that a signal has ended
            return end.code

    monkeypatch.setattr(AnyOrderTrainer, "training_step", interrupted)
    output = tmp_path / "cut"
    assert code() == 128 + number
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert "saved at step 14 of 30; go on with the same command and --resume" in capsys.readouterr().err
    assert not (output / "adapter_model.safetensors").exists()
    monkeypatch.setattr(AnyOrderTrainer, "training_step", step)
    assert code("--rank", 8, "--resume") == 2
    assert "has --rank 4, not 8: use the same" in capsys.readouterr().err
    assert code() == 2
    assert "is not empty: add --resume" in capsys.readouterr().err
    assert code("--resume") == 0
    assert curve(output) == curve(whole_run)
    one, two = ((folder / "adapter_model.safetensors").read_bytes() for folder in (whole_run, output))
    assert one == two


def test_a_second_signal_stops_at_once(checkpoint, stories, tmp_path, monkeypatch):
    def interrupted(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(AnyOrderTrainer, "training_step", interrupted)
    with pytest.raises(SystemExit) as end:
        adapt(checkpoint, stories, tmp_path / "run")
    assert end.value.code == 143
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--curriculum", "magic"], "no curriculum 'magic'"),
        (["--train-file", "none.jsonl"], "no such file: none.jsonl"),
        (["--resume"], "nothing to resume"),
        (["--mixture", "1", "2"], "--mixture has 2 weights for 1 training files"),
        (["--attn-implementation", "flex_attention"], "has no backward pass on cpu: use sdpa"),
        (["--device", "banana"], "--device 'banana'"),
        (["--device", "cuda:1"], "make this one the first by CUDA_VISIBLE_DEVICES=1 and use --device cuda"),
        (["--streaming", "--training", "dataloader_num_workers=1"], "dataloader_num_workers=1 must be 0"),
        (["--training", "gradient_checkpoint=true"], "did you mean 'gradient_checkpointing'?"),
        (["--training", "max_steps=3"], "max_steps follows from the other options"),
        (["--training", "torch_compile=true"], "training is not compiled"),
        (["--training", "fast"], "--training takes NAME=VALUE, got 'fast'"),
        (["--training", "lr_scheduler_type=magic"], "magic"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_mistake_is_told_in_one_line_and_leaves_nothing_behind(more, message, checkpoint, stories, tmp_path, capsys):
    assert adapt(checkpoint, stories, tmp_path / "run", *more) == 2
    assert not (tmp_path / "run").exists()
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_mistyped_model_leaves_nothing_behind(stories, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    assert adapt(tmp_path / "typo", stories, tmp_path / "run") == 2
    assert "typo" in capsys.readouterr().err
    assert list((tmp_path / "run").iterdir()) == []


def test_further_training_arguments_reach_the_trainer(trained_run, checkpoint, stories, tmp_path):
    more = ("--training", "gradient_checkpointing=true", "max_grad_norm=0.001")
    assert adapt(checkpoint, stories, tmp_path / "clipped", *more) == 0
    assert curve(tmp_path / "clipped")[0] == pytest.approx(curve(trained_run)[0], abs=1e-4)
    assert curve(tmp_path / "clipped", "learning_rate") == curve(trained_run, "learning_rate")
    assert curve(tmp_path / "clipped")[-1] != pytest.approx(curve(trained_run)[-1], abs=1e-4)


def test_an_adapted_model_is_trained_on(trained_run, stories, tmp_path, capsys):
    assert adapt(trained_run, stories, tmp_path / "second", "--dtype", "bfloat16") == 0
    assert sum(curve(tmp_path / "second")[:5]) < sum(curve(trained_run)[:5])
    assert adapt(trained_run, stories, tmp_path / "third", "--adapter", "lora") == 2
    assert "start from its base" in capsys.readouterr().err.splitlines()[-1]
    assert adapt(trained_run, stories, tmp_path / "fourth", "--rank", "8") == 2
    message = "has a gated adapter of rank 4, not a gated one of rank 8: use the same, or start from its base"
    assert message in capsys.readouterr().err
    assert not (tmp_path / "third").exists()
    assert not (tmp_path / "fourth").exists()


def test_a_coupling_is_added_to_a_finished_model_and_changes_nothing_else(trained_run, stories, tmp_path, capsys):
    assert adapt(trained_run, stories, tmp_path / "second", "--coupling-only", "--learning-rate", "1e-3") == 0
    before, after = (AnyOrderForCausalLM.from_pretrained(path) for path in (trained_run, tmp_path / "second"))
    weights = dict(after.named_parameters())
    assert all(torch.equal(weights.pop(name), parameter) for name, parameter in before.named_parameters())
    assert weights
    assert all(name.startswith("coupling.") for name in weights)
    assert bool(after.coupling.up.weight.any())
    with pytest.raises(SystemExit):
        adapt(trained_run, stories, tmp_path / "third", "--coupling-only", "--coupling")
    assert "not allowed with" in capsys.readouterr().err


def test_layers_for_scattered_members_are_added_to_a_coupling_and_change_nothing_else(trained_run, stories, tmp_path):
    coupled = AnyOrderForCausalLM.from_pretrained(trained_run)
    coupled.couple(Coupling(width=24, rank=8, scattered=False))
    torch.nn.init.normal_(coupled.coupling.up.weight, std=0.1)
    coupled.save_pretrained(tmp_path / "coupled")
    AutoTokenizer.from_pretrained(trained_run).save_pretrained(tmp_path / "coupled")
    (tmp_path / "apart.yaml").write_text("stages: [{mixture: [{regime: random_groups, group_sizes: [4]}]}]")
    more = ("--scattered-only", "--learning-rate", "1e-3", "--curriculum", str(tmp_path / "apart.yaml"))
    assert adapt(tmp_path / "coupled", stories, tmp_path / "second", *more) == 0
    before, after = (AnyOrderForCausalLM.from_pretrained(tmp_path / name) for name in ("coupled", "second"))
    weights = dict(after.named_parameters())
    assert all(torch.equal(weights.pop(name), parameter) for name, parameter in before.named_parameters())
    assert weights
    assert all(name.startswith("coupling.scattered.") for name in weights)
    assert not torch.equal(after.coupling.scattered.inner.weight, after.coupling.inner.weight)


def test_layers_for_scattered_members_need_a_coupling(trained_run, stories, tmp_path, capsys):
    assert adapt(trained_run, stories, tmp_path / "second", "--scattered-only") == 2
    assert "train one with --coupling-only" in capsys.readouterr().err.splitlines()[-1]


def test_a_model_with_all_weights_trained_is_trained_on(checkpoint, stories, tmp_path, capsys):
    own = ("--adapter", "none", "--learning-rate", "3e-3")
    assert adapt(checkpoint, stories, tmp_path / "first", *own) == 0
    assert adapt(tmp_path / "first", stories, tmp_path / "second", *own, "--dtype", "bfloat16") == 0
    assert sum(curve(tmp_path / "second")[:5]) < sum(curve(tmp_path / "first")[:5])
    assert adapt(tmp_path / "first", stories, tmp_path / "third", "--adapter", "lora") == 2
    assert "start from its base" in capsys.readouterr().err.splitlines()[-1]


def test_options_can_stand_in_a_file(checkpoint, stories, tmp_path):
    (tmp_path / "own.args").write_text("# a recipe\n--rank 8  # small\n--curriculum infill\n--tokens 128")
    assert adapt(checkpoint, stories, tmp_path / "run", f"@{tmp_path / 'own.args'}") == 0
    begun = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (begun["rank"], begun["curriculum"]) == (8, "infill")
    assert len(curve(tmp_path / "run")) == 2
