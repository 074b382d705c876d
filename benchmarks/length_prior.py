"""Fit the length prior of `length="auto"` on texts whose lengths are known.

Half of the blanks are a sentence of a story, half are 1 to 8 words of one. For each the model is asked about every
length of `auto`; the weights are those under which the true lengths are likeliest. Writes them with what they were
fitted on.

    python benchmarks/length_prior.py --stories rocstories_valid.jsonl.gz --skip 2000 --limit 600 \\
        --output src/anyorder/shipped/length_prior.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
from pathlib import Path
from typing import ClassVar

import torch
from infill_loss import read
from torch import Tensor
from tqdm import tqdm

from anyorder import DEFAULT_MODEL, Infiller, load
from anyorder.infill.lengths import AUTO, LengthPrior, Tries, fit, median


class Listener(LengthPrior):
    """Keeps what it is asked about."""

    heard: ClassVar[list[Tries]] = []

    def probabilities(self, tries: Tries) -> Tensor:
        self.heard.append(tries)
        return super().probabilities(tries)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", type=Path, required=True, help='.jsonl or .jsonl.gz of {"sentences": [five]}')
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--skip", type=int, default=2000, help="stories; default: 2000")
    parser.add_argument("--limit", type=int, default=600, help="stories after those; default: 600")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    options = parser.parse_args()
    model, tokenizer = load(options.model, dtype=getattr(torch, options.dtype))
    infiller = Infiller(model, tokenizer, length_prior=Listener(1.0, 0.0, 0.0, 0.0, 0.0))
    chooser, cases = random.Random(0), []
    for number, sentences in enumerate(tqdm(read(options.stories)[options.skip :][: options.limit], unit="story")):
        before, blank, after = a_sentence(sentences, chooser) if number % 2 else some_words(sentences, chooser)
        true = len(infiller.pieces.encode(" " * bool(before) + blank, at_start=not before))
        if true <= AUTO[-1]:
            infiller(" ".join(filter(None, [before, "___", after])), length="auto")
            cases.append((Listener.heard[-1], min(range(len(AUTO)), key=lambda k: abs(AUTO[k] - true))))
    prior = fit(cases)
    nats = [-float(prior.probabilities(tries).log()[true]) for tries, true in cases]
    lengths = [AUTO[median(prior.probabilities(tries))] - AUTO[true] for tries, true in cases]
    report = {
        "weights": {name: round(value, 4) for name, value in dataclasses.asdict(prior).items()},
        "model": options.model,
        "stories": f"{options.stories.name}, {options.skip} to {options.skip + options.limit - 1}",
        "cases": len(cases),
        "nats_a_length": round(sum(nats) / len(nats), 4),
        "nats_a_length_of_even_odds": round(float(torch.tensor(len(AUTO)).log()), 4),
        "mean_error_in_tokens": round(sum(lengths) / len(lengths), 3),
        "mean_absolute_error_in_tokens": round(sum(map(abs, lengths)) / len(lengths), 3),
    }
    options.output.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


def a_sentence(sentences: list[str], chooser: random.Random) -> tuple[str, str, str]:
    k = chooser.randrange(1, 4)
    return " ".join(sentences[:k]), sentences[k], " ".join(sentences[k + 1 :])


def some_words(sentences: list[str], chooser: random.Random) -> tuple[str, str, str]:
    words = " ".join(sentences).split(" ")
    count = chooser.randint(1, 8)
    start = chooser.randrange(1, len(words) - count)
    return " ".join(words[:start]), " ".join(words[start : start + count]), " ".join(words[start + count :])


if __name__ == "__main__":
    main()
