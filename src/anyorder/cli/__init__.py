"""The command line: `anyorder convert | adapt | fit-lengths | generate | infill | score | eval | ...`; see `_COMMANDS`.

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
from anyorder.cli import adapt, bench, convert, eval, fit_lengths, generate, infill, plot, prepare, score, serve, show

_COMMANDS = (convert, adapt, fit_lengths, prepare, generate, infill, score, eval, bench, serve, show, plot)
"""Modules with `add(subparsers)`: one a command, in the order of the help page."""


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
        code = options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader (head, less) has gone: no error of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
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
    return code or 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(
        prog="anyorder",
        description="Any-order language models out of pretrained left-to-right ones.",
        epilog='example: anyorder infill "The cat ___ on the mat." --length 2',
    )
    parser.add_argument("--version", action="version", version=f"anyorder {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="command", parser_class=_Parser)
    for command in _COMMANDS:
        command.add(subparsers)
    return parser


def _quieten(options: argparse.Namespace) -> None:
    """Own messages on standard error; of libraries only errors, and bars only where someone can see them."""
    own = logging.getLogger("anyorder")
    own.setLevel(logging.DEBUG if options.debug else logging.INFO)
    if options.debug:
        logging.basicConfig(level=logging.DEBUG, format="%(name)s: %(message)s")
        return
    if (
        not logging.getLogger().handlers and not own.handlers
    ):  # a handler on the root would say what libraries say twice
        own.addHandler(_handler())
    warnings.simplefilter("ignore")
    for name in ("HF_HUB_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    for name in ("torchao", "torch.utils._pytree"):  # noisy where PEFT imports them
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _handler() -> logging.Handler:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    return handler
