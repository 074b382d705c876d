"""Ctrl-C and SIGTERM end the step that runs, then save and stop; a second one stops at once.

Of several processes all stop after the same step, whichever of them was told: at the end of each step they tell each
other.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class Interruption:
    """Whether a run was told to stop, and by which signal."""

    signal: int | None = None

    def stop(self) -> None:
        """End the program as the signal would have.

        Raises:
            KeyboardInterrupt: for Ctrl-C.
            SystemExit: with code 128 + the signal's number, for others.
        """
        assert self.signal is not None
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + self.signal)


class _StopAfterStep(TrainerCallback):
    def __init__(self, trainer: Trainer, heard: Interruption):
        self.trainer, self.heard = trainer, heard

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.accelerator.num_processes > 1:
            told = torch.tensor([float(self.heard.signal or 0)], device=args.device)
            self.heard.signal = int(self.trainer.accelerator.gather(told).max()) or None
        if self.heard.signal is not None:
            control.should_save = control.should_training_stop = True


@contextmanager
def saved_when_interrupted(trainer: Trainer) -> Iterator[Interruption]:
    """While inside, signals stop the training after its step; what comes back tells whether one came."""
    heard = Interruption()

    def hear(number: int, frame: FrameType | None) -> None:
        if heard.signal is not None:
            Interruption(number).stop()
        heard.signal = number

    trainer.add_callback(_StopAfterStep(trainer, heard))
    previous = {number: signal.signal(number, hear) for number in SIGNALS}
    try:
        yield heard
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
