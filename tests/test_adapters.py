"""Gated adapters: the base model bit for bit wherever it has stood before, different elsewhere."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from anyorder import AnyOrderForCausalLM, Factorization, load, policies
from anyorder.model import gates
from anyorder.model.adapters import Adapter
from architectures import ARCHITECTURES, VOCABULARY, base_model

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
    assert again.config.base["name"] == f"./{checkpoint.name}"


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


@pytest.fixture
def saved(tmp_path):
    """An adapter beside its base."""
    base_model("llama").save_pretrained(tmp_path / "secret-place" / "base")
    model = AnyOrderForCausalLM.from_causal_lm(
        str(tmp_path / "secret-place" / "base"), adapter=Adapter("gated", rank=2)
    )
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path


def test_a_base_that_has_moved_is_found_beside_the_adapter_or_asked_for(saved, monkeypatch):
    for file in (saved / "adapter").iterdir():
        assert b"secret-place" not in file.read_bytes()
    with pytest.raises(
        ValueError, match=r"adapter on the model \./base, which lies neither .* base_model= .*--base-model"
    ):
        AnyOrderForCausalLM.from_pretrained(saved / "adapter")
    place = saved / "secret-place" / "base"
    assert AnyOrderForCausalLM.from_pretrained(saved / "adapter", base_model=place).config.base["name"] == "./base"
    place.rename(saved / "base")
    assert AnyOrderForCausalLM.from_pretrained(saved / "adapter").config.base["name"] == "./base"
    (saved / "elsewhere").mkdir()
    (saved / "base").rename(saved / "elsewhere" / "base")
    monkeypatch.chdir(saved / "elsewhere")
    assert AnyOrderForCausalLM.from_pretrained(saved / "adapter").config.base["name"] == "./base"


def test_load_takes_the_place_of_the_base(saved, checkpoint, byte_tokenizer):
    byte_tokenizer.save_pretrained(saved / "secret-place" / "base")
    model, tokenizer = load(str(saved / "adapter"), base_model=str(saved / "secret-place" / "base"))
    assert model.config.adapter["kind"] == "gated"
    assert tokenizer.get_vocab() == byte_tokenizer.get_vocab()
    with pytest.raises(ValueError, match="plain causal LM, not an adapter: it has no base_model"):
        load(str(checkpoint), base_model=str(checkpoint))


def test_all_files_of_an_adapter_have_the_modes_of_any_new_file(tmp_path):
    (tmp_path / "new").write_text("")
    adapted().save_pretrained(tmp_path / "adapter")
    assert {file.stat().st_mode for file in (tmp_path / "adapter").iterdir()} == {(tmp_path / "new").stat().st_mode}


def test_pushing_an_adapter_writes_it_here_too(tmp_path, monkeypatch):
    uploaded = {}

    def upload(self, folder, repo, *args, **options):
        uploaded[repo] = sorted(path.name for path in Path(folder).iterdir())

    monkeypatch.setattr(AnyOrderForCausalLM, "_upload_modified_files", upload)
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda self, repo, **k: SimpleNamespace(repo_id=repo))
    card = SimpleNamespace(save=lambda path: Path(path).write_text("card"))
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *a, **k: card)
    model = adapted()
    model.save_pretrained(tmp_path / "mine", push_to_hub=True, commit_message="one")
    model.save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id="me/other")
    model.save_pretrained(tmp_path / "none", push_to_hub=True, is_main_process=False)
    files = sorted(path.name for path in (tmp_path / "mine").iterdir())
    assert "adapter_model.safetensors" in files
    assert uploaded == {"mine": sorted([*files, "README.md"]), "me/other": sorted([*files, "README.md"])}
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 99}, "format version 99, this anyorder reads up to 1: install a newer one"),
        ({"adapter": {"kind": "gated", "rank": 2, "warp": 9}}, r"fields that this version does not know \(warp\)"),
        ({"recipee": "paper"}, "unknown field 'recipee' of the config; did you mean 'recipe'"),
    ],
)
def test_configs_of_newer_versions_are_told(saved, change, message):
    file = saved / "adapter" / "config.json"
    config = json.loads(file.read_text())
    assert config["format_version"] == 1
    file.write_text(json.dumps(config | change))
    for attempt in (load, AnyOrderForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=message):
            attempt(str(saved / "adapter"))


def test_an_adapter_from_the_hub_has_its_bases_tokenizer(saved, byte_tokenizer, monkeypatch):
    """The hub's cache, as a download leaves it; the adapter has no tokenizer."""
    byte_tokenizer.save_pretrained(saved / "secret-place" / "base")
    place = saved / "hub" / "models--me--adapter"
    (place / "snapshots").mkdir(parents=True)
    (saved / "adapter").rename(place / "snapshots" / "abc")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("abc")
    monkeypatch.chdir(saved / "secret-place")
    model, tokenizer = load("me/adapter", cache_dir=str(saved / "hub"), local_files_only=True)
    assert model.config.adapter["kind"] == "gated"
    assert tokenizer.get_vocab() == byte_tokenizer.get_vocab()
