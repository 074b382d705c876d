"""What cannot be served is refused, by name or on evidence, and stays as it was."""

from __future__ import annotations

import pytest
import torch
import transformers as tr
from transformers import AutoModelForCausalLM

from anyorder import AnyOrderForCausalLM
from anyorder.model.compatibility import check_config, context_length
from architectures import CONFIGS, REFUSED, VOCABULARY, base_model

IDS = torch.randint(3, VOCABULARY, (2, 14), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_with_a_reason(name):
    make, reason = REFUSED[name]
    with pytest.raises(ValueError, match=rf"{name} cannot be converted: .*{reason}"):
        AnyOrderForCausalLM.from_causal_lm(AutoModelForCausalLM.from_config(make()))


def test_encoder_decoders_are_refused():
    config = tr.T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    with pytest.raises(ValueError, match="t5 cannot be converted: it is an encoder-decoder"):
        AnyOrderForCausalLM.from_causal_lm(tr.T5ForConditionalGeneration(config))


def falcon(**kwargs):
    return tr.FalconConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, **kwargs)


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (falcon, "AttentionInterface"),
        (lambda: falcon(alibi=True), "ALiBi"),
        (lambda: CONFIGS["llama"](vocab_size=VOCABULARY, rope_parameters=DYNAMIC), "dynamic RoPE"),
    ],
    ids=["own attention", "falcon with alibi", "dynamic rope"],
)
def test_variants_are_refused(config, reason):
    with pytest.raises(ValueError, match=reason):
        AnyOrderForCausalLM.from_causal_lm(AutoModelForCausalLM.from_config(config()))


def test_a_model_that_numbers_its_positions_itself_is_refused():
    """The second net: evidence, not names."""
    base = base_model("llama")
    rotary = base.model.rotary_emb.forward
    base.model.rotary_emb.forward = lambda x, position_ids: rotary(x, torch.arange(x.shape[1])[None])
    with pytest.raises(ValueError, match="ignores position_ids"):
        AnyOrderForCausalLM.from_causal_lm(base)


def test_a_model_whose_rows_do_not_give_its_logits_is_refused():
    base = base_model("llama")
    mlp, calls = base.model.layers[1].mlp.forward, iter(range(100))
    base.model.layers[1].mlp.forward = lambda x: mlp(x) + 0.1 * next(calls)
    with pytest.raises(ValueError, match="its logits change by"):
        AnyOrderForCausalLM.from_causal_lm(base)


def left_neighbour(x):
    return torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", ["mlp", "embed_tokens", "input_layernorm"])
def test_layers_that_mix_neighbouring_rows_are_refused(place, dtype):
    """A token shift passes from left to right, where neighbouring rows are neighbouring tokens; sorted they are not."""
    base = base_model("llama").to(dtype)
    module = base.model.embed_tokens if place == "embed_tokens" else getattr(base.model.layers[1], place)
    forward = module.forward
    module.forward = lambda x: forward(x + 0.5 * left_neighbour(x)) if place == "mlp" else forward(x)
    if place != "mlp":
        module.register_forward_hook(lambda module, inputs, output: output + 0.5 * left_neighbour(output))
    with pytest.raises(ValueError, match="llama cannot be converted: .*(mix neighbouring|its logits change)"):
        AnyOrderForCausalLM.from_causal_lm(base)


def test_a_short_convolution_is_refused_with_the_reason():
    base = base_model("llama")
    norm = base.model.layers[2].post_attention_layernorm
    kernel = torch.nn.Conv1d(32, 32, 3, groups=32, bias=False)
    norm.register_forward_hook(
        lambda module, inputs, out: kernel(torch.nn.functional.pad(out.transpose(1, 2), (2, 0))).transpose(1, 2)
    )
    with pytest.raises(ValueError, match=r"mix neighbouring tokens outside attention \(a shift or a convolution\)"):
        AnyOrderForCausalLM.from_causal_lm(base)


def test_the_probe_runs_few_rows():
    """One forward of the base and two of the converted model, of a few tokens each."""
    base, seen = base_model("llama"), []
    base.model.register_forward_pre_hook(
        lambda module, inputs, keywords: seen.append(next(v for v in keywords.values() if v is not None).shape[:2]),
        with_kwargs=True,
    )
    AnyOrderForCausalLM.from_causal_lm(base)
    assert [tuple(shape) for shape in seen] == [(1, 8), (1, 9), (1, 9)]


