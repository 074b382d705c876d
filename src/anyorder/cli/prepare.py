"""`anyorder prepare`."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from anyorder.cli.model import add_device, load_model
from anyorder.cli.options import add_command, print_json
from anyorder.hub.resolve import DEFAULT_MODEL


def add(subparsers: Any) -> None:
    """The command's options."""
    parser = add_command(
        subparsers,
        "prepare",
        _run,
        "make a model ready for a fast engine, once",
        "anyorder prepare smollm2-135m-anyorder --weights int8",
        more="Later runs of the same model in the same --dtype find what was made: see ANYORDER_CACHE.",
    )
    parser.add_argument(
        "model", nargs="?", default=DEFAULT_MODEL,
        help=f"built-in name, directory, GGUF file or hub id; default: {DEFAULT_MODEL}",
    )  # fmt: skip
    parser.add_argument("--engine", default="openvino", metavar="NAME", help="openvino, the default and the only one")
    parser.add_argument(
        "--weights", default="int8", metavar="DTYPE", help="int8, bfloat16, float32 or int4; default: int8"
    )
    parser.add_argument("--overwrite", action="store_true", help="make it anew even if it is there")
    add_device(parser)


def _run(options: argparse.Namespace) -> None:
    from anyorder.runtime.engines import check_engine, check_installed

    check_engine(options.engine, options.weights)
    if options.engine != "openvino":
        raise ValueError(f"--engine {options.engine!r} needs no preparing: choose openvino")
    if options.device != "cpu":
        raise ValueError(f"--device {options.device!r}: openvino is for the CPU")
    check_installed()
    from tqdm import tqdm

    from anyorder.runtime.openvino.prepare import STEPS, prepare

    model, _ = load_model(options)
    with tqdm(total=len(STEPS), disable=not sys.stderr.isatty(), bar_format="{desc}: {bar} {elapsed}") as bar:

        def report(step: str) -> None:
            bar.n = STEPS.index(step)
            bar.set_description_str(step)

        folder = prepare(model, options.weights, report, options.overwrite)
        bar.n = len(STEPS)
        bar.set_description_str("prepared")
    size = sum(file.stat().st_size for file in folder.iterdir())
    if options.json:
        print_json({"folder": str(folder), "weights": options.weights, "bytes": size})
    else:
        print(f"{folder}: {options.model} with weights in {options.weights}, {size / 1e6:.0f} MB")
