"""Conversations to train on, made by a chat model itself: its template up to the user's turn, continued by the model.

    python benchmarks/chat_texts.py --output chat.jsonl --characters 300000

What a user may say is what the model writes where a user's message stands (as in Magpie, arXiv 2406.08464); then it
answers. Nothing but the model's own text comes in, so its licence is that of the model. A message that was written
before, or that has no end within its length, is left out; an answer that has none is kept as far as it goes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from anyorder import load

HERE = "<<message>>"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="with a chat template; default: smollm2-135m")
    parser.add_argument("--output", type=Path, required=True, help="file to write, .jsonl of {text}")
    parser.add_argument("--characters", type=int, default=300_000, help="in all; default: 300000")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-k", type=int, default=100)
    parser.add_argument("--longest", type=int, nargs=2, default=(64, 128), help="tokens of message and answer")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    model, tokenizer = load(options.model, dtype=getattr(torch, options.dtype))
    written, seen = 0, set()
    with options.output.open("w") as out, tqdm(total=options.characters, unit="char") as bar:
        while written < options.characters:
            messages = [m for m in continued(model.causal_lm, tokenizer, before_the_user(tokenizer), options) if m]
            new = [m for m in dict.fromkeys(messages) if m not in seen]
            seen.update(new)
            prompts = [template(tokenizer, message, answered=False) for message in new]
            for prompt, answer in zip(prompts, continued(model.causal_lm, tokenizer, prompts, options), strict=True):
                text = prompt + answer
                if answer:
                    out.write(json.dumps({"text": text}) + "\n")
                    written += len(text)
                    bar.update(len(text))
            out.flush()


def template(tokenizer: Any, message: str, answered: bool) -> str:
    said = [{"role": "user", "content": message}]
    return tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=not answered)


def before_the_user(tokenizer: Any) -> str:
    return template(tokenizer, HERE, answered=True).partition(HERE)[0]


@torch.inference_mode()
def continued(causal_lm: Any, tokenizer: Any, prompts: str | list[str], options: argparse.Namespace) -> list[str]:
    """What the model writes behind each prompt: a message without the end of its turn, empty where it has none; an
    answer with it, or without where it has none."""
    is_message = isinstance(prompts, str)
    texts = [prompts] * options.batch_size if isinstance(prompts, str) else prompts
    if not texts:
        return []
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    longest = options.longest[0 if is_message else 1]
    made = causal_lm.generate(**batch, do_sample=True, temperature=options.temperature, top_k=options.top_k, top_p=1.0,
                              max_new_tokens=longest)[:, batch["input_ids"].shape[1] :]  # fmt: skip
    out = []
    for ids in made.tolist():
        end = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else None
        if is_message:
            out.append("" if end is None else tokenizer.decode(ids[:end]).strip())
        else:
            out.append(tokenizer.decode(ids if end is None else ids[: end + 1]))
    return out


if __name__ == "__main__":
    main()
