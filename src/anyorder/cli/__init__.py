"""The command line: `anyorder convert | adapt | generate | infill | score | bench | show | plot`.

Texts come from arguments, from `--file` or from standard input. Results go to standard output, everything else to
standard error. An error is one line and exit code 2; `--debug` shows the traceback.

Heavy imports live inside functions, so that `--help` and mistakes in the arguments answer at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import NoReturn

from anyorder import __version__
from anyorder.cli.commands import (
    add_adapt,
    add_bench,
    add_convert,
    add_generate,
    add_infill,
    add_plot,
    add_score,
    add_show,
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for an error, 130 when interrupted."""
    parser = build_parser()
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(arguments)
    options.as_typed = shlex.join(["anyorder", *arguments])
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
    subparsers = parser.add_subparsers(dest="command", metavar="command", parser_class=_Parser)
    for add in (add_convert, add_adapt, add_generate, add_infill, add_score, add_bench, add_show, add_plot):
        add(subparsers)
    return parser


def _quieten(options: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.DEBUG if options.debug else logging.WARNING, format="%(name)s: %(message)s")
    logging.getLogger("anyorder").setLevel(logging.DEBUG if options.debug else logging.INFO)
    if not options.debug:
        warnings.simplefilter("ignore")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
