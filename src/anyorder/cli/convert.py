"""`anyorder convert`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from anyorder.cli.model import add_device, load_model
from anyorder.cli.options import add_command, check_directory_to_write, print_json

CHECKED_TEXT = "A language model predicts the next word. This one predicts any word, and still knows what it knew."


def add(subparsers: Any) -> None:
    """The command's options."""
    parser = add_command(
        subparsers, "convert", _run, "convert a pretrained model and save it", "anyorder convert smollm2-135m my-model"
    )
    parser.add_argument("source", help="built-in name, directory, GGUF file or hub id of a left-to-right model")
    parser.add_argument("output", type=Path, help="directory to write")
    parser.add_argument("--recipe", choices=("exact", "paper"), help="default: exact, or what it has")
    add_device(parser)
    parser.add_argument("--overwrite", action="store_true", help="write into a directory that is not empty")


def _run(options: argparse.Namespace) -> None:
    output: Path = options.output
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; choose a directory")
    if output.exists() and any(output.iterdir()) and not options.overwrite:
        raise ValueError(f"{output} exists and is not empty; choose another directory, or add --overwrite")
    check_directory_to_write("output", output)
    options.model = options.source
    model, tokenizer = load_model(options)
    error = None
    if model.recipe == "exact":
        import torch

        from anyorder.model.conversion import left_to_right_difference

        ids = torch.tensor([tokenizer.encode(CHECKED_TEXT, add_special_tokens=False)[:32]])
        error = left_to_right_difference(model, ids.to(model.device))
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    report = {"output": str(output), "recipe": model.recipe, "parameters": sum(p.numel() for p in model.parameters())}
    if error is not None:
        report["greatest_logit_difference"] = error
    if options.json:
        print_json(report)
        return
    print(f"{options.source} -> {output}: {report['parameters']:,} parameters, recipe {model.recipe}")
    if error is not None:
        print(f"greatest difference of its left-to-right logits from the base model's: {error:.2g}")
