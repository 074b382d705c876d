"""What a task is: records -> items -> numbers an item -> metrics. Knows no particular task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from anyorder.decoding.policies import Policy, groupwise
from anyorder.evaluation.judge import Judge
from anyorder.evaluation.statistics import Estimate, estimate, ratio
from anyorder.infill.infiller import Infiller
from anyorder.infill.pieces import Pieces
from anyorder.modeling import AnyOrderForCausalLM


@dataclass(frozen=True)
class Metric:
    """The sum of one field over that of another, over items; without another, the mean of the field."""

    field: str
    per: str | None = None
    better: str = "higher"

    def columns(self, results: Sequence[Mapping[str, Any]]) -> Tensor:
        """(N, C) float64: what the statistic adds up over items; here numerators and denominators."""
        pairs = [(one[self.field], 1 if self.per is None else one[self.per]) for one in results]
        return torch.tensor(pairs, dtype=torch.float64).view(len(results), 2)

    def statistic(self, sums: Tensor) -> Tensor:
        """Of (..., C) sums over items."""
        return ratio(sums)

    def is_known(self, results: Sequence[Mapping[str, Any]]) -> bool:
        """Whether every item has it; some are measured only where the user says so."""
        return all(self.field in one for one in results)

    def estimate(self, results: Sequence[Mapping[str, Any]]) -> Estimate:
        """Over results of items, with its interval."""
        return estimate(self.columns(results), self.statistic)


@dataclass
class Subject:
    """What is evaluated: a model, and how it decodes and scores.

    Args:
        model: a converted model; a masked diffusion model for tasks that are `of_controls`.
        tokenizer: the base model's.
        policy: of what is generated.
        group_size: of what is scored, from left to right.
        execute_code: whether programs that the model writes are run.
        orders: random orders that a document is predicted in, where orders are compared.
        seed: of random orders and draws; each document's own depend on its text alone.
        temperature: of text that is judged; what is compared with a right answer is never drawn.
        load_judge: the model that judges text, and its tokenizer; None: the wrapped causal LM itself.
    """

    model: AnyOrderForCausalLM
    tokenizer: PreTrainedTokenizerBase
    policy: Policy = field(default_factory=lambda: groupwise(1))
    group_size: int = 1
    execute_code: bool = False
    orders: int = 8
    seed: int = 0
    temperature: float = 1.0
    load_judge: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]] | None = None

    @cached_property
    def pieces(self) -> Pieces:
        return Pieces(self.tokenizer)

    @cached_property
    def judge(self) -> Judge:
        """Loaded where text is judged."""
        own = self.model.causal_lm, self.tokenizer
        return Judge(*(own if self.load_judge is None else self.load_judge()))

    @cached_property
    def infiller(self) -> Infiller:
        """Made once: it reads the whole vocabulary."""
        return Infiller(self.model, self.tokenizer)


class Task(ABC):
    """One evaluation.

    Attributes:
        name: on the command line.
        about: half a sentence.
        source: where its records are on the hub, as owner/name:config:split; None: nowhere that is free to read.
        file: of local records, by name without its endings, in a data directory.
        metrics: by name.
        of_controls: whether a masked diffusion model can be asked: by `questions.answer` and `questions.write` alone.
    """

    of_controls: ClassVar[bool] = True
    name: ClassVar[str]
    about: ClassVar[str]
    source: ClassVar[str | None]
    file: ClassVar[str]
    metrics: ClassVar[dict[str, Metric]]

    def check(self, policy: Policy) -> None:  # noqa: B027 - most tasks can be asked under any
        """Raise ValueError if the task cannot be asked under a policy, before a model is loaded."""

    @abstractmethod
    def item(self, record: dict[str, Any]) -> Any:
        """What is asked of a record.

        Raises:
            ValueError: naming the columns that are missing, or the value that cannot be meant.
        """

    @abstractmethod
    def evaluate(self, subject: Subject, items: Sequence[Any]) -> list[dict[str, Any]]:
        """Numbers and texts of each item, among them all fields of the metrics; those of an item do not depend on the
        others."""
