"""`anyorder bench`: see `bench.run`."""

from __future__ import annotations

import argparse
from typing import Any

from anyorder.bench import run as bench
from anyorder.cli.model import add_model, load_model
from anyorder.cli.options import add_command, check_directory_to_write, positive


def add(subparsers: Any) -> None:
    """The command's options."""
    parser = add_command(
        subparsers,
        "bench",
        _run,
        "time decoders against the base model's own, quality beside speed",
        "anyorder bench my-figures --dtype bfloat16 --policies groupwise:size=4 speculative --batch-size 1 8",
    )
    bench.add_options(parser, positive)
    add_model(parser)


def _run(options: argparse.Namespace) -> None:
    check_directory_to_write("output", options.output)
    bench.run(options, load_model)
