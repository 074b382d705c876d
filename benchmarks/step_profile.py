"""Where the time of a decoding step goes, by kind of work, for each decoder: what bounds tokens a second.

Runs a decoder under torch.profiler, sorts the operators' own time by their shapes (matrix products with the adapter's
rank, with the vocabulary, others; attention; the rest), and sets it against the wall time without
the profiler. What no operator accounts for is Python and dispatch. Hugging Face `generate` stands beside it.

Compiled steps are one call of generated code and one for the head: each is timed as a whole, and the rest is the eager
forward over the prompt, the choice of tokens and Python.

    python benchmarks/step_profile.py --policies groupwise:size=1 groupwise:size=4 --output docs/step_profile.md
    python benchmarks/step_profile.py --policies groupwise:size=1 groupwise:size=4 --compile
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from anyorder import DEFAULT_MODEL, AnyOrderForCausalLM, load, policies
from anyorder.hub.pretrained import load_causal_lm
from anyorder.runtime.compiled import compiled_runner

KINDS = ("base linears", "adapter linears", "head", "attention", "other operators")
COMPILED = ("compiled rows", "compiled head")
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument(
        "--policies", nargs="+", default=["groupwise:size=1", "groupwise:size=4", "speculative:draft=query"]
    )
    parser.add_argument("--compile", action="store_true", help="our steps as compiled code")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5, help="default: 5, interleaved; medians")
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    model, _ = load(options.model, dtype=getattr(torch, options.dtype))
    torch.manual_seed(0)
    prompt = torch.randint(1000, 40000, (1, options.prompt_tokens))
    decoders = {"Hugging Face generate": _hugging_face(model, prompt, options.new_tokens)}
    for name in options.policies:
        decoders[name] = _ours(model, prompt, name, options)
    for decode in decoders.values():
        decode()
    parts = _timed(model) if options.compile else {}
    walls: dict[str, list[float]] = {name: [] for name in decoders}
    for _ in range(options.rounds):
        for name, decode in decoders.items():
            start = perf_counter()
            forwards = decode()
            walls[name].append((perf_counter() - start) / forwards * 1000)
    kinds, rest = (COMPILED, "the rest") if options.compile else (KINDS, "Python and dispatch")
    lines = [
        f"    {shlex.join(['python', *sys.argv])}",
        "",
        "| ms a forward | forwards | wall | " + " | ".join(kinds) + f" | {rest} |",
        "|---" * (len(kinds) + 4) + "|",
    ]
    for name, decode in decoders.items():
        forwards, spent = _in_compiled_code(decode, parts) if options.compile else _profiled(decode, model)
        wall = median(walls[name])
        cells = [spent[kind] for kind in kinds]
        lines.append(f"| {name} | {forwards} | {wall:.1f} | " + " | ".join(f"{c:.1f}" for c in cells)
                     + f" | {wall - sum(cells):.1f} |")  # fmt: skip
    print("\n".join(lines))
    if options.output is not None:
        options.output.write_text("\n".join(lines) + "\n")


def _hugging_face(model: AnyOrderForCausalLM, prompt: torch.Tensor, new: int) -> Callable[[], int]:
    # A base of its own: ours has another attention function and, with an adapter, other modules.
    name = (model.config.base or {}).get("name") or model.causal_lm.name_or_path
    causal_lm: Any = load_causal_lm(name, dtype=model.causal_lm.dtype)

    def decode() -> int:
        causal_lm.generate(prompt, max_new_tokens=new, min_new_tokens=new, do_sample=True, temperature=1.0, top_k=0)
        return new

    return decode


def _ours(
    model: AnyOrderForCausalLM, prompt: torch.Tensor, name: str, options: argparse.Namespace
) -> Callable[[], int]:
    policy = policies.parse(name)

    def decode() -> int:
        output = model.generate(
            prompt, max_new_tokens=options.new_tokens, policy=policy, eos_token_id=(), temperature=1.0,
            generator=torch.Generator().manual_seed(0), compile=options.compile, return_dict_in_generate=True,
        )  # fmt: skip
        assert not isinstance(output, torch.Tensor)
        return output.forwards

    return decode


def _timed(model: AnyOrderForCausalLM) -> dict[str, list[float]]:
    """Seconds of every call of compiled code from here on, by kind."""
    forward = compiled_runner(model)
    parts: dict[str, list[float]] = {kind: [] for kind in COMPILED}

    def timed(function: Callable[..., torch.Tensor], spent: list[float]) -> Callable[..., torch.Tensor]:
        def call(*inputs: Any) -> torch.Tensor:
            start = perf_counter()
            output = function(*inputs)
            spent.append(perf_counter() - start)
            return output

        return call

    for name, function in forward._built.items():
        kind = COMPILED[name.startswith("head")]
        forward._built[name] = timed(function, parts[kind])
    return parts


def _in_compiled_code(decode: Callable[[], int], parts: dict[str, list[float]]) -> tuple[int, dict[str, float]]:
    """Forwards, and milliseconds of each kind a forward: medians of a few runs."""
    runs = []
    for _ in range(5):
        for spent in parts.values():
            spent.clear()
        forwards = decode()
        runs.append([sum(spent) * 1000 / forwards for spent in parts.values()])
    return forwards, dict(zip(parts, (median(run) for run in zip(*runs, strict=True)), strict=True))


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
