"""What is unknown of blanks before they are filled: how long they are, and which string a choice comes to.

This module knows blanks and likelihoods; how the blanks are filled is `infiller`'s business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anyorder.core.factorization import Factorization
from anyorder.decoding.constraints import Automata, Choice, Constraint
from anyorder.infill.choices import Decision, decide
from anyorder.infill.encoding import Blanks, pad
from anyorder.infill.lengths import LengthPrior, Tries, median, provisional
from anyorder.infill.template import Template
from anyorder.model.compatibility import context_length
from anyorder.modeling import AnyOrderForCausalLM


@dataclass(frozen=True)
class Sought:
    """What was unknown of the blanks of one text."""

    lengths: list[int]
    """Tokens of each blank; of a choice those of its string do not matter here."""
    shares: dict[int, dict[int, float]]
    """Of each blank whose length was sought: the probability of every length tried."""
    decisions: dict[int, Decision]
    """Of each blank that is a choice."""
    forwards: int


class Seeker:
    """Finds out what is unknown of blanks.

    Args:
        model: a converted model.
        blanks: turns templates into positions.
        automata: of patterns.
        prior: of lengths.
    """

    def __init__(self, model: AnyOrderForCausalLM, blanks: Blanks, automata: Automata, prior: LengthPrior):
        self.model, self._blanks, self._automata, self.prior = model, blanks, automata, prior

    def seek(
        self,
        templates: Sequence[Template],
        tried: Sequence[Sequence[tuple[int, ...]]],
        constraints: Sequence[Sequence[Constraint | None]],
        suppressed: tuple[int, ...],
        generators: Sequence[torch.Generator | None],
        temperature: float | None,
    ) -> list[Sought]:
        """Lengths and choices of a batch of texts.

        Args:
            templates: the texts.
            tried: the lengths to try for each blank of each text; one where it is known.
            constraints: of each blank of each text.
            suppressed: ids that no blank may hold.
            generators: one a text, of the choices that are drawn.
            temperature: of the choices; None: the likeliest string.

        Raises:
            ValueError: if a text is longer than the model's context.
        """
        rows = zip(templates, tried, constraints, generators, strict=True)
        return [self._one(*row, suppressed, temperature) for row in rows]

    def _one(
        self,
        template: Template,
        tried: Sequence[tuple[int, ...]],
        constraints: Sequence[Constraint | None],
        generator: torch.Generator | None,
        suppressed: tuple[int, ...],
        temperature: float | None,
    ) -> Sought:
        lengths = [provisional(one) for one in tried]
        found: dict[int, dict[int, float]] = {}
        for k, one in enumerate(tried):
            if len(one) > 1 and not isinstance(constraints[k], Choice):
                one = self._possible(template, lengths, k, one, constraints[k], suppressed)
                shares = self.prior.probabilities(self.tries(template, lengths, k, one))
                lengths[k], found[k] = one[median(shares)], dict(zip(one, shares.tolist(), strict=True))
        decisions = decide(self.model, self._blanks, template, lengths, constraints, generator, temperature)
        return Sought(lengths, found, decisions, len(found))

    def tries(self, template: Template, lengths: list[int], k: int, tried: Sequence[int]) -> Tries:
        """What speaks for each length of blank k, the other blanks having the lengths given."""
        encoded = self._blanks.encode(template, [*lengths[:k], tried[0], *lengths[k + 1 :]], {})
        fixed = [column for column, blank in enumerate(encoded.blank) if blank < 0]
        start = encoded.columns(k)[0]
        given = [column for column in fixed if column < start]
        opens = template.opens_a_sentence(k)
        if len(tried) == 1 or len(given) == len(fixed):
            return Tries(torch.tensor(tried), torch.zeros(len(tried)), opens)
        behind = fixed[len(given)]
        targets = [behind + n - tried[0] for n in tried]
        ids = [[*encoded.ids[:start], *[0] * (target - start), encoded.ids[behind]] for target in targets]
        orders = [Factorization.conditional([target], given, target + 1) for target in targets]
        rows, order = pad(ids, 0), Factorization.stack(orders)
        # Decoding rather than scoring: what all rows begin with is encoded once.
        output = self.model.generate(
            rows, factorization=order, forced_ids=rows, eos_token_id=(), return_dict_in_generate=True
        )
        assert not isinstance(output, Tensor)
        return Tries(torch.tensor(tried), output.log_probs.sum(dim=1), opens)

    def _possible(
        self,
        template: Template,
        lengths: list[int],
        k: int,
        tried: tuple[int, ...],
        constraint: Constraint | None,
        suppressed: tuple[int, ...],
    ) -> tuple[int, ...]:
        """The lengths that fit into the context and the blank's pattern; if none does, one, which is then refused."""
        limit = context_length(self.model.causal_lm.config)
        fixed = len(self._blanks.encode(template, lengths, {}).ids) - lengths[k]
        automaton = self._automata.of(constraint, self._blanks.eats_space(template, k), suppressed)
        return tuple(
            n
            for n in tried
            if (limit is None or fixed + n <= limit)
            and (automaton is None or automaton.can_end(automaton.start, n))
        ) or tried[:1]  # fmt: skip
