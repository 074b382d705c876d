"""What ends a row: an end id, or transformers' own stopping criteria over the text so far. Knows ids and no model.

Shapes: B batch, T columns, N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import StoppingCriteriaList


class EndRule:
    """Which tokens end their rows.

    Args:
        end_ids: token ids that do.
        criteria: asked for each token with the text up to it, from the row's first token on and without padding; the
            text must be filled from left to right. They get no scores.
    """

    def __init__(self, end_ids: Sequence[int] = (), criteria: StoppingCriteriaList | None = None):
        self.end_ids = torch.tensor(list(end_ids), dtype=torch.int64)
        self.criteria = criteria or None

    def __call__(self, ids: Tensor, row: Tensor, column: Tensor, token: Tensor) -> Tensor:
        """(N,) bool: whether each token ends its row.

        Args:
            ids: (B, T) int64, with tokens wherever something was committed before.
            row, column, token: (N,) int64: what is committed together.
        """
        ends = torch.isin(token, self.end_ids)
        if self.criteria is None:
            return ends
        text = ids.clone()
        text[row, column] = token
        for end in column.unique().tolist():  # rows whose text is as long are handed over together
            these = (column == end).nonzero()[:, 0]
            ends[these] |= self.criteria(text[row[these], : end + 1], None).cpu()
        return ends
