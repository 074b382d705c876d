"""`anyorder plot`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from anyorder.cli.options import add_command, check_file_to_write, print_json


def add(subparsers: Any) -> None:
    """The command's options."""
    parser = add_command(
        subparsers,
        "plot",
        _run,
        "draw in which order a text was filled, or put runs side by side",
        "anyorder plot trace.json order.html",
        "anyorder plot one-evaluation another a-bench a-training runs.md",
    )
    parser.add_argument(
        "input", type=Path, nargs="+",
        help="a file that --trace of generate or infill wrote; or directories that eval, bench and adapt wrote",
    )  # fmt: skip
    parser.add_argument(
        "output", type=Path,
        help="of a trace: a file ending in .html (to play and scrub), .png or .gif; of directories: a file ending in "
        ".md for the tables, figures are written beside it",
    )  # fmt: skip


def _run(options: argparse.Namespace) -> None:
    check_file_to_write("output", options.output)
    directories = [path for path in options.input if path.is_dir()]
    if directories:
        _draw_runs(options, directories)
    else:
        _draw_trace(options)


def _draw_runs(options: argparse.Namespace, directories: list[Path]) -> None:
    others = [str(path) for path in options.input if path not in directories]
    if others:
        raise ValueError(f"{', '.join(others)} is no directory: runs stand beside runs, a trace is drawn by itself")
    if options.output.suffix != ".md":
        raise ValueError(f"{options.output} must end in .md: that is where the tables of runs go, figures beside it")
    from anyorder.bench import side_by_side

    page, *figures = side_by_side.write(directories, options.output)
    if options.json:
        print_json({"output": str(page), "figures": [str(file) for file in figures], "runs": len(directories)})
    else:
        print("written: " + ", ".join(map(str, [page, *figures])))


def _draw_trace(options: argparse.Namespace) -> None:
    if len(options.input) > 1:
        raise ValueError(f"one trace is drawn at a time, got {', '.join(map(str, options.input))}")
    from anyorder.trace.record import Trace
    from anyorder.trace.render import draw

    trace = Trace.load(options.input[0])
    draw(trace, options.output)
    if options.json:
        print_json({"output": str(options.output), "steps": trace.steps, "tokens": len(trace.filled)})
    else:
        print(f"{options.output}: {len(trace.filled)} tokens in {trace.steps} steps")
