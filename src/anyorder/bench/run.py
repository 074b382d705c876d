"""`anyorder bench`: prompts, decoders, measurements, report."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from anyorder.bench.decoders import Decoder
    from anyorder.bench.measure import Measured
    from anyorder.decoding.policies import Policy
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
    parser.add_argument(
        "--engines", nargs="+", default=["eager"], metavar="NAME[:WEIGHTS]",
        help="each policy runs in each: eager, openvino:int8, openvino:float32, ..., cuda_graphs; default: eager",
    )  # fmt: skip
    parser.add_argument(
        "--uncoupled",
        action="store_true",
        help="also each policy of groups without the model's coupling, whose tokens do not know each other",
    )
    parser.add_argument("--greedy", action="store_true", help="take the most likely tokens instead of sampling")
    parser.add_argument("--temperature", type=float, metavar="T", help="default: 1; 0 is --greedy")
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
        help="other samplers, f(base_model, input_ids, max_new_tokens, seeds) -> ids, or (ids, forwards); llama.cpp: "
        "on the GGUF file of the base (pip install xllamacpp); torch.compile: generate with a static cache, compiled",
    )  # fmt: skip
    parser.add_argument(
        "--warm-up", type=float, default=0.0, metavar="SECONDS",
        help="in which each decoder goes on after a first run before any is measured (some engines compile a graph for "
        "sizes that have come some hundred times); default: 0",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")


def run(options: argparse.Namespace, load: Callable[..., tuple[Any, Any]]) -> None:
    """Measure, print the table and write the files.

    Args:
        options: parsed from `add_options`.
        load: loads the model that the options name.

    Raises:
        ValueError: for options that cannot be meant, before a model is loaded.
    """
    import json

    from anyorder.bench import report
    from anyorder.bench.decoders import HuggingFace
    from anyorder.bench.measure import measure
    from anyorder.bench.others import others, read
    from anyorder.runtime.processor import describe

    _check_installed(options)
    sampling = _sampling(options)
    engines, chosen = _engines(options), _policies(options.policies)
    against = read(options.against)
    texts = _texts(options)
    model, tokenizer = load(options)
    ids, references = _prompts(options, texts, model, tokenizer)
    if options.uncoupled and model.coupling is None:
        raise ValueError(f"--uncoupled compares with a coupling, and {options.model} has none: leave it out")
    decoders: list[Decoder] = [HuggingFace(model, sampling), *others(against, model, sampling, options.model)]
    for engine in engines:
        decoders += _in_engine(model, _by_ones_first(chosen) if engine[0] != "eager" else chosen, sampling, *engine,
                               uncoupled=options.uncoupled)  # fmt: skip
    sizes = sorted(set(options.batch_size))
    results = measure(decoders, ids, options.new_tokens, sizes, options.seed, options.warm_up)
    _judge(results, model, tokenizer, references)
    records = [result.record() for result in results]
    names = ("model", "dtype", "device", "prompt_tokens", "new_tokens", "seed", "warm_up")
    settings = {"command": options.as_typed} | {name: getattr(options, name) for name in names}
    settings["sampling"] = "greedy" if sampling is None else ", ".join(f"{k} {v}" for k, v in sampling.items())
    settings |= {"prompts": len(ids), "prompt_file": options.prompt_file, "processor": describe()}
    # Printed before anything is written: a file that cannot be written loses no measurement.
    print(json.dumps({"settings": settings, "results": records}) if options.json else report.explained(records))
    files = report.write(records, settings, options.output)
    if not options.json:
        print("written: " + ", ".join(map(str, files)))


def _check_installed(options: argparse.Namespace) -> None:
    """Raise ValueError if the report could not be made."""
    needed = {"matplotlib": "the picture"} | ({} if options.prompt_file is None else {"rouge_score": "ROUGE-L"})
    for package, what in needed.items():
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"{what} needs {package.replace('_', '-')}: pip install 'anyorder[bench]'")


def _sampling(options: argparse.Namespace) -> dict[str, Any] | None:
    """Settings of drawing; None: greedy."""
    from anyorder.decoding.sampling import Sampler

    if options.greedy and (options.temperature is not None or options.top_p is not None):
        raise ValueError("--greedy takes the most likely token: leave out --temperature and --top-p")
    if max(options.batch_size) > options.prompts:
        raise ValueError(f"--batch-size {max(options.batch_size)} needs as many prompts: raise --prompts")
    if options.greedy:
        return None
    sampling: dict[str, Any] = {"temperature": 1.0 if options.temperature is None else options.temperature}
    sampling |= {} if options.top_p is None else {"top_p": options.top_p}
    return sampling if Sampler(True, **sampling).do_sample else None  # temperature 0 is greedy


def _engines(options: argparse.Namespace) -> list[tuple[str, str | None]]:
    """Engines and their weights, in the order in which they were asked for."""
    from anyorder.runtime.engines import check_engine, check_installed

    found = []
    for text in dict.fromkeys(options.engines):
        engine, _, weights = text.partition(":")
        if engine == "auto":
            raise ValueError("--engines auto: a bench names what it measures: eager, openvino:int8, ...")
        check_engine(engine, weights or None)
        if engine == "openvino":
            check_installed()
        found.append((engine, weights or None))
    return found


def _policies(texts: Sequence[str]) -> list[tuple[Policy, str]]:
    from anyorder.decoding import policies

    return [(policies.parse(text), text) for text in texts]


def _by_ones_first(chosen: list[tuple[Policy, str]]) -> list[tuple[Policy, str]]:
    """The policies, the first of them one token at a time, which the others of an engine are compared with: from left
    to right that is the base model's own decoding."""
    from anyorder.decoding import policies

    by_ones = (policies.groupwise(), policies.groupwise(1))
    first = next((one for one in chosen if one[0] in by_ones), (policies.groupwise(1), "groupwise:size=1"))
    return [first, *(one for one in chosen if one is not first)]


