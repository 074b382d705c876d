"""lm-evaluation-harness as the tests run it: local tasks over a few lines of JSON, requests made by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from anyorder import Factorization, scoring

QUESTIONS = [
    {"question": "a b", "choices": ["c", "ab c", "b a"], "answer": 0, "text": "a b c ab", "target": "x"},
    {"question": "ab", "choices": ["c c", "a"], "answer": 1, "text": "b " * 45 + "c", "target": "x"},
    {"question": "c", "choices": ["a", "b", "c", "ab"], "answer": 2, "text": "c\nab ab", "target": "x"},
    {"question": "b ab c", "choices": ["b", "c a a"], "answer": 0, "text": "", "target": "x"},
    {"question": "c a", "choices": [" b", "a"], "answer": 1, "text": "ab" * 40, "target": "x"},
]
_TASKS = {
    "choices": {
        "output_type": "multiple_choice", "doc_to_text": "q: {{question}}\na:", "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer", "metric_list": [{"metric": "acc"}],
    },
    "texts": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    },
    "answers": {
        "output_type": "generate_until", "doc_to_text": "q: {{question}}\na:", "doc_to_target": "{{target}}",
        "generation_kwargs": {"until": ["\n", "zz"], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0},
        "metric_list": [{"metric": "exact_match"}],
    },
}  # fmt: skip
TASKS = tuple(_TASKS)
PAIRS = [(f"q: {q['question']}\na:", f" {choice}") for q in QUESTIONS for choice in q["choices"]]
TEXTS = [q["text"] for q in QUESTIONS]


def write_tasks(directory: Path) -> Path:
    """A folder for --include_path, with its data beside the tasks."""
    directory.mkdir(parents=True)
    data = directory / "questions.jsonl"
    # No text is empty in a task on perplexity: byte_perplexity divides by its length.
    lines = [{**line, "text": line["text"] or "a"} for line in QUESTIONS]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, task in _TASKS.items():
        whole = {
            "task": name, "dataset_path": "json", "test_split": "test", "fewshot_split": "test",
            "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(directory / "cache")}, **task,
        }  # fmt: skip
        (directory / f"{name}.yaml").write_text(json.dumps(whole))  # JSON is YAML
    return directory


def requests(kind: str, *arguments: Sequence[Any]) -> list[Any]:
    """Requests as the harness makes them."""
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, tuple(of), i, (kind, i, 1)) for i, of in enumerate(arguments)]


def likelihoods(lm, pairs):
    return lm.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)


def rolling(lm, texts):
    return lm.loglikelihood_rolling(requests("loglikelihood_rolling", *([text] for text in texts)), disable_tqdm=True)


def generate(lm, *pairs):
    return lm.generate_until(requests("generate_until", *pairs), disable_tqdm=True)


def direct(lm, given, predicted, order="left_to_right", group_size=1, generator=None):
    """log P of token ids by the model's own method, and whether greedy decoding gives them."""
    ids = torch.tensor([given + predicted])
    plain = Factorization.left_to_right(ids.shape[1], given=len(given))
    f = plain.regroup(group_size, order, generator)
    best = scoring.teacher_forced(lm.model, ids, f).is_best
    return float(lm.model.log_likelihood(ids, f).double().sum()), bool(best[0, len(given) :].all())


def close(one, other, tolerance=1e-4):
    return one == pytest.approx(other, abs=tolerance)
