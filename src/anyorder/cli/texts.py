"""Texts in, one result for each out: where texts come from, and what happens to those that cannot be used.

Each text is a case of its own. What is wrong with one is told under its number, and the others go on; the exit code is
2 at the end. An empty line is passed through. So with `--lines` every line in gives one result out, in order.

Knows no models: a command says how a text is checked before a model is loaded, and how it is answered. Texts in files
of tables, on a cluster, are the business of `on_ray`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from anyorder.cli.options import decoded, print_json, typed
from anyorder.cli.work import Result, Work


def add_texts(parser: argparse.ArgumentParser, help_text: str) -> None:
    """Where texts come from."""
    parser.add_argument("text", nargs="*", help=f"{help_text}; without it, or for a lone -, standard input")
    parser.add_argument("--file", metavar="PATH", help="read one text from a file; with --ray as many as it has rows")
    parser.add_argument(
        "--lines", action="store_true",
        help="with a file or standard input: one text a line, one result each. An empty line gives an empty one; so "
        "does a line that cannot be used, which is told (with --json: a record with an error) and ends in exit code 2",
    )  # fmt: skip
    parser.add_argument(
        "--ray", nargs="?", const="", metavar="OPTION=VALUE,...",
        help="work on a Ray cluster: --file is a Parquet or JSON Lines file, or a directory of such, --out gets the "
        "results; once more goes on where it was stopped. Options: count (of workers), cpus, slots, context, rows, "
        "column, for example count=8,slots=32,column=prompt",
    )  # fmt: skip
    parser.add_argument("--out", metavar="DIRECTORY", help="with --ray: where results go, as Parquet")


def read_texts(options: argparse.Namespace) -> list[str]:
    """The texts that the options name, as they are: line ends and all."""
    if options.file is not None:
        if options.text:
            raise ValueError("give texts as arguments or with --file, not both")
        read = decoded(Path(options.file).read_bytes(), options.file)
    elif options.text and options.text != ["-"]:
        if options.lines:
            raise ValueError("--lines is for --file and standard input; texts in the arguments are one each")
        return [typed(text, "an argument") for text in options.text]
    else:
        read = decoded(sys.stdin.buffer.read(), "standard input")
    read = read.removesuffix("\n")
    # Line feeds alone end a line: str.splitlines would cut at form feeds and Unicode separators too.
    return [line.removesuffix("\r") for line in read.split("\n")] if options.lines else [read]


def answer_each(
    options: argparse.Namespace,
    check: Callable[[str], object],
    begin: Callable[[], Work],
    check_all: Callable[[argparse.Namespace, list[str]], None] | None = None,
) -> int:
    """Print one result for each text that the options name, and return the exit code.

    Args:
        options: of the command.
        check: raises ValueError for a text that cannot be used; needs no model.
        begin: loads the model. Not called if there is nothing for it to do.
        check_all: raises ValueError for texts that do not go with the options.

    Raises:
        ValueError: if the only text cannot be used.
    """
    if options.ray is not None:
        from anyorder.cli.on_ray import answer_files

        return answer_files(options, check, begin)
    if options.out is not None:
        raise ValueError("--out is for --ray; other results go to standard output")
    texts = read_texts(options)
    if check_all is not None:
        check_all(options, texts)
    errors = {number: error for number, text in enumerate(texts) if (error := _error(check, text, options.lines))}
    if errors and len(texts) == 1:
        raise errors[0]
    work: Work | None = None
    for number, text in enumerate(_progress(texts)):
        result, error = Result("", {"text": text}), errors.get(number)
        if error is None and not _passed_through(text, options.lines):
            work = begin() if work is None else work
            try:
                result = work.answer(number, text)
            except ValueError as failure:
                if len(texts) == 1:
                    raise
                error = failure
        if error is not None:
            errors[number] = error
            _tell(options, number, len(texts), error)
            result = Result("", {"text": text, "error": _one_line(error)})
        if options.json:
            print_json(result.record)
        elif error is None or options.lines:
            print(result.shown, flush=True)
        if result.trace is not None:  # behind the text, so that a file that cannot be written loses none
            result.trace.save(options.trace)
    return 2 if errors else 0


def _passed_through(text: str, lines: bool) -> bool:
    return lines and not text


def _error(check: Callable[[str], object], text: str, lines: bool) -> ValueError | None:
    if _passed_through(text, lines):
        return None
    try:
        check(text)
    except ValueError as error:
        return error
    return None


def _tell(options: argparse.Namespace, number: int, count: int, error: ValueError) -> None:
    where = f"line {number + 1}" if options.lines else f"text {number + 1} of {count}"
    print(f"anyorder {options.command}: error: {where}: {_one_line(error)}", file=sys.stderr)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _progress(texts: list[str]) -> Iterator[str]:
    """The texts, with a progress bar where someone can see it."""
    from tqdm import tqdm

    yield from tqdm(texts, unit="text", file=sys.stderr, disable=len(texts) < 2 or not sys.stderr.isatty())
