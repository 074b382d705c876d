"""`anyorder adapt` as the tests run it, and what its curves say."""

from __future__ import annotations

import csv


def adapt(checkpoint, stories, output, *more):
    from anyorder.cli import main

    return main([
        "adapt", str(checkpoint), str(output), "--train-file", str(stories), "--tokens", str(30 * 2 * 32),
        "--length", "32", "--document-length", "32", "--batch-size", "2", "--rank", "4", "--learning-rate", "1e-2",
        "--log-every", "1", "--save-every", "10", "--dtype", "float32", "--warmup-steps", "2", *map(str, more),
    ])  # fmt: skip


def curve(output, column="loss"):
    with (output / "curves.csv").open() as file:
        return [float(row[column]) for row in csv.DictReader(file) if row.get(column)]
