"""The directory of an evaluation: one line an item, written batch by batch, and the report made of them.

A run that is killed loses the batch it was at; the same command goes on behind what is written, and counts nothing
twice. This module knows files and numbers; no model and no task's meaning.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anyorder.evaluation.statistics import paired
from anyorder.evaluation.task import Metric

SETTINGS, REPORT, TABLE = "settings.json", "report.json", "report.md"
_MAY_DIFFER = ("command", "versions", "batch_size")


class Results:
    """Items of the tasks of one run.

    Args:
        directory: to write to; made if it is not there.
        settings: what the results depend on, and what describes them.

    Raises:
        ValueError: if the directory holds something else, or a run with other settings.
    """

    def __init__(self, directory: Path, settings: dict[str, Any]):
        self.directory = directory
        settings = json.loads(json.dumps(settings))
        if directory.exists() and any(directory.iterdir()):
            before = read_settings(directory)
            for name in sorted(settings.keys() | before.keys()):
                if name not in _MAY_DIFFER and before.get(name) != settings.get(name):
                    raise ValueError(
                        f"{directory} holds a run with {name} {before.get(name)!r}, not {settings.get(name)!r}: "
                        "use the same to go on with it, or another directory"
                    )
        directory.mkdir(parents=True, exist_ok=True)
        self.settings = settings
        _replace(directory / SETTINGS, json.dumps(settings, indent=1) + "\n")

    def done(self, task: str) -> int:
        """Items of a task that are written down whole; what a kill has cut off behind them is removed."""
        file = _items_file(self.directory, task)
        if not file.is_file():
            return 0
        data = file.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            with file.open("r+b") as out:
                out.truncate(len(whole))
        return whole.count(b"\n")

    def append(self, task: str, results: Sequence[dict[str, Any]]) -> None:
        """Write items down behind those of a task that are there, so that they survive whatever comes."""
        with _items_file(self.directory, task).open("ab") as out:
            out.write("".join(json.dumps(result) + "\n" for result in results).encode())
            out.flush()
            os.fsync(out.fileno())

    def report(self, metrics: dict[str, dict[str, Metric]]) -> dict[str, Any]:
        """Write the report of all tasks, as JSON and as a Markdown table, and return it.

        Args:
            metrics: of each task, by name.
        """
        found: dict[str, Any] = {}
        for task, own in metrics.items():
            results = read_items(self.directory, task)
            found[task] = {
                name: vars(metric.estimate(results)) for name, metric in own.items() if metric.is_known(results)
            }
        report = {"settings": self.settings, "tasks": found}
        _replace(self.directory / REPORT, json.dumps(report, indent=1) + "\n")
        _replace(self.directory / TABLE, table(report) + "\n")
        return report


def read_settings(directory: Path) -> dict[str, Any]:
    """The settings of a run.

    Raises:
        ValueError: if the directory holds none.
    """
    file = directory / SETTINGS
    if not file.is_file():
        raise ValueError(f"{directory} holds no evaluation: it has no {SETTINGS}")
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def read_report(directory: Path) -> dict[str, Any]:
    """The report of a run that is finished.

    Raises:
        ValueError: if the directory holds none.
    """
    command = read_settings(directory)["command"]
    file = directory / REPORT
    if not file.is_file():
        raise ValueError(f"{directory} holds an unfinished evaluation; this goes on with it: {command}")
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def read_items(directory: Path, task: str) -> list[dict[str, Any]]:
    """All items of a task of a run, in their order."""
    file = _items_file(directory, task)
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def _items_file(directory: Path, task: str) -> Path:
    return directory / f"{task}.jsonl"


def table(report: dict[str, Any]) -> str:
    """A run as Markdown: a row a metric, with its 95% interval, under the command that made it."""
    settings = report["settings"]
    lines = [
        f"    {settings['command']}",
        "",
        f"| {settings['model']} | metric | value | 95% interval | items |",
        "|---|---|---|---|---|",
    ]
    for task, metrics in report["tasks"].items():
        for name, one in metrics.items():
            lines.append(
                f"| {task} | {name} | {one['value']:.4f} | {one['low']:.4f} to {one['high']:.4f} | {one['items']} |"
            )
    return "\n".join(lines)


def compare(first: Path, second: Path, metrics: dict[str, dict[str, Metric]]) -> list[dict[str, Any]]:
    """How the second run differs from the first, metric by metric, over the items that both have.

    Raises:
        ValueError: if they share no task, or the same task was run on different data.
    """
    one, other = read_settings(first), read_settings(second)
    shared = [task for task in one["data"] if task in other["data"]]
    if not shared:
        raise ValueError(f"{first} and {second} have no task in common: {', '.join(one['data'])} against "
                         f"{', '.join(other['data'])}")  # fmt: skip
    rows = []
    for task in shared:
        if one["data"][task] != other["data"][task]:
            raise ValueError(f"{first} and {second} ran {task} on different data: nothing can be paired")
        a, b = read_items(first, task), read_items(second, task)
        both = min(len(a), len(b))
        for name, metric in metrics[task].items():
            if not (metric.is_known(a[:both]) and metric.is_known(b[:both])):
                continue
            difference = paired(metric.columns(a[:both]), metric.columns(b[:both]), metric.statistic)
            rows.append({"task": task, "metric": name} | vars(difference))
    return rows


def differences(rows: Sequence[dict[str, Any]], first: str, second: str) -> str:
    """Rows of `compare` as Markdown."""
    lines = [
        f"{second} less {first}",
        "",
        "| task | metric | difference | 95% interval | p | items |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        interval = f"{row['low']:+.4f} to {row['high']:+.4f}"
        values = row["task"], row["metric"], f"{row['value']:+.4f}", interval, f"{row['p_value']:.4f}", row["items"]
        lines.append("| " + " | ".join(map(str, values)) + " |")
    return "\n".join(lines)


def _replace(file: Path, text: str) -> None:
    """Written whole or not at all."""
    new = file.with_name(file.name + ".new")
    new.write_text(text)
    new.replace(file)
