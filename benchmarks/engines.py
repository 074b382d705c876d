"""Milliseconds a step, by engine, weights and rows: one run, the engines by turns, medians.

    python benchmarks/engines.py --output docs/engines_measured.md

Every step has as many content rows as half its rows, on `--cached` stored tokens. A model is prepared once for each
precision of its weights, which takes minutes the first time.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

from anyorder import DEFAULT_MODEL, load
from anyorder.core.layout import Rows
from anyorder.model.kv_cache import KeyValueStore
from anyorder.runtime.engines import runner_for
from anyorder.runtime.processor import describe
from anyorder.runtime.runner import ModelRunner


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--weights", nargs="+", default=["int8", "float32", "bfloat16"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 7, 15])
    parser.add_argument("--cached", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    narrow, _ = load(options.model, dtype=torch.bfloat16)
    whole, _ = load(options.model, dtype=torch.float32)
    runners = {"eager, bfloat16": runner_for(narrow, "eager"), "eager, float32": runner_for(whole, "eager")}
    for weights in options.weights:
        runners[f"openvino, {weights}"] = runner_for(whole, "openvino", weights)
    columns = [(rows, is_open) for is_open in (False, True) for rows in options.rows]
    lines = [
        f"    {shlex.join(['python', *sys.argv])}",
        "",
        f"{describe()}; ms a step with the head over all its rows",
        "",
        "| engine | " + " | ".join(f"R={rows}" + ", adapters" * is_open for rows, is_open in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    found = {column: _measured(runners, *column, options.cached, options.rounds) for column in columns}
    for name in runners:
        lines.append(f"| {name} | " + " | ".join(f"{found[column][name]:.1f}" for column in columns) + " |")
    print("\n".join(lines))
    if options.output is not None:
        options.output.write_text("\n".join(lines) + "\n")


def _measured(runners: dict[str, ModelRunner], rows: int, is_open: bool, cached: int, rounds: int) -> dict[str, float]:
    """Medians of the engines, which take turns."""
    steps = {name: _step(runner, rows, is_open, cached) for name, runner in runners.items()}
    spent: dict[str, list[float]] = {name: [] for name in runners}
    for number in range(rounds + 2):
        for name, step in steps.items():
            start = perf_counter()
            step()
            if number > 1:  # the first ones make kernels
                spent[name].append((perf_counter() - start) * 1000)
    return {name: median(times) for name, times in spent.items()}


def _step(runner: ModelRunner, rows: int, is_open: bool, cached: int) -> Callable[[], None]:
    store, capacity = KeyValueStore(runner.capacity(cached + rows)), cached + rows
    positions = torch.arange(capacity + 1)[None]
    with torch.inference_mode():
        runner.hidden(_rows(0, cached, cached, False), positions, store)
    forward = _rows(cached, rows, (rows + 1) // 2, is_open)

    @torch.inference_mode()
    def step() -> None:
        runner.logits(runner.hidden(forward, positions, store)[0])

    return step


def _rows(first: int, count: int, content: int, is_open: bool) -> Rows:
    ranks = first + torch.arange(content)[None]
    where = first + torch.arange(count)[None]
    every = torch.ones(1, count, dtype=torch.bool)
    reach = (where + 1).clamp(max=first + content)
    gates = every if is_open else ~every
    return Rows(torch.full_like(where, 5), every, where, lo=where * 0, hi=reach, gates=gates, ranks=ranks)


if __name__ == "__main__":
    main()
