"""`anyorder eval`: see `evaluation.run`."""

from __future__ import annotations

import argparse
from typing import Any

from anyorder.cli.model import add_model, load_judge, load_ready
from anyorder.cli.options import add_command, add_engine, positive
from anyorder.evaluation import run as evaluation


def add(subparsers: Any) -> None:
    """The command's options."""
    parser = add_command(
        subparsers,
        "eval",
        _run,
        "evaluate a model on questions, infilling, what it writes and its orders, with intervals",
        "anyorder eval hellaswag stories --data-dir my-data --limit 300 --out my-results",
        "anyorder eval --compare my-results other-results",
    )
    evaluation.add_options(parser, positive)
    add_model(parser)
    add_engine(parser)


def _run(options: argparse.Namespace) -> None:
    evaluation.run(options, load_ready, load_judge)
