"""length="auto" against the true length, on the third sentences of five-sentence stories.

Each is filled greedily at the length that was found, at the true length, and at one length for all (the mean of the
true ones); ROUGE-L F1 against the sentence that was there. Writes a table.

    python benchmarks/auto_length.py --stories rocstories_valid.jsonl.gz --limit 200 --output docs/auto_length.md
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from statistics import mean

import torch
from infill_loss import BLANK, read
from tqdm import tqdm

from anyorder import DEFAULT_MODEL, Infiller, load
from anyorder.bench.quality import rouge_l

HOW = ("auto", "true length", "one length for all")


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
    fills: dict[str, list[str]] = {name: [] for name in HOW}
    found = []
    for text, length in zip(tqdm(texts, unit="story"), true, strict=True):
        (span,) = infiller(text, length="auto").spans
        found.append(span.tokens)
        fills["auto"].append(span.text)
        fills["true length"].append(infiller(text, length=length).spans[0].text)
        fills["one length for all"].append(infiller(text, length=average).spans[0].text)
    lengths = {"auto": found, "true length": true, "one length for all": [average] * len(true)}
    lines = [
        f"# Unknown lengths: {len(stories)} third sentences of stories, {options.model}, {options.dtype}",
        "",
        f"    {shlex.join(['python', *sys.argv])}",
        "",
        "| length | ROUGE-L F1 | mean tokens | mean error | mean absolute error |",
        "|---|---|---|---|---|",
    ]
    for name in HOW:
        errors = [own - real for own, real in zip(lengths[name], true, strict=True)]
        score = rouge_l(fills[name], references)
        lines.append(
            f"| {name} | {score:.3f} | {mean(lengths[name]):.1f} | {mean(errors):+.2f} | {mean(map(abs, errors)):.2f} |"
        )
    print("\n".join(lines))
    if options.output is not None:
        options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
