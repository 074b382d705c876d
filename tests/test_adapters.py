"""Gated adapters: the base model bit for bit wherever it has stood before, different elsewhere."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from anyorder import AnyOrderForCausalLM, Factorization, load, policies
from anyorder.model.adapters import Adapter
from architectures import ARCHITECTURES, VOCABULARY, base_model

pytest.importorskip("peft", reason="adapters need the train extra")

IDS = torch.randint(3, VOCABULARY, (2, 14), generator=torch.Generator().manual_seed(0))


def adapted(architecture: str = "llama", kind: str = "gated", trained: bool = True, **kwargs) -> AnyOrderForCausalLM:
    """A model whose adapter has random weights, as if it had been trained."""
    model = AnyOrderForCausalLM.from_causal_lm(base_model(architecture), adapter=Adapter(kind=kind, rank=4), **kwargs)
    if trained:
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_" in name or name == "query_embedding":
                parameter.data.normal_(std=0.3)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_base_model_bit_for_bit_where_it_has_stood_before(architecture):
    model = adapted(architecture)
    bare = AnyOrderForCausalLM.from_causal_lm(base_model(architecture))
    bare.query_embedding.data.copy_(model.query_embedding)

    def logits(order):
        return model(IDS[:1], order).logits[0], bare(IDS[:1], order).logits[0]

    ours, base = logits(Factorization.left_to_right(14))
    assert torch.equal(ours, base)
    plain = base_model(architecture)
    torch.testing.assert_close(model.causal_lm(IDS).logits, plain(IDS).logits, atol=2e-5, rtol=0)

    ours, base = logits(Factorization.left_to_right(14, group_size=4))
    first = torch.arange(14) % 4 == 1  # of each group
    if architecture == "qwen3_moe":  # an expert multiplies all its rows at once: rounding depends on the others
        torch.testing.assert_close(ours[first], base[first], atol=2e-5, rtol=0)
    else:
        assert torch.equal(ours[first], base[first])
    assert (ours[2:5] != base[2:5]).any(dim=1).all()

    blank = torch.zeros(14, dtype=torch.bool)
    blank[5:8] = True
    ours, base = logits(Factorization.infill(blank))
    assert (ours[5:8] != base[5:8]).any(dim=1).all()  # each reads the suffix, which skipped the gap


@torch.no_grad()
@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "qwen3_moe"])
def test_the_prefix_rows_of_an_infill_are_the_base_models(architecture):
    """Their keys and values can be shared with the base model's cache."""
    model, states = adapted(architecture), {}
    bare = AnyOrderForCausalLM.from_causal_lm(base_model(architecture))
    blank = torch.zeros(1, 14, dtype=torch.bool)
    blank[0, 5:8] = True
    for name, one in (("ours", model), ("base", bare)):
        layout = one.lay_out(IDS[:1], Factorization.infill(blank))
        states[name] = one.hidden_rows(layout.rows, layout.key_positions)[0]
    assert torch.equal(states["ours"][:5], states["base"][:5])
    assert (states["ours"][5:11] != states["base"][5:11]).any(dim=1).all()  # the suffix


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cached_equals_parallel_with_a_gated_adapter(architecture):
    model = adapted(architecture)
    order = Factorization.stack([Factorization.random(14, 3, given=2), Factorization.left_to_right(9, 2)])
    output = model.generate(IDS, order, forced_ids=IDS, return_dict_in_generate=True)
    torch.testing.assert_close(output.log_probs, model.log_likelihood(IDS, order), atol=1e-5, rtol=0)


def test_greedy_left_to_right_is_the_base_models_own():
    options = {"max_new_tokens": 12, "do_sample": False}
    expected = base_model("qwen3").generate(IDS, pad_token_id=0, attention_mask=torch.ones_like(IDS), **options)
    model = adapted("qwen3")
    assert torch.equal(model.generate(IDS, **options), expected)
    assert torch.equal(model.causal_lm.generate(IDS, attention_mask=torch.ones_like(IDS), **options), expected)
    assert not torch.equal(model.generate(IDS, policy=policies.groupwise(4), eos_token_id=(), **options), expected)


