"""`anyorder adapt`: its golden trajectory, what it leaves behind, interruptions and mistakes."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("peft", reason="training needs the train extra")
pytest.importorskip("datasets", reason="training needs the train extra")

from anyorder.training.heldout import REGIMES, HeldOut
from anyorder.training.texts import tokenize
from training_runs import adapt, curve

GOLDEN = [5.4387, 4.9066, 4.0666]  # first, sixth, thirtieth step


@pytest.mark.filterwarnings("ignore")
def test_adapt_follows_its_golden_trajectory_and_saves_a_model_that_infills(checkpoint, stories, tmp_path):
    from anyorder import Infiller, load

    output = tmp_path / "run"
    assert adapt(checkpoint, stories, output) == 0
    curve_ = curve(output)
    assert len(curve_) == 30
    assert [curve_[0], curve_[5], curve_[29]] == pytest.approx(GOLDEN, abs=0.02)
    assert curve(output, "eval_random_1") == []
    assert curve(output, "num_input_tokens_seen")[-1] == 1005
    model, tokenizer = load(str(output))
    assert model.config.adapter["kind"] == "gated"
    assert Infiller(model, tokenizer)("a ___ b", length=2).text.startswith("a ")


@pytest.mark.filterwarnings("ignore")
def test_held_out_loss_is_measured_in_four_regimes(checkpoint, stories, tmp_path):
    from anyorder import load

    assert adapt(checkpoint, stories, tmp_path / "run", "--eval-file", stories, "--eval-every", 15) == 0
    curves = {name: curve(tmp_path / "run", f"eval_{name}") for name in REGIMES}
    assert {len(values) for values in curves.values()} == {3}  # at the start, after 15 steps, after 30
    assert len(set(curves["left_to_right_1"])) == 1  # gated: the base model's, whatever was trained
    for name in ("left_to_right_4", "random_1", "random_4"):
        assert curves[name][-1] < curves[name][0]
    model, tokenizer = load(str(tmp_path / "run"))
    texts = [json.loads(line)["text"] for line in stories.read_text().splitlines()]
    held_out = HeldOut(tokenize(texts, tokenizer, 32))
    assert len(held_out) == 12
    assert held_out.losses(model) == pytest.approx({name: values[-1] for name, values in curves.items()}, abs=1e-4)
    with pytest.raises(ValueError, match="no documents to measure on"):
        HeldOut([])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("more", [(), ("--streaming",)])
def test_ctrl_c_saves_and_resume_goes_on_as_if_nothing_had_happened(
    more, checkpoint, stories, tmp_path, capsys, monkeypatch
):
    import os
    import signal

    from anyorder.training.trainer import AnyOrderTrainer

    assert adapt(checkpoint, stories, tmp_path / "whole", *more) == 0
    step = AnyOrderTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 13:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(AnyOrderTrainer, "training_step", interrupted)
    output = tmp_path / "cut"
    assert adapt(checkpoint, stories, output, *more) == 130
    assert "saved at step 14 of 30; go on with the same command and --resume" in capsys.readouterr().err
    assert not (output / "adapter_model.safetensors").exists()
    monkeypatch.setattr(AnyOrderTrainer, "training_step", step)
    assert adapt(checkpoint, stories, output, "--rank", 8, *more, "--resume") == 2
    assert "has --rank 4, not 8: use the same" in capsys.readouterr().err
    assert adapt(checkpoint, stories, output, *more) == 2
    assert "is not empty: add --resume" in capsys.readouterr().err
    assert adapt(checkpoint, stories, output, *more, "--resume") == 0
    assert curve(output) == curve(tmp_path / "whole")
    one, two = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert one == two


def test_adapt_tells_mistakes_in_one_line(checkpoint, stories, tmp_path, capsys):
    for number, (more, message) in enumerate((
        (["--curriculum", "magic"], "no curriculum 'magic'"),
        (["--train-file", "none.jsonl"], "no such file: none.jsonl"),
        (["--resume"], "nothing to resume"),
        (["--mixture", "1", "2"], "--mixture has 2 weights for 1 training files"),
        (["--attn-implementation", "flex_attention"], "has no backward pass on cpu: use sdpa"),
    )):  # fmt: skip
        assert adapt(checkpoint, stories, tmp_path / str(number), *more) == 2
        assert not (tmp_path / str(number)).exists()
        assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.filterwarnings("ignore")
def test_curves_are_a_table_and_a_picture(checkpoint, stories, tmp_path):
    output = tmp_path / "run"
    assert adapt(checkpoint, stories, output, "--eval-file", stories, "--eval-every", 15) == 0
    names = (output / "curves.csv").read_text().splitlines()[0].split(",")
    assert {"step", "loss", "loss_spans", "eval_random_4", "tokens_per_second", "learning_rate"} <= set(names)
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list(output.glob("*.part"))


@pytest.mark.filterwarnings("ignore")
def test_further_training_arguments_reach_the_trainer(checkpoint, stories, tmp_path, capsys):
    whole = tmp_path / "whole"
    assert adapt(checkpoint, stories, whole) == 0
    more = ("--training", "gradient_checkpointing=true", "max_grad_norm=0.001")
    assert adapt(checkpoint, stories, tmp_path / "clipped", *more) == 0
    assert curve(tmp_path / "clipped")[0] == pytest.approx(curve(whole)[0], abs=1e-4)
    assert curve(tmp_path / "clipped", "learning_rate") == curve(whole, "learning_rate")
    assert curve(tmp_path / "clipped")[-1] != pytest.approx(curve(whole)[-1], abs=1e-4)
    for pair, message in (
        ("gradient_checkpoint=true", "did you mean 'gradient_checkpointing'?"),
        ("max_steps=3", "max_steps follows from the other options"),
        ("torch_compile=true", "training is not compiled"),
        ("fast", "--training takes NAME=VALUE, got 'fast'"),
    ):
        assert adapt(checkpoint, stories, tmp_path / "mistaken", "--training", pair) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
        assert not (tmp_path / "mistaken").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["gated", "none"])
def test_an_adapted_model_is_trained_on(kind, checkpoint, stories, tmp_path, capsys):
    rate = ("--adapter", kind, "--learning-rate", "3e-3")
    assert adapt(checkpoint, stories, tmp_path / "first", *rate) == 0
    assert adapt(tmp_path / "first", stories, tmp_path / "second", *rate, "--dtype", "bfloat16") == 0
    first, second = curve(tmp_path / "first"), curve(tmp_path / "second")
    assert sum(second[:5]) < sum(first[:5])
    assert adapt(tmp_path / "first", stories, tmp_path / "third", "--adapter", "lora") == 2
    assert "start from its base" in capsys.readouterr().err.splitlines()[-1]
    if kind == "gated":
        assert adapt(tmp_path / "first", stories, tmp_path / "fourth", "--rank", "8") == 2
        message = "has a gated adapter of rank 4, not a gated one of rank 8: use the same, or start from its base"
        assert message in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_options_can_stand_in_a_file(checkpoint, stories, tmp_path, capsys):
    (tmp_path / "own.args").write_text("# a recipe\n--rank 8  # small\n--curriculum infill\n")
    assert adapt(checkpoint, stories, tmp_path / "run", f"@{tmp_path / 'own.args'}") == 0
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (run["rank"], run["curriculum"]) == (8, "infill")
