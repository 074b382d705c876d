"""Two processes give the losses of one: DDP through the real command line, FSDP2 by PyTorch's own sharding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft", reason="training needs the train extra")
pytest.importorskip("datasets", reason="training needs the train extra")

import sharded_training
from anyorder import AnyOrderForCausalLM
from training_runs import adapt, curve

pytestmark = pytest.mark.filterwarnings("ignore")
HERE = Path(__file__).parent


def torchrun(*arguments):
    paths = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)


@pytest.mark.parametrize(("adapter", "more"), [("none", []), ("gated", ["--streaming"])])
def test_two_processes_under_ddp_give_the_losses_of_one(adapter, more, checkpoint, stories, tmp_path):
    own = ["--adapter", adapter, "--learning-rate", "1e-3", *more]
    assert adapt(checkpoint, stories, tmp_path / "one", *own) == 0
    options = [
        "--train-file", stories, "--tokens", 30 * 2 * 32, "--length", 32, "--document-length", 32, "--rank", 4,
        "--batch-size", 1, "--log-every", 1, "--save-every", 10, "--dtype", "float32", "--warmup-steps", 2, *own,
    ]  # fmt: skip
    done = torchrun("-m", "anyorder", "adapt", str(checkpoint), str(tmp_path / "two"), *map(str, options))
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(curve(tmp_path / "two")) == 30
    assert curve(tmp_path / "two") == pytest.approx(curve(tmp_path / "one"), abs=1e-4)
    assert curve(tmp_path / "two", "loss_spans") == pytest.approx(curve(tmp_path / "one", "loss_spans"), abs=1e-4)
    one, two = (AnyOrderForCausalLM.from_pretrained(tmp_path / name) for name in ("one", "two"))
    for (name, a), (_, b) in zip(one.named_parameters(), two.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=0, msg=name)


@pytest.mark.parametrize("adapter", ["full", "lora", "gated"])
def test_two_processes_under_fsdp2_give_the_losses_of_one(adapter, tmp_path):
    model = sharded_training.model_of(adapter)
    expected = sharded_training.train(model, 0, 1)
    done = torchrun(str(HERE / "sharded_training.py"), adapter, str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "curve.json").read_text()) == pytest.approx(expected, abs=1e-5)
    base = {} if adapter == "full" else {"base_model": sharded_training.base_model("llama_tied")}
    saved = AnyOrderForCausalLM.from_pretrained(tmp_path / "model", **base)
    for (name, a), (_, b) in zip(model.named_parameters(), saved.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0, msg=name)
