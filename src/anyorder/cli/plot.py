"""`anyorder plot`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from anyorder.cli.options import add_command, check_file_to_write, print_json


def add(subparsers: Any) -> None:
    """The command's options."""
    parser = add_command(
        subparsers, "plot", _run, "draw in which order a text was filled", "anyorder plot trace.json order.html"
    )
    parser.add_argument("trace", type=Path, help="a file that --trace of generate or infill wrote")
    parser.add_argument("output", type=Path, help="a file ending in .html (to play and scrub), .png or .gif")


def _run(options: argparse.Namespace) -> None:
    check_file_to_write("output", options.output)
    from anyorder.trace.record import Trace
    from anyorder.trace.render import draw

    trace = Trace.load(options.trace)
    draw(trace, options.output)
    if options.json:
        print_json({"output": str(options.output), "steps": trace.steps, "tokens": len(trace.filled)})
    else:
        print(f"{options.output}: {len(trace.filled)} tokens in {trace.steps} steps")
