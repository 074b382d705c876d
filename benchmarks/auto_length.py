"""length="auto" against the true length, on the third sentences of five-sentence stories.

Each is filled greedily at the length that was found, at the true length, and at one length for all (the mean of the
true ones); ROUGE-L F1 against the sentence that was there. Writes a table.

    python benchmarks/auto_length.py --stories rocstories_valid.jsonl.gz --limit 200 --output docs/auto_length.md
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from infill_loss import BLANK, read
from tqdm import tqdm

from anyorder import DEFAULT_MODEL, Infiller, load
from anyorder.bench.quality import rouge_l
from anyorder.infill.infiller import Span
from anyorder.infill.lengths import Length

TOGETHER = 20  # texts of one length that are filled in one batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", type=Path, required=True, help='.jsonl or .jsonl.gz of {"sentences": [five]}')
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--limit", type=int, default=200, help="stories, from the first; default: 200")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    model, tokenizer = load(options.model, dtype=getattr(torch, options.dtype))
    infiller = Infiller(model, tokenizer)
    stories = read(options.stories)[: options.limit]
    references = [sentences[BLANK] for sentences in stories]
    true = [len(infiller.pieces.encode(" " + text)) for text in references]
    texts = [" ".join([*sentences[:BLANK], "___", *sentences[BLANK + 1 :]]) for sentences in stories]
    average = round(mean(true))
    spans = {"auto": filled(infiller, texts, ["auto"] * len(texts)), "true length": filled(infiller, texts, true)}
    spans["one length for all"] = filled(infiller, texts, [average] * len(texts))
    lines = [
        f"# Unknown lengths: {len(stories)} third sentences of stories, {options.model}, {options.dtype}",
        "",
        f"    {shlex.join(['python', *sys.argv])}",
        "",
        "| length | ROUGE-L F1 | mean tokens | mean error | mean absolute error |",
        "|---|---|---|---|---|",
    ]
    for name, found in spans.items():
        errors = [span.tokens - real for span, real in zip(found, true, strict=True)]
        score = rouge_l([span.text for span in found], references)
        tokens = mean(span.tokens for span in found)
        lines.append(f"| {name} | {score:.3f} | {tokens:.1f} | {mean(errors):+.2f} | {mean(map(abs, errors)):.2f} |")
    print("\n".join(lines))
    if options.output is not None:
        options.output.write_text("\n".join(lines) + "\n")


def filled(
    infiller: Infiller, texts: list[str], lengths: Sequence[Length], together: int = TOGETHER, **options: Any
) -> list[Span]:
    """The blank of each text, filled at its length; texts of one length together. What a text draws is its number's."""
    found: dict[int, Span] = {}
    for length in tqdm(dict.fromkeys(lengths), unit="length"):
        own = [number for number, one in enumerate(lengths) if one == length]
        for first in range(0, len(own), together):
            batch = own[first : first + together]
            if options.get("temperature"):
                options["generator"] = [torch.Generator().manual_seed(number) for number in batch]
            infills = infiller([texts[number] for number in batch], length=length, **options)
            found |= {number: infill.spans[0] for number, infill in zip(batch, infills, strict=True)}
    return [found[number] for number in range(len(texts))]


if __name__ == "__main__":
    main()
