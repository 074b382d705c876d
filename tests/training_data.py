"""Random training documents over the vocabulary of the tiny models."""

from __future__ import annotations

import torch

from anyorder.training.curriculum import Document
from anyorder.training.texts import TokenDocument
from architectures import VOCABULARY


def documents(count=30):
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 12, (count,), generator=g).tolist()
    return [TokenDocument(torch.randint(3, VOCABULARY, (n,), generator=g), Document(n, (1,))) for n in lengths]
