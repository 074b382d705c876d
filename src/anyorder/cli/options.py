"""Options that commands share, and what they mean once a command runs.

Reading the arguments imports nothing heavy: what a value means to the library is found out when the command runs, and
still before a model is loaded.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anyorder.decoding.policies import Policy
    from anyorder.infill.lengths import Length
    from anyorder.runtime.runner import ModelRunner

DRAWING = ("temperature", "top_k", "top_p", "min_p")


def add_command(
    subparsers: Any, name: str, run: Any, help_text: str, *examples: str, more: str = ""
) -> argparse.ArgumentParser:
    """One command, with the options that every command has.

    Args:
        subparsers: of the parser of all commands.
        name: of the command.
        run: is called with the options; returns an exit code, or None for 0.
        help_text: what it does, in half a sentence.
        examples: whole command lines.
        more: sentences behind the help text, on the command's own page.
    """
    lines = "\n".join(f"example: {example}" for example in examples)
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name,
        help=help_text,
        description=f"{help_text[0].upper()}{help_text[1:]}. {more}".strip(),
        epilog=lines,
        formatter_class=_Page,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="print one JSON object a result")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error, and log more")
    return parser


class _Page(argparse.HelpFormatter):
    """Wraps all text but the examples, which are to be copied."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith("example: ") else super()._fill_text(text, width, indent)


# ---------------------------------------------------------------------- orders and policies


def add_order(parser: argparse.ArgumentParser) -> None:
    """An order of prediction."""
    parser.add_argument("--group-size", type=positive, default=1, metavar="N", help="tokens a step; default: 1")
    parser.add_argument(
        "--order", choices=("left_to_right", "random"), default="left_to_right", help="default: left_to_right"
    )


def add_policy(parser: argparse.ArgumentParser) -> None:
    """Which positions each step commits."""
    parser.add_argument(
        "--policy", metavar="NAME[:OPTION=VALUE,...]",
        help="groupwise, dynamic (criterion, step_size, threshold, entropy_budget, spacing, window, "
        "reencode, max_revisions) or speculative "
        "(draft, draft_length), for example dynamic:criterion=entropy,step_size=4",
    )  # fmt: skip


def policy_of(options: argparse.Namespace) -> Policy | None:
    """The policy that --policy names, if any.

    Raises:
        ValueError: if there is no such policy or option, or another option says what a step commits.
    """
    if options.policy is None:
        return None
    if options.group_size != 1:
        raise ValueError(f"--group-size {options.group_size} and --policy both say what a step commits: choose one")
    from anyorder.decoding import policies

    return policies.parse(options.policy)


# ---------------------------------------------------------------------- sampling


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """How tokens are drawn, and by what code."""
    parser.add_argument("--sample", action="store_true", help="draw tokens instead of taking the most likely")
    parser.add_argument(
        "--temperature", type=float, metavar="T", help="implies --sample; 0 takes the most likely tokens"
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="implies --sample")
    parser.add_argument("--top-p", type=float, metavar="P", help="implies --sample")
    parser.add_argument("--min-p", type=float, metavar="P", help="implies --sample")
    parser.add_argument("--repetition-penalty", type=float, metavar="R")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    parser.add_argument("--compile", action="store_true", help="what --engine openvino was called; will go")
    add_engine(parser)


def add_engine(parser: argparse.ArgumentParser) -> None:
    """What runs steps."""
    parser.add_argument(
        "--engine", default="auto", metavar="NAME",
        help="auto, eager, openvino or cuda_graphs; default: auto, which is openvino once the model is prepared for it",
    )  # fmt: skip
    parser.add_argument("--weights", metavar="DTYPE", help="of openvino: int8, bfloat16, float32, int4; default: int8")


def drawing_of(options: argparse.Namespace) -> dict[str, Any]:
    """How tokens are drawn, as options of `generate`. Temperature 0 takes the most likely, whatever else is said.

    Raises:
        ValueError: if a value cannot be meant.
    """
    given = {name: getattr(options, name) for name in DRAWING if getattr(options, name) is not None}
    do_sample = bool(given) or options.sample
    if given or options.repetition_penalty is not None:
        from anyorder.decoding.sampling import Sampler

        Sampler(do_sample, **given, repetition_penalty=options.repetition_penalty)
    return given | {"do_sample": do_sample, "repetition_penalty": options.repetition_penalty}


def sampling_options(options: argparse.Namespace, number: int, runner: ModelRunner | None = None) -> dict[str, Any]:
    """Options of `generate`; text number n draws from seed + n, whatever the other texts are. A runner executes."""
    import torch

    generator = torch.Generator().manual_seed(options.seed + number)
    executed = {"compile": options.compile} if runner is None else {"runner": runner}
    return {**drawing_of(options), "generator": generator, **executed}


# ---------------------------------------------------------------------- chat


def add_answer_to(parser: argparse.ArgumentParser) -> None:
    """What a text answers."""
    parser.add_argument(
        "--chat", metavar="MESSAGE",
        help="the text is the assistant's answer to this message of the user's, by the tokenizer's chat template",
    )  # fmt: skip


def messages_of(options: argparse.Namespace) -> list[dict[str, str]] | None:
    """The conversation that --chat begins, if it was given."""
    return None if options.chat is None else asked(typed(options.chat, "--chat"))


def asked(message: str) -> list[dict[str, str]]:
    """A conversation of one message, as chat templates take it.

    Raises:
        ValueError: if the message is empty.
    """
    if not message.strip():
        raise ValueError("the message is empty: --chat answers one")
    return [{"role": "user", "content": message}]


# ---------------------------------------------------------------------- text


def typed(text: str, source: str) -> str:
    """An argument as text; ValueError if what was typed is not UTF-8, which Python hands on as lone surrogates."""
    try:
        return decoded(os.fsencode(text), source)
    except UnicodeEncodeError as error:
        raise ValueError(f"{source} is not UTF-8 text: {error.reason} at character {error.start}") from error


def decoded(data: bytes, source: str) -> str:
    """What was read, as text; as bytes until here, so that line ends come through unchanged.

    Raises:
        ValueError: if it is not UTF-8.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not UTF-8 text: {error.reason} at byte {error.start}") from error


# ---------------------------------------------------------------------- types


def positive(text: str) -> int:
    """A whole number from 1 up, as an argparse type."""
    return _at_least(1, text)


def whole(text: str) -> int:
    """A whole number from 0 up, as an argparse type."""
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} up")
    return value


def length(text: str) -> Length:
    """Tokens of a blank, as an argparse type."""
    lo, dash, hi = text.partition("-")
    return "auto" if text == "auto" else (positive(lo), positive(hi)) if dash else positive(text)


# ---------------------------------------------------------------------- files


def check_file_to_write(name: str, file: Path) -> None:
    """Raise ValueError if a file could not be written, before anything is paid for what is to be in it."""
    if file.is_dir():
        raise ValueError(f"{name} {file} is a directory: name a file")
    if not file.parent.is_dir():
        raise ValueError(f"{name} {file}: there is no directory {file.parent}")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise ValueError(f"{name} {file} may not be written: choose another place")


def check_directory_to_write(name: str, directory: Path) -> None:
    """Raise ValueError if a directory could not be made, or nothing written in it."""
    nearest = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise ValueError(f"{name} {directory}: {nearest} is a file; choose a directory")
    if not os.access(nearest, os.W_OK):
        raise ValueError(f"{name} {directory}: {nearest} may not be written in; choose another place")


def print_json(record: dict[str, Any]) -> None:
    """One record on one line, at once."""
    print(json.dumps(record, ensure_ascii=False), flush=True)
