"""Text judged by a left-to-right language model: how likely it goes on as it does. Knows causal LMs; no task.

Lower is likelier, not better: a model's own samples have its entropy, and text that repeats itself has less. So a
judgement stands beside measures of variety (`text_metrics`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from anyorder.evaluation.batches import batches, padded
from anyorder.infill.pieces import Pieces
from anyorder.model.compatibility import context_length

TOKENS_AT_ONCE = 512
"""Of a forward, padding included: the logits of 512 tokens over 49,152 entries are 100 MB in float32."""


@torch.inference_mode()
def nats_of_ids(causal_lm: PreTrainedModel, rows: Sequence[Sequence[int]], first: Sequence[int]) -> list[float]:
    """-log P of each row's ids from number `first` on, given those before, in nats.

    Args:
        causal_lm: a left-to-right model.
        rows: ids.
        first: of each row, at least 1.
    """
    found = [0.0] * len(rows)
    in_order = sorted(range(len(rows)), key=lambda n: len(rows[n]))
    for numbers in batches(in_order, lambda n: len(rows[n]), TOKENS_AT_ONCE, None):
        ids = padded([rows[n] for n in numbers]).to(causal_lm.device)
        start = min(first[n] for n in numbers)
        logits = causal_lm(ids, use_cache=False, logits_to_keep=ids.shape[1] - start + 1).logits[:, :-1].float()
        log_p = logits.log_softmax(-1).gather(2, ids[:, start:, None])[..., 0].double()
        for row, n in zip(log_p, numbers, strict=True):
            found[n] = -float(row[first[n] - start : len(rows[n]) - start].sum())
    return found


@dataclass(frozen=True)
class Judgement:
    """Of a text behind another."""

    nats: float
    tokens: int
    """In the judge's own vocabulary."""


class Judge:
    """A causal LM that reads text.

    Args:
        causal_lm: any; it need not be of the same family as what it judges.
        tokenizer: its own.
    """

    def __init__(self, causal_lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self.causal_lm, self.pieces = causal_lm, Pieces(tokenizer)
        self.room = context_length(causal_lm.config)

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[Judgement]:
        """How likely the second text of each pair is behind the first; what does not fit the judge is left out from the
        left.

        Raises:
            ValueError: if a text alone does not fit.
        """
        rows: list[list[int]] = []
        first: list[int] = []
        for before, text in pairs:
            start = [self.pieces.start_token(), *self.pieces.encode(before, at_start=True)]
            own = self.pieces.encode(text, at_start=len(start) == 1)
            if self.room is not None and len(own) >= self.room:
                raise ValueError(f"a text of {len(own)} tokens does not fit the judge, which reads {self.room}")
            rows.append((start + own)[-self.room :] if self.room else start + own)
            first.append(len(rows[-1]) - len(own))
        nats = nats_of_ids(self.causal_lm, rows, first)
        return [Judgement(own, len(row) - k) for own, row, k in zip(nats, rows, first, strict=True)]
