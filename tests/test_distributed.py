"""Two processes give the losses of one: DDP through the real command line, FSDP2 by PyTorch's own sharding."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("datasets", reason="training needs the train extra")

import sharded_training
from anyorder import AnyOrderForCausalLM
from training_runs import OPTIONS, adapt, curve

pytestmark = pytest.mark.filterwarnings("ignore")
HERE = Path(__file__).parent


def started(*arguments):
    paths = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    return subprocess.Popen([*map(str, command)], env=environment, stderr=subprocess.PIPE, text=True)


def torchrun(*arguments):
    with started(*arguments) as process:
        errors = process.communicate(timeout=300)[1]
    assert process.returncode == 0, errors[-3000:]


def adapt_by_two(checkpoint, stories, output, *more):
    """The arguments of the command that `adapt` runs, with half the rows in each of two processes."""
    options = [*OPTIONS, "--batch-size", 1, *more]
    return HERE / "adapt_in_group.py", "adapt", checkpoint, output, "--train-file", stories, *options


@pytest.mark.parametrize(
    ("adapter", "more"),
    [
        ("gated", ["--coupling"]),
        pytest.param("none", [], marks=pytest.mark.slow),
        pytest.param("gated", ["--streaming"], marks=pytest.mark.slow),
    ],
)
def test_two_processes_under_ddp_give_the_losses_of_one(adapter, more, checkpoint, stories, tmp_path):
    own = ["--adapter", adapter, "--learning-rate", "1e-3", *more]
    assert adapt(checkpoint, stories, tmp_path / "one", *own) == 0
    torchrun(*adapt_by_two(checkpoint, stories, tmp_path / "two", *own))
    assert len(curve(tmp_path / "two")) == 30
    assert curve(tmp_path / "two") == pytest.approx(curve(tmp_path / "one"), abs=1e-4)
    assert curve(tmp_path / "two", "loss_spans") == pytest.approx(curve(tmp_path / "one", "loss_spans"), abs=1e-4)
    one, two = (AnyOrderForCausalLM.from_pretrained(tmp_path / name) for name in ("one", "two"))
    for (name, a), (_, b) in zip(one.named_parameters(), two.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=0, msg=name)


@pytest.mark.slow
def test_two_processes_stop_after_the_same_step_when_told_and_go_on(checkpoint, stories, tmp_path):
    """torchrun hands SIGTERM on to its processes, which hear it in the middle of whatever they do."""
    long = ["--learning-rate", "1e-3", "--tokens", 400 * 2 * 32, "--save-every", 100]
    command = adapt_by_two(checkpoint, stories, tmp_path / "run", *long)
    with started(*command) as process:
        while not list((tmp_path / "run").glob("checkpoints/checkpoint-100/trainer_state.json")):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        errors = process.communicate(timeout=100)[1]
    assert process.returncode != 0
    assert "of 400; go on with the same command and --resume" in errors, errors[-3000:]
    assert "outlive the command" not in errors
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()
    torchrun(*command, "--resume")
    assert adapt(checkpoint, stories, tmp_path / "one", *long) == 0
    assert curve(tmp_path / "run") == pytest.approx(curve(tmp_path / "one"), abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["full", "lora", "gated"])
def test_two_processes_under_fsdp2_give_the_losses_of_one(adapter, tmp_path):
    model = sharded_training.model_of(adapter)
    expected = sharded_training.train(model, 0, 1)
    torchrun(HERE / "sharded_training.py", adapter, tmp_path)
    assert json.loads((tmp_path / "curve.json").read_text()) == pytest.approx(expected, abs=1e-5)
    base = {} if adapter == "full" else {"base_model": sharded_training.base_model("llama_tied")}
    saved = AnyOrderForCausalLM.from_pretrained(tmp_path / "model", **base)
    for (name, a), (_, b) in zip(model.named_parameters(), saved.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0, msg=name)
