"""How well a group of four can be predicted by one who knows exactly what the base model believes.

The tokens of a group do not see each other, so a perfect student of the base model would give the second, third and
fourth the base's own marginals: its next-token distribution averaged over what it might have written in between. They
are estimated by drawing that from the base itself. A mean over few draws errs towards more nats (Jensen), so the same
estimates from fewer draws stand beside it. A student does better only by knowing this kind of text better than the
base does.

    python benchmarks/group_bound.py --stories rocstories_valid.jsonl.gz
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from infill_loss import read
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel

from anyorder import load
from anyorder.infill.pieces import Pieces

SHARES = (4, 2, 1)
"""The draws, divided by each, give an estimate: how fast these fall says how far the last one is from the truth."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", type=Path, required=True, help='.jsonl or .jsonl.gz of {"sentences": [five]}')
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--limit", type=int, default=300, help="stories, from the first; default: 300")
    parser.add_argument("--groups", type=int, default=150, help="of them, drawn at random; default: 150")
    parser.add_argument("--draws", type=int, default=256, help="a group; default: 256")
    parser.add_argument("--group-size", type=int, default=4)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    options = parser.parse_args()
    model, tokenizer = load(options.model, dtype=getattr(torch, options.dtype))
    pieces, base = Pieces(tokenizer), model.causal_lm
    base.set_attn_implementation("sdpa")  # its own again: nothing of ours takes part
    groups = []
    for sentences in read(options.stories)[: options.limit]:
        ids = [pieces.start_token(), *pieces.encode(" ".join(sentences), at_start=True)]
        groups += [(ids, start) for start in range(1, len(ids) - options.group_size + 1, options.group_size)]
    torch.manual_seed(0)
    chosen = torch.randperm(len(groups))[: options.groups].tolist()
    nats = torch.stack(
        [
            group_nats(base, ids, start, options.group_size, options.draws)
            for ids, start in tqdm([groups[k] for k in chosen], unit="group")
        ]
    )
    print(
        f"{len(chosen)} of {len(groups)} groups of {options.group_size}, nats a token by place in the group, and mean"
    )
    shares = [f"marginals, {options.draws // share} draws" for share in SHARES]
    for name, sample in zip(["one at a time", *shares], nats.unbind(dim=1), strict=True):
        places = " ".join(f"{value:6.3f}" for value in sample.mean(dim=0).tolist())
        excess = (sample - nats[:, 0]).mean(dim=1)
        error = float(excess.std() / len(excess) ** 0.5)
        print(f"{name:24} {places} {float(sample.mean()):6.3f}  (+{float(excess.mean()):.3f} +- {error:.3f})")


@torch.inference_mode()
def group_nats(base: PreTrainedModel, ids: list[int], start: int, size: int, draws: int) -> Tensor:
    """(1 + shares, size): nats of each token of a group one at a time, and by the marginals from some of the draws."""
    group = torch.tensor(ids[start : start + size])
    logits = base(torch.tensor([ids[: start + size - 1]]), logits_to_keep=size).logits[0]
    rows = [-logits.float().log_softmax(dim=-1).double().gather(1, group[:, None])[:, 0]]
    cache = DynamicCache()
    logits = base(torch.tensor([ids[:start]]), past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
    cache.batch_repeat_interleave(draws)
    log_probs = logits.float().log_softmax(dim=-1).expand(draws, -1)
    of_token = []
    for place, token in enumerate(group.tolist()):
        of_token.append(log_probs[:, token].double())
        if place + 1 < size:
            drawn = torch.multinomial(log_probs.exp(), 1)
            log_probs = base(drawn, past_key_values=cache, use_cache=True).logits[:, -1].float().log_softmax(dim=-1)
    for share in SHARES:
        part = torch.stack(of_token)[:, : draws // share]
        rows.append(torch.tensor(part.shape[1]).log() - part.logsumexp(dim=1))
    return torch.stack(rows)


if __name__ == "__main__":
    main()
