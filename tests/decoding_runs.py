"""What tests of decoding share: ids, generators, automata, a run with its whole result, a test of frequencies."""

from __future__ import annotations

import torch
from scipy.stats import chisquare
from transformers.generation.streamers import BaseStreamer

from anyorder import Factorization
from anyorder.decoding.constraints import Automata
from anyorder.decoding.sampling import AllowedTokens
from architectures import VOCABULARY

T = 12
IDS = torch.randint(3, VOCABULARY, (3, T), generator=torch.Generator().manual_seed(0))
PROMPTS = IDS[:, :5]
TOKENS = {0: "a", 1: "b", 2: "ab", 3: "1", 4: "12", 5: " ", 6: "é", 7: "2"}
AUTOMATA = Automata(lambda: TOKENS, 8)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def p_value(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Of a chi-square test; outcomes expected fewer than 5 times are pooled."""
    rare = expected < 5
    counts, expected = (torch.cat([x[~rare], x[rare].sum()[None]]).double() for x in (counts, expected))
    assert (~rare).sum() > 8
    return float(
        chisquare(counts[expected > 0].numpy(), (expected / expected.sum() * counts.sum())[expected > 0].numpy()).pvalue
    )


def repeated(order: Factorization, times: int) -> Factorization:
    """A batch of one row, so many times."""
    return Factorization(order.group_ids.repeat(times, 1))


def run(model, ids, order, **options):
    options = {"eos_token_id": (), "return_dict_in_generate": True} | options
    return model.generate(ids, factorization=order, **options)


def exactly(tokens: list[int]) -> AllowedTokens:
    """Each position may take one token: a draw whose outcome is known."""
    return AllowedTokens(torch.eye(VOCABULARY, dtype=torch.bool), torch.tensor([tokens]))


class Recorder(BaseStreamer):
    def __init__(self):
        self.values, self.ended = [], False

    def put(self, value):
        assert not self.ended
        self.values.append(value)

    def end(self):
        self.ended = True
