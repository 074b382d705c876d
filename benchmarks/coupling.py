"""What coupling buys, by group size and order: nats a token, and how many drafts pass.

    python benchmarks/coupling.py --stories rocstories_valid.jsonl.gz --model smollm2-135m-anyorder --limit 300

Nats a token of whole stories in groups of 1, 2, 4 and 8, from left to right and in random order (`--random-skip` other
stories), with the model's coupling and without it: each is the model's own exact likelihood. `--ranks` cuts the
coupling's delta to so many columns (of the product of its last two layers the greatest singular values are kept;
nothing is trained again, so this is at most what a network of that rank would lose).

Drafts are measured on the stories as they stand: from every place, a group of `--drafts` + 1, of which the first is
the base's own. A draft passes with probability sum_x min(p(x), q(x)) at temperature 1, p being the base's distribution
given the text and q the drafts'; greedy, if both have the same most likely token. Tokens a round are 1 + a_1 + a_1 a_2
+ ..., over all places.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from infill_loss import read
from torch import Tensor

from anyorder import AnyOrderForCausalLM, Factorization, load
from anyorder.core.rng import row_generators
from anyorder.infill.pieces import Pieces

SIZES = (1, 2, 4, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", type=Path, required=True, help='.jsonl or .jsonl.gz of {"sentences": [five]}')
    parser.add_argument("--model", nargs="+", default=["smollm2-135m-anyorder"], help="models to compare")
    parser.add_argument("--limit", type=int, default=300, help="stories, from the first; default: 300")
    parser.add_argument("--random-skip", type=int, default=1000, help="where those in random order begin")
    parser.add_argument("--random-limit", type=int, default=100, help="how many of them; default: 100")
    parser.add_argument("--ranks", type=int, nargs="+", default=[], help="of the delta, measured in groups of 4")
    parser.add_argument("--drafts", type=int, default=5, help="default: 5")
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--json", action="store_true", help="one object a model")
    options = parser.parse_args()
    stories = read(options.stories)
    chosen = stories[: options.limit]
    others = stories[options.random_skip :][: options.random_limit]
    for name in options.model:
        model, tokenizer = load(name, dtype=torch.float32)
        pieces = Pieces(tokenizer)
        report = measure(model, pieces, chosen, others, options.batch_size, options.drafts)
        if options.ranks:
            report["left to right, groups of 4, by rank"] = by_rank(
                model, pieces, chosen, options.batch_size, options.ranks
            )
        print(json.dumps({"model": name} | report) if options.json else describe(name, report), flush=True)


def measure(
    model: AnyOrderForCausalLM,
    pieces: Pieces,
    stories: list[list[str]],
    others: list[list[str]],
    batch: int,
    drafts: int,
) -> dict[str, dict[str, float]]:
    """Nats by order, size and coupling; passes and tokens a round."""
    out: dict[str, dict[str, float]] = {}
    coupling = model.coupling
    kinds = {"coupled": model} if coupling is not None else {}
    for kind, one in (kinds | {"independent": model.uncoupled()}).items():
        out[f"left to right, {kind}"] = {str(n): nats(one, pieces, stories, batch, n, False) for n in SIZES}
        out[f"random, {kind}"] = {str(n): nats(one, pieces, others, batch, n, True) for n in SIZES}
        out[f"drafts, {kind}"] = passes(one, pieces, stories, batch, drafts, from_state=False)
    if coupling is not None and coupling.drafts is not None:
        out["drafts, state"] = passes(model, pieces, stories, batch, drafts, from_state=True)
    return out


def encode(pieces: Pieces, stories: list[list[str]]) -> list[Tensor]:
    return [torch.tensor([pieces.start_token(), *pieces.encode(" ".join(story), at_start=True)]) for story in stories]


def nats(
    model: AnyOrderForCausalLM, pieces: Pieces, stories: list[list[str]], batch: int, size: int, random: bool
) -> float:
    """Nats a token over all predicted tokens; the same random orders for every model and size."""
    total, count = 0.0, 0
    texts = encode(pieces, stories)
    sources = row_generators(torch.Generator().manual_seed(0), len(texts))
    for first in range(0, len(texts), batch):
        some = texts[first : first + batch]
        ids = torch.nn.utils.rnn.pad_sequence(some, batch_first=True)
        order = Factorization.stack([Factorization.left_to_right(len(text)) for text in some])
        if random:
            order = order.regroup(1, "random", sources[first : first + batch])
        order = order.regroup(size)
        total -= float(model.log_likelihood(ids, order).double().sum())
        count += int(order.is_predicted.sum())
    return total / count


@torch.no_grad()
def by_rank(
    model: AnyOrderForCausalLM, pieces: Pieces, stories: list[list[str]], batch: int, ranks: list[int]
) -> dict[str, float]:
    """Nats a token in groups of 4, by columns of the delta that are kept."""
    if model.coupling is None:
        raise SystemExit("--ranks: the model has no coupling")
    up, down = model.coupling.up.weight, model.coupling.down.weight
    whole = up.clone(), down.clone()
    left, sizes, right = torch.linalg.svd(up.float() @ down.float(), full_matrices=False)
    found = {}
    for rank in sorted({*ranks, up.shape[1]}):
        kept = min(rank, up.shape[1])
        up.zero_()
        down.zero_()
        up[:, :kept] = left[:, :kept] * sizes[:kept]
        down[:kept] = right[:kept]
        found[str(kept)] = nats(model, pieces, stories, batch, 4, False)
    up.copy_(whole[0])
    down.copy_(whole[1])
    return found


@torch.no_grad()
def passes(
    model: AnyOrderForCausalLM, pieces: Pieces, stories: list[list[str]], batch: int, drafts: int, from_state: bool
) -> dict[str, float]:
    """How often each draft of query rows, or of the first row's state, passes, at temperature 1 and greedy."""
    sums = torch.zeros(2, drafts, dtype=torch.float64)
    counts = torch.zeros(drafts, dtype=torch.float64)
    for first in range(0, len(stories), batch):
        some = encode(pieces, stories[first : first + batch])
        ids = torch.nn.utils.rnn.pad_sequence(some, batch_first=True)
        for shift in range(drafts + 1):  # groups that begin everywhere
            order = Factorization.stack(
                [Factorization.left_to_right(len(t), drafts + 1, given=min(1 + shift, len(t) - 1)) for t in some]
            )
            found = model.predictions(ids, order, taught=True)
            assert found.base is not None
            columns = torch.arange(ids.shape[1]).expand_as(ids)[found.where][found.base.which]
            place = (columns - 1 - shift) % (drafts + 1)
            states = found.drafts if from_state else found.hidden[found.base.which]
            assert states is not None
            q = model.predictor.logits(states).softmax(-1)
            p = model.predictor.logits(found.base.hidden).softmax(-1)
            for k in range(1, drafts + 1):
                own = place == k
                sums[0, k - 1] += float(torch.minimum(p[own], q[own]).sum())
                sums[1, k - 1] += float((p[own].argmax(-1) == q[own].argmax(-1)).sum())
                counts[k - 1] += int(own.sum())
    rates = sums / counts
    rounds = 1 + rates.cumprod(dim=1).sum(dim=1)
    named = {f"{k + 1}": float(rates[0, k]) for k in range(drafts)}
    named |= {f"{k + 1} greedy": float(rates[1, k]) for k in range(drafts)}
    return named | {"tokens a round": float(rounds[0]), "tokens a round, greedy": float(rounds[1])}


def describe(name: str, report: dict[str, dict[str, float]]) -> str:
    lines = [name]
    for row, values in report.items():
        lines.append(f"  {row:28} " + "  ".join(f"{key} {value:.3f}" for key, value in values.items()))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
