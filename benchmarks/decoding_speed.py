"""Tokens a second of group-wise decoding against the same base model under Hugging Face `generate`.

One process, the same weights and prompts, runs interleaved so that a slow moment of the machine falls on all alike;
new tokens only; medians over rounds, with the ratio taken round by round. Quality is not measured here: an untrained
conversion is the base model only at group size 1.

    python benchmarks/decoding_speed.py --rounds 7 --json speed.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from anyorder import load, policies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1])
    parser.add_argument("--group-size", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write every measurement to this file")
    options = parser.parse_args()

    model, tokenizer = load(options.model, dtype=getattr(torch, options.dtype))
    records = []
    print(f"{options.dtype}, {options.prompt_tokens} + {options.new_tokens} tokens, {torch.get_num_threads()} threads")
    print("batch  decoder        tok/s  (min .. max)     ratio  (min .. max)  forwards/token")
    for batch in options.batch_size:
        generator = torch.Generator().manual_seed(options.seed)
        ids = torch.randint(len(tokenizer), (batch, options.prompt_tokens), generator=generator)
        for record in compare(model, ids, options.new_tokens, options.group_size, options.rounds):
            records.append({"batch": batch, "dtype": options.dtype, **record})
            speed, ratio = record["tokens_per_second"], record["ratio"]
            print(
                f"{batch:5d}  {record['decoder']:12} {statistics.median(speed):7.1f}  "
                f"({min(speed):.1f} .. {max(speed):.1f})  {statistics.median(ratio):7.2f}  "
                f"({min(ratio):.2f} .. {max(ratio):.2f})  {record['forwards_per_token']:.3f}"
            )
    if options.json is not None:
        options.json.write_text(json.dumps(records, indent=1) + "\n")


def compare(model, ids: torch.Tensor, new: int, sizes: list[int], rounds: int) -> list[dict]:  # type: ignore[no-untyped-def, type-arg]
    """Time the base and every group size in turn, `rounds` times after one unmeasured round."""

    def base() -> int:
        out = model.causal_lm.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=True,
            top_k=0,
        )
        assert out.shape[1] == ids.shape[1] + new
        return new

    def grouped(size: int) -> Callable[[], int]:
        def run() -> int:
            out = model.generate(
                ids,
                max_new_tokens=new,
                policy=policies.groupwise(size),
                do_sample=True,
                eos_token_id=(),
                return_dict_in_generate=True,
            )
            assert out.sequences.shape[1] == ids.shape[1] + new
            return out.forwards

        return run

    contestants: dict[str, Callable[[], int]] = {"hugging face": base}
    contestants |= {f"group size {size}": grouped(size) for size in sizes}
    speeds: dict[str, list[float]] = {name: [] for name in contestants}
    forwards = {}
    for turn in range(rounds + 1):
        for name, run in contestants.items():
            start = time.perf_counter()
            forwards[name] = run()
            if turn:
                speeds[name].append(ids.shape[0] * new / (time.perf_counter() - start))
    return [
        {
            "decoder": name,
            "tokens_per_second": speed,
            "ratio": [ours / theirs for ours, theirs in zip(speed, speeds["hugging face"], strict=True)],
            "forwards_per_token": forwards[name] / new,
        }
        for name, speed in speeds.items()
    ]


if __name__ == "__main__":
    main()
