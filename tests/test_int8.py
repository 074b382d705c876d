"""Weights in 8 bits: near the same model, and everything that holds of a model holds of this one."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import BitsAndBytesConfig, TorchAoConfig

from anyorder import AnyOrderForCausalLM, Factorization, load
from anyorder.model.adapters import Adapter
from architectures import VOCABULARY, base_model
from command_line import run as run_command

pytest.importorskip("torchao", reason="needs anyorder[int8]")

from torchao.quantization import Int8WeightOnlyConfig

IDS = torch.randint(3, VOCABULARY, (2, 14), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """A base model, it converted whole, and it with a gated adapter."""
    root = tmp_path_factory.mktemp("int8")
    base_model("llama").save_pretrained(root / "base")
    AnyOrderForCausalLM.from_causal_lm(str(root / "base")).save_pretrained(root / "whole")
    adapted = AnyOrderForCausalLM.from_causal_lm(str(root / "base"), adapter=Adapter("gated", rank=4))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name or name == "query_embedding":
            parameter.data.normal_(std=0.3)
    adapted.save_pretrained(root / "adapted")
    return root


@pytest.mark.parametrize("kind", ["whole", "adapted"])
def test_in_8_bits_it_is_nearly_the_same_model(directories, kind):
    plain = AnyOrderForCausalLM.from_pretrained(directories / kind).eval()
    config = TorchAoConfig(Int8WeightOnlyConfig())
    model = AnyOrderForCausalLM.from_pretrained(directories / kind, quantization_config=config).eval()
    layer = model.causal_lm.model.layers[0].mlp.up_proj
    weight = getattr(layer, "base_layer", layer).weight
    assert "Int8" in type(weight).__name__
    if kind == "adapted":
        assert type(layer.lora_A["default"].weight) is torch.nn.Parameter
    order = Factorization.random(14, 3, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        exact, near = plain(IDS[:1], order).logits, model(IDS[:1], order).logits
    error = float((near - exact).abs().max() / exact.abs().max())
    assert 0 < error < 0.05
    output = model.generate(IDS, Factorization.stack([order] * 2), return_dict_in_generate=True)
    scored = model.log_likelihood(output.sequences, Factorization.stack([order] * 2))
    torch.testing.assert_close(output.log_probs, scored, atol=1e-5, rtol=0)  # cached == parallel


def test_only_torchao_quantises_under_an_adapter(directories):
    with pytest.raises(ValueError, match="must be a TorchAoConfig, got a BitsAndBytesConfig"):
        AnyOrderForCausalLM.from_pretrained(directories / "adapted", quantization_config=BitsAndBytesConfig())


def test_the_command_line_loads_in_8_bits(checkpoint, capsys, monkeypatch):
    seen = []

    def spy(*arguments, **options):
        model, tokenizer = load(*arguments, **options)
        seen.append(model)
        return model, tokenizer

    monkeypatch.setattr("anyorder.loading.load", spy)
    code, out, error = run_command(capsys, "infill", "a ___ b", "--model", checkpoint, "--json", "--int8")
    assert code == 0, error
    assert json.loads(out)["text"].startswith("a ")
    assert "Int8" in type(seen[0].causal_lm.model.layers[0].mlp.up_proj.weight).__name__
