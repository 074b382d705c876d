"""Adapters as files: saved, loaded, pushed, and put on the base that they were trained on and on no other."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from anyorder import AnyOrderForCausalLM, Factorization, load
from anyorder.model.adapters import Adapter
from architectures import VOCABULARY, adapted, base_model

IDS = torch.randint(3, VOCABULARY, (2, 14), generator=torch.Generator().manual_seed(0))


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


def test_peft_itself_reads_an_ungated_adapter(tmp_path):
    from peft import PeftModel

    model = adapted(kind="lora")
    model.save_pretrained(tmp_path)
    theirs = PeftModel.from_pretrained(base_model("llama"), tmp_path)
    torch.testing.assert_close(theirs(IDS).logits, model.causal_lm(IDS).logits, atol=2e-5, rtol=0)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_load_takes_an_adapter_directory(checkpoint, tmp_path):
    model, tokenizer = load(str(checkpoint), adapter="gated")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = load(str(tmp_path))
    assert again.config.base["name"] == f"./{checkpoint.name}"


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
    made = "transformers.utils.hub.create_repo"  # of older versions
    monkeypatch.setattr(made, lambda repo, **k: SimpleNamespace(repo_id=repo), raising=False)
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
        ({"format_version": 99}, "format version 99, this anyorder reads up to 2: install a newer one"),
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
