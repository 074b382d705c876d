"""The paper's tables for a small model: every recipe and control on the same questions, with intervals.

Each row is `anyorder eval` in a folder of its own under --work, which goes on where it was cut; when it is complete its
figures go into --results as a small file, and the table in the page beside that folder is written anew from the files
alone. So the table can be made in as many sittings as it takes. Rows that are trained for it are read from --runs,
where `benchmarks/study.py --work` has left them.

    python benchmarks/paper_table.py --data-dir my-data --work table-runs --rows base shipped shipped_4
    python benchmarks/paper_table.py --data-dir my-data --work table-runs --runs study-runs --rows autoregressive exact
    python benchmarks/paper_table.py --report-only
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent.parent
SHIPPED = "smollm2-135m-anyorder"
FOURS = ("--group-size", "4", "--policy", "groupwise:size=4")
BEGIN, END = "<!-- the table: written by a program in benchmarks -->", "<!-- the end of the table -->"


@dataclass(frozen=True)
class Row:
    """One model, and how it is asked."""

    title: str
    options: tuple[str, ...] = ()
    model: str | None = None
    """None: trained for the table, in --runs under the row's name."""
    infills: str = ""
    """Which way of the infilling task is its own: a model that reads from the left alone is given what stands there."""


ROWS = {
    "base": Row("the base, nothing trained", model="smollm2-135m", infills="_prefix_only"),
    "autoregressive": Row("AR fine-tuning (control)", infills="_prefix_only"),
    "masked_diffusion": Row("masked diffusion (control)", ("--policy", "dynamic:criterion=confidence,step_size=1")),
    "paper": Row("A3's recipe, all weights"),
    "exact": Row("exact recipe, all weights"),
    "shipped": Row("exact recipe, gated: shipped", model=SHIPPED),
    "shipped_4": Row("the same in groups of 4", FOURS, model=SHIPPED),
    "shipped_4_uncoupled": Row("the same, groups of 4 uncoupled", (*FOURS, "--uncoupled"), model=SHIPPED),
}
COLUMNS = (
    ("TriviaQA", "triviaqa", "accuracy"),
    ("HellaSwag", "hellaswag", "accuracy"),
    ("WinoGrande", "winogrande", "accuracy"),
    ("SIQA", "siqa", "accuracy"),
    ("PIQA", "piqa", "accuracy"),
    ("LAMBADA", "lambada", "accuracy"),
    ("infill ROUGE-1", "stories", "rouge1"),
    ("ROUGE-2", "stories", "rouge2"),
    ("ROUGE-L", "stories", "rougeL"),
    ("infill nats a token", "stories", "nats_per_token"),
)  # heading, task, metric
TASKS = tuple(dict.fromkeys(task for _, task, _ in COLUMNS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="default: all")
    parser.add_argument("--data-dir", type=Path, help="records, named as `anyorder eval --list` says")
    parser.add_argument("--work", type=Path, help="folder for the evaluations")
    parser.add_argument("--runs", type=Path, help="folder of trained models, named as the rows are")
    parser.add_argument("--limit", type=int, default=300, help="items of each task; default: 300")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--results", type=Path, default=HERE / "docs" / "results", help="default: docs/results")
    parser.add_argument("--report-only", action="store_true", help="write the table from the results that are there")
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    if options.report_only:
        write_page(options.results)
        return
    if not (options.data_dir and options.work):
        parser.error("a table needs --data-dir and --work (or --report-only)")
    if options.runs is None and (homeless := [name for name in options.rows if ROWS[name].model is None]):
        parser.error(f"--runs: where {', '.join(homeless)} lie, as benchmarks/study.py --work has left them")
    for name in options.rows:
        evaluate(options, name)
        write_page(options.results)


def evaluate(options: argparse.Namespace, name: str) -> None:
    """Ask one row everything, and keep what came of it."""
    row, out = ROWS[name], options.work / name
    model = row.model or str(options.runs / name)
    command = [sys.executable, "-m", "anyorder", "eval", *TASKS, "--model", model, "--data-dir", str(options.data_dir)]
    command += ["--limit", str(options.limit), "--dtype", options.dtype, "--out", str(out), *row.options]
    print(" ".join(command), flush=True)
    subprocess.run(command, check=True)
    report = json.loads((out / "report.json").read_text())
    kept = {key: report["settings"][key] for key in ("limit", "dtype", "versions", "data")}
    record = {"settings": kept, "tasks": report["tasks"]}
    (options.results / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


def write_page(results: Path) -> None:
    """Put the table into the page beside the folder of results."""
    put_into(results.parent / f"{results.name}.md", table(results))


def put_into(page: Path, lines: list[str]) -> None:
    """Lines between the two that mark a table in a page, which keeps what is written around it."""
    text = page.read_text() if page.is_file() else f"# Results\n\n{BEGIN}\n{END}\n"
    before, begin, rest = text.partition(BEGIN)
    _, end, behind = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{page} has no lines {BEGIN!r} and {END!r}, between which the table belongs")
    page.write_text("\n".join([before + BEGIN, "", *lines, "", END + behind]))


def table(results: Path) -> list[str]:
    """A row a model, in Markdown; rows that are not measured are named behind it."""
    found = {name: json.loads(file.read_text()) for name in ROWS if (file := results / f"{name}.json").is_file()}
    lines = [f"| | {' | '.join(heading for heading, _, _ in COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, record in found.items():
        cells = [cell(record["tasks"], task, metric, ROWS[name].infills) for _, task, metric in COLUMNS]
        lines.append(f"| {ROWS[name].title} | {' | '.join(cells)} |")
    if missing := [row.title for name, row in ROWS.items() if name not in found]:
        lines += ["", f"Not yet measured: {'; '.join(missing)}."]
    asked = {name: [record["settings"][key] for key in ("limit", "data")] for name, record in found.items()}
    if others := [name for name, questions in asked.items() if questions != next(iter(asked.values()))]:
        raise SystemExit(f"{', '.join(others)} were asked other questions than {next(iter(asked))}: measure them anew")
    return lines


def cell(tasks: dict[str, Any], task: str, metric: str, way: str = "") -> str:
    """A metric in percent, or in nats, with its 95% interval."""
    one = tasks[task][metric + way * (task == "stories")]
    factor, digits = (1, 3) if metric.startswith("nats") else (100, 1)
    value, low, high = (f"{factor * one[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


if __name__ == "__main__":
    main()
