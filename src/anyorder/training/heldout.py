"""Held-out loss in four regimes: left to right and random order, groups of one and of four.

The same documents under the same factorizations at every measurement, so that curves can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from anyorder.core.factorization import Factorization
from anyorder.training.curriculum import Document, LeftToRight, RandomGroups, Regime, seeded

if TYPE_CHECKING:
    from anyorder.modeling import AnyOrderForCausalLM
    from anyorder.training.texts import TokenDocument

REGIMES: dict[str, Regime] = {
    "left_to_right_1": LeftToRight((1,)),
    "left_to_right_4": LeftToRight((4,)),
    "random_1": RandomGroups((1,)),
    "random_4": RandomGroups((4,)),
}


class HeldOut:
    """Documents that are measured on, never trained on.

    Args:
        documents: each is predicted whole but for its start token.
        batch_size: documents a forward.
        seed: of the random orders.
    """

    def __init__(self, documents: Sequence[TokenDocument], batch_size: int = 16, seed: int = 0):
        if not documents:
            raise ValueError("no documents to measure on")
        ordered = sorted(documents, key=lambda document: document.shape.length)  # little padding
        self.batches = [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]
        self.seed = seed

    def __len__(self) -> int:
        return sum(map(len, self.batches))

    @torch.no_grad()
    def losses(self, model: AnyOrderForCausalLM) -> dict[str, float]:
        """Nats per token in each regime."""
        return {name: self._loss(model, name, regime) for name, regime in REGIMES.items()}

    def _loss(self, model: AnyOrderForCausalLM, name: str, regime: Regime) -> float:
        total, count = 0.0, 0
        for number, batch in enumerate(self.batches):
            drawn = [
                regime.draw(Document(document.shape.length), seeded([self.seed, name, number, i]))
                for i, document in enumerate(batch)
            ]
            order = Factorization.stack(drawn)
            ids = torch.zeros(order.group_ids.shape, dtype=torch.int64)
            for row, document in zip(ids, batch, strict=True):
                row[: len(document.ids)] = document.ids
            # The model's own call, around which FSDP and DeepSpeed gather what is split.
            total += float(model(ids, order, labels=ids, loss_only=True).token_losses.double().sum())
            count += int(order.is_predicted.sum())
        return total / count
