"""Tables in pages whose rows are runs of `anyorder eval`, made in as many sittings as it takes.

Each task of a row is evaluated in a folder of its own, which goes on where it was cut; when it is complete its figures
go into the row's small file, and the table in the page is written anew from such files alone. What is written around a
table stays.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent / "docs"
BEGIN, END = "<!-- the table: written by a program in benchmarks -->", "<!-- the end of the table -->"
PLAIN = ("nats", "entropy", "steps")
"""What is no share and not shown in percent, by words in a metric's name."""


@dataclass(frozen=True)
class Row:
    """One model, and how it is asked."""

    title: str
    options: tuple[str, ...] = ()
    """Of `anyorder eval`."""
    model: str | None = None
    """None: trained for the table, in --runs under the row's name."""
    infills: str = ""
    """Which way of the infilling task is its own: a model that reads from the left alone is given what stands there."""


@dataclass(frozen=True)
class Table:
    """Rows by name, and columns: heading, task, metric."""

    rows: Mapping[str, Row]
    columns: tuple[tuple[str, str, str], ...]
    page: str
    """Its name, without the ending, and that of the folder beside it that holds the results."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """What a row is asked, each once."""
        return tuple(dict.fromkeys(task for _, task, _ in self.columns))

    def main(self, description: str | None) -> None:
        """The command line of a script that makes this table."""
        options = self._options(description)
        options.results.mkdir(parents=True, exist_ok=True)
        if options.report_only:
            self.write(options.results)
            return
        for name in options.rows:
            self.evaluate(options, name)
            self.write(options.results)

    def _options(self, description: str | None) -> argparse.Namespace:
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--rows", nargs="+", choices=self.rows, default=list(self.rows), help="default: all")
        parser.add_argument("--tasks", nargs="+", choices=self.tasks, default=list(self.tasks), help="default: all")
        parser.add_argument("--data-dir", type=Path, help="records, named as `anyorder eval --list` says")
        parser.add_argument("--work", type=Path, help="folder for the evaluations")
        homeless = [name for name, row in self.rows.items() if row.model is None]
        if homeless:
            parser.add_argument("--runs", type=Path, help="folder of trained models, named as the rows are")
        parser.add_argument("--limit", type=int, default=300, help="items of each task; default: 300")
        parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
        results = DOCS / self.page
        parser.add_argument("--results", type=Path, default=results, help=f"default: docs/{self.page}")
        parser.add_argument(
            "--report-only", action="store_true", help="write the table from the results that are there"
        )
        options = parser.parse_args()
        if not options.report_only and not (options.data_dir and options.work):
            parser.error("a table needs --data-dir and --work (or --report-only)")
        homeless = [name for name in homeless if name in options.rows]
        if not options.report_only and homeless and options.runs is None:
            parser.error(f"--runs: where {', '.join(homeless)} lie, as benchmarks/study.py --work has left them")
        return options

    def evaluate(self, options: argparse.Namespace, name: str) -> None:
        """Ask one row task by task, and keep what comes of each beside what is kept of the others."""
        row, file = self.rows[name], options.results / f"{name}.json"
        model = row.model or str(options.runs / name)
        more = ["--data-dir", str(options.data_dir), "--limit", str(options.limit), "--dtype", options.dtype]
        kept: dict[str, Any] = (
            json.loads(file.read_text()) if file.is_file() else {"settings": {"data": {}}, "tasks": {}}
        )
        for key in ("limit", "dtype"):  # before anything is measured in vain
            wanted = getattr(options, key)
            if kept["settings"].get(key, wanted) != wanted:
                raise SystemExit(f"{file} holds figures of another {key} than {wanted}: take it away first")
        for task in options.tasks:
            report = evaluated([task], model, options.work / name / task, [*more, *row.options])
            settings = settings_of(report)
            settings["data"] = kept["settings"]["data"] | settings["data"]
            kept = {"settings": settings, "tasks": kept["tasks"] | report["tasks"]}
            keep(file, **kept)

    def write(self, results: Path) -> None:
        """Put the table into the page beside the folder of results."""
        put_into(results.parent / f"{results.name}.md", self.lines(results))

    def lines(self, results: Path) -> list[str]:
        """A row a model, in Markdown; rows that are not measured are named behind it."""
        found = {
            name: json.loads(file.read_text()) for name in self.rows if (file := results / f"{name}.json").is_file()
        }
        lines = [
            f"| | {' | '.join(heading for heading, _, _ in self.columns)} |",
            "|---" * (len(self.columns) + 1) + "|",
        ]
        for name, record in found.items():
            cells = [cell(record["tasks"], task, metric, self.rows[name].infills) for _, task, metric in self.columns]
            lines.append(f"| {self.rows[name].title} | {' | '.join(cells)} |")
        if missing := [row.title for name, row in self.rows.items() if name not in found]:
            lines += ["", f"Not yet measured: {'; '.join(missing)}."]
        asked = [
            (name, task, (record["settings"]["limit"], record["settings"]["data"][task]))
            for name, record in found.items()
            for task in record["tasks"]
        ]
        first = {task: questions for _, task, questions in reversed(asked)}
        if others := dict.fromkeys(name for name, task, questions in asked if questions != first[task]):
            raise SystemExit(
                f"{', '.join(others)} were asked other questions than {next(iter(found))}: measure them anew"
            )
        return lines


def evaluated(tasks: Sequence[str], model: str, out: Path, more: Sequence[str]) -> dict[str, Any]:
    """The report of `anyorder eval` in a folder, which goes on where it was cut."""
    command = [sys.executable, "-m", "anyorder", "eval", *tasks, "--model", model, "--out", str(out), *more]
    print(" ".join(command), flush=True)
    subprocess.run(command, check=True)
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    return report


def settings_of(report: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of how a report was made: what two of them must share, and the versions."""
    return {key: report["settings"][key] for key in ("limit", "dtype", "versions", "data")}


def keep(file: Path, **record: Any) -> None:
    """Write a small file of results."""
    file.write_text(json.dumps(record, indent=1) + "\n")


def put_into(page: Path, lines: Sequence[str]) -> None:
    """Lines between the two that mark a table in a page, which keeps what is written around it."""
    text = page.read_text() if page.is_file() else f"# Results\n\n{BEGIN}\n{END}\n"
    before, begin, rest = text.partition(BEGIN)
    _, end, behind = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{page} has no lines {BEGIN!r} and {END!r}, between which the table belongs")
    page.write_text("\n".join([before + BEGIN, "", *lines, "", END + behind]))


def cell(tasks: Mapping[str, Any], task: str, metric: str, way: str = "") -> str:
    """A metric with its 95% interval: a share in percent, anything else as it is; empty of a task not asked."""
    if task not in tasks:
        return ""
    one = tasks[task][metric + way * (task == "stories")]
    factor, digits = (1, 3) if any(word in metric for word in PLAIN) else (100, 1)
    value, low, high = (f"{factor * one[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"
