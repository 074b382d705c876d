"""Where the time of a decoding step goes, by kind of work, for each decoder: what bounds tokens a second.

Runs a decoder under torch.profiler, sorts the operators' own time by their shapes (matrix products with the adapter's
rank, with the vocabulary, others; attention; the rest), and sets it against the wall time without
the profiler. What no operator accounts for is Python and dispatch. Hugging Face `generate` stands beside it.

Steps of another engine than eager PyTorch are few calls: each kind is timed as a whole, what the runner does around the
engine's own call apart; the rest is the choice of tokens and the loop. The last column is what a step takes without the
engine's calls where nothing pushes Python's own data out of the caches: forwards of rows are left out once they have
come often enough that their results, which are then the last ones', have their places.

    python benchmarks/step_profile.py --policies groupwise:size=1 groupwise:size=4 --output docs/step_profile.md
    python benchmarks/step_profile.py --policies groupwise:size=1 groupwise:size=4 --engine openvino --weights int8
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from anyorder import DEFAULT_MODEL, AnyOrderForCausalLM, load, policies
from anyorder.bench.others import base_of_its_own
from anyorder.runtime.engines import runner_for
from anyorder.runtime.runner import ModelRunner

KINDS = ("base linears", "adapter linears", "head", "attention", "other operators")
PARTS = {"hidden": "rows", "logits": "head", "coupled_logits": "coupling", "draft_logits": "drafts"}
"""Methods of a runner, and what they are in the table."""
INSIDE = "of rows and head: in the engine"
ALONE = "without the engine, rows left out"
OFTEN = 3
"""Forwards over one store that are made, where rows are left out: the prompt, and those after which shapes stay."""
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument(
        "--policies", nargs="+", default=["groupwise:size=1", "groupwise:size=4", "speculative:draft=query"]
    )
    parser.add_argument("--engine", default="eager")
    parser.add_argument("--weights", help="of openvino")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5, help="default: 5, interleaved; medians")
    parser.add_argument(
        "--warm-up",
        type=float,
        default=20.0,
        help="seconds of each decoder before, for what engines compile; default: 20",
    )
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    model, _ = load(options.model, dtype=getattr(torch, options.dtype))
    torch.manual_seed(0)
    prompt = torch.randint(1000, 40000, (1, options.prompt_tokens))
    runner = runner_for(model, options.engine, options.weights)
    is_eager = options.engine == "eager"
    decoders = {"Hugging Face generate": _hugging_face(model, prompt, options.new_tokens)} if is_eager else {}
    for name in options.policies:
        decoders[name] = _ours(model, prompt, name, options, runner)
    for decode in decoders.values():
        decode()
        ready = perf_counter()
        while not is_eager and perf_counter() < ready + options.warm_up:
            decode()
    parts = {} if is_eager else _timed(runner)
    walls: dict[str, list[float]] = {name: [] for name in decoders}
    for _ in range(options.rounds):
        for name, decode in decoders.items():
            start = perf_counter()
            forwards = decode()
            walls[name].append((perf_counter() - start) / forwards * 1000)
    kinds, rest = (KINDS, "Python and dispatch") if is_eager else ((*PARTS.values(), INSIDE), "choice of tokens, loop")
    headings = ["ms a forward", "forwards", "wall", *kinds, rest, *([] if is_eager else [ALONE])]
    lines = [
        f"    {shlex.join(['python', *sys.argv])}",
        "",
        f"| {' | '.join(headings)} |",
        "|---" * len(headings) + "|",
    ]
    for name, decode in decoders.items():
        forwards, spent = _profiled(decode, model) if is_eager else _in_parts(decode, parts)
        wall = median(walls[name])
        cells = [wall, *(spent[kind] for kind in kinds), wall - sum(spent[kind] for kind in kinds if kind != INSIDE)]
        if not is_eager:
            cells.append(_without_rows(runner, decode, parts[INSIDE]))
        lines.append(f"| {name} | {forwards} | " + " | ".join(f"{cell:.1f}" for cell in cells) + " |")
    print("\n".join(lines))
    if options.output is not None:
        options.output.write_text("\n".join(lines) + "\n")


def _hugging_face(model: AnyOrderForCausalLM, prompt: torch.Tensor, new: int) -> Callable[[], int]:
    causal_lm: Any = base_of_its_own(model)

    def decode() -> int:
        causal_lm.generate(prompt, max_new_tokens=new, min_new_tokens=new, do_sample=True, temperature=1.0, top_k=0)
        return new

    return decode


def _ours(
    model: AnyOrderForCausalLM, prompt: torch.Tensor, name: str, options: argparse.Namespace, runner: ModelRunner
) -> Callable[[], int]:
    policy = policies.parse(name)

    def decode() -> int:
        output = model.generate(
            prompt, max_new_tokens=options.new_tokens, policy=policy, eos_token_id=(), temperature=1.0,
            generator=torch.Generator().manual_seed(0), runner=runner, return_dict_in_generate=True,
        )  # fmt: skip
        assert not isinstance(output, torch.Tensor)
        return output.forwards

    return decode


def _timed(runner: ModelRunner) -> dict[str, list[float]]:
    """Seconds of every call of a runner's methods from here on, by kind."""
    parts: dict[str, list[float]] = {kind: [] for kind in (*PARTS.values(), INSIDE)}

    def timed(function: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
        def call(*inputs: Any) -> Any:
            start = perf_counter()
            output = function(*inputs)
            spent.append(perf_counter() - start)
            return output

        return call

    for method, kind in PARTS.items():
        setattr(runner, method, timed(getattr(runner, method), parts[kind]))
    if hasattr(runner, "infer"):
        setattr(runner, "infer", timed(getattr(runner, "infer"), parts[INSIDE]))  # noqa: B009, B010
    return parts


def _in_parts(decode: Callable[[], int], parts: dict[str, list[float]]) -> tuple[int, dict[str, float]]:
    """Forwards, and milliseconds of each kind a forward: medians of a few runs."""
    runs = []
    for _ in range(5):
        for spent in parts.values():
            spent.clear()
        forwards = decode()
        runs.append([sum(spent) * 1000 / forwards for spent in parts.values()])
    return forwards, dict(zip(parts, (median(run) for run in zip(*runs, strict=True)), strict=True))


def _without_rows(runner: ModelRunner, decode: Callable[[], int], inside: list[float]) -> float:
    """Milliseconds a forward that are not the engine's, without most forwards of rows."""
    infer: Callable[[Any], None] = getattr(runner, "infer")  # noqa: B009
    made: Counter[Any] = Counter()
    others = {id(graph) for graph in [getattr(runner, "_head"), *getattr(runner, "_members").values()]}  # noqa: B009

    def left_out(request: Any) -> None:
        made[request] += 1
        if id(request) in others or made[request] <= OFTEN:
            infer(request)

    setattr(runner, "infer", left_out)  # noqa: B010
    runs = []
    for _ in range(5):
        inside.clear()
        start = perf_counter()
        forwards = decode()
        runs.append((perf_counter() - start - sum(inside)) * 1000 / forwards)
    setattr(runner, "infer", infer)  # noqa: B010
    return median(runs)


def _profiled(decode: Callable[[], int], model: AnyOrderForCausalLM) -> tuple[int, dict[str, float]]:
    """Forwards, and milliseconds of each kind a forward."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        forwards = decode()
    rank = (model.config.adapter or {}).get("rank")
    spent = dict.fromkeys(KINDS, 0.0)
    for event in recorded.key_averages(group_by_input_shape=True):
        if event.key.startswith("aten::"):
            weight = [shape for shape in event.input_shapes if len(shape) == 2][-1:]
            sizes = {size for shape in weight for size in shape}
            if "attention" in event.key:
                kind = "attention"
            elif event.key not in PRODUCTS:
                kind = "other operators"
            elif model.vocabulary_size in sizes:
                kind = "head"
            else:
                kind = "adapter linears" if rank in sizes else "base linears"
            spent[kind] += event.self_cpu_time_total / 1000 / forwards
    return forwards, spent


if __name__ == "__main__":
    main()
