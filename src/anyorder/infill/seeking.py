"""What is unknown of blanks before they are filled: how long they are, and which string a choice comes to.

Nothing made up is ever read or stood upon:

1. Where a text has choices, the lengths are sought with the choices open: a choice is a gap of one of its strings'
   numbers of tokens. That gives the probabilities of those numbers, and where the other blanks end.
2. The choices are decided from left to right, given all of the fixed text (`choices`).
3. The lengths of the other blanks are sought, from left to right; the choices are now known text (`lookahead`).

A text without choices needs the last step alone. The texts of a batch take each step together.

This module knows templates, constraints and their automata; it fills nothing.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from anyorder.decoding.constraints import Automata, Choice, Constraint
from anyorder.infill.choices import Decision, Undecided, decide, token_counts
from anyorder.infill.encoding import Blanks
from anyorder.infill.lengths import AUTO, NEUTRAL, LengthPrior, Tries
from anyorder.infill.lookahead import Found, Gap, Part, look_ahead
from anyorder.infill.template import Template
from anyorder.model.compatibility import context_length
from anyorder.model.kv_cache import KeyValueStore
from anyorder.modeling import AnyOrderForCausalLM
from anyorder.runtime.runner import ModelRunner

logger = logging.getLogger(__name__)

PATTERN_LENGTHS = (64, 256, 1024)
"""Of a pattern every length is tried up to the first of these that allows one at all."""


@dataclass(frozen=True)
class Sought:
    """What was unknown of the blanks of one text."""

    lengths: list[int]
    """Tokens of each blank; those of a choice do not matter."""
    shares: dict[int, dict[int, float]]
    """Of each blank whose length was sought: the probability of every length tried."""
    decisions: dict[int, Decision]
    """Of each blank that is a choice."""
    forwards: int
    """Of the model, for all texts of the batch together."""
    encoded: KeyValueStore | None
    """Keys and values of the first known tokens, at the lengths found."""
    known: dict[int, int] = field(default_factory=dict)
    """Of each blank whose length was sought: how many known tokens stand in front of it."""


@dataclass(frozen=True)
class _Text:
    template: Template
    tried: list[tuple[int, ...]]
    """Of each blank; of a choice the numbers of tokens that its strings have."""
    choices: dict[int, Choice]
    sought: tuple[int, ...]
    """The blanks, other than choices, whose length is not known."""
    generator: torch.Generator | None

    @property
    def needs_open_choices(self) -> bool:
        """Whether lengths are to be sought while the choices are open."""
        return bool(self.choices) and (bool(self.sought) or any(len(self.tried[k]) > 1 for k in self.choices))


class Seeker:
    """Finds out what is unknown of blanks.

    Args:
        model: a converted model.
        blanks: turns templates into positions.
        automata: of patterns.
        prior: of lengths; None: the model's own, or a neutral one with a warning.
    """

    def __init__(self, model: AnyOrderForCausalLM, blanks: Blanks, automata: Automata, prior: LengthPrior | None):
        self.model, self._blanks, self._automata = model, blanks, automata
        self._prior = LengthPrior.of(model.config.length_prior) if prior is None else prior

    @property
    def prior(self) -> LengthPrior:
        """The prior of lengths that is used."""
        if self._prior is None:
            _warn_of_no_prior(self.model.config.name_or_path or "the model")
            return NEUTRAL
        return self._prior

    def seek(
        self,
        templates: Sequence[Template],
        tried: Sequence[Sequence[tuple[int, ...]]],
        constraints: Sequence[Sequence[Constraint | None]],
        suppressed: tuple[int, ...],
        generators: Sequence[torch.Generator | None],
        temperature: float | None,
        runner: ModelRunner | None = None,
    ) -> list[Sought]:
        """Lengths and choices of a batch of texts.

        Args:
            templates: the texts.
            tried: the lengths to try for each blank of each text; one where it is known.
            constraints: of each blank of each text.
            suppressed: ids that no blank may hold.
            generators: one a text, of the choices that are drawn.
            temperature: of the choices; None: the likeliest string.
            runner: executes the forwards that lengths are sought with; None: eager PyTorch.

        Raises:
            ValueError: if a text is longer than the model's context.
        """
        rows = zip(templates, tried, constraints, generators, strict=True)
        texts = [self._text(*row, suppressed) for row in rows]
        nothing: list[dict[int, Decision]] = [{} for _ in texts]
        first, forwards = self._look_ahead(texts, [text.needs_open_choices for text in texts], nothing, runner=runner)
        undecided = [
            Undecided(text.template, text.choices, self._lengths(text, found), found.log_shares, text.generator)
            for text, found in zip(texts, first, strict=True)
        ]
        decisions, more = decide(self.model, self._blanks, undecided, temperature)
        last, most = self._look_ahead(texts, [bool(text.sought) for text in texts], decisions, True, runner)
        forwards += more + most
        return [
            Sought(
                self._lengths(text, found),
                {k: {n: math.exp(share) for n, share in found.log_shares[k].items()} for k in text.sought},
                decided,
                forwards,
                found.encoded,
                found.known,
            )
            for text, found, decided in zip(texts, last, decisions, strict=True)
        ]

    def tries(self, templates: Sequence[Template]) -> list[Tries | None]:
        """Of texts with one blank: what speaks for each length of AUTO; None where no two fit into the context."""
        texts = [_Text(template, [AUTO], {}, (0,), None) for template in templates]
        found, _ = self._look_ahead(texts, [True] * len(texts), [{}] * len(texts))
        return [own.tries.get(0) for own in found]

    def count_tokens(self, template: Template, k: int, text: str) -> int:
        """How many tokens a string has in blank k."""
        return len(self._blanks.encode_fill(template, k, text))

    def _text(
        self,
        template: Template,
        tried: Sequence[tuple[int, ...]],
        constraints: Sequence[Constraint | None],
        generator: torch.Generator | None,
        suppressed: tuple[int, ...],
    ) -> _Text:
        choices = {k: one for k, one in enumerate(constraints) if isinstance(one, Choice)}
        sought = tuple(k for k, lengths in enumerate(tried) if len(lengths) > 1 and k not in choices)
        possible = [
            token_counts(self._blanks, template, k, choices[k])
            if k in choices
            else self._possible(template, k, lengths, constraints[k], suppressed)
            for k, lengths in enumerate(tried)
        ]
        return _Text(template, possible, choices, sought, generator)

    def _possible(
        self,
        template: Template,
        k: int,
        tried: tuple[int, ...],
        constraint: Constraint | None,
        suppressed: tuple[int, ...],
    ) -> tuple[int, ...]:
        """The lengths that the blank's pattern allows; if it allows none, one, which is then refused."""
        automaton = self._automata.of(constraint, self._blanks.eats_space(template, k), suppressed)
        if automaton is None or len(tried) == 1:
            return tried
        # A pattern may allow none of the few lengths of AUTO.
        ranges = [range(1, longest + 1) for longest in PATTERN_LENGTHS] if tried == AUTO else [tried]
        for lengths in ranges:
            found = tuple(n for n in lengths if automaton.can_end(automaton.start, n))
            if found:
                return found
        return tried[:1]

    def _look_ahead(
        self,
        texts: Sequence[_Text],
        wanted: Sequence[bool],
        decisions: Sequence[dict[int, Decision]],
        keep: bool = False,
        runner: ModelRunner | None = None,
    ) -> tuple[list[Found], int]:
        """What was found for the texts that want it; nothing for the others."""
        chosen = [n for n, wants in enumerate(wanted) if wants]
        out = [Found() for _ in texts]
        if not chosen:
            return out, 0
        parts = [self._parts(texts[n], decisions[n]) for n in chosen]
        limit = context_length(self.model.causal_lm.config)
        found, forwards = look_ahead(self.model, parts, self.prior, limit, keep, runner)
        for n, own in zip(chosen, found, strict=True):
            out[n] = own
        return out, forwards

    def _parts(self, text: _Text, decided: dict[int, Decision]) -> list[Part]:
        """Known tokens and gaps, from left to right."""
        ids = {k: decision.ids for k, decision in decided.items()}
        encoded = self._blanks.encode(text.template, [1] * text.template.blanks, ids)
        parts: list[Part] = []
        for token, k in zip(encoded.ids, encoded.blank, strict=True):
            if k >= 0 and k not in encoded.decided:
                parts.append(Gap(k, text.tried[k], text.template.opens_a_sentence(k)))
            elif parts and isinstance(parts[-1], list):
                parts[-1].append(token)
            else:
                parts.append([token])
        return parts

    @staticmethod
    def _lengths(text: _Text, found: Found) -> list[int]:
        return [found.lengths.get(k, lengths[0]) for k, lengths in enumerate(text.tried)]


@functools.cache
def _warn_of_no_prior(name: str) -> None:
    """Once a model."""
    logger.warning(
        "%s has no length prior of its own: how long blanks are is decided with a neutral one. To fit one, into the "
        "directory of a converted model: anyorder fit-lengths DIRECTORY --train-file texts.jsonl",
        name,
    )