def test_closed_rows_cost_no_adapter(monkeypatch):
    model, seen = adapted(), []
    layer = model.causal_lm.model.layers[0].self_attn.q_proj
    add = layer._add
    monkeypatch.setattr(layer, "_add", lambda flat, rows, x, name: seen.append(len(x)) or add(flat, rows, x, name))
    with torch.no_grad():
        model(IDS[:1])
    assert seen == []
    model(IDS[:1])
    assert seen.pop() == 0  # in training it takes part in every step
    model(IDS[:1], Factorization.left_to_right(14, 4))
    assert seen == [9]  # of 13 predictions 4 are free rows; the base has stood there


@torch.no_grad()
def test_an_untrained_adapter_changes_nothing():
    order = Factorization.random(14, 3, generator=torch.Generator().manual_seed(0))
    bare = AnyOrderForCausalLM.from_causal_lm(base_model("llama"))
    for kind in ("gated", "lora"):
        torch.testing.assert_close(
            adapted(kind=kind, trained=False)(IDS[:1], order).logits, bare(IDS[:1], order).logits
        )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "gemma3", "phi3"])
def test_frozen_rows_first_gives_the_gradients_of_one_forward(architecture, checkpointing, monkeypatch):
    """Rows that the adapter cannot change are forwarded without gradient; losses and gradients stay what they were."""
    model, counts = adapted(architecture).train(), []
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    blank = torch.zeros(14, dtype=torch.bool)
    blank[5:8] = True
    order = Factorization.stack(
        [
            Factorization.random(14, 3, generator=torch.Generator().manual_seed(1)),
            Factorization.infill(blank),
            Factorization.left_to_right(12, 4),
        ]
    )
    ids = IDS[[0, 1, 0]]

    def gradients():
        model.zero_grad()
        output = model(ids, order, labels=ids)
        output.loss.backward()
        return output.token_losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    handle = model.get_input_embeddings().register_forward_hook(lambda *args: counts.append(torch.is_grad_enabled()))
    losses, grads = gradients()
    assert counts == [False, True]
    handle.remove()
    monkeypatch.setattr(
        AnyOrderForCausalLM,
        "_frozen_rows_first",
        lambda self, layout: (
            self.hidden_rows(layout.rows, layout.key_positions),
            torch.arange(layout.rows.count).expand(layout.rows.lo.shape),
        ),
    )
    expected, plain = gradients()
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=0)
    assert grads.keys() == plain.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, plain[name], atol=1e-6, rtol=1e-4)


def test_rows_are_frozen_when_nothing_they_read_is_adapted():
    layout = adapted().lay_out(IDS[:1], Factorization.random(14, 3, generator=torch.Generator().manual_seed(1)))
    rows, C = layout.rows, layout.rows.content_count
    for r in range(rows.count):
        read = rows.gates[0, :C][int(rows.lo[0, r]) : int(rows.hi[0, r])]
        assert bool(rows.frozen[0, r]) == (not rows.gates[0, r] and not read.any())
    assert rows.frozen.any()
    assert not rows.frozen.all()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["gated", "lora"])
def test_only_the_adapter_and_the_query_embedding_are_trained(kind, checkpointing):
    model = adapted(kind=kind).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    order = Factorization.stack(
        [Factorization.random(14, 3, generator=torch.Generator().manual_seed(s)) for s in (0, 1)]
    )
    model(IDS, order, labels=IDS).loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert all("lora_" in name or name == "query_embedding" for name in grads)
    assert len(grads) == 1 + 2 * 7 * 3
    assert all(grad.abs().sum() > 0 for grad in grads.values())
    if checkpointing:
        again = adapted(kind=kind).train()
        again(IDS, order, labels=IDS).loss.backward()
        for name, parameter in again.named_parameters():
            if name in grads:
                torch.testing.assert_close(parameter.grad, grads[name])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gated", "lora"])
