"""Tiny random base models, made on the spot: one for each architecture that is served, and those that are refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import transformers as tr
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from anyorder import AnyOrderForCausalLM
from anyorder.model.adapters import Adapter
from anyorder.model.coupling import Coupling

VOCABULARY = 37
WINDOW = 4
_LLAMA_LIKE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_HYBRID = ["sliding_attention", "full_attention", "sliding_attention"]

CONFIGS: dict[str, Callable[..., PretrainedConfig]] = {
    "llama": lambda **k: tr.LlamaConfig(**_LLAMA_LIKE | k),
    "llama_tied": lambda **k: tr.LlamaConfig(**_LLAMA_LIKE | k, tie_word_embeddings=True),
    "qwen2": lambda **k: tr.Qwen2Config(**_LLAMA_LIKE | k),
    "qwen3": lambda **k: tr.Qwen3Config(**_LLAMA_LIKE | k),
    "qwen3_moe": lambda **k: tr.Qwen3MoeConfig(
        **_LLAMA_LIKE | k, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
    "mistral": lambda **k: tr.MistralConfig(**_LLAMA_LIKE | k, sliding_window=WINDOW),
    "gemma2": lambda **k: tr.Gemma2Config(**_LLAMA_LIKE | k, sliding_window=WINDOW, attn_logit_softcapping=2.0),
    "gemma3": lambda **k: tr.Gemma3TextConfig(**_LLAMA_LIKE | k, sliding_window=WINDOW, layer_types=_HYBRID),
    "olmo2": lambda **k: tr.Olmo2Config(**_LLAMA_LIKE | k),
    "phi3": lambda **k: tr.Phi3Config(**_LLAMA_LIKE | k),
    "smollm3": lambda **k: tr.SmolLM3Config(**_LLAMA_LIKE | k, no_rope_layers=[1, 0, 1]),
    "gpt_neox": lambda **k: tr.GPTNeoXConfig(
        **{key: value for key, value in (_LLAMA_LIKE | k).items() if key not in ("num_key_value_heads", "head_dim")},
        rotary_pct=0.5,
    ),
    "granite": lambda **k: tr.GraniteConfig(
        **_LLAMA_LIKE | k,
        embedding_multiplier=3.0,
        logits_scaling=2.0,
        residual_multiplier=0.5,
        attention_multiplier=0.2,
    ),
    "gpt2": lambda **k: tr.GPT2Config(
        vocab_size=k.get("vocab_size", VOCABULARY),
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    ),
}
ARCHITECTURES = tuple(CONFIGS)
WINDOWED = ("mistral", "gemma2", "gemma3")
RECIPES = ("exact", "paper")

REFUSED: dict[str, tuple[Callable[[], PretrainedConfig], str]] = {
    "bloom": (lambda: tr.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4), "ALiBi"),
    "mpt": (lambda: tr.MptConfig(vocab_size=VOCABULARY, d_model=32, n_layers=2, n_heads=4), "ALiBi"),
    "mamba": (lambda: tr.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2), "recurrent"),
    "recurrent_gemma": (
        lambda: tr.RecurrentGemmaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            lru_width=32,
        ),
        "recurrent",
    ),
}  # fmt: skip


def base_model(architecture: str, vocabulary: int = VOCABULARY, seed: int = 0, **sizes: int) -> PreTrainedModel:
    """A fresh random base model in evaluation mode, with weights large enough for its logits to differ."""
    torch.manual_seed(seed)
    config = CONFIGS[architecture](vocab_size=vocabulary, **sizes)
    # Older transformers choose SDPA for caps on attention's scores too, and leave them out.
    own = {"attn_implementation": "eager"} if getattr(config, "attn_logit_softcapping", None) else {}
    model = AutoModelForCausalLM.from_config(config, **own)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.eval()


def couple(model: AnyOrderForCausalLM, **fields: bool) -> AnyOrderForCausalLM:
    """The model with a coupling of random weights, large enough to matter."""
    model.couple(Coupling(width=24, rank=8, **fields))
    torch.manual_seed(2)
    for parameter in model.coupling.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    return model


@cache
def coupled(architecture: str, recipe: str = "exact", vocabulary: int = VOCABULARY) -> AnyOrderForCausalLM:
    """`converted` with a coupling; shared between tests, which must not change it."""
    return couple(converted.__wrapped__(architecture, recipe, vocabulary))


@cache
def converted(
    architecture: str, recipe: str = "exact", vocabulary: int = VOCABULARY, **kwargs: str
) -> AnyOrderForCausalLM:
    """A converted model with a random query embedding; shared between tests, which must not change it."""
    model = AnyOrderForCausalLM.from_causal_lm(base_model(architecture, vocabulary), recipe=recipe, **kwargs)
    torch.manual_seed(1)
    model.query_embedding.data.normal_(std=0.5)
    return model


def gated(architecture: str, **sizes: int) -> AnyOrderForCausalLM:
    """A fresh converted model with a gated adapter of random weights."""
    model = AnyOrderForCausalLM.from_causal_lm(base_model(architecture, **sizes), adapter=Adapter("gated", rank=4))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def adapted(architecture: str = "llama", kind: str = "gated", trained: bool = True, **kwargs) -> AnyOrderForCausalLM:
    """A model whose adapter has random weights, as if it had been trained."""
    model = AnyOrderForCausalLM.from_causal_lm(base_model(architecture), adapter=Adapter(kind=kind, rank=4), **kwargs)
    if trained:
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_" in name or name == "query_embedding":
                parameter.data.normal_(std=0.3)
    return model.eval()
