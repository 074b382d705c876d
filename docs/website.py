"""Before and after zensical: collect the pages where their links hold, and look at what was built.

Pages stand beside what they describe (README.md, docs/, recipes/, the card of the shipped adapter) and link to each
other there. `collect` copies them with their places, so that every link is the same on the site. `check` says which
page would load something from elsewhere, since the site is to be read without a network, and which names a file that
is not there; zensical itself looks at links between pages, and at anchors.

    python docs/website.py collect build/pages
    python docs/website.py check build/site
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).parent.parent
PLACES = ("*.md", "docs/**/*", "recipes/**/*", "src/anyorder/shipped/**/*.md", "src/anyorder/shipped/**/*.png")
NAMED = re.compile(r"<[^>]*?\s(?:src|href)=[\"']?([^\"'\s>]+)")
LOADED = re.compile(r"<(?:script|link|img|iframe)\b[^>]*?\b(?:src|href)=[\"']?((?:https?:)?//[^\"'\s>]+)")


def collect(target: Path) -> None:
    """Copy all pages, and the files beside them."""
    shutil.rmtree(target, ignore_errors=True)
    for file in sorted({file for place in PLACES for file in ROOT.glob(place) if file.is_file()}):
        copy = target / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)


def check(site: Path) -> list[str]:
    """What pages load from elsewhere, and which files they name that are not there."""
    pages = sorted(page for page in site.rglob("*.html") if page.name != "404.html")
    if not pages:
        raise SystemExit(f"no site in {site}")
    problems = []
    for page in pages:
        text = page.read_text(encoding="utf-8")
        problems += [f"{page}: loads {address}" for address in LOADED.findall(text)]
        for link in NAMED.findall(text):
            file, is_elsewhere = unquote(re.split("[#?]", link)[0]), re.match(r"[a-z]+:|//", link)
            if file and not is_elsewhere and not (page.parent / file).is_file():
                problems.append(f"{page}: {link} is not there")
    return problems


if __name__ == "__main__":
    command, directory = sys.argv[1], Path(sys.argv[2])
    if command == "collect":
        collect(directory)
    elif problems := check(directory):
        raise SystemExit("\n".join(problems))
