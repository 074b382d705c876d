"""The mean of several adapters of one run, as one adapter: often better than each of them (arXiv 2203.05482).

Averages the saved tensors of directories that `anyorder adapt` or `convert` wrote; everything else comes from the last.
Whether it is better is for a measurement to say, on text that is not what the result is judged by.

    python benchmarks/average_adapters.py first second third --output mean
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

FILES = ("adapter_model.safetensors", "query_embedding.safetensors", "coupling.safetensors")
"""Of an adapter; the last of those that are coupled."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", nargs="+", type=Path, help="directories, of the same base, kind and rank")
    parser.add_argument("--output", type=Path, required=True, help="directory to write; must not exist")
    options = parser.parse_args()
    average(options.adapters, options.output)


def average(adapters: list[Path], output: Path) -> None:
    """Write the mean of some adapters.

    Raises:
        ValueError: if their tensors do not go together.
    """
    if output.exists():
        raise ValueError(f"{output} exists: choose another directory")
    means = {}
    for file in FILES:
        have = [(directory / file).is_file() for directory in adapters]
        if any(have) and not all(have):
            raise ValueError(f"{adapters[have.index(False)]} has no {file}, others have: their mean means nothing")
        if not any(have):
            continue
        parts = [load_file(directory / file) for directory in adapters]
        shapes = [{name: tensor.shape for name, tensor in part.items()} for part in parts]
        for directory, own in zip(adapters, shapes, strict=True):
            if own != shapes[0]:
                raise ValueError(f"{directory} has other tensors than {adapters[0]}: their mean means nothing")
        means[file] = {
            name: torch.stack([part[name].double() for part in parts]).mean(dim=0).to(tensor.dtype)
            for name, tensor in parts[-1].items()
        }
    shutil.copytree(adapters[-1], output)
    for file, tensors in means.items():
        save_file(tensors, output / file, metadata={"format": "pt"})


if __name__ == "__main__":
    main()
