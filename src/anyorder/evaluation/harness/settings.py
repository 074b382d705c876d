"""What `--model_args` may say, checked before a model is loaded. Knows names and values only."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from anyorder.core.options import check_options
from anyorder.decoding import policies
from anyorder.decoding.policies import Policy
from anyorder.decoding.sampling import DRAWING, Sampler
from anyorder.hub.resolve import DEFAULT_MODEL
from anyorder.runtime.engines import check_engine
from anyorder.scoring import TOKENS_AT_ONCE

ORDERS = ("left_to_right", "random")
SCORED = ("continuation", "context")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Loading:
    """Which model, and how to load it.

    Args:
        pretrained: a built-in name, a directory, a GGUF file or a hub id; or a model that is loaded already.
        tokenizer: of a model that is loaded already.
        recipe, base_model, revision, attn_implementation: as `load` takes them.
        dtype: of the weights; default: as they were saved.
        device: default: a CUDA device if there is one, else the CPU; of a loaded model, its own.
        engine, weights: what runs the steps of generation, as of `generate`; of a loaded model, its own.
    """

    pretrained: Any = DEFAULT_MODEL
    tokenizer: Any = None
    recipe: str | None = None
    base_model: str | None = None
    revision: str | None = None
    attn_implementation: str | None = None
    dtype: str | None = None
    device: str | None = None
    engine: str = "auto"
    weights: str | None = None

    def __post_init__(self) -> None:
        check_engine(self.engine, self.weights)
        if self.dtype not in (None, "auto", *DTYPES):
            raise ValueError(f"dtype={self.dtype!r}: use auto, {', '.join(DTYPES)}")
        if isinstance(self.pretrained, str) and self.tokenizer is not None:
            raise ValueError("tokenizer is for a model that is loaded already; one that is named brings its own")


@dataclass(frozen=True)
class Settings:
    """How to score and generate.

    Args:
        order: of prediction, for likelihoods: "left_to_right" or "random".
        group_size: tokens predicted at a step; without a policy for generation, too.
        order_average: for likelihoods, over so many random orders: see `likelihoods`.
        scored: what a likelihood is of: the "continuation" given its context, or the "context" given the continuation
            that stands behind it, as no causal LM can say exactly: which answer makes the question likeliest.
        seed: of random orders and of drawing.
        policy: for generation, as the command line writes it: `groupwise:size=4`.
        temperature, top_k, top_p, min_p: for generation, whatever a task says; None leaves it to the task.
        max_gen_toks: new tokens where a task names no number.
        max_length: tokens that the model reads at most; default: its context.
        add_bos_token: whether texts begin with the start token; default: as the tokenizer does.
        prefix_token_id: what stands in front of a text with no context; default: what the tokenizer puts in front of
            texts, else its start token, else its end token.
        batch_size: most texts in a forward, or "auto": as many as `tokens_at_once` allows, which bounds any number.
        max_batch_size: most texts in a forward with "auto".
        tokens_at_once: most tokens in a forward, unless a single text is longer.
    """

    order: str = "left_to_right"
    group_size: int = 1
    order_average: int = 1
    scored: str = "continuation"
    seed: int = 0
    policy: str | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    max_gen_toks: int = 256
    max_length: int | None = None
    add_bos_token: bool | None = None
    prefix_token_id: int | None = None
    batch_size: int | str = "auto"
    max_batch_size: int | None = None
    tokens_at_once: int = TOKENS_AT_ONCE

    def __post_init__(self) -> None:
        if self.order == "both_sides":
            raise ValueError(
                "order='both_sides' has no meaning here: the harness asks for the likelihood of what ends a text, and "
                "nothing stands on its right; use order=random, in which tokens read both sides within it"
            )
        if self.order not in ORDERS:
            raise ValueError(f"order={self.order!r}: use {' or '.join(ORDERS)}")
        if self.scored not in SCORED:
            raise ValueError(f"scored={self.scored!r}: use {' or '.join(SCORED)}")
        for name, least in (
            ("group_size", 1), ("order_average", 1), ("seed", 0), ("max_gen_toks", 1), ("max_length", 2),
            ("prefix_token_id", 0), ("max_batch_size", 1), ("tokens_at_once", 1),
        ):  # fmt: skip
            _check_whole(name, getattr(self, name), least)
        if self.order_average > 1 and self.order != "random":
            raise ValueError(f"order_average={self.order_average} is over random orders: add order=random")
        if self.add_bos_token not in (None, True, False):
            raise ValueError(f"add_bos_token={self.add_bos_token!r}: use true or false")
        self.decoding_policy()
        self.most_rows()
        if self.drawing:
            Sampler(True, **self.drawing)

    def decoding_policy(self) -> Policy:
        """Which positions each step of generation commits."""
        if self.policy is None:
            return policies.groupwise(self.group_size)
        if not isinstance(self.policy, str):
            raise ValueError(f"policy={self.policy!r}: write it as NAME or NAME:OPTION=VALUE")
        return policies.parse(self.policy)

    @property
    def drawing(self) -> dict[str, Any]:
        """What is said of how tokens are drawn."""
        return {name: getattr(self, name) for name in DRAWING if getattr(self, name) is not None}

    def most_rows(self) -> int | None:
        """Rows in a batch at most; None: as many as memory allows."""
        if str(self.batch_size).partition(":")[0] == "auto":
            return self.max_batch_size
        try:
            rows = int(self.batch_size)
        except ValueError:
            rows = 0
        if rows < 1:
            raise ValueError(f"batch_size={self.batch_size!r}: use auto or a whole number, at least 1")
        return rows

    def of_results(self) -> dict[str, Any]:
        """Those that results depend on."""
        speed = ("batch_size", "max_batch_size", "tokens_at_once")
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in speed}


def read(model_args: Mapping[str, Any]) -> tuple[Loading, Settings]:
    """What `--model_args` say, None as if not said.

    Raises:
        ValueError: for an unknown name, with a suggestion, or a value that cannot be meant.
    """
    given = {name: value for name, value in model_args.items() if value is not None}
    loading, settings = ({field.name for field in dataclasses.fields(cls)} for cls in (Loading, Settings))
    check_options((name for name in given if name not in loading), Settings, *loading)
    return (
        Loading(**{name: value for name, value in given.items() if name in loading}),
        Settings(**{name: value for name, value in given.items() if name in settings}),
    )


def _check_whole(name: str, value: object, least: int) -> None:
    if value is not None and (not isinstance(value, Integral) or isinstance(value, bool) or value < least):
        raise ValueError(f"{name}={value!r}: use a whole number, at least {least}")
