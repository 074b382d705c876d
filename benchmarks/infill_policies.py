"""Ways to fill a blank, side by side: likeness to what was there, how likely the whole is, and seconds.

The third sentence of five-sentence stories is filled at its true length, with each policy and group size, with the
model's coupling and without it. ROUGE-L F1 against the sentence that was there; nats a token of the filled sentence,
and of the two behind it, under a judge that reads from left to right (the base model, unless another is named); the
share of different pairs of words; seconds a story in batches. Lower nats are likelier, not better: what repeats itself
is likely.

    python benchmarks/infill_policies.py --stories rocstories_valid.jsonl.gz --output docs/infill_policies.md
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path
from statistics import mean

import torch
from auto_length import filled
from infill_loss import BLANK, read
from tqdm import tqdm

from anyorder import DEFAULT_MODEL, AnyOrderForCausalLM, Factorization, Infiller, load
from anyorder.bench.quality import rouge_l
from anyorder.decoding import policies
from anyorder.evaluation import text_metrics
from anyorder.infill.pieces import Pieces

WAYS = (
    "groupwise:size=1", "groupwise:size=2", "groupwise:size=4", "groupwise:size=8", "speculative:draft=auto",
    "dynamic:criterion=confidence", "dynamic:criterion=confidence,step_size=2", "dynamic:criterion=entropy,step_size=4",
    "dynamic:criterion=entropy,entropy_budget=2",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", type=Path, required=True, help='.jsonl or .jsonl.gz of {"sentences": [five]}')
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--judge", help="a left-to-right model; default: the base of the model")
    parser.add_argument("--policies", nargs="+", default=WAYS, metavar="POLICY")
    parser.add_argument("--skip", type=int, default=0, help="stories, from the first; default: 0")
    parser.add_argument("--limit", type=int, default=100, help="stories; default: 100")
    parser.add_argument("--batch-size", type=int, default=10)
    parser.add_argument("--temperature", type=float, default=0.0, help="default: 0, the likeliest tokens")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    model, tokenizer = load(options.model, dtype=getattr(torch, options.dtype))
    judge = model if options.judge is None else load(options.judge, dtype=torch.float32)[0]
    stories = read(options.stories)[options.skip :][: options.limit]
    lines = [
        f"# Ways to fill a blank: {len(stories)} third sentences of stories, {options.model}, {options.dtype}",
        "",
        f"    {shlex.join(['python', *sys.argv])}",
        "",
        "| policy | coupling | ROUGE-L F1 | nats of the sentence | of the two behind it | distinct pairs | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    true = Pieces(tokenizer)
    references = [story[BLANK] for story in stories]
    lines.append(row("what was there", "", stories, references, references, judge, true, 0.0))
    models = {"": model} if model.coupling is None else {"on": model, "off": model.uncoupled()}
    for policy in tqdm(options.policies):
        for coupling, one in models.items():
            if coupling == "off" and (policy.startswith("speculative") or policy == "groupwise:size=1"):
                continue  # the same text as with it
            start = time.perf_counter()
            fills = third_sentences(Infiller(one, tokenizer), stories, policy, options)
            seconds = (time.perf_counter() - start) / len(stories)
            lines.append(row(policy, coupling, stories, fills, references, judge, true, seconds))
    print("\n".join(lines))
    if options.output is not None:
        options.output.write_text("\n".join(lines) + "\n")


def third_sentences(
    infiller: Infiller, stories: list[list[str]], policy: str, options: argparse.Namespace
) -> list[str]:
    """The third sentences, as they are filled."""
    lengths = [len(infiller.pieces.encode(" " + story[BLANK])) for story in stories]
    texts = [" ".join([*story[:BLANK], "___", *story[BLANK + 1 :]]) for story in stories]
    draws = {"temperature": options.temperature} if options.temperature else {}
    spans = filled(infiller, texts, lengths, options.batch_size, policy=policies.parse(policy), **draws)
    return [span.text for span in spans]


def row(
    name: str,
    coupling: str,
    stories: list[list[str]],
    fills: list[str],
    references: list[str],
    judge: AnyOrderForCausalLM,
    pieces: Pieces,
    seconds: float,
) -> str:
    whole = [[*story[:BLANK], fill.strip(), *story[BLANK + 1 :]] for story, fill in zip(stories, fills, strict=True)]
    own, behind = judged(judge, pieces, whole)
    distinct = mean(text_metrics.distinct(words, 2) for words in map(str.split, fills) if len(words) > 1)
    score = rouge_l(fills, references)
    return f"| {name} | {coupling} | {score:.3f} | {own:.2f} | {behind:.3f} | {distinct:.2f} | {seconds:.2f} |"


def judged(judge: AnyOrderForCausalLM, pieces: Pieces, stories: list[list[str]]) -> tuple[float, float]:
    """Nats a token of the third sentence given those before it, and of the last two given all before them."""
    sums, counts = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for sentences in stories:
        parts = [pieces.encode(s if k == 0 else " " + s, at_start=k == 0) for k, s in enumerate(sentences)]
        ids = torch.tensor([[pieces.start_token(), *(token for part in parts for token in part)]])
        ends = torch.tensor([1, *map(len, parts)]).cumsum(0).tolist()
        losses = -judge.log_likelihood(ids, Factorization.left_to_right(ids.shape[1]))[0]
        for k, (begin, end) in enumerate(((ends[BLANK], ends[BLANK + 1]), (ends[BLANK + 1], ends[-1]))):
            sums[k] += float(losses[begin:end].sum())
            counts[k] += end - begin
    own, behind = (sums / counts).tolist()
    return own, behind


if __name__ == "__main__":
    main()
