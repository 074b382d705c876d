"""A real llama.cpp server on a tiny random model with fill-in-the-middle tokens, for tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np

WIDTH, HEADS, HIDDEN = 64, 2, 128


def tiny_gguf(path: Path, tokenizer: Any) -> Path:
    """A Llama of one layer with a byte-level tokenizer's vocabulary and merges, random weights."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    fim = [f"<|fim_{name}|>" for name in ("prefix", "suffix", "middle", "pad")]
    tokens = [token for token, _ in vocabulary] + fim
    control = set(tokenizer.all_special_tokens) | set(fim)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    kinds = (gguf.TokenType.NORMAL, gguf.TokenType.CONTROL)
    writer.add_token_types([kinds[token in control] for token in tokens])
    writer.add_token_merges(["Ġ a", "Ġ b", "Ġ c", "a b"])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    for number, name in enumerate(("pre", "suf", "mid", "pad"), start=len(vocabulary)):
        writer.add_uint32(f"tokenizer.ggml.fim_{name}_token_id", number)
    draw = np.random.default_rng(0)
    shapes = {
        "token_embd": (len(tokens), WIDTH), "output_norm": (WIDTH,), "output": (len(tokens), WIDTH),
        "blk.0.attn_norm": (WIDTH,), "blk.0.ffn_norm": (WIDTH,), "blk.0.attn_q": (WIDTH, WIDTH),
        "blk.0.attn_k": (WIDTH, WIDTH), "blk.0.attn_v": (WIDTH, WIDTH), "blk.0.attn_output": (WIDTH, WIDTH),
        "blk.0.ffn_gate": (HIDDEN, WIDTH), "blk.0.ffn_up": (HIDDEN, WIDTH), "blk.0.ffn_down": (WIDTH, HIDDEN),
    }  # fmt: skip
    for name, shape in shapes.items():
        values = np.ones(shape) if name.endswith("norm") else 0.3 * draw.standard_normal(shape)
        writer.add_tensor(f"{name}.weight", values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@contextmanager
def llama_cpp(model: Path) -> Iterator[str]:
    """The address of a llama.cpp server in this process."""
    import xllamacpp

    options = xllamacpp.CommonParams()
    options.model.path = str(model)
    options.n_ctx, options.n_parallel, options.warmup, options.port = 512, 1, False, 0
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(options)
    yield server.listening_address
    del server  # which stops it