def _in_engine(
    model: AnyOrderForCausalLM,
    chosen: list[tuple[Policy, str]],
    sampling: dict[str, Any] | None,
    engine: str,
    weights: str | None,
    uncoupled: bool,
) -> list[Decoder]:
    """Each policy, and each policy of groups without the coupling."""
    from anyorder.bench.decoders import AnyOrder
    from anyorder.decoding import policies

    decoders: list[Decoder] = [AnyOrder(model, policy, text, sampling, engine, weights) for policy, text in chosen]
    if uncoupled:
        plain = model.uncoupled()
        decoders += [AnyOrder(plain, policy, f"{text}, uncoupled", sampling, engine, weights)
                     for policy, text in chosen if not isinstance(policy, policies.Speculative)]  # fmt: skip
    return decoders


def _judge(
    results: Sequence[Measured],
    model: AnyOrderForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    references: list[str] | None,
) -> None:
    """Say of each how good its texts are."""
    from anyorder.bench import quality

    for result in results:
        new, sequences = result.new_tokens, result.sequences
        result.quality["base_nats_per_token"] = quality.nats_per_token(model.causal_lm, sequences, new)
        result.quality["distinct_2"] = quality.distinct(sequences, new)
        if references is not None:
            texts = [tokenizer.decode(row[-new:], skip_special_tokens=True) for row in sequences]
            result.quality["rouge_l"] = quality.rouge_l(texts, references[: len(texts)])


def _texts(options: argparse.Namespace) -> list[str] | None:
    """What --prompt-file holds."""
    if options.prompt_file is None:
        return None
    from anyorder.training.texts import read_texts

    return read_texts([options.prompt_file])


def _prompts(
    options: argparse.Namespace,
    texts: list[str] | None,
    model: AnyOrderForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[Tensor, list[str] | None]:
    """(M, P) ids, and how each text really goes on, if it does."""
    import torch

    P, N = options.prompt_tokens, options.new_tokens
    if texts is None:
        torch.manual_seed(options.seed)
        rows = []
        for m in range(options.prompts):
            begin = torch.tensor([tokenizer.encode(OPENINGS[m % len(OPENINGS)])])[:, :P].to(model.device)
            more: dict[str, Any] = {"max_length": P, "min_length": P, "do_sample": True, "top_k": 50, "pad_token_id": 0}
            full = begin.shape[1] == P
            rows.append(begin if full else model.causal_lm.generate(begin, attention_mask=begin * 0 + 1, **more))
        return torch.cat(rows), None
    encoded = [tokenizer.encode(text) for text in texts]
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