@pytest.mark.parametrize("recipe", ["exact", "paper"])
def test_saved_and_loaded_is_the_same_model(kind, recipe, tmp_path):
    base_model("llama").save_pretrained(tmp_path / "base")
    model = AnyOrderForCausalLM.from_causal_lm(
        str(tmp_path / "base"), recipe=recipe, adapter=Adapter(kind=kind, rank=4)
    )
    for name, parameter in model.named_parameters():
        if "lora_" in name or name == "query_embedding":
            parameter.data.normal_(std=0.3)
    model.save_pretrained(tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "config.json", "adapter_config.json", "adapter_model.safetensors", "query_embedding.safetensors", "README.md",
    } - ({"README.md"} if not (tmp_path / "adapter" / "README.md").exists() else set())  # fmt: skip
    order = Factorization.random(14, 3, generator=torch.Generator().manual_seed(0))
    again = AnyOrderForCausalLM.from_pretrained(tmp_path / "adapter")
    assert again.config.adapter == model.config.adapter
    assert torch.equal(again(IDS[:1], order).logits, model(IDS[:1], order).logits)
    auto = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert isinstance(auto, AnyOrderForCausalLM)
    assert torch.equal(auto(IDS[:1], order).logits, again(IDS[:1], order).logits)
    half = AnyOrderForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.bfloat16)
    assert half.causal_lm.dtype == torch.bfloat16
    other = AnyOrderForCausalLM.from_pretrained(tmp_path / "adapter", base_model=base_model("llama"))
    assert torch.equal(other(IDS[:1], order).logits, again(IDS[:1], order).logits)


def test_an_adapter_of_another_base_is_refused(tmp_path):
    adapted().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not say which model it was trained on: pass base_model="):
        AnyOrderForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="trained on another model than LlamaForCausalLM: .* differs"):
        AnyOrderForCausalLM.from_pretrained(tmp_path, base_model=base_model("llama", seed=5))
    with pytest.raises(ValueError, match="trained on another model than .*: its layers have other names"):
        AnyOrderForCausalLM.from_pretrained(tmp_path, base_model=base_model("gpt2"))
    assert (
        AnyOrderForCausalLM.from_pretrained(tmp_path, base_model=base_model("llama")).config.adapter["kind"] == "gated"
    )


def test_the_base_that_the_built_in_name_means_elsewhere_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("anyorder.hub.resolve.packaged_file", lambda package, file: None)
    monkeypatch.setattr("anyorder.hub.checkpoint.load_causal_lm", lambda name, **kwargs: base_model("llama", seed=5))
    model = adapted()
    model.config.base["name"] = "smollm2-135m"
    model.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"another model than smollm2-135m: .* differs \(it was trained on the built-in"
    ):
        AnyOrderForCausalLM.from_pretrained(tmp_path)


def test_adapter_weights_that_do_not_fit_are_an_error(tmp_path):
    adapted().save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(iter(weights))
    for broken, message in (
        ({k: v for k, v in weights.items() if k != name}, "missing"),
        (weights | {"extra": torch.zeros(1)}, "unknown: extra"),
        (weights | {name: torch.zeros(1, 1)}, "of another shape"),
    ):
        save_file(broken, file)
        with pytest.raises(ValueError, match=message):
            AnyOrderForCausalLM.from_pretrained(tmp_path, base_model=base_model("llama"))


@torch.no_grad()
def test_lora_can_be_merged_and_a_gated_adapter_cannot(tmp_path):
    model = adapted(kind="lora")
    order = Factorization.random(14, 3, generator=torch.Generator().manual_seed(0))
    expected = model(IDS[:1], order).logits
    model.merge_adapter().save_pretrained(tmp_path)
    torch.testing.assert_close(model(IDS[:1], order).logits, expected, atol=1e-4, rtol=0)
    again = AnyOrderForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(IDS[:1], order).logits, expected, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="no adapter to merge"):
        again.merge_adapter()
    with pytest.raises(ValueError, match="a gated adapter cannot be merged"):
        adapted().merge_adapter()


def test_peft_itself_reads_an_ungated_adapter(tmp_path):
    from peft import PeftModel

    model = adapted(kind="lora")
    model.save_pretrained(tmp_path)
    theirs = PeftModel.from_pretrained(base_model("llama"), tmp_path)
    torch.testing.assert_close(theirs(IDS).logits, model.causal_lm(IDS).logits, atol=2e-5, rtol=0)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "magic"}, "adapter must be one of gated, lora, got 'magic'"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1\.0"),
    ],
)
def test_adapters_that_cannot_be_meant(fields, message):
    with pytest.raises(ValueError, match=message):
        Adapter(**fields)


def test_load_takes_an_adapter_directory(checkpoint, tmp_path):
    model, tokenizer = load(str(checkpoint), adapter="gated")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = load(str(tmp_path))
    assert again.config.base["name"] == str(checkpoint)
