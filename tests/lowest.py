"""Write a constraints file with the lowest versions that pyproject.toml allows: `python tests/lowest.py FILE`."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path


def main() -> None:
    """Every `name>=version` of the dependencies and of all extras, as `name==version`."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    lowest = {}
    for requirement in (one for group in groups for one in group):
        match = re.fullmatch(r"([\w-]+)(?:\[[^]]*\])?>=([\w.]+)", requirement)
        if match is None:
            raise SystemExit(f"{requirement!r} has no lowest version: write it as NAME>=VERSION")
        lowest[match[1]] = match[2]
    file = Path(sys.argv[1])
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{name}=={version}\n" for name, version in sorted(lowest.items())))


if __name__ == "__main__":
    main()