def test_a_window_that_the_attention_is_not_told_of_is_refused():
    base = base_model("llama")
    base.config.sliding_window = 5
    before = base.config._attn_implementation
    with pytest.raises(ValueError, match="3 of its layers have a sliding window, but only 0 tell"):
        AnyOrderForCausalLM.from_causal_lm(base)
    assert base.config._attn_implementation == before  # a refused model stays as it was


def test_a_layer_that_calls_attention_twice_is_refused():
    """The cache would keep the second call's keys and values alone."""
    config = tr.DiffLlamaConfig(**CONFIGS["llama"](vocab_size=VOCABULARY).to_diff_dict() | {"model_type": "diffllama"})
    with pytest.raises(ValueError, match="its 3 layers call attention 6 times|does not go through"):
        AnyOrderForCausalLM.from_causal_lm(AutoModelForCausalLM.from_config(config))


def test_code_that_fails_on_rows_is_refused_with_its_own_words():
    config = tr.OPTConfig(vocab_size=VOCABULARY, hidden_size=32, ffn_dim=32, num_hidden_layers=2, num_attention_heads=4,
                          max_position_embeddings=64, word_embed_proj_dim=32)  # fmt: skip
    with pytest.raises(ValueError, match="opt cannot be converted: .*fails on rows"):
        AnyOrderForCausalLM.from_causal_lm(AutoModelForCausalLM.from_config(config))


def test_attention_sinks_are_refused_and_the_model_stays_usable():
    config = tr.GptOssConfig(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
                             num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_local_experts=2,
                             num_experts_per_tok=1, pad_token_id=0)  # fmt: skip
    base = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ValueError, match="s_aux"):
        AnyOrderForCausalLM.from_causal_lm(base)
    assert base(input_ids=IDS).logits.isfinite().all()


def test_attention_cannot_be_replaced_behind_the_wrappers_back():
    model = AnyOrderForCausalLM.from_causal_lm(base_model("llama"))
    expected = model(IDS).logits
    model.set_attn_implementation("sdpa")
    assert torch.equal(model(IDS).logits, expected)
    with pytest.raises(ValueError, match="got 'eager'"):
        model.set_attn_implementation("eager")
    model.causal_lm.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="attention was replaced after conversion"):
        model(IDS)


def test_hooks_on_the_wrapped_model_do_not_reach_the_head():
    """accelerate puts its hooks on instances, where they are bound to the whole model."""
    model = AnyOrderForCausalLM.from_causal_lm(base_model("gemma2"))
    expected = model(IDS).logits
    model.causal_lm.forward = model.causal_lm.forward
    assert torch.equal(model(IDS).logits, expected)


def test_different_kernels_in_16_bits_are_not_a_different_model():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from anyorder.model.conversion import check_conversion, probe

    base = base_model("llama").to(torch.bfloat16)
    with sdpa_kernel(SDPBackend.MATH):
        probed = probe(base)
    check_conversion(AnyOrderForCausalLM.from_causal_lm(base), probed)


def test_multimodal_models_are_refused():
    with pytest.raises(ValueError, match="gemma3 cannot be converted: it is multimodal"):
        check_config(tr.Gemma3Config())


def test_nested_ropes_are_checked_too():
    config = CONFIGS["gemma3"](vocab_size=VOCABULARY)
    config.rope_parameters["sliding_attention"]["rope_type"] = "dynamic"
    with pytest.raises(ValueError, match="dynamic RoPE"):
        check_config(config)
    config.rope_parameters["sliding_attention"] |= {"rope_type": "longrope", "original_max_position_embeddings": 16}
    assert context_length(config) == 16


def test_longrope_context_ends_where_its_frequencies_change():
    factors = [1.0] * 4
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": factors, "long_factor": factors,
            "original_max_position_embeddings": 8}  # fmt: skip
    config = CONFIGS["phi3"](vocab_size=VOCABULARY, rope_parameters=rope, original_max_position_embeddings=8)
    model = AnyOrderForCausalLM.from_causal_lm(AutoModelForCausalLM.from_config(config))
    with pytest.raises(ValueError, match="14 tokens, .* the model's context is 8"):
        model(IDS)
