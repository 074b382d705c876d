"""The whole path on a real model: convert SmolLM2, check that it is still itself, score, infill.

python examples/demo.py
"""

from __future__ import annotations

import time

import torch

from anyorder import Factorization, Infiller, load
from anyorder.pieces import Pieces
from anyorder.support import left_to_right_difference

SENTENCE = "The old lighthouse keeper climbed the stairs to light the lamp."
TEXTS = (
    ("The cat ___ on the mat.", 2),
    ("Anna opened the window because the room was too ___. Then she went back to bed.", 1),
    ("def area(width, height):\n    return ___\n", 3),
)


def main() -> None:
    begin = time.perf_counter()
    print("Loading SmolLM2-135M and converting it (the first time it is dequantised, about half a minute) ...")
    model, tokenizer = load("smollm2-135m", dtype=torch.float32)
    size = sum(p.numel() for p in model.parameters())
    print(f"  {size / 1e6:.1f} million parameters, recipe {model.recipe}, nothing trained\n")

    pieces = Pieces(tokenizer)
    ids = torch.tensor([[pieces.start_token(), *pieces.encode(SENTENCE, at_start=True)]])
    print("Is it still the model that it was?")
    print(f"  greatest left-to-right logit difference from the base: {left_to_right_difference(model, ids):.1e}\n")

    print(f"How likely is the sentence {SENTENCE!r}?")
    length, generator = ids.shape[1], torch.Generator().manual_seed(0)
    orders = {
        "left to right": Factorization.left_to_right(length),
        "left to right, four at a time": Factorization.left_to_right(length, group_size=4),
        "a random order": Factorization.random(length, group_size=1, generator=generator),
    }
    for name, order in orders.items():
        total = float(model.log_likelihood(ids, order).sum())
        print(f"  {total:8.2f} nats, {total / (length - 1):6.2f} a token   {name}")
    print("  (exact, one forward each; only left to right is good before adaptation)\n")

    print("Filling blanks, left to right inside each:")
    infiller = Infiller(model, tokenizer)
    for text, tokens in TEXTS:
        result = infiller(text, length=tokens)
        print(f"  {text!r}\n  {result.text!r}   log p {result.log_prob:.2f}\n")
    print(f"{time.perf_counter() - begin:.0f} s in all")


if __name__ == "__main__":
    main()
