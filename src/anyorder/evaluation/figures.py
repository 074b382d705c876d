"""Pictures of evaluations: quality against steps, reliability, which position is predicted when.

Knows the fields of items that tasks write down; no model. Matplotlib is imported where something is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CELLS = 16
"""Of a heat map, along each side."""
Items = Sequence[Mapping[str, Any]]


def reliability_curve(items: Items) -> tuple[Tensor, Tensor, Tensor]:
    """Of the bins of confidence in which there are predictions: mean confidence, share that is right, predictions."""
    predictions, confidence, right = (
        torch.tensor([one["bins"] for one in items], dtype=torch.float64).sum(0).view(3, -1)
    )
    some = predictions > 0
    return confidence[some] / predictions[some], right[some] / predictions[some], predictions[some]


def order_map(items: Items, field: str) -> Tensor:
    """(CELLS, CELLS) float64: row by row from the first step to the last, the share of each part of the text (column)
    that is predicted then; columns sum to 1 (0 where no text reaches).

    Args:
        items: of `order_taken`.
        field: lists of the step of each position.
    """
    counts = torch.zeros(CELLS, CELLS, dtype=torch.float64)
    for one in items:
        steps = torch.tensor(one[field])
        column = torch.arange(len(steps)) * CELLS // len(steps)
        row = steps * CELLS // (int(steps.max()) + 1)
        counts.index_put_((row, column), torch.ones(len(steps), dtype=torch.float64), accumulate=True)
    return counts / counts.sum(dim=0).clamp(min=1)


def draw_calibration(runs: Mapping[str, Items], errors: Mapping[str, float], file: Path) -> None:
    """The reliability diagram: on the diagonal, what is said with confidence p is right with probability p.

    Args:
        runs: items of `calibration` by the run's name.
        errors: expected calibration error by the run's name.
    """
    figure = _figure(1)
    (axes,) = figure.axes
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    for label, items in runs.items():
        confidence, right, predictions = reliability_curve(items)
        (line,) = axes.plot(confidence, right, label=f"{label}, ECE {errors[label]:.3f}", linewidth=1)
        axes.scatter(confidence, right, s=100 * predictions / predictions.max() + 4, color=line.get_color())
    axes.set(xlabel="confidence (area: predictions)", ylabel="share that is right", xlim=(0, 1), ylim=(0, 1))
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=110)


def draw_orders(runs: Mapping[str, Items], file: Path) -> None:
    """Heat maps of which position is predicted when: a column a run; on the documents above, on own text below.

    Args:
        runs: items of `order_taken` by the run's name.
    """
    figure = _figure(len(runs), 2)
    for number, (label, items) in enumerate(runs.items()):
        for row, (field, text) in enumerate((("steps", "documents"), ("steps_own_text", "own text"))):
            axes = figure.axes[row * len(runs) + number]
            axes.imshow(order_map(items, field), origin="lower", extent=(0, 1, 0, 1), aspect="auto", cmap="viridis")
            axes.set(title=f"{label}, {text}", xlabel="place in the text", ylabel="step, of all")
    figure.savefig(file, dpi=110)


def draw_quality(runs: Mapping[str, Mapping[str, Any]], file: Path) -> None:
    """Quality against steps, a panel a task that writes: down and to the left is better, if the text is varied.

    Args:
        runs: by the run's name, its tasks' metrics as its report has them.
    """
    steps, nats = "steps_per_token", "judge_nats_per_token"
    tasks = list(dict.fromkeys(task for found in runs.values() for task, own in found.items() if nats in own))
    figure = _figure(len(tasks))
    for axes, task in zip(figure.axes, tasks, strict=True):
        for label, found in runs.items():
            if nats in found.get(task, {}):
                x, y = found[task][steps]["value"], found[task][nats]
                error = [[y["value"] - y["low"]], [y["high"] - y["value"]]]
                axes.errorbar([x], [y["value"]], yerr=error, marker="o", linestyle="none", label=label)
        axes.set(title=task, xlabel="steps a token", ylabel="the judge's nats a token (95% interval)")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(file, dpi=110)


def _figure(columns: int, rows: int = 1) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * columns, 4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    figure.subplots(rows, columns, squeeze=False)
    return figure
