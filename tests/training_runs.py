"""`anyorder adapt` as the tests run it, and what its curves say."""

from __future__ import annotations

import csv

ALL_CHECKPOINTS = ("--training", "save_total_limit=3")
"""What the fixture `trained_run` was begun with beside the options of `adapt` below; --resume needs the same."""


OPTIONS = (
    "--tokens", 30 * 2 * 32, "--length", 32, "--document-length", 32, "--batch-size", 2, "--rank", 4,
    "--learning-rate", "1e-2", "--log-every", 1, "--save-every", 10, "--dtype", "float32", "--warmup-steps", 2,
)  # fmt: skip


def adapt(checkpoint, stories, output, *more):
    from anyorder.cli import main

    return main([*map(str, ("adapt", checkpoint, output, "--train-file", stories, *OPTIONS, *more))])


def curve(output, column="loss"):
    with (output / "curves.csv").open() as file:
        return [float(row[column]) for row in csv.DictReader(file) if row.get(column)]
