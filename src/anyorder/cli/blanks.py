"""What a blank is on the command line: the same in every command, by `Template.parse`."""

from __future__ import annotations

import argparse

from anyorder.infill.template import BLANK, Template


def add_blank(parser: argparse.ArgumentParser) -> None:
    """What marks a blank."""
    parser.add_argument("--blank", default=BLANK, metavar="MARK", help=f"what marks a blank; default: {BLANK}")


def has_blank(text: str, mark: str) -> bool:
    """Whether a text has a blank; ValueError for a mark that cannot mark one."""
    Template.parse(mark, mark)
    try:
        Template.parse(text, mark)
    except ValueError:
        return False
    return True
