"""Gated adapters: the base model bit for bit wherever it has stood before, different elsewhere."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from anyorder import AnyOrderForCausalLM, Factorization, policies
from anyorder.model import gates
from anyorder.model.adapters import Adapter
from architectures import ARCHITECTURES, VOCABULARY, adapted, base_model

IDS = torch.randint(3, VOCABULARY, (2, 14), generator=torch.Generator().manual_seed(0))


@cache
def shared(architecture: str) -> AnyOrderForCausalLM:
    """One of those, for tests that do not change it."""
    return adapted(architecture)


@cache
def bare_one(architecture: str) -> AnyOrderForCausalLM:
    """The same without an adapter."""
    bare = AnyOrderForCausalLM.from_causal_lm(base_model(architecture))
    bare.query_embedding.data.copy_(shared(architecture).query_embedding)
    return bare


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_base_model_bit_for_bit_where_it_has_stood_before(architecture):
    model, bare = shared(architecture), bare_one(architecture)

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
    model, bare, states = shared(architecture), bare_one(architecture), {}
    blank = torch.zeros(1, 14, dtype=torch.bool)
    blank[0, 5:8] = True
    for name, one in (("ours", model), ("base", bare)):
        layout = one.lay_out(IDS[:1], Factorization.infill(blank))
        states[name] = one.hidden_rows(layout.rows, layout.key_positions)[0]
    assert torch.equal(states["ours"][:5], states["base"][:5])
    assert (states["ours"][5:11] != states["base"][5:11]).any(dim=1).all()  # the suffix


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cached_equals_parallel_with_a_gated_adapter(architecture):
    model = shared(architecture)
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
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [None, "gated", "lora"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loaded_in_bfloat16_it_is_the_base_loaded_in_bfloat16(architecture, kind, tmp_path):
    """Transformers keeps rotary frequencies in float32 whatever the weights: rounded, they turn far tokens wrongly."""
    folders = tmp_path / "base", tmp_path / "ours"
    base_model(architecture).save_pretrained(folders[0])
    AnyOrderForCausalLM.from_causal_lm(str(folders[0]), adapter=kind).save_pretrained(folders[1])
    base = AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.bfloat16)
    ours = AnyOrderForCausalLM.from_pretrained(folders[1], dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.bfloat16}
    buffers = dict(base.named_buffers())
    assert {name for name, _ in ours.causal_lm.named_buffers()} == buffers.keys()
    for name, buffer in ours.causal_lm.named_buffers():
        assert buffer.dtype == buffers[name].dtype, name
        assert torch.equal(buffer, buffers[name]), name
    assert torch.equal(ours(IDS).logits, AnyOrderForCausalLM.from_causal_lm(base)(IDS).logits)


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


OPEN = Factorization.random(14, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_a_gate_on_what_lies_outside_the_decoders_layers_is_refused(name):
    with pytest.raises(
        ValueError, match=rf"inside the decoder's layers, and (model\.)?{name} is none; leave '{name}' out"
    ):
        AnyOrderForCausalLM.from_causal_lm(
            base_model("llama"), adapter=Adapter("gated", rank=2, target_modules=["q_proj", name])
        )


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # of peft 0.19
def test_an_ungated_adapter_may_stand_on_the_head():
    model = AnyOrderForCausalLM.from_causal_lm(
        base_model("llama"), adapter=Adapter("lora", rank=2, target_modules=["lm_head"])
    )
    before = model(IDS[:1], OPEN).logits
    model.causal_lm.lm_head.lora_B["default"].weight.data.fill_(0.5)
    assert (model(IDS[:1], OPEN).logits != before)[0, 1:].any(dim=1).all()


def test_targets_that_no_layer_answers_to_are_errors():
    for target, hint in (("q_porj", "did you mean 'q_proj'"), ("xyz", "its linear layers: down_proj, .*v_proj")):
        with pytest.raises(ValueError, match=f"no module '{target}'; {hint}"):
            AnyOrderForCausalLM.from_causal_lm(base_model("llama"), adapter=Adapter("lora", target_modules=[target]))
    with pytest.raises(ValueError, match="must be a list of names, got 'q_proj'"):
        Adapter("gated", target_modules="q_proj")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_gate_stays_open(checkpointing):
    """Neither after a forward, nor after one that fails, nor after recomputation."""
    model = adapted().train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    seen = []
    head = model.causal_lm.lm_head
    handle = head.register_forward_pre_hook(lambda *args: seen.append(gates._gate.get()))
    with torch.no_grad():
        model(IDS[:1], OPEN)
    model(IDS[:1], OPEN, labels=IDS[:1]).loss.backward()
    handle.remove()
    assert seen
    assert set(seen) == {None}
    assert gates._gate.get() is None
    layer = model.causal_lm.model.layers[1]
    handle = layer.mlp.register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(IDS[:1], OPEN)
    handle.remove()
    assert gates._gate.get() is None
    q = layer.self_attn.q_proj
    x = torch.randn(5, 32)
    assert torch.equal(q(x), q.base_layer(x))


def test_a_layer_that_sees_some_rows_only_is_named():
    """As an expert does, to which a router sends some."""
    base = base_model("llama")
    mlp = base.model.layers[1].mlp
    forward = mlp.forward
    mlp.forward = lambda x: torch.cat([forward(x[:, :5]), forward(x[:, 5:])], dim=1)
    model = AnyOrderForCausalLM.from_causal_lm(base, adapter=Adapter("gated", rank=2))
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=r"sees 5 of the forward's 26 rows: leave it out of target_mod"),
    ):
        model(IDS[:1], Factorization.random(14, 14, generator=torch.Generator().manual_seed(0)))


def test_a_base_that_carries_peft_adapters_is_refused():
    from peft import LoraConfig, PeftModel, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj"])
    wrapped = get_peft_model(base_model("llama"), config)
    assert isinstance(wrapped, PeftModel)
    with pytest.raises(ValueError, match=r"the model is a PeftModel: .* merge_and_unload\(\)") as caught:
        AnyOrderForCausalLM.from_causal_lm(wrapped)
    assert len(str(caught.value)) < 300
    model = AnyOrderForCausalLM.from_causal_lm(wrapped.merge_and_unload())
    torch.testing.assert_close(
        model(IDS[:1]).logits[0, 1:], base_model("llama")(IDS[:1]).logits[0, :-1], atol=2e-5, rtol=0
    )
    base = base_model("llama")
    base.add_adapter(config)
    with pytest.raises(
        ValueError, match=r"carries PEFT adapters already, on model\.layers\.0\.self_attn\.q_proj for one"
    ):
        AnyOrderForCausalLM.from_causal_lm(base)
    with pytest.raises(ValueError, match="must be a causal LM of transformers, got a Linear"):
        AnyOrderForCausalLM.from_causal_lm(torch.nn.Linear(2, 2))


def state_of(model):
    return {
        "learns": [(name, p.requires_grad, p.dtype) for name, p in model.named_parameters()],
        "modules": [(name, type(m), m.training) for name, m in model.named_modules()],
        "hooks": sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()),
        "attention": model.config._attn_implementation,
        "attributes": sorted(vars(model)),
    }


@pytest.mark.parametrize("stage", ["target", "injection", "weights"])
def test_a_refused_adapter_leaves_the_base_as_it_was(stage, tmp_path, monkeypatch):
    base = base_model("llama")
    base.lm_head.weight.requires_grad_(False)
    base.model.norm.register_forward_hook(lambda *args: None)
    expected, before = base(IDS).logits, state_of(base)
    adapter = Adapter("gated", rank=2, target_modules=["lm_head"] if stage == "target" else None)
    if stage == "weights":
        adapted().save_pretrained(tmp_path)
        save_file({"extra": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
        with pytest.raises(ValueError, match="does not fit the model"):
            AnyOrderForCausalLM.from_pretrained(tmp_path, base_model=base)
    else:
        if stage == "injection":
            monkeypatch.setattr(gates.gated_linear(), "reset_lora_parameters", lambda *args: 1 / 0, raising=False)
        with pytest.raises(ValueError if stage == "target" else ZeroDivisionError):
            AnyOrderForCausalLM.from_causal_lm(base, adapter=adapter)
    assert state_of(base) == before
    assert torch.equal(base(IDS).logits, expected)
    monkeypatch.undo()
    assert AnyOrderForCausalLM.from_causal_lm(base, adapter="gated").config.adapter["kind"] == "gated"
