"""The command line: `anyorder convert | generate | infill | score | show`.

Texts come from arguments, from `--file` or from standard input. Results go to standard output, everything else to
standard error. An error is one line and exit code 2; `--debug` shows the traceback.

Heavy imports live inside functions, so that `--help` and mistakes in the arguments answer at once.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from anyorder import DEFAULT_MODEL, __version__

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from anyorder.modeling import AnyOrderForCausalLM

CHECKED_TEXT = "A language model predicts the next word. This one predicts any word, and still knows what it knew."


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for an error, 130 when interrupted."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if not hasattr(options, "run"):
        parser.print_help()
        return 2
    _quieten(options)
    try:
        options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader (head, less) has gone: no error of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if options.debug:
            traceback.print_exc()
            return 2
        text = " ".join(str(error).split())
        name = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
        print(f"anyorder {options.command}: error: {name}{text or type(error).__name__}", file=sys.stderr)
        return 2
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(
        prog="anyorder",
        description="Any-order language models out of pretrained left-to-right ones.",
        epilog='example: anyorder infill "The cat ___ on the mat." --length 2',
    )
    parser.add_argument("--version", action="version", version=f"anyorder {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", parser_class=_Parser)
    for add in (_add_convert, _add_generate, _add_infill, _add_score, _add_show):
        add(commands)
    return parser


# ---------------------------------------------------------------------- convert


def _add_convert(commands: Any) -> None:
    parser = _command(
        commands,
        "convert",
        _convert,
        "convert a pretrained model and save it",
        "anyorder convert smollm2-135m my-model",
    )
    parser.add_argument("source", help="built-in name, directory, GGUF file or hub id of a left-to-right model")
    parser.add_argument("output", type=Path, help="directory to write")
    parser.add_argument("--recipe", choices=("exact", "paper"), help="default: exact, or what it has")
    _add_device(parser)
    parser.add_argument("--overwrite", action="store_true", help="write into a directory that is not empty")


def _convert(options: argparse.Namespace) -> None:
    import torch

    from anyorder.support import left_to_right_difference

    output: Path = options.output
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; choose a directory")
    if output.exists() and any(output.iterdir()) and not options.overwrite:
        raise ValueError(f"{output} exists and is not empty; choose another directory, or add --overwrite")
    options.model = options.source
    model, tokenizer = _load(options)
    error = None
    if model.recipe == "exact":
        ids = torch.tensor([tokenizer.encode(CHECKED_TEXT, add_special_tokens=False)[:32]])
        error = left_to_right_difference(model, ids.to(model.device))
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    report = {"output": str(output), "recipe": model.recipe, "parameters": sum(p.numel() for p in model.parameters())}
    if error is not None:
        report["greatest_logit_difference"] = error
    if options.json:
        _print_json(report)
        return
    print(f"{options.source} -> {output}: {report['parameters']:,} parameters, recipe {model.recipe}")
    if error is not None:
        print(f"greatest difference of its left-to-right logits from the base model's: {error:.2g}")


# ---------------------------------------------------------------------- generate


def _add_generate(commands: Any) -> None:
    example = 'anyorder generate "Once upon a time" --max-new-tokens 40 --temperature 0.8 --seed 1'
    parser = _command(commands, "generate", _generate, "continue a text", example)
    _add_texts(parser, "text to continue (an empty one starts from the start token)")
    _add_model(parser)
    parser.add_argument("--max-new-tokens", type=_positive, default=64, metavar="N", help="default: 64")
    parser.add_argument("--group-size", type=_positive, default=1, metavar="N", help="tokens a forward; default: 1")
    _add_sampling(parser)


def _generate(options: argparse.Namespace) -> None:
    import torch

    from anyorder import policies
    from anyorder.pieces import Pieces

    texts = _texts(options)
    model, tokenizer = _load(options)
    pieces = Pieces(tokenizer)
    for number, text in enumerate(_progress(texts)):
        ids = tokenizer.encode(text) or [pieces.start_token()]
        output = model.generate(
            torch.tensor([ids]),
            max_new_tokens=options.max_new_tokens,
            policy=policies.groupwise(options.group_size),
            return_dict_in_generate=True,
            **_sampling(options, number),
        )
        assert not isinstance(output, torch.Tensor)
        new = [token for token in output.sequences[0, len(ids) :].tolist() if token not in tokenizer.all_special_ids]
        continuation = pieces.decode(new, at_start=not text)
        if options.json:
            log_prob = float(output.log_probs.sum())
            _print_json({"text": text + continuation, "continuation": continuation, "log_prob": log_prob,
                         "tokens": output.sequences.shape[1] - len(ids), "forwards": output.forwards})  # fmt: skip
        else:
            print(text + continuation)


# ---------------------------------------------------------------------- infill


def _add_infill(commands: Any) -> None:
    example = 'anyorder infill "The cat ___ on the mat. It was ___." --length 2 3 --json'
    parser = _command(commands, "infill", _infill, "fill the blanks of a text", example)
    _add_texts(parser, "text with blanks")
    _add_model(parser)
    parser.add_argument("--blank", default="___", metavar="MARK", help="what marks a blank; default: ___")
    parser.add_argument(
        "--length", type=_positive, nargs="+", default=[8], metavar="N",
        help="tokens of every blank, or one number for each; default: 8",
    )  # fmt: skip
    _add_order(parser)
    parser.add_argument("--special-tokens", action="store_true", help="allow special tokens inside a blank")
    _add_sampling(parser)


def _infill(options: argparse.Namespace) -> None:
    from anyorder.template import Template

    texts = _texts(options)
    for number, text in enumerate(texts, 1):  # a mistake is told before the model is loaded
        try:
            Template.parse(text, options.blank)
        except ValueError as error:
            raise ValueError(f"{error} (text {number} of {len(texts)})" if len(texts) > 1 else error) from error
    from anyorder.infilling import Infiller

    model, tokenizer = _load(options)
    infiller = Infiller(model, tokenizer)
    length = options.length[0] if len(options.length) == 1 else options.length
    for number, text in enumerate(_progress(texts)):
        filled = infiller(
            text, blank=options.blank, length=length, group_size=options.group_size, order=options.order,
            special_tokens=options.special_tokens, **_sampling(options, number),
        )  # fmt: skip
        if options.json:
            spans = [vars(span) for span in filled.spans]
            _print_json({"text": filled.text, "spans": spans, "log_prob": filled.log_prob, "forwards": filled.forwards})
        else:
            print(filled.text)


# ---------------------------------------------------------------------- score


def _add_score(commands: Any) -> None:
    example = 'anyorder score "The cat sat on the mat." --order random --group-size 2 --seed 1'
    parser = _command(commands, "score", _score, "exact log-likelihood of a text, in any order", example)
    _add_texts(parser, "text to score")
    _add_model(parser)
    _add_order(parser)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random order; default: 0")


def _score(options: argparse.Namespace) -> None:
    import torch

    from anyorder.factorization import Factorization
    from anyorder.pieces import Pieces

    texts = _texts(options)
    model, tokenizer = _load(options)
    pieces = Pieces(tokenizer)
    for text in _progress(texts):
        ids = torch.tensor([[pieces.start_token(), *pieces.encode(text, at_start=True)]])
        if ids.shape[1] == 1:
            raise ValueError("the text is empty: nothing to score")
        generator = torch.Generator().manual_seed(options.seed)
        order = Factorization.left_to_right(ids.shape[1]).regroup(options.group_size, options.order, generator)
        log_prob = float(model.log_likelihood(ids, order).sum())
        tokens, size = ids.shape[1] - 1, len(text.encode())
        report = {"log_prob": log_prob, "tokens": tokens, "nats_per_token": -log_prob / tokens,
                  "bits_per_byte": -log_prob / size / math.log(2), "order": options.order,
                  "group_size": options.group_size}  # fmt: skip
        if options.json:
            _print_json({"text": text, **report})
        else:
            print(f"{log_prob:.3f} nats, {tokens} tokens, {report['nats_per_token']:.3f} nats a token, "
                  f"{report['bits_per_byte']:.3f} bits a byte")  # fmt: skip


# ---------------------------------------------------------------------- show


def _add_show(commands: Any) -> None:
    example = 'anyorder show "The cat ___ ___ the mat" --group-size 2'
    parser = _command(commands, "show", _show, "draw a factorization and which rows read what; loads no model", example)
    parser.add_argument("text", help="words; each stands for one token. With blanks (___), only those are predicted")
    _add_order(parser)
    parser.add_argument("--given", type=_positive, default=1, metavar="N", help="leading words given, without blanks")
    parser.add_argument("--recipe", choices=("exact", "paper"), default="exact", help="default: exact")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random order; default: 0")


def _show(options: argparse.Namespace) -> None:
    import torch

    from anyorder.factorization import Factorization
    from anyorder.layout import describe, lay_out

    words = options.text.split()
    if not words:
        raise ValueError("the text is empty: give at least one word")
    blank = torch.tensor([word == "___" for word in words])
    generator = torch.Generator().manual_seed(options.seed)
    if blank.any():
        order = Factorization.infill(blank, options.group_size, options.order, generator)
        names = [
            f"?{i}" if is_blank else word for i, (word, is_blank) in enumerate(zip(words, blank.tolist(), strict=True))
        ]
    else:
        order = Factorization.left_to_right(len(words), given=options.given)
        order, names = order.regroup(options.group_size, options.order, generator), words
    layout = lay_out(torch.zeros(1, len(words), dtype=torch.int64), order, options.recipe)
    if options.json:
        rows = {name: getattr(layout.rows, name)[0].tolist() for name in ("positions", "lo", "hi")}
        _print_json({"group_ids": order.group_ids[0].tolist(), "content_rows": layout.rows.content_count, **rows})
    else:
        print(order.describe([names]), describe(layout, [names]), sep="\n\n")


# ---------------------------------------------------------------------- shared pieces


def _command(commands: Any, name: str, run: Any, help_text: str, example: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=help_text, description=help_text[0].upper() + help_text[1:] + ".", epilog=f"example: {example}"
    )
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="print one JSON object a result")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error, and log more")
    return parser


def _add_texts(parser: argparse.ArgumentParser, help_text: str) -> None:
    parser.add_argument("text", nargs="*", help=f"{help_text}; without it, or for a lone -, standard input")
    parser.add_argument("--file", type=Path, metavar="PATH", help="read one text from a file")
    parser.add_argument("--lines", action="store_true", help="with a file or standard input: one text a line")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, metavar="NAME",
        help=f"built-in name, directory, GGUF file or hub id; default: {DEFAULT_MODEL}",
    )  # fmt: skip
    _add_device(parser)


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="default: float32"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps, ...; default: cpu")


def _add_order(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--group-size", type=_positive, default=1, metavar="N", help="tokens a step; default: 1")
    parser.add_argument(
        "--order", choices=("left_to_right", "random"), default="left_to_right", help="default: left_to_right"
    )


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sample", action="store_true", help="draw tokens instead of taking the most likely")
    parser.add_argument("--temperature", type=float, metavar="T", help="implies --sample")
    parser.add_argument("--top-k", type=int, metavar="K", help="implies --sample")
    parser.add_argument("--top-p", type=float, metavar="P", help="implies --sample")
    parser.add_argument("--min-p", type=float, metavar="P", help="implies --sample")
    parser.add_argument("--repetition-penalty", type=float, metavar="R")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")


def _sampling(options: argparse.Namespace, number: int) -> dict[str, Any]:
    """Options of `generate`; text number n draws from seed + n, whatever the other texts are."""
    import torch

    chosen = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    do_sample = options.sample or bool(chosen)
    generator = torch.Generator().manual_seed(options.seed + number)
    return {**chosen, "do_sample": do_sample, "generator": generator, "repetition_penalty": options.repetition_penalty}


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up")
    return value


def _texts(options: argparse.Namespace) -> list[str]:
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


def _load(options: argparse.Namespace) -> tuple[AnyOrderForCausalLM, PreTrainedTokenizerBase]:
    import torch

    from anyorder.sources import load

    dtype: torch.dtype = getattr(torch, options.dtype)
    device = torch.device(options.device)
    model, tokenizer = load(options.model, recipe=getattr(options, "recipe", None), dtype=dtype)
    return model.to(device), tokenizer


def _progress(texts: list[str]) -> Iterator[str]:
    from tqdm import tqdm

    yield from tqdm(texts, unit="text", file=sys.stderr, disable=len(texts) < 2 or not sys.stderr.isatty())


def _print_json(record: dict[str, Any]) -> None:
    print(json.dumps(record, ensure_ascii=False), flush=True)


def _quieten(options: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.DEBUG if options.debug else logging.WARNING, format="%(name)s: %(message)s")
    logging.getLogger("anyorder").setLevel(logging.DEBUG if options.debug else logging.INFO)
    if not options.debug:
        warnings.simplefilter("ignore")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
