"""Runs side by side: what `anyorder eval`, `bench` and `adapt` wrote, as one page of tables and figures.

Knows the files of runs; loads no model. Tables need nothing; figures need Matplotlib.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from anyorder.bench import report as bench_report
from anyorder.evaluation import figures, results
from anyorder.training import curves

BENCH, CURVES = "bench.json", "curves.csv"
_SAME_IN_ALL = ("command", "versions", "data", "batch_size")
"""Settings that are not shown: what is the same, what changes no result, or what is too long."""


class Runs:
    """Directories, by what wrote them.

    Args:
        directories: each written by one of the three commands.

    Raises:
        ValueError: for one that none of them wrote, or that is unfinished.
    """

    def __init__(self, directories: Sequence[Path]):
        self.evaluations: dict[str, dict[str, Any]] = {}
        self.benches: dict[str, list[dict[str, Any]]] = {}
        self.trainings: dict[str, list[dict[str, float]]] = {}
        self.directories = dict(zip(_labels(directories), directories, strict=True))
        for label, directory in self.directories.items():
            if (directory / results.SETTINGS).is_file():
                self.evaluations[label] = results.read_report(directory)
            elif (directory / BENCH).is_file():
                self.benches[label] = json.loads((directory / BENCH).read_text())["results"]
            elif (directory / CURVES).is_file():
                self.trainings[label] = curves.read_csv(directory / CURVES)
            else:
                raise ValueError(f"{directory} was written by none of anyorder eval, bench and adapt: it has no "
                                 f"{results.SETTINGS}, {BENCH} or {CURVES}")  # fmt: skip

    def items(self, task: str) -> dict[str, list[dict[str, Any]]]:
        """Items of a task of all evaluations that have it, by label."""
        return {label: results.read_items(self.directories[label], task)
                for label, report in self.evaluations.items() if task in report["tasks"]}  # fmt: skip


def write(directories: Sequence[Path], page: Path) -> list[Path]:
    """One Markdown page, and beside it the figures for which there is data; the page comes first.

    Returns:
        The page and the figures.

    Raises:
        ValueError: for directories that cannot be read; and where figures cannot be drawn, once the page is written.
    """
    runs = Runs(directories)
    drawings = {page.with_name(f"{page.stem}_{name}.png"): draw for name, draw in _drawings(runs).items()}
    page.write_text(_page(runs, [file.name for file in drawings]))
    try:
        for file, draw in drawings.items():
            draw(file)
    except ImportError as error:
        raise ValueError(f"{page} is written; its figures need Matplotlib: pip install 'anyorder[plot]'") from error
    return [page, *drawings]


def _labels(directories: Sequence[Path]) -> list[str]:
    names = [directory.resolve().name for directory in directories]
    labels = names if len(set(names)) == len(names) else [str(directory) for directory in directories]
    if len(set(labels)) < len(labels):
        raise ValueError(f"a directory is named twice: {', '.join(labels)}")
    return labels


# ---------------------------------------------------------------------- the page


def _page(runs: Runs, pictures: Sequence[str]) -> str:
    parts = ["# Runs side by side"]
    if runs.evaluations:
        parts += [settings_table(runs.evaluations), metrics_table(runs.evaluations), *_warnings(runs.evaluations)]
    parts += [f"## {label}\n\n{bench_report.explained(records)}" for label, records in runs.benches.items()]
    parts += [f"![{Path(name).stem}]({name})" for name in pictures]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def settings_table(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: a row a run, with its model and the settings in which runs differ."""
    settings = {label: report["settings"] for label, report in reports.items()}
    names = dict.fromkeys(name for own in settings.values() for name in own if name not in _SAME_IN_ALL)
    shown = [name for name in names
             if name == "model" or len({json.dumps(own.get(name)) for own in settings.values()}) > 1]  # fmt: skip
    rows = [[label, *("" if own.get(name) is None else str(own[name]) for name in shown)]
            for label, own in settings.items()]  # fmt: skip
    return _markdown(["run", *(name.replace("_", " ") for name in shown)], rows)


def metrics_table(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: a row a metric, a column a run, each value with its 95% interval."""
    pairs = dict.fromkeys(
        (task, metric) for report in reports.values() for task, own in report["tasks"].items() for metric in own
    )
    rows = []
    for task, metric in pairs:
        found = [report["tasks"].get(task, {}).get(metric) for report in reports.values()]
        rows.append([task, metric, *("" if one is None else _cell(one) for one in found)])
    return _markdown(["task", "metric", *reports], rows)


def _cell(one: Mapping[str, float]) -> str:
    return f"{one['value']:.4f} ({one['low']:.4f} to {one['high']:.4f})"


def _warnings(reports: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What keeps values in one row from being compared."""
    found = []
    for task in dict.fromkeys(task for report in reports.values() for task in report["tasks"]):
        own = [report for report in reports.values() if task in report["tasks"]]
        data = {report["settings"]["data"][task] for report in own}
        items = {next(iter(report["tasks"][task].values()))["items"] for report in own if report["tasks"][task]}
        if len(data) > 1:
            found.append(f"**Not the same data: {task}.**")
        elif len(items) > 1:
            found.append(f"**Not the same items: {task} ({' and '.join(map(str, sorted(items)))}).**")
    return found


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# ---------------------------------------------------------------------- the figures


def _drawings(runs: Runs) -> dict[str, Callable[[Path], None]]:
    """What can be drawn, by name."""
    found: dict[str, Callable[[Path], None]] = {}
    if runs.benches:
        several = len(runs.benches) > 1
        records = [one | {"decoder": f"{label}: {one['decoder']}"} if several else one
                   for label, own in runs.benches.items() for one in own]  # fmt: skip
        found["speed"] = partial(bench_report.plot, records)
    tasks = {label: report["tasks"] for label, report in runs.evaluations.items()}
    if any("judge_nats_per_token" in own for each in tasks.values() for own in each.values()):
        found["quality"] = partial(figures.draw_quality, tasks)
    if calibrated := runs.items("calibration"):
        errors = {label: tasks[label]["calibration"]["expected_calibration_error"]["value"] for label in calibrated}
        found["calibration"] = partial(figures.draw_calibration, calibrated, errors)
    if ordered := runs.items("order_taken"):
        found["order"] = partial(figures.draw_orders, ordered)
    if runs.trainings:
        found["loss"] = partial(curves.compare, runs.trainings)
    return found
