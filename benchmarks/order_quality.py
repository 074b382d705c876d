"""How good the third sentence of a story becomes, by the order in which it is filled: dynamic against fixed orders.

The sentence is blank and keeps its true number of tokens; what is filled in is judged by the base model alone, from
left to right: nats a token of the blank, and of the blank with all that follows it. Every order draws with the same
seeds and the same number of forwards. Lower is likelier.

    python benchmarks/order_quality.py --stories rocstories_valid.jsonl.gz --limit 50 --output docs/order_quality
"""

from __future__ import annotations

import argparse
import csv
import shlex
import sys
from pathlib import Path

import torch
from infill_loss import BLANK, read

from anyorder import AnyOrderForCausalLM, Factorization, load, policies
from anyorder.infill.pieces import Pieces

ORDERS = ("left_to_right", "random", "dynamic, confidence", "dynamic, entropy", "dynamic, margin")
SPACED = ("dynamic, entropy, spacing=2", "dynamic, entropy, spacing=3", "dynamic, random, spacing=3")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", type=Path, required=True, help='.jsonl or .jsonl.gz of {"sentences": [five]}')
    parser.add_argument("--model", default="smollm2-135m-anyorder")
    parser.add_argument("--limit", type=int, default=50, help="stories, from the first; default: 50")
    parser.add_argument("--size", type=int, nargs="+", default=[1, 4], help="tokens a step; default: 1 4")
    parser.add_argument("--seeds", type=int, default=4, help="fills of each story; default: 4")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--output", type=Path, help="also write this file with .csv and .md")
    options = parser.parse_args()
    model, tokenizer = load(options.model, dtype=getattr(torch, options.dtype))
    ids, blank, present = _texts(Pieces(tokenizer), read(options.stories)[: options.limit])
    lines = [["tokens a step", "order", "forwards", "blank", "blank and what follows"]]
    lines.append(["", "the story's own sentence", "", *(f"{x:.3f}" for x in _judge(model, ids, blank, present))])
    for size in options.size:
        for order in (*ORDERS, *SPACED) if size > 1 else ORDERS:
            lines.append(
                [str(size), order.replace("_", " "), *_measured(model, ids, blank, present, size, order, options)]
            )
            print(" | ".join(lines[-1]), flush=True)
    table = "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], ["---"] * 5, *lines[1:]])
    print(table)
    if options.output is not None:
        said = f"{options.model}, {options.limit} stories, {options.seeds} fills each, {options.dtype}"
        options.output.with_suffix(".md").write_text(
            f"# The order of filling\n\n{said}; nats a token under the base model.\n\n"
            f"    {shlex.join(['python', *sys.argv])}\n\n{table}\n"
        )
        with options.output.with_suffix(".csv").open("w", newline="") as out:
            csv.writer(out).writerows(lines)


def _texts(pieces: Pieces, stories: list[list[str]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, blanks = [], []
    for sentences in stories:
        parts = [pieces.encode(s if k == 0 else " " + s, at_start=k == 0) for k, s in enumerate(sentences)]
        rows.append([pieces.start_token(), *(token for part in parts for token in part)])
        blanks.append([False, *(k == BLANK for k, part in enumerate(parts) for _ in part)])
    width = max(map(len, rows))
    pad = [width - len(row) for row in rows]
    ids = torch.tensor([row + [0] * n for row, n in zip(rows, pad, strict=True)])
    blank = torch.tensor([row + [False] * n for row, n in zip(blanks, pad, strict=True)])
    present = torch.tensor([[True] * len(row) + [False] * n for row, n in zip(rows, pad, strict=True)])
    return ids, blank, present


def _measured(
    model: AnyOrderForCausalLM,
    ids: torch.Tensor,
    blank: torch.Tensor,
    present: torch.Tensor,
    size: int,
    order: str,
    options: argparse.Namespace,
) -> list[str]:
    totals, forwards = torch.zeros(2, dtype=torch.float64), 0
    for seed in range(options.seeds):
        generators = [torch.Generator().manual_seed(1000 * seed + row) for row in range(len(ids))]
        kind, *settings = order.split(", ")
        fixed = "left_to_right" if kind == "dynamic" else order
        named = ",".join([f"step_size={size}", *(f"criterion={settings[0]}" for _ in settings[:1]), *settings[1:]])
        factorization = Factorization.infill(blank, size, fixed, generators, attention_mask=present.long())
        policy = policies.parse(f"dynamic:{named}") if settings else None
        output = model.generate(
            ids, factorization, policy, generator=generators, temperature=options.temperature, eos_token_id=(),
            return_dict_in_generate=True,
        )  # fmt: skip
        assert not isinstance(output, torch.Tensor)
        forwards += output.forwards
        totals += torch.tensor(_judge(model, torch.where(present, output.sequences, 0), blank, present))
    return [f"{forwards / options.seeds:.0f}", *(f"{x:.3f}" for x in (totals / options.seeds).tolist())]


def _judge(
    model: AnyOrderForCausalLM, ids: torch.Tensor, blank: torch.Tensor, present: torch.Tensor
) -> tuple[float, float]:
    columns = torch.arange(ids.shape[1]).expand_as(ids)
    order = Factorization((columns - 1).masked_fill(~present, -2))
    scores = model.log_likelihood(ids, order).double()
    after = present & (columns >= torch.where(blank, columns, ids.shape[1]).amin(dim=1, keepdim=True))
    return float(-scores[blank].mean()), float(-scores[after].mean())


if __name__ == "__main__":
    main()
