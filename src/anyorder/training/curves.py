"""Curves of a run as a table and as a picture.

Knows the records that Trainer keeps (`state.log_history`); nothing of models or data.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TOKENS = "num_input_tokens_seen"


def rows(history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One record a step: what was logged and what was measured there."""
    steps: dict[int, dict[str, Any]] = {}
    for record in history:
        steps.setdefault(record["step"], {}).update(record)
    return [record for _, record in sorted(steps.items()) if "loss" in record or "eval_loss" in record]


def write_csv(history: Sequence[dict[str, Any]], file: Path) -> None:
    """One line a step; a column is empty where nothing was logged."""
    found = rows(history)
    kinds = sorted({name for record in found for name in record if name.startswith(("loss_", "eval_"))})
    names = ["step", TOKENS, "loss", "learning_rate", "grad_norm", "tokens_per_second", *kinds]
    draft = file.with_name(file.name + ".part")
    with draft.open("w", newline="") as out:
        writer = csv.DictWriter(out, names, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(found)
    os.replace(draft, file)


def plot(history: Sequence[dict[str, Any]], file: Path, title: str) -> None:
    """A PNG: training loss by regime, and held-out loss if it was measured, against tokens."""
    found = rows(history)
    panels = {
        "training loss by regime": [name for name in _names(found, "loss") if name != "loss"] or ["loss"],
        "held-out loss": [name for name in _names(found, "eval_") if name.count("_") > 1],
    }
    panels = {label: names for label, names in panels.items() if names}
    figure = _figure(len(panels))
    for axes, (label, names) in zip(figure.axes, panels.items(), strict=True):
        for name in names:
            points = [(record.get(TOKENS, record["step"]), record[name]) for record in found if name in record]
            short = name.removeprefix("loss_").removeprefix("eval_").replace("_", " ")
            marks = {"marker": "o", "markersize": 3} if len(points) < 60 else {"linewidth": 0.8}
            axes.plot(*zip(*points, strict=True), label=short, **marks)
        _describe(axes, label)
    figure.suptitle(title)
    _save(figure, file)


def read_csv(file: Path) -> list[dict[str, float]]:
    """What `write_csv` wrote, one record a step, without its empty cells.

    Raises:
        ValueError: if it holds something else.
    """
    with file.open(newline="") as lines:
        found = list(csv.DictReader(lines))
    try:
        records = [{name: float(value) for name, value in one.items() if value} for one in found]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} holds no curves: {error}") from error
    if not records or TOKENS not in records[0]:
        raise ValueError(f"{file} holds no curves: it has no column {TOKENS}, or no line")
    return records


def compare(runs: Mapping[str, Sequence[Mapping[str, float]]], file: Path) -> None:
    """A PNG: loss against tokens of several runs, a panel a regime that is held out, else of training alone.

    Args:
        runs: records of `read_csv` by name.
    """
    every = [record for records in runs.values() for record in records]
    panels = [name for name in _names(every, "eval_") if name.count("_") > 1] or ["loss"]
    columns = min(2, len(panels))
    figure = _figure(columns, -(-len(panels) // columns))
    for axes, name in zip(figure.axes, panels, strict=False):
        for label, records in runs.items():
            points = [(record[TOKENS], record[name]) for record in records if name in record]
            if points:
                axes.plot(*zip(*points, strict=True), label=label, marker="o", markersize=3)
        _describe(axes, name.removeprefix("eval_").replace("_", " "))
    _save(figure, file)


def _figure(columns: int, rows: int = 1) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * columns, 4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    figure.subplots(rows, columns, squeeze=False)
    return figure


def _describe(axes: Axes, title: str) -> None:
    axes.set(xlabel="tokens trained on", ylabel="nats a token", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _save(figure: Figure, file: Path) -> None:
    draft = file.with_name(file.name + ".part")
    figure.savefig(draft, format="png", dpi=110)
    os.replace(draft, file)


def _names(found: Sequence[Mapping[str, Any]], start: str) -> list[str]:
    return sorted({name for record in found for name in record if name.startswith(start)})
