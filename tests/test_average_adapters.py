"""The script that averages adapters."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from anyorder import AnyOrderForCausalLM
from anyorder.model.adapters import Adapter
from architectures import base_model, couple

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "average_adapters.py"


def average(adapters, output):
    spec = importlib.util.spec_from_file_location("average_adapters", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.average(adapters, output)


def saved(directory, seed, rank=4, coupled=False):
    torch.manual_seed(seed)
    model = AnyOrderForCausalLM.from_causal_lm(base_model("llama"), adapter=Adapter("gated", rank=rank))
    for name, parameter in model.named_parameters():
        if "lora_" in name or name == "query_embedding":
            parameter.data.normal_(std=0.3)
    if coupled:
        couple(model)
        model.coupling.up.weight.data.mul_(seed + 1)
    model.save_pretrained(directory)
    own = "lora_", "coupling.", "query_embedding"
    return {name: p.detach() for name, p in model.named_parameters() if any(part in name for part in own)}


@pytest.mark.parametrize("coupled", [False, True])
def test_the_mean_of_adapters_is_an_adapter(tmp_path, coupled):
    first, second = saved(tmp_path / "a", 0, coupled=coupled), saved(tmp_path / "b", 1, coupled=coupled)
    average([tmp_path / "a", tmp_path / "b"], tmp_path / "mean")
    model = AnyOrderForCausalLM.from_pretrained(tmp_path / "mean", base_model=base_model("llama"))
    found = dict(model.named_parameters())
    for name, tensor in first.items():
        torch.testing.assert_close(found[name], (tensor + second[name]) / 2)
    with pytest.raises(ValueError, match="exists: choose another directory"):
        average([tmp_path / "a"], tmp_path / "mean")
    saved(tmp_path / "wide", 2, rank=8)
    with pytest.raises(ValueError, match="wide has other tensors than"):
        average([tmp_path / "a", tmp_path / "wide"], tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_coupling_that_only_some_have_is_refused(tmp_path):
    saved(tmp_path / "a", 0, coupled=True)
    saved(tmp_path / "b", 1)
    with pytest.raises(ValueError, match="b has no coupling.safetensors"):
        average([tmp_path / "a", tmp_path / "b"], tmp_path / "mean")
