"""Measurements as JSON, CSV, a Markdown table and a picture of speed against quality."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
_SAME = (
    "Same as alone: prompts whose tokens are those of the smallest batch. In 16 bits kernels round by the number of "
    "rows, and a draw may turn on that; in float32 it shows the decoder itself.\n"
)
_RATIO = (
    "Ratio: new tokens a second over those of the first decoder of the same engine, batch by batch: what the order of "
    "decoding brings. What an engine brings as well is in the columns of times.\n"
)
_TIMES = "times "
_MARKERS = "osD^vP*X"
"""Of engines, in turn."""
_QUALITY = {"base_nats_per_token": "base nats a token", "distinct_2": "distinct-2", "rouge_l": "ROUGE-L"}


def table(records: Sequence[Record]) -> str:
    """Markdown, one line a decoder and batch size."""
    quality = [name for name in _QUALITY if name in records[0]]
    several = _several_batches(records)
    engines = _several_engines(records)
    times = [name for name in records[0] if name.startswith(_TIMES)] if engines else []
    head = ["decoder", "batch", "tokens/s (min .. max)", "ratio (min .. max)"] + ["ratio to"] * engines
    head += [f"times {name.removeprefix(_TIMES)}" for name in times] + ["forwards a token", "ms a forward"]
    head += [_QUALITY[name] for name in quality] + ["same as alone"] * several + ["warm-up, s"] * engines
    lines = [head, ["---"] * len(head)]
    for record in records:
        speed = "{tokens_per_second:.1f} ({tokens_per_second_min:.1f} .. {tokens_per_second_max:.1f})".format(**record)
        ratio = "{ratio:.2f} ({ratio_min:.2f} .. {ratio_max:.2f})".format(**record)
        line = [record["decoder"], str(record["batch_size"]), speed, ratio] + [record["ratio_to"]] * engines
        line += [_number(record[name], 2) for name in times]
        line += [_number(record["forwards_per_token"], 3), _number(record["ms_per_forward"], 1)]
        line += [_number(record[name], 3) for name in quality]
        if several:
            same = record["same_as_alone"]
            line.append("" if same is None else f"{same} of {record['prompts']}")
        if engines:
            line.append(f"{record['warm_up_seconds']:.0f}")
        lines.append(line)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def explained(records: Sequence[Record]) -> str:
    """The table, and under it what its columns compare."""
    notes = [_RATIO] * _several_engines(records) + [_SAME] * _several_batches(records)
    return "\n\n".join([table(records), *notes])


def _several_engines(records: Sequence[Record]) -> bool:
    return len({record["ratio_to"] for record in records}) > 1


def _several_batches(records: Sequence[Record]) -> bool:
    return any(record["same_as_alone"] is not None for record in records)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def write(records: Sequence[Record], settings: Record, output: Path) -> list[Path]:
    """`bench.json`, `bench.csv`, `bench.md` and `bench.png` in a directory."""
    output.mkdir(parents=True, exist_ok=True)
    files = [output / f"bench.{kind}" for kind in ("json", "csv", "md", "png")]
    files[0].write_text(json.dumps({"settings": settings, "results": records}, indent=1) + "\n")
    with files[1].open("w", newline="") as out:
        writer = csv.DictWriter(out, list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    others = [f"- {name.replace('_', ' ')}: {value}" for name, value in settings.items() if name != "command"]
    parts = ["# Decoders side by side", f"    {settings['command']}", "\n".join(others), explained(records)]
    files[2].write_text("\n\n".join(parts))
    plot(records, files[3])
    return files


def plot(records: Sequence[Record], file: Path) -> None:
    """Speed against quality: one line a decoder over batch sizes; up and to the right is better."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    engine_of = {record["decoder"]: record.get("engine", "eager") for record in records}
    engines = list(dict.fromkeys(engine_of.values()))
    methods = list(dict.fromkeys(name.removesuffix(f", {engine}") for name, engine in engine_of.items()))
    for decoder, engine in engine_of.items():
        own = [record for record in records if record["decoder"] == decoder]
        x, y = ([record[name] for record in own] for name in ("tokens_per_second", "base_nats_per_token"))
        color = f"C{methods.index(decoder.removesuffix(f', {engine}'))}"
        axes.plot(x, y, marker=_MARKERS[engines.index(engine) % len(_MARKERS)], color=color, label=decoder)
        for record, a, b in zip(own, x, y, strict=True):
            axes.annotate(str(record["batch_size"]), (a, b), textcoords="offset points", xytext=(4, 4), fontsize=7)
    axes.set(xscale="log", xlabel="new tokens a second (points: batch sizes)", ylabel="base model's nats a token")
    axes.invert_yaxis()
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=110)
