"""The project's Markdown pages: where they are, their blocks of code, tables, links and headings."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PLACES = ("*.md", "docs/**/*.md", "recipes/**/*.md", "src/anyorder/shipped/**/*.md")


def pages() -> list[Path]:
    return sorted(page for place in PLACES for page in ROOT.glob(place))


def blocks(text: str, language: str) -> list[str]:
    """Fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def commands(block: str) -> Iterator[list[str]]:
    """The commands of a shell block, one a line or joined by backslashes, without comments."""
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


def prose(text: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def links(text: str) -> list[str]:
    """The targets of links and pictures."""
    return re.findall(r"\]\(([^)\s]+)\)", prose(text))


def anchors(text: str) -> set[str]:
    """What `#...` of a link may name: the headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def rows(text: str) -> list[list[str]]:
    """The cells of every table row, heads included."""
    lines = [line for line in prose(text).splitlines() if line.startswith("|")]
    return [
        [cell.strip() for cell in line.strip().strip("|").split("|")]
        for line in lines
        if not re.fullmatch(r"[|\s:-]+", line)
    ]


def words(text: str) -> str:
    """With single spaces, whatever the line ends, and without emphasis."""
    return " ".join(text.replace("**", "").replace("`", "").split())


def resolve(name: str) -> Any:
    """What a dotted name below the package stands for: a module, or something in one."""
    parts = ["anyorder", *name.split(".")]
    for cut in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return found
    raise AssertionError(name)
