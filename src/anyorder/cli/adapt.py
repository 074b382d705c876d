"""`anyorder adapt`: see `training.adapt`."""

from __future__ import annotations

import argparse
from typing import Any

from anyorder.cli.model import add_device, load_model
from anyorder.cli.options import add_command, positive
from anyorder.training import adapt


def add(subparsers: Any) -> None:
    """The command's options."""
    parser = add_command(
        subparsers,
        "adapt",
        _run,
        "train a model on any order; Ctrl-C saves, --resume goes on",
        "anyorder adapt smollm2-135m my-run --train-file stories.jsonl.gz --tokens 500000",
    )
    adapt.add_options(parser, positive)
    add_device(parser)
    parser.set_defaults(dtype="bfloat16")


def _run(options: argparse.Namespace) -> None:
    adapt.run(options, _load)


def _load(options: argparse.Namespace, **more: Any) -> tuple[Any, Any]:
    """The model of the objective and its tokenizer."""
    if options.objective == "masked_diffusion":
        from anyorder.evaluation.baselines.masked_diffusion import MaskedDiffusionLM

        more["model_class"] = MaskedDiffusionLM
    return load_model(options, **more)
