"""Curves of a run as a table and as a picture.

Knows the records that Trainer keeps (`state.log_history`); nothing of models or data.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = rows(history)
    panels = {
        "training loss by regime": [name for name in _names(found, "loss") if name != "loss"] or ["loss"],
        "held-out loss": [name for name in _names(found, "eval_") if name.count("_") > 1],
    }
    panels = {label: names for label, names in panels.items() if names}
    figure = Figure(figsize=(5.5 * len(panels), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (label, names) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name in names:
            points = [(record.get(TOKENS, record["step"]), record[name]) for record in found if name in record]
            short = name.removeprefix("loss_").removeprefix("eval_").replace("_", " ")
            marks = {"marker": "o", "markersize": 3} if len(points) < 60 else {"linewidth": 0.8}
            axes.plot(*zip(*points, strict=True), label=short, **marks)
        axes.set(xlabel="tokens trained on", ylabel="nats a token", title=label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.suptitle(title)
    draft = file.with_name(file.name + ".part")
    figure.savefig(draft, format="png", dpi=110)
    os.replace(draft, file)


def _names(found: Sequence[dict[str, Any]], start: str) -> list[str]:
    return sorted({name for record in found for name in record if name.startswith(start)})
