"""Python source to train on, out of packages that are installed here: functions, classes and what stands between them.

    python benchmarks/python_sources.py --output python.jsonl --characters 3000000

Only packages whose own metadata names a permissive licence are read (MIT, BSD, Apache, PSF, ISC); which they are, and
how much comes from each, is printed. Pieces are whole definitions where they fit, cut at blank lines where they do not;
files that are tests, generated or vendored are left out. Packages take turns, so that none fills the whole.

With --blank-lines each piece names lines of its own that training may leave out (`anyorder adapt`, own_blanks): half
from behind their indentation on, as an editor's cursor stands, a quarter whole, a quarter from anywhere in the line.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import json
import random
import re
from collections.abc import Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path

PERMISSIVE = re.compile(r"\b(MIT|BSD|Apache|PSF|Python Software Foundation|ISC)\b", re.IGNORECASE)
OTHER = re.compile(r"\b(GPL|LGPL|MPL|AGPL|Proprietary|NVIDIA)\b", re.IGNORECASE)
LEFT_OUT = re.compile(r"(^|/)(tests?|testing|_?vendor|_vendored|generated|conftest|lextab|yacctab)(/|_|\.py|$)")
CHARACTERS = (80, 1500)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="file to write, .jsonl of {text, package}")
    parser.add_argument("--characters", type=int, default=3_000_000, help="in all; default: 3000000")
    parser.add_argument("--blank-lines", type=int, default=0, help="of each piece, at most; default: 0")
    options = parser.parse_args()
    found = {name: pieces(files) for name, files in sorted(packages().items())}
    taken: dict[str, int] = {}
    with options.output.open("w") as out:
        for name, piece in in_turn(found):
            if sum(taken.values()) >= options.characters:
                break
            record: dict[str, object] = {"text": piece, "package": name}
            if options.blank_lines:
                record["blanks"] = blank_lines(piece, options.blank_lines)
            out.write(json.dumps(record) + "\n")
            taken[name] = taken.get(name, 0) + len(piece)
    for name, count in sorted(taken.items(), key=lambda item: -item[1]):
        print(f"{count:9,} {name}")


def blank_lines(text: str, most: int) -> list[tuple[int, int]]:
    """The characters of some lines of a text, none the first, no two of them neighbours; the same for the same text."""
    chooser = random.Random(text)
    starts = [0, *(match.end() for match in re.finditer("\n", text)), len(text) + 1]
    lines = [n for n in range(1, len(starts) - 1) if text[starts[n] : starts[n + 1] - 1].strip()]
    taken: list[int] = []
    for n in chooser.sample(lines, len(lines)):
        if len(taken) < most and not {n - 1, n + 1} & set(taken):
            taken.append(n)
    out = []
    for n in sorted(taken):
        first, end = starts[n], starts[n + 1] - 1
        indented = end - len(text[first:end].lstrip())
        begin = chooser.choice([indented, indented, first, chooser.randrange(indented, end)])
        out.append((begin, end))
    return out


def packages() -> dict[str, list[Path]]:
    """Source files of each package with a permissive licence, as `name version (licence)`."""
    out = {}
    for distribution in distributions():
        licence = licence_of(distribution)
        if not PERMISSIVE.search(licence) or OTHER.search(licence):
            continue
        files = [Path(str(distribution.locate_file(file))) for file in distribution.files or []]
        sources = [
            f for f in files if f.suffix == ".py" and not LEFT_OUT.search(f.as_posix().partition("site-packages/")[2])
        ]
        if sources:
            out[f"{distribution.metadata['Name']} {distribution.version} ({licence})"] = sources
    return out


def licence_of(distribution: Distribution) -> str:
    """What its metadata says, in a few words."""
    named: dict[str, list[str]] = {}
    for field in ("License-Expression", "Classifier", "License"):
        named[field] = list(distribution.metadata.get_all(field) or [])
    said = named["License-Expression"]
    said += [text.rpartition("::")[2].strip() for text in named["Classifier"] if text.startswith("License")]
    said += [text.strip().partition("\n")[0][:40] for text in named["License"]]
    return next((text for text in said if text and text != "OSI Approved"), "")


def pieces(files: list[Path]) -> Iterator[str]:
    """Definitions of a package's files, in an order drawn once and for all."""
    random.Random(0).shuffle(files)
    for file in files:
        try:
            text = file.read_text()
            tree = ast.parse(text)
        except (OSError, UnicodeDecodeError, SyntaxError, ValueError):
            continue
        lines = text.split("\n")
        for node in tree.body:
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
                yield from cut("\n".join(lines[first - 1 : node.end_lineno]))


def cut(text: str) -> Iterator[str]:
    """The text, or parts of it that begin behind blank lines, of CHARACTERS."""
    part = ""
    for block in re.split(r"\n{2,}", text):
        if part and len(part) + len(block) > CHARACTERS[1]:
            if CHARACTERS[0] <= len(part) <= CHARACTERS[1]:
                yield part
            part = ""
        part = f"{part}\n\n{block}" if part else block
    if CHARACTERS[0] <= len(part) <= CHARACTERS[1]:
        yield part


def in_turn(found: dict[str, Iterator[str]]) -> Iterator[tuple[str, str]]:
    """A piece of each package, then the next of each."""
    turns = itertools.zip_longest(*found.values())
    for turn in turns:
        yield from ((name, piece) for name, piece in zip(found, turn, strict=True) if piece is not None)


if __name__ == "__main__":
    main()
