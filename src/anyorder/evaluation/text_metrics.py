"""How alike two texts are, and how varied a text is. Knows strings alone."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

ROUGE = ("rouge1", "rouge2", "rougeL")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def rouge(text: str, reference: str) -> dict[str, float]:
    """ROUGE-1, -2 and -L F1 by Google's rouge-score, with stemming.

    Raises:
        ValueError: if rouge-score is not installed.
    """
    found = _scorer().score(reference, text)
    return {name: float(found[name].fmeasure) for name in ROUGE}


@cache
def _scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ValueError("ROUGE needs rouge-score: pip install 'anyorder[eval]'") from error
    return RougeScorer(list(ROUGE), use_stemmer=True)


def edit_similarity(text: str, reference: str) -> float:
    """1 - Levenshtein distance / length of the longer; 1 for two empty texts."""
    if not text and not reference:
        return 1.0
    before = list(range(len(reference) + 1))
    for row, character in enumerate(text, start=1):
        now = [row]
        for column, other in enumerate(reference, start=1):
            now.append(min(before[column] + 1, now[-1] + 1, before[column - 1] + (character != other)))
        before = now
    return 1 - before[-1] / max(len(text), len(reference))


def normalised(text: str) -> str:
    """Lower case, without punctuation, articles and extra spaces (as SQuAD's and TriviaQA's own evaluations)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def contains(text: str, answers: Sequence[str]) -> bool:
    """Whether one of the answers stands in the text, both normalised, as whole words."""
    padded = f" {normalised(text)} "
    return any(f" {found} " in padded for found in map(normalised, answers) if found)


def distinct(words: Sequence[Any], n: int) -> float:
    """Share of different n-grams among all n-grams (Li et al. 2016); 1 where there is none."""
    grams = [tuple(words[k : k + n]) for k in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def entropy(words: Sequence[Any]) -> float:
    """Of the distribution of words within the text, in nats: 0 for one word over and over, log N for N different."""
    counts = Counter(words).values()
    return -sum(count / len(words) * math.log(count / len(words)) for count in counts)


def repetition(words: Sequence[Any], n: int = 4) -> float:
    """Share of n-grams that stood in the text before: 1 - distinct."""
    return 1 - distinct(words, n)
