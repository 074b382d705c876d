"""`anyorder fit-lengths`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from anyorder.cli.model import add_device, load_model
from anyorder.cli.options import add_command, positive, print_json


def add(subparsers: Any) -> None:
    """The command's options."""
    parser = add_command(
        subparsers,
        "fit-lengths",
        _run,
        "fit how long a model's blanks are when nobody says, and write it into its config",
        "anyorder fit-lengths my-run --train-file stories.jsonl.gz",
    )
    parser.add_argument("directory", type=Path, help="a converted model; its config.json is written")
    parser.add_argument(
        "--train-file", nargs="+", required=True, metavar="TEXTS",
        help="texts of the kind in which blanks will be: .txt, .jsonl, .json or .parquet, each also as .gz",
    )  # fmt: skip
    parser.add_argument("--blanks", type=positive, default=600, metavar="N", help="blanks to fit on; default: 600")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of where the blanks are; default: 0")
    add_device(parser)
    parser.set_defaults(dtype="bfloat16")


def _run(options: argparse.Namespace) -> None:
    from anyorder.training.length_fitting import fit_lengths, read_config, write_prior
    from anyorder.training.texts import read_records

    read_config(options.directory)  # a mistake is told before anything is paid for
    records = read_records(options.train_file)
    options.model = str(options.directory)
    model, tokenizer = load_model(options)
    found = fit_lengths(model, tokenizer, records, options.blanks, options.seed)
    write_prior(options.directory, found.prior)
    if options.json:
        print_json(found.report())
        return
    print(
        f"{options.directory}: fitted on {found.cases} blanks. A true length has {found.nats_a_length:.2f} nats, at "
        f"even odds {found.nats_of_even_odds:.2f}; lengths are off by {found.mean_absolute_error:.1f} tokens on average"
    )
