"""A plan against what really happens: parameters counted, arithmetic counted by PyTorch, the command."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from anyorder import AnyOrderForCausalLM, Factorization
from anyorder.model.adapters import Adapter
from anyorder.training.curriculum import BUILT_IN, Curriculum, LeftToRight, RandomGroups, Stage
from architectures import base_model

pytest.importorskip("datasets", reason="training needs the train extra")

from anyorder.training.data import Sequences, collate
from anyorder.training.plan import Document, Machine, Run, plan
from anyorder.training.texts import TokenDocument

CURRICULA = {
    "random": Curriculum((Stage((RandomGroups((4,)),), (1.0,)),)),
    "left_to_right": Curriculum((Stage((LeftToRight((1,)),), (1.0,)),)),
}


@pytest.mark.parametrize(
    ("adapter", "curriculum"),
    [(None, "random"), (None, "left_to_right"), ("lora", "random"), ("lora", "left_to_right"), ("gated", "random")],
)
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2"])
@pytest.mark.filterwarnings("ignore")
def test_parameters_and_arithmetic_are_those_of_a_real_step(architecture, adapter, curriculum):
    base = base_model(architecture)
    rank = 4 if adapter else None
    run = Run(CURRICULA[curriculum], rank=rank, gated=adapter == "gated", length=48, document_length=48, batch_size=1)
    expected = plan(base.config, run, Machine())
    model = AnyOrderForCausalLM.from_causal_lm(base, adapter=adapter and Adapter(adapter, 4)).train()
    assert expected.parameters == sum(p.numel() for p in model.parameters())
    assert expected.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    document = TokenDocument(torch.ones(48, dtype=torch.int64), Document(48, (1,)))
    data = Sequences([[document]], 48, run.curriculum, 100)
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:  # the fused kernel's products are not counted
        for i in range(6):
            batch = collate([data[i]])
            order = Factorization(batch["group_ids"], batch["document_ids"])
            model(batch["input_ids"], order, labels=batch["labels"]).loss.backward()
    real = counter.get_total_flops() / (6 * 48)
    assert expected.flops_per_token == pytest.approx(real, rel=0.2)


def test_more_devices_hold_less_each_and_finish_sooner():
    config, run = base_model("llama").config, Run(BUILT_IN["paper"], recipe="paper")
    one, eight = plan(config, run, Machine(1)), plan(config, run, Machine(8))
    assert eight.optimizer == one.optimizer / 8
    assert eight.seconds == pytest.approx(one.seconds / 8)
    copied = plan(config, run, Machine(8, sharded=False))
    assert copied.weights == one.weights
    checkpointed = plan(config, Run(BUILT_IN["paper"], recipe="paper", gradient_checkpointing=True), Machine())
    assert checkpointed.activations < one.activations
    assert checkpointed.flops_per_token > one.flops_per_token


def test_the_command_plans_without_data_or_output(checkpoint, capsys):
    from anyorder.cli import main

    options = ["--devices", "8", "--tokens", "2000000000", "--training", "gradient_checkpointing=true"]
    assert main(["adapt", str(checkpoint), "--plan", "--adapter", "none", *options]) == 0
    out = capsys.readouterr().out
    for word in ("parameters", "memory a device", "tokens a second", "days"):
        assert word in out
    assert main(["adapt", str(checkpoint), "--plan", "--json", *options]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["seconds"] == pytest.approx(2e9 / record["tokens_per_second"])
    assert main(["adapt", str(checkpoint), "--plan", "--utilisation", "3"]) == 2
    assert "--utilisation 3.0 must be in (0, 1]" in capsys.readouterr().err
    assert main(["adapt", str(checkpoint), "somewhere"]) == 2
    assert "adapt needs an output directory and --train-file" in capsys.readouterr().err
