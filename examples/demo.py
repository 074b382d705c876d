"""The whole path on a real model: SmolLM2 with the shipped adapter, its base left to right, better in other orders.

python examples/demo.py
"""

from __future__ import annotations

import time

import torch

from anyorder import Factorization, Infiller, load
from anyorder.infill.pieces import Pieces
from anyorder.model.conversion import left_to_right_difference

SENTENCE = "The old lighthouse keeper climbed the stairs to light the lamp."
TEXTS = (
    ("Tom wanted to bake a cake for his mother. ___ She smiled and ate two slices.", 10),
    ("Anna opened the window because the room was too ___. Then she went back to bed.", 1),
    ("The old lighthouse keeper climbed the stairs. ___ The ships could see the light all night.", 10),
    ("It was raining, so we ___ and played cards all afternoon.", 4),
)


def main() -> None:
    begin = time.perf_counter()
    print("Loading SmolLM2-135M (the first time it is dequantised, about half a minute) and the shipped adapter ...")
    untrained, tokenizer = load("smollm2-135m", dtype=torch.float32)
    model, _ = load("smollm2-135m-anyorder", dtype=torch.float32)
    size = sum(p.numel() for p in untrained.parameters())
    added = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    print(f"  {size / 1e6:.1f} million parameters, {added / 1e6:.1f} million in the gated adapter\n")

    pieces = Pieces(tokenizer)
    ids = torch.tensor([[pieces.start_token(), *pieces.encode(SENTENCE, at_start=True)]])
    print("From left to right, is it still the model that it was?")
    print(f"  greatest logit difference from the base: {left_to_right_difference(model, ids):.1e}\n")

    print(f"How likely is the sentence {SENTENCE!r}?")
    length, generator = ids.shape[1], torch.Generator().manual_seed(0)
    orders = {
        "left to right": Factorization.left_to_right(length),
        "left to right, four at a time": Factorization.left_to_right(length, group_size=4),
        "a random order": Factorization.random(length, group_size=1, generator=generator),
    }
    print("  log-probability a token, nats:  before training    with the adapter")
    for name, order in orders.items():
        before, after = (float(m.log_likelihood(ids, order).sum()) / (length - 1) for m in (untrained, model))
        print(f"  {name:30} {before:16.2f} {after:19.2f}")
    print("  (exact, one forward each)\n")

    print("Filling blanks, left to right inside each, without and with the adapter:")
    infillers = [("before", Infiller(untrained, tokenizer)), ("adapter", Infiller(model, tokenizer))]
    for text, tokens in TEXTS:
        print(f"  {text!r}, {tokens} token{'s' * (tokens > 1)}")
        for name, infiller in infillers:
            result = infiller(text, length=tokens)
            print(f"    {name:8} {result.spans[0].text!r}   log p {result.log_prob:.2f}")
    print(f"\n{time.perf_counter() - begin:.0f} s in all")


if __name__ == "__main__":
    main()
