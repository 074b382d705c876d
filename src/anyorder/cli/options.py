"""What the commands share: options, reading texts, loading the model, printing."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anyorder.hub.resolve import DEFAULT_MODEL

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase, TorchAoConfig

    from anyorder.decoding.policies import Policy
    from anyorder.infill.lengths import Length
    from anyorder.modeling import AnyOrderForCausalLM
    from anyorder.trace.record import Recorder


def add_command(subparsers: Any, name: str, run: Any, help_text: str, example: str) -> argparse.ArgumentParser:
    """One command, with the options that every command has."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name, help=help_text, description=help_text[0].upper() + help_text[1:] + ".", epilog=f"example: {example}"
    )
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="print one JSON object a result")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error, and log more")
    return parser


def add_texts(parser: argparse.ArgumentParser, help_text: str) -> None:
    """Where texts come from."""
    parser.add_argument("text", nargs="*", help=f"{help_text}; without it, or for a lone -, standard input")
    parser.add_argument("--file", type=Path, metavar="PATH", help="read one text from a file")
    parser.add_argument("--lines", action="store_true", help="with a file or standard input: one text a line")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Which model, and how to load it."""
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, metavar="NAME",
        help=f"built-in name, directory, GGUF file or hub id; default: {DEFAULT_MODEL}",
    )  # fmt: skip
    parser.add_argument("--int8", action="store_true", help="hold the weights of linear layers in 8 bits, by torchao")
    add_device(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    """How to load a model."""
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="default: %(default)s"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps, ...; default: cpu")


def add_order(parser: argparse.ArgumentParser) -> None:
    """An order of prediction."""
    parser.add_argument("--group-size", type=positive, default=1, metavar="N", help="tokens a step; default: 1")
    parser.add_argument(
        "--order", choices=("left_to_right", "random"), default="left_to_right", help="default: left_to_right"
    )


def add_policy(parser: argparse.ArgumentParser) -> None:
    """Which positions each step commits."""
    parser.add_argument(
        "--policy", type=_policy, metavar="NAME[:OPTION=VALUE,...]",
        help="groupwise, dynamic (criterion, step_size, threshold, entropy_budget, spacing, window, "
        "reencode, max_revisions) or speculative "
        "(draft, draft_length), for example dynamic:criterion=entropy,step_size=4",
    )  # fmt: skip


def _policy(text: str) -> Policy:
    from anyorder.decoding import policies

    try:
        return policies.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """How tokens are drawn, and by what code."""
    parser.add_argument("--sample", action="store_true", help="draw tokens instead of taking the most likely")
    parser.add_argument("--temperature", type=float, metavar="T", help="implies --sample")
    parser.add_argument("--top-k", type=int, metavar="K", help="implies --sample")
    parser.add_argument("--top-p", type=float, metavar="P", help="implies --sample")
    parser.add_argument("--min-p", type=float, metavar="P", help="implies --sample")
    parser.add_argument("--repetition-penalty", type=float, metavar="R")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    parser.add_argument("--compile", action="store_true", help="compiled code: minutes the first time, faster for good")


def add_watching(parser: argparse.ArgumentParser) -> None:
    """Seeing the order of generation."""
    parser.add_argument("--watch", action="store_true", help="show the text as it fills, coloured by probability")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write what each step did, for anyorder plot")


@contextmanager
def watching(options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, texts: int) -> Iterator[Recorder | None]:
    """Something that watches, if it was asked for; its trace is written at the end.

    Raises:
        ValueError: if a trace of several texts is asked for.
    """
    from anyorder.trace.live import Live
    from anyorder.trace.record import Recorder

    if options.trace is not None and texts > 1:
        raise ValueError(f"--trace takes one text, got {texts}")

    def text(token: int) -> str:
        return "" if token in tokenizer.all_special_ids else tokenizer.decode([token])

    watcher = Live(text) if options.watch else Recorder(text) if options.trace is not None else None
    yield watcher
    if isinstance(watcher, Live):
        watcher.close()
    if options.trace is not None and watcher is not None:
        watcher.traces[0].save(options.trace)


def sampling_options(options: argparse.Namespace, number: int) -> dict[str, Any]:
    """Options of `generate`; text number n draws from seed + n, whatever the other texts are."""
    import torch

    chosen = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    do_sample = options.sample or bool(chosen)
    generator = torch.Generator().manual_seed(options.seed + number)
    more = {"repetition_penalty": options.repetition_penalty, "compile": options.compile}
    return {**chosen, "do_sample": do_sample, "generator": generator, **more}


def positive(text: str) -> int:
    """A whole number from 1 up, as an argparse type."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up")
    return value


def length(text: str) -> Length:
    """Tokens of a blank, as an argparse type."""
    lo, dash, hi = text.partition("-")
    return "auto" if text == "auto" else (positive(lo), positive(hi)) if dash else positive(text)


def read_texts(options: argparse.Namespace) -> list[str]:
    """The texts that the options name, as they are: line ends and all."""
    if options.file is not None:
        if options.text:
            raise ValueError("give texts as arguments or with --file, not both")
        read = _decoded(options.file.read_bytes(), str(options.file))
    elif options.text and options.text != ["-"]:
        if options.lines:
            raise ValueError("--lines is for --file and standard input; texts in the arguments are one each")
        return [_decoded(os.fsencode(text), "an argument") for text in options.text]
    else:
        read = _decoded(sys.stdin.buffer.read(), "standard input")
    read = read.removesuffix("\n")
    # Line feeds alone end a line: str.splitlines would cut at form feeds and Unicode separators too.
    return [line.removesuffix("\r") for line in read.split("\n")] if options.lines else [read]


def _decoded(data: bytes, source: str) -> str:
    """As bytes until here, so that line ends come through unchanged."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not UTF-8 text: {error.reason} at byte {error.start}") from error


def load_model(options: argparse.Namespace, **more: Any) -> tuple[AnyOrderForCausalLM, PreTrainedTokenizerBase]:
    """The converted model and its tokenizer; `more` goes to `sources.load`."""
    import torch

    from anyorder.loading import load

    if getattr(options, "int8", False):
        more["quantization_config"] = _int8()
    dtype: torch.dtype = getattr(torch, options.dtype)
    device = torch.device(options.device)
    model, tokenizer = load(options.model, recipe=getattr(options, "recipe", None), dtype=dtype, **more)
    return model.to(device), tokenizer


def _int8() -> TorchAoConfig:
    try:
        from torchao.quantization import Int8WeightOnlyConfig
    except ImportError as error:
        raise ValueError("--int8 needs torchao: pip install 'anyorder[int8]'") from error
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def progress(texts: list[str]) -> Iterator[str]:
    """The texts, with a progress bar where someone can see it."""
    from tqdm import tqdm

    yield from tqdm(texts, unit="text", file=sys.stderr, disable=len(texts) < 2 or not sys.stderr.isatty())


def print_json(record: dict[str, Any]) -> None:
    """One record on one line, at once."""
    print(json.dumps(record, ensure_ascii=False), flush=True)
