"""The length prior of a model, fitted on texts: blanks are made where the true length is known.

Of a text that names blanks of its own, one of those is taken. Of the others, half of the blanks are a whole sentence,
half some words of a sentence, one to MOST_WORDS of them and the fewer the likelier (k words in proportion to 1/k), as
blanks that people write are. The model is asked about every length of `auto`; the weights are those under which the
true ones are likeliest (`infill.lengths`).

This module knows texts, blanks and a model; what the weights mean it does not know.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from anyorder.infill.infiller import Infiller
from anyorder.infill.lengths import AUTO, NEUTRAL, LengthPrior, Tries, chosen, fit
from anyorder.infill.template import Template
from anyorder.model.configuration import AnyOrderConfig
from anyorder.modeling import AnyOrderForCausalLM
from anyorder.training.cutting import parted

MOST_WORDS = 8
SENTENCES = 6
"""Of a longer text so many sentences are read."""
LEAST_CASES = 20
_TOGETHER = 32  # texts that share forwards
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True)
class Fit:
    """A fitted prior, and how well it does on what it was fitted on."""

    prior: LengthPrior
    cases: int
    nats_a_length: float
    """Of the true lengths, on average."""
    nats_of_even_odds: float
    mean_error: float
    """Tokens by which the lengths chosen are too long."""
    mean_absolute_error: float

    def report(self) -> dict[str, Any]:
        """As JSON."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "prior"} | {
            "length_prior": dataclasses.asdict(self.prior)
        }


def fit_lengths(
    model: AnyOrderForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[tuple[str, Sequence[Sequence[int]]]],
    limit: int,
    seed: int = 0,
) -> Fit:
    """Fit a prior on one blank each in the first `limit` texts that can have one.

    Args:
        model: a converted model.
        tokenizer: its.
        records: texts, and the blanks that each names as (first character, the one behind the last). One that names
            none is ordinary text, at least two sentences or a sentence of some words.
        limit: blanks.
        seed: of the places where the blanks are.

    Raises:
        ValueError: if fewer than LEAST_CASES texts can have a blank whose length is one of AUTO's or between two.
    """
    seeker, chooser = Infiller(model, tokenizer, length_prior=NEUTRAL).seeker, random.Random(seed)
    made: list[tuple[Template, int]] = []
    for text, named in records:
        if named:
            template, inside = parted(text, [chooser.choice(named)])
            blank: tuple[Template, str] | None = (template, inside[0])
        else:
            blank = make_blank(text, chooser, whole_sentence=len(made) % 2 == 1)
        if blank is not None and len(made) < limit:
            template, own = blank
            count = seeker.count_tokens(template, 0, own)
            if 1 <= count <= AUTO[-1]:
                made.append((template, count))
    if len(made) < LEAST_CASES:
        raise ValueError(
            f"only {len(made)} of {len(records)} texts can have a blank to fit on, {LEAST_CASES} are needed: give more "
            "texts, of several sentences each"
        )
    cases: list[tuple[Tries, int]] = []
    for first in tqdm(range(0, len(made), _TOGETHER), unit="batch", disable=None):
        batch = made[first : first + _TOGETHER]
        tries = seeker.tries([template for template, _ in batch])
        for one, (_, count) in zip(tries, batch, strict=True):
            if one is not None:
                cases.append((one, int((one.lengths - count).abs().argmin())))
    return _measured(fit(cases), cases)


def _measured(prior: LengthPrior, cases: Sequence[tuple[Tries, int]]) -> Fit:
    rounded = LengthPrior(*(round(weight, 4) for weight in dataclasses.astuple(prior)))
    nats, errors = 0.0, []
    for tries, true in cases:
        log_shares = rounded.log_probabilities(tries)
        nats -= float(log_shares[true])
        errors.append(int(tries.lengths[chosen(log_shares.exp(), tries.opens)]) - int(tries.lengths[true]))
    n, absolute = len(cases), sum(map(abs, errors))
    even = math.log(len(AUTO))
    return Fit(rounded, n, round(nats / n, 4), round(even, 4), round(sum(errors) / n, 3), round(absolute / n, 3))


def make_blank(text: str, chooser: random.Random, whole_sentence: bool) -> tuple[Template, str] | None:
    """A text with one blank, and what stood there; None if it is too short for that.

    Args:
        text: any text.
        chooser: chooses the place.
        whole_sentence: whether the blank is one of the sentences, not the first; else some words, not the first.
    """
    sentences = _SENTENCE_END.split(text.strip())
    start = chooser.randrange(max(1, len(sentences) - SENTENCES + 1))
    sentences = sentences[start : start + SENTENCES]
    if whole_sentence:
        if len(sentences) < 2:
            return None
        k = chooser.randrange(1, max(2, len(sentences) - 1))
        parts = " ".join(sentences[:k]), sentences[k], " ".join(sentences[k + 1 :])
    else:
        words = " ".join(sentences).split()
        most = min(MOST_WORDS, len(words) - 2)
        if most < 1:
            return None
        counts = range(1, most + 1)
        (count,) = chooser.choices(counts, [1 / n for n in counts])
        k = chooser.randrange(1, len(words) - count)
        parts = " ".join(words[:k]), " ".join(words[k : k + count]), " ".join(words[k + count :])
    before, own, behind = parts
    return Template((f"{before} ", f" {behind}" if behind else "")), own


def read_config(directory: Path) -> dict[str, Any]:
    """The config of a converted model's directory, into which a prior can be written.

    Raises:
        ValueError: if it is no such directory, or may not be written in.
    """
    file = directory / "config.json"
    if not file.is_file():
        raise ValueError(f"{directory} is no directory of a converted model: make one with anyorder convert")
    config: dict[str, Any] = json.loads(file.read_text())
    if config.get("model_type") != AnyOrderConfig.model_type:
        raise ValueError(
            f"{directory} holds a {config.get('model_type')} model, not a converted one: make one with anyorder convert"
        )
    if not os.access(directory, os.W_OK):
        raise ValueError(f"{directory} may not be written in: copy it to another place")
    return config


def write_prior(directory: Path, prior: LengthPrior) -> None:
    """Put a prior into the config of a converted model's directory; see `read_config`."""
    config = read_config(directory) | {"length_prior": dataclasses.asdict(prior)}
    part = directory / f"config.json.{os.getpid()}.part"
    part.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    part.replace(directory / "config.json")
