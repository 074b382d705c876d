"""What is timed: the base model under Hugging Face `generate`, a converted model under a policy, anyone's own function.

A decoder continues prompts of equal length by exactly so many tokens; it is given a seed for each row.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from anyorder.decoding.policies import Policy
from anyorder.modeling import AnyOrderForCausalLM

Sampling = dict[str, Any]


@dataclass(frozen=True)
class Continuation:
    """What a decoder returns."""

    sequences: Tensor
    """(B, P + N) int64: prompts and N new tokens."""
    forwards: int | None
    """Forwards of the model, the one over the prompt included; None: not known."""


class Decoder(ABC):
    """Continues prompts.

    Attributes:
        name: in the tables.
        by_row: whether the seeds alone decide what a row gets, whatever batch it is in.
        engine: what runs its steps; what the order of decoding brings shows among decoders of one engine.
        is_reference: whether every decoder is compared with it, whatever runs it.
    """

    name: str
    by_row: bool = True
    engine: str = "eager"
    is_reference: bool = False

    @abstractmethod
    def __call__(self, ids: Tensor, new: int, seeds: Sequence[int]) -> Continuation:
        """Continue (B, P) prompts by `new` tokens, ends ignored."""


class HuggingFace(Decoder):
    """The wrapped base model under transformers' `generate`.

    Args:
        model: its owner.
        sampling: temperature, top_k, top_p, min_p; None: greedy.
    """

    by_row = False  # one global generator draws for all rows
    is_reference = True
    more: ClassVar[Sampling] = {}
    """Further settings of `generate`."""

    def __init__(self, model: AnyOrderForCausalLM, sampling: Sampling | None):
        self.base, self.sampling = model.causal_lm, sampling
        self.name = "hugging face" if sampling is not None else "hugging face, greedy"

    def __call__(self, ids: Tensor, new: int, seeds: Sequence[int]) -> Continuation:
        torch.manual_seed(seeds[0])
        draws: Sampling = {"do_sample": False}
        if self.sampling is not None:
            draws = {"do_sample": True, "top_k": 0, **self.sampling}
        sequences = self.base.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, pad_token_id=0,
            **draws, **self.more,
        )  # fmt: skip
        return Continuation(sequences, new)


class AnyOrder(Decoder):
    """A converted model from left to right under a policy.

    Args:
        model: the model.
        policy: of `decoding.policies`.
        name: in the tables.
        sampling: as of `HuggingFace`.
        engine, weights: as of `generate`.
    """

    def __init__(
        self,
        model: AnyOrderForCausalLM,
        policy: Policy,
        name: str,
        sampling: Sampling | None,
        engine: str = "eager",
        weights: str | None = None,
    ):
        self.model, self.policy, self.sampling = model, policy, sampling
        self._runs: dict[str, Any] = {"engine": engine, "weights": weights}
        self.engine = engine if weights is None else f"{engine} {weights}"
        self.name = name + ", greedy" * (sampling is None)
        self.name += "" if engine == "eager" else f", {self.engine}"

    def __call__(self, ids: Tensor, new: int, seeds: Sequence[int]) -> Continuation:
        draws: Sampling = {"do_sample": False}
        if self.sampling is not None:
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            draws = {"do_sample": True, "generator": generators, **self.sampling}
        output = self.model.generate(
            ids,
            max_new_tokens=new,
            policy=self.policy,
            **self._runs,
            eos_token_id=(),
            return_dict_in_generate=True,
            **draws,
        )
        assert not isinstance(output, Tensor)
        return Continuation(output.sequences, output.forwards)


class Foreign(Decoder):
    """Someone else's function, given the base model.

    Args:
        function: `f(model, input_ids, max_new_tokens, seeds)` -> (B, P + N) ids, or these and the number of forwards.
        name: in the tables.
        model: a converted model, whose base it is given.
    """

    by_row = False

    def __init__(self, function: Callable[..., Any], name: str, model: AnyOrderForCausalLM):
        self.function, self.name, self.base = function, name, model.causal_lm

    def __call__(self, ids: Tensor, new: int, seeds: Sequence[int]) -> Continuation:
        out = self.function(self.base, ids, new, list(seeds))
        sequences, forwards = out if isinstance(out, tuple) else (out, None)
        if not isinstance(sequences, Tensor) or sequences.shape != (ids.shape[0], ids.shape[1] + new):
            found = tuple(sequences.shape) if isinstance(sequences, Tensor) else type(sequences).__name__
            raise ValueError(f"{self.name} returned {found}, not ids of shape {(ids.shape[0], ids.shape[1] + new)}")
        return Continuation(sequences, forwards)


def foreign_function(place: str) -> tuple[Callable[..., Any], str]:
    """The function that `FILE.py:FUNCTION` names, and a name for the tables.

    Raises:
        ValueError: if there is no such file or function.
    """
    file, colon, function = place.rpartition(":")
    if not colon or not Path(file).is_file():
        raise ValueError(f"--against {place!r} must be FILE.py:FUNCTION, and the file must exist")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"--against {place!r}: {file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = getattr(module, function, None)
    if not callable(found):
        raise ValueError(f"--against {place!r}: {file} has no function {function!r}")
    return found, f"{Path(file).stem}:{function}"
