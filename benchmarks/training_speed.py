"""Training throughput and memory against plain autoregressive fine-tuning of the same model.

The same weights, the same batch of documents, the same precision (float32 weights where they are trained, bfloat16
arithmetic), the same optimizer; one process, steps interleaved, medians, ratios taken round by round. Two streams cost
two rows a token, so where every token is predicted by a row of its own the ceiling is 0.5. Memory is the growth of the
process over its size before the first step, each contestant in a process of its own.

    python benchmarks/training_speed.py --rounds 7 --memory
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from anyorder import Factorization, load
from anyorder.model.adapters import Adapter
from anyorder.training.curriculum import BUILT_IN, Curriculum, Document, RandomGroups, Stage
from anyorder.training.data import Sequences, collate
from anyorder.training.texts import TokenDocument

EVERY_TOKEN = Curriculum((Stage((RandomGroups((4,)),), (1.0,)),))
CONTESTANTS: dict[str, tuple[Any, Curriculum | None, str | None]] = {
    # name: (adapter, curriculum or None for plain left-to-right training by transformers, who it is compared with)
    "autoregressive, all weights": (None, None, None),
    "any order, all weights, random groups of 4": (None, EVERY_TOKEN, "autoregressive, all weights"),
    "any order, all weights, curriculum exact": (None, BUILT_IN["exact"], "autoregressive, all weights"),
    "autoregressive, LoRA": ("lora", None, None),
    "any order, gated, random groups of 4": ("gated", EVERY_TOKEN, "autoregressive, LoRA"),
    "any order, gated, curriculum exact": ("gated", BUILT_IN["exact"], "autoregressive, LoRA"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--batch-size", type=int, default=8, help="documents a step; default: 8")
    parser.add_argument("--length", type=int, default=128, help="tokens of a document; default: 128")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help="measure memory too, in a process each")
    parser.add_argument("--only", choices=CONTESTANTS, help="one contestant: print its speeds and memory as JSON")
    parser.add_argument("--json", type=Path, help="write every measurement to this file")
    options = parser.parse_args()
    if options.only:
        return one(options)
    steps = {name: contestant(name, options) for name in CONTESTANTS}
    speeds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(options.rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            tokens = step(turn)
            if turn:
                speeds[name].append(tokens / (time.perf_counter() - start))
    memory = {name: growth(name) for name in steps} if options.memory else {}
    print(f"{options.batch_size} x {options.length} tokens a step, rank {options.rank}, {options.rounds} rounds")
    print(f"{'':44} {'tokens/s':>9} {'ratio':>6} {'(min .. max)':>14} {'memory MiB':>11} {'ratio':>6}")
    for name, (_, _, against) in CONTESTANTS.items():
        line = f"{name:44} {statistics.median(speeds[name]):9.0f}"
        ratios = [a / b for a, b in zip(speeds[name], speeds[against or name], strict=True)]
        line += f" {statistics.median(ratios):6.2f} {f'({min(ratios):.2f} .. {max(ratios):.2f})':>14}"
        if memory:
            line += f" {memory[name]:11.0f} {memory[name] / memory[against or name]:6.2f}"
        print(line)
    if options.json:
        options.json.write_text(json.dumps({"tokens_per_second": speeds, "memory_mib": memory}, indent=1) + "\n")


def contestant(name: str, options: argparse.Namespace) -> Callable[[int], int]:
    """A function that takes one optimizer step on batch number n and returns the tokens in it."""
    kind, curriculum, _ = CONTESTANTS[name]
    torch.manual_seed(0)
    more: dict[str, Any] = {} if kind is None else {"adapter": Adapter(kind, options.rank)}
    dtype = torch.float32 if kind is None else torch.bfloat16
    model = load(options.model, dtype=dtype, **more)[0].train()
    generator = torch.Generator().manual_seed(0)
    documents = [
        TokenDocument(
            torch.randint(1000, 20000, (options.length,), generator=generator),
            Document(options.length, tuple(range(1, options.length, 16))),
        )
        for _ in range(64)
    ]
    count = 1000 * options.batch_size
    data = Sequences([documents], options.length, curriculum or EVERY_TOKEN, count)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)

    def step(n: int) -> int:
        batch = collate([data[n * options.batch_size + k] for k in range(options.batch_size)])
        ids = batch["input_ids"]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if curriculum is None:
                rows = ids.view(options.batch_size, options.length)
                loss = model.causal_lm(input_ids=rows, labels=rows, use_cache=False).loss
            else:
                loss = model(ids, Factorization(batch["group_ids"], batch["document_ids"]), batch["labels"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return ids.numel()

    return step


def one(options: argparse.Namespace) -> None:
    step = contestant(options.only, options)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten (Linux)
    before = _status("VmRSS")
    for n in range(3):
        step(n)
    print(json.dumps({"mib": _status("VmHWM") - before}))


def _status(name: str) -> float:
    """MiB of this process, as Linux tells; ru_maxrss would still be the peak of the process that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def growth(name: str) -> float:
    """MiB that training adds to a process."""
    command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
    return float(json.loads(subprocess.check_output(command, text=True).splitlines()[-1])["mib"])


if __name__ == "__main__":
    main()
