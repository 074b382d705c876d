"""The study of recipes: the same model, data, tokens and evaluation, trained in several ways.

Each run is `anyorder adapt` in a folder of its own under --work, and is resumed if it was cut; when it is complete, its
curves and its measurements go into --results as small files, from which the page and the plot are made. So the study
can be made in as many sittings as it takes, and the page can be written anew from the files alone.

    python benchmarks/hold_out.py --output split stories.jsonl.gz tales.jsonl.gz novels.jsonl.gz
    python benchmarks/study.py --work study-runs --dtype bfloat16 --stories rocstories_valid.jsonl.gz \\
        --train-file split/stories.jsonl split/tales.jsonl split/novels.jsonl --mixture 0.5 0.2 0.3 \\
        --eval-file split/held_out.jsonl \\
        --options "--dtype bfloat16 --length 1024 --document-length 128 --batch-size 1 --warmup-steps 20 \\
        --eval-every 60 --save-every 60 --eval-documents 48 --seed 0"
    python benchmarks/study.py --report-only
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import infill_loss
import torch

from anyorder.infill.pieces import Pieces
from anyorder.training.heldout import REGIMES

HERE = Path(__file__).parent.parent
STUDY = HERE / "recipes" / "study"
INFILL = ("given 1 2", "given 1 2 4 5", "story, groups of 1", "story, groups of 4")


@dataclass(frozen=True)
class Way:
    """How one run differs from the others."""

    title: str
    options: tuple[str, ...]


WAYS = {
    "autoregressive": Way(
        "plain AR fine-tuning (control)", ("--adapter", "none", "--curriculum", str(STUDY / "autoregressive.yaml"))
    ),
    "masked_diffusion": Way(
        "masked diffusion, all weights (control)",
        ("--objective", "masked_diffusion", "--adapter", "none", "--curriculum", "exact"),
    ),
    "paper": Way("paper recipe, all weights", ("--adapter", "none", "--recipe", "paper", "--curriculum", "paper")),
    "skip_stages": Way(
        "paper recipe, last stage alone",
        ("--adapter", "none", "--recipe", "paper", "--curriculum", str(STUDY / "skip_stages.yaml")),
    ),
    "exact": Way("exact recipe, all weights", ("--adapter", "none", "--curriculum", "exact")),
    "gated_16": Way("exact recipe, gated, rank 16", ("--adapter", "gated", "--rank", "16", "--curriculum", "exact")),
    "gated_64": Way("exact recipe, gated, rank 64", ("--adapter", "gated", "--rank", "64", "--curriculum", "exact")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--work", type=Path, help="folder for the runs")
    parser.add_argument("--train-file", nargs="+", default=[])
    parser.add_argument("--mixture", nargs="+", default=[])
    parser.add_argument("--eval-file", nargs="+", default=[])
    parser.add_argument("--stories", type=Path, help='{"sentences": [five]} a line, for the infill loss')
    parser.add_argument("--limit", type=int, default=300, help="stories; default: 300")
    # `adapt` counts the padding of rows too: a row of 1024 holds some 965 tokens of these texts.
    parser.add_argument(
        "--tokens",
        type=int,
        default=320_000,
        help="of each run, padding included (of 320000, the default, 301000 read)",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the infill losses alone"
    )
    parser.add_argument("--options", default="", help="further options of adapt, the same for every run, in one string")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument(
        "--only", nargs="*", choices=WAYS, default=list(WAYS), help="some of the runs; without a name: the base alone"
    )
    parser.add_argument("--results", type=Path, default=HERE / "docs" / "study")
    parser.add_argument("--report-only", action="store_true", help="write the page from the results that are there")
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    if not options.report_only:
        if not (options.work and options.train_file and options.eval_file and options.stories):
            parser.error("a study needs --work, --train-file, --eval-file and --stories (or --report-only)")
        measured(options, "base", options.model)
        for name in options.only:
            if not (options.results / f"{name}.json").is_file():
                train(options, name)
                measured(options, name, str(options.work / name))
    report(options.results)


def train(options: argparse.Namespace, name: str) -> None:
    """Run or resume `anyorder adapt`."""
    output = options.work / name
    command = [sys.executable, "-m", "anyorder", "adapt", options.model, str(output), *WAYS[name].options]
    command += ["--train-file", *options.train_file, "--eval-file", *options.eval_file]
    command += ["--mixture", *options.mixture] if options.mixture else []
    command += ["--tokens", str(options.tokens), "--device", options.device, *options.options.split()]
    if (output / "run.json").is_file():
        command.append("--resume")
    print(" ".join(command), flush=True)
    subprocess.run(command, check=True)
    (options.results / f"{name}.csv").write_bytes((output / "curves.csv").read_bytes())


def measured(options: argparse.Namespace, name: str, model_name: str) -> None:
    """Write the infill losses of a model, and how it was trained."""
    file = options.results / f"{name}.json"
    if file.is_file():
        return
    model, tokenizer = infill_loss.load_any(model_name, getattr(torch, options.dtype))
    model.to(options.device)
    stories = infill_loss.read(options.stories)[: options.limit]
    losses, errors = infill_loss.measure(model, Pieces(tokenizer), stories, 20)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) if name != "base" else 0
    record = {"losses": losses, "trained": trained, "stories": len(stories), "dtype": options.dtype}
    if any(errors):
        record["standard_errors"] = errors
    file.write_text(json.dumps(record, indent=1) + "\n")


# ---------------------------------------------------------------------- the page


def report(results: Path) -> None:
    """Write the page beside the folder of results, and the plot into it."""
    done = [name for name in WAYS if (results / f"{name}.json").is_file()]
    curves = {name: rows(results / f"{name}.csv") for name in done}
    lines = ["# The study of recipes", "", "Made by `benchmarks/study.py` (its docstring has the command).", ""]
    missing = [WAYS[name].title for name in WAYS if name not in done]
    if missing:
        lines += [f"Not yet run: {'; '.join(missing)}.", ""]
    lines += ["Held-out loss in four regimes at the end of each run, nats a token:", ""]
    lines += table(("", "tokens", *(name.replace("_", " ") for name in REGIMES)), four_regimes(done, curves))
    lines += ["", "Infill loss: the third sentence of five-sentence stories, and whole stories, nats a token:", ""]
    lines += table(("", "parameters trained", *INFILL), infill(results, done))
    if "masked_diffusion" in done:
        errors = json.loads((results / "masked_diffusion.json").read_text())["standard_errors"]
        reading = "every figure is an estimated bound, in random order (docs/evaluation.md)"
        drawn = f"infill losses have a standard error of {max(errors):.3f} at most from the masks that were drawn"
        lines += ["", f"Of masked diffusion {reading}; {drawn}."]
    if done:
        plot(curves, results / "curves.png")
        lines += ["", f"![Held-out loss against tokens]({results.name}/curves.png)"]
    (results.parent / f"{results.name}.md").write_text("\n".join(lines) + "\n")


def four_regimes(done: list[str], curves: dict[str, list[dict[str, float]]]) -> list[list[str]]:
    found = []
    for name in done:
        measured_at = [row for row in curves[name] if "eval_loss" in row]
        last = measured_at[-1]
        found.append(
            [WAYS[name].title, f"{last['num_input_tokens_seen']:,.0f}", *(f"{last[f'eval_{r}']:.3f}" for r in REGIMES)]
        )
    return found


def infill(results: Path, done: list[str]) -> list[list[str]]:
    found = []
    for name in ["base", *done]:
        if (results / f"{name}.json").is_file():
            record = json.loads((results / f"{name}.json").read_text())
            title = WAYS[name].title if name in WAYS else "base, nothing trained"
            found.append([title, f"{record['trained']:,}", *(f"{loss:.3f}" for loss in record["losses"])])
    return found


def table(head: tuple[str, ...], body: list[list[str]]) -> list[str]:
    """Markdown."""
    return [f"| {' | '.join(row)} |" for row in (list(head), ["---"] * len(head), *body)]


def rows(file: Path) -> list[dict[str, float]]:
    with file.open() as source:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(source)]


def plot(curves: dict[str, list[dict[str, float]]], file: Path) -> None:
    """One panel a regime, one line a run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, regime in zip(figure.subplots(2, 2).flat, REGIMES, strict=True):
        for name, found in curves.items():
            points = [(row["num_input_tokens_seen"], row[f"eval_{regime}"]) for row in found if f"eval_{regime}" in row]
            axes.plot(*zip(*points, strict=True), label=WAYS[name].title, marker="o", markersize=3)
        axes.set(title=regime.replace("_", " "), xlabel="tokens", ylabel="held-out nats a token")
        axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
