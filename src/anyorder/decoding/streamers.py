"""transformers' streamers: told of text as it grows from left to right, and only of what stays.

Shapes: B batch, T columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from anyorder.decoding.engine import Run


class StreamerFeed:
    """Feeds a streamer as `transformers` does: the prompts first, then (B,) tokens for each new column.

    Args:
        streamer: whose `put` and `end` are called.
        run: the run, filled from left to right.
        starts: for each row the column of its first new token.
        pad_token_id: what rows get that have ended.
    """

    def __init__(self, streamer: BaseStreamer, run: Run, starts: Sequence[int], pad_token_id: int):
        self.streamer, self.run, self.pad_token_id = streamer, run, pad_token_id
        self.starts = torch.tensor(starts)
        self.next = 0
        self.new = run.ids.shape[1] - max(starts)

    def begin(self, prompts: Tensor) -> None:
        """(B, T) prompts."""
        self.streamer.put(prompts.cpu())

    def step(self) -> None:
        """Put each new column in which every row has its token, or has ended before it."""
        every = torch.arange(len(self.starts))
        while self.next < self.new:
            column = self.starts + self.next
            ended = column > self.run.end
            if bool(ended.all()) or not bool((self.run.known[every, column] | ended).all()):
                break
            self.streamer.put(torch.where(ended, self.pad_token_id, self.run.ids[every, column]))
            self.next += 1

    def end(self) -> None:
        """Nothing more comes."""
        self.streamer.end()
