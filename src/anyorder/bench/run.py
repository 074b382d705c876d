"""`anyorder bench`: prompts, decoders, measurements, report."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from anyorder.bench.decoders import Decoder
    from anyorder.modeling import AnyOrderForCausalLM

DEFAULT_POLICIES = [
    "groupwise:size=1", "groupwise:size=4", "groupwise:size=8", "speculative:draft=ngram", "speculative:draft=query"
]  # fmt: skip

OPENINGS = (
    "The train left the station at", "My grandmother always said that", "In the summer of 1969, the",
    "The recipe calls for two eggs and", "When the doctor opened the door,", "Scientists have found that the",
    "The city council voted on", "Once upon a time, in a small village,", "The main difference between cats and dogs",
    "To install the software, first", "The history of the river goes back", "She looked at the letter and",
    "The economy of the country depends on", "The team won the game because", "Light travels faster than",
    "The old man sat by the sea and", "A good teacher knows how to", "The first computer was built",
    "In mathematics, a prime number is", "The garden was full of",
)  # fmt: skip
"""How the default prompts begin; the base model goes on with them up to the length of a prompt."""


def add_options(parser: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    """Options of the command."""
    parser.add_argument("output", type=Path, help="directory for bench.json, .csv, .md and .png")
    parser.add_argument(
        "--policies", nargs="+", default=DEFAULT_POLICIES, metavar="NAME[:OPTION=VALUE,...]",
        help=f"as --policy of generate; default: {' '.join(DEFAULT_POLICIES)}",
    )  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="also each policy compiled; warm-up is told apart")
    parser.add_argument("--greedy", action="store_true", help="take the most likely tokens instead of sampling")
    parser.add_argument("--temperature", type=float, metavar="T", help="default: 1")
    parser.add_argument("--top-p", type=float, metavar="P", help="default: 1")
    parser.add_argument("--batch-size", type=positive, nargs="+", default=[1, 2, 4, 8], metavar="N")
    parser.add_argument("--prompts", type=positive, default=20, metavar="N", help="default: 20")
    parser.add_argument("--prompt-tokens", type=positive, default=64, metavar="N", help="default: 64")
    parser.add_argument("--new-tokens", type=positive, default=128, metavar="N", help="default: 128")
    parser.add_argument(
        "--prompt-file", metavar="PATH",
        help="texts whose beginnings are the prompts (.txt, .jsonl, .parquet, or a data set of the hub); where a text "
        "goes on for --new-tokens it is the reference for ROUGE-L. Default: openings that the base model goes on with",
    )  # fmt: skip
    parser.add_argument(
        "--against", nargs="+", default=[], metavar="FILE.py:FUNCTION",
        help="other samplers, f(base_model, input_ids, max_new_tokens, seeds) -> ids, or (ids, forwards)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")


def run(options: argparse.Namespace, load: Callable[..., tuple[Any, Any]]) -> None:
    """Measure, print the table and write the files."""
    import json

    import torch

    from anyorder.bench import quality, report
    from anyorder.bench.decoders import AnyOrder, Foreign, HuggingFace
    from anyorder.bench.measure import measure
    from anyorder.decoding import policies
    from anyorder.decoding.sampling import Sampler

    chosen = [(policies.parse(text), text) for text in options.policies]  # a mistake is told before the model is loaded
    if options.greedy and (options.temperature is not None or options.top_p is not None):
        raise ValueError("--greedy takes the most likely token: leave out --temperature and --top-p")
    if max(options.batch_size) > options.prompts:
        raise ValueError(f"--batch-size {max(options.batch_size)} needs as many prompts: raise --prompts")
    sampling: dict[str, Any] = {"temperature": 1.0 if options.temperature is None else options.temperature}
    sampling |= {} if options.top_p is None else {"top_p": options.top_p}
    Sampler(not options.greedy, **({} if options.greedy else sampling))  # refuses values that cannot be meant
    model, tokenizer = load(options)
    ids, references = _prompts(options, model, tokenizer)
    decoders: list[Decoder] = [HuggingFace(model, None if options.greedy else sampling)]
    decoders += [
        AnyOrder(model, policy, text, None if options.greedy else sampling, compiled)
        for compiled in (False, True)[: 1 + options.compile]
        for policy, text in chosen
    ]
    decoders += [Foreign(place, model) for place in options.against]
    results = measure(decoders, ids, options.new_tokens, sorted(set(options.batch_size)), options.seed)
    for result in results:
        new, sequences = options.new_tokens, result.sequences
        result.quality["base_nats_per_token"] = quality.nats_per_token(model.causal_lm, sequences, new)
        result.quality["distinct_2"] = quality.distinct(sequences, new)
        if references is not None:
            texts = [tokenizer.decode(row[-new:], skip_special_tokens=True) for row in sequences]
            result.quality["rouge_l"] = quality.rouge_l(texts, references[: len(texts)])
    records = [result.record() for result in results]
    names = ("model", "dtype", "device", "prompt_tokens", "new_tokens", "seed")
    settings = {"command": options.as_typed} | {name: getattr(options, name) for name in names}
    settings["sampling"] = "greedy" if options.greedy else ", ".join(f"{k} {v}" for k, v in sampling.items())
    settings |= {"prompts": len(ids), "prompt_file": options.prompt_file, "threads": torch.get_num_threads()}
    files = report.write(records, settings, options.output)
    if options.json:
        print(json.dumps({"settings": settings, "results": records}))
    else:
        print(report.table(records) + "\nwritten: " + ", ".join(map(str, files)))


def _prompts(
    options: argparse.Namespace, model: AnyOrderForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> tuple[Tensor, list[str] | None]:
    """(M, P) ids, and how each text really goes on, if it does."""
    import torch

    P, N = options.prompt_tokens, options.new_tokens
    if options.prompt_file is None:
        torch.manual_seed(options.seed)
        rows = []
        for m in range(options.prompts):
            begin = torch.tensor([tokenizer.encode(OPENINGS[m % len(OPENINGS)])])[:, :P].to(model.device)
            more: dict[str, Any] = {"max_length": P, "min_length": P, "do_sample": True, "top_k": 50, "pad_token_id": 0}
            full = begin.shape[1] == P
            rows.append(begin if full else model.causal_lm.generate(begin, attention_mask=begin * 0 + 1, **more))
        return torch.cat(rows), None
    from anyorder.training.texts import read_texts

    encoded = [tokenizer.encode(text) for text in read_texts([options.prompt_file])]
    for least in (P + N, P):
        found = [row for row in encoded if len(row) >= least][: options.prompts]
        if len(found) == options.prompts:
            break
    if len(found) < options.prompts:
        raise ValueError(
            f"{options.prompt_file} has {len(found)} texts of at least {P} tokens, not {options.prompts}: "
            "lower --prompts or --prompt-tokens"
        )
    ids = torch.tensor([row[:P] for row in found]).to(model.device)
    if least == P:
        return ids, None
    return ids, [tokenizer.decode(row[P : P + N], skip_special_tokens=True) for row in found]
