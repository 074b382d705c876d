"""The metric of triviaqa_local.yaml."""

from __future__ import annotations

from typing import Any

from anyorder.evaluation.text_metrics import contains


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    return {"acc": float(contains(results[0], doc["golden_answers"]))}
