"""How much the order of prediction matters, which order a policy takes, and whether its confidence can be relied on.

Documents are predicted whole, behind their start token. A model that were one joint distribution would give a text the
same likelihood in every order; how far it is from that is its spread (`order_spread`). A dynamic policy picks its order
by its confidence, so two things decide what it is worth: which order that is (`order_taken`), and whether what is
said with confidence is right as often as it claims (`calibration`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from anyorder.core.factorization import Factorization
from anyorder.decoding.events import GenerateOutput
from anyorder.decoding.policies import Dynamic, Policy
from anyorder.evaluation import documents
from anyorder.evaluation.batches import padded
from anyorder.evaluation.questions import Question, asked_in
from anyorder.evaluation.statistics import calibration_error
from anyorder.evaluation.task import Metric, Subject, Task
from anyorder.scoring import TeacherForced

BINS = 15
"""Of confidence, equally wide (as in arXiv 1706.04599)."""


class DocumentTask(Task):
    """A task on the first tokens of documents.

    Attributes:
        longest: tokens of a document that are read at most.
    """

    of_controls = False
    source, file = documents.SOURCE, documents.FILE
    longest: ClassVar[int] = 128

    def item(self, record: dict[str, Any]) -> str:
        return documents.text_of(record, self.name)

    def questions(self, subject: Subject, texts: Sequence[str]) -> list[Question]:
        """Each text, all of whose tokens are to be predicted."""
        return [documents.whole(subject.pieces, text, self.longest) for text in texts]

    def in_random_orders(self, subject: Subject, texts: Sequence[str]) -> list[list[TeacherForced]]:
        """What the model says of each text's tokens in each of its random orders."""
        questions, orders = self.questions(subject, texts), []
        for text, question in zip(texts, questions, strict=True):
            generator = documents.generator_of(subject.seed, text)
            orders += [question.order(subject.group_size, "random", generator) for _ in range(subject.orders)]
        every = [question for question in questions for _ in range(subject.orders)]
        said = asked_in(subject.model, every, orders)
        return [said[first : first + subject.orders] for first in range(0, len(said), subject.orders)]


# ---------------------------------------------------------------------- spread


class OrderSpread(DocumentTask):
    """How far the likelihood of a document depends on the order, in nats a token of the document."""

    name, about = "order_spread", "how far the likelihood of a document depends on the order"
    metrics: ClassVar[dict[str, Metric]] = {
        "nats_per_token_left_to_right": Metric("nats_left_to_right", "tokens", better="lower"),
        "nats_per_token_random": Metric("nats_random", "tokens", better="lower"),
        "standard_deviation": Metric("standard_deviation", better="lower"),
        "range": Metric("range", better="lower"),
    }

    def evaluate(self, subject: Subject, items: Sequence[Any]) -> list[dict[str, Any]]:
        questions = self.questions(subject, items)
        plain = asked_in(subject.model, questions, [one.order(subject.group_size) for one in questions])
        results = []
        for forward, orders in zip(plain, self.in_random_orders(subject, items), strict=True):
            nats = torch.tensor([_nats(one) for one in orders], dtype=torch.float64)
            of_token = nats / len(forward.log_probs)
            results.append({
                "nats_left_to_right": _nats(forward), "nats_random": float(nats.mean()),
                "tokens": len(forward.log_probs), "nats_by_order": nats.tolist(),
                "standard_deviation": float(of_token.std()), "range": float(of_token.max() - of_token.min()),
            })  # fmt: skip
        return results


def _nats(said: TeacherForced) -> float:
    return -float(said.log_probs.double().sum())


# ---------------------------------------------------------------------- the order that a policy takes


class OrderTaken(DocumentTask):
    """How left-to-right the order is that a dynamic policy takes: on the document itself, where tokens are forced and
    the policy says which is next; and on as many tokens that it writes itself."""

    name, about = "order_taken", "how left-to-right the order is that a dynamic policy takes"
    longest: ClassVar[int] = 64  # a step a token
    metrics: ClassVar[dict[str, Metric]] = {
        "kendall_tau": Metric("kendall_tau"),
        "kendall_tau_own_text": Metric("kendall_tau_own_text"),
        "nats_per_token": Metric("nats", "tokens", better="lower"),
    }

    def check(self, policy: Policy) -> None:
        if not isinstance(policy, Dynamic):
            raise ValueError(
                f"task {self.name} asks which order a dynamic policy takes, and {policy} has that of its "
                "factorization: say --policy dynamic:criterion=confidence, entropy, margin or random"
            )

    def evaluate(self, subject: Subject, items: Sequence[Any]) -> list[dict[str, Any]]:
        questions = self.questions(subject, items)
        ids = padded([one.ids for one in questions])
        forced, own = (_filled(subject, questions, items, given) for given in (ids, None))
        results = []
        for row, question in enumerate(questions):
            where = list(question.targets)
            steps, own_steps = forced.steps[row, where], own.steps[row, where]
            results.append({
                "kendall_tau": kendall_tau(steps), "kendall_tau_own_text": kendall_tau(own_steps),
                "nats": -float(forced.log_probs[row, where].double().sum()), "tokens": len(where),
                "steps": steps.tolist(), "steps_own_text": own_steps.tolist(),
                "own_text": subject.pieces.decode(own.sequences[row, where].tolist(), at_start=True),
            })  # fmt: skip
        return results


def _filled(
    subject: Subject, questions: Sequence[Question], texts: Sequence[str], forced: Tensor | None
) -> GenerateOutput:
    order = Factorization.stack([one.order() for one in questions])
    generators = [documents.generator_of(subject.seed, text) for text in texts]
    made = subject.model.generate(
        padded([one.ids for one in questions]), factorization=order, policy=subject.policy, forced_ids=forced,
        do_sample=False, generator=generators, eos_token_id=(), return_dict_in_generate=True,
    )  # fmt: skip
    assert isinstance(made, GenerateOutput)
    return made


def kendall_tau(steps: Tensor) -> float:
    """Kendall's tau-b between positions and the steps at which they are predicted.

    Args:
        steps: (N,) of the positions from left to right; those of one step are ties.

    Returns:
        1 from left to right, -1 from right to left, 0 where all are predicted at one step.
    """
    sign = (steps[None] - steps[:, None]).sign().triu(diagonal=1)
    pairs, untied = len(steps) * (len(steps) - 1) / 2, int(sign.abs().sum())
    return float(sign.sum()) / math.sqrt(pairs * untied) if untied else 0.0


# ---------------------------------------------------------------------- calibration


@dataclass(frozen=True)
class CalibrationError(Metric):
    """Expected calibration error over bins of confidence; `field` holds three lists in one."""

    def columns(self, results: Sequence[Mapping[str, Any]]) -> Tensor:
        return torch.tensor([one[self.field] for one in results], dtype=torch.float64)

    def statistic(self, sums: Tensor) -> Tensor:
        return calibration_error(sums)


class Calibration(DocumentTask):
    """The probability of the likeliest token, which policies go by, against how often that token is the document's.

    Orders are random: each token is asked for once an order, given a random set of the others, as a policy would find
    it among the open positions.
    """

    name, about = "calibration", "whether the confidence that policies rely on is right"
    metrics: ClassVar[dict[str, Metric]] = {
        "expected_calibration_error": CalibrationError("bins", better="lower"),
        "confidence": Metric("confidence", "predictions"),
        "accuracy": Metric("right", "predictions"),
    }

    def evaluate(self, subject: Subject, items: Sequence[Any]) -> list[dict[str, Any]]:
        results = []
        for orders in self.in_random_orders(subject, items):
            confidence = torch.cat([one.best_log_probs for one in orders]).double().exp()
            right = torch.cat([one.is_best for one in orders]).double()
            results.append({
                "bins": reliability(confidence, right).flatten().tolist(), "confidence": float(confidence.sum()),
                "right": float(right.sum()), "predictions": len(right),
            })  # fmt: skip
        return results


def reliability(confidence: Tensor, right: Tensor) -> Tensor:
    """(3, BINS) float64: of each bin of confidence the predictions, the sum of confidences, and how many are right.

    Args:
        confidence: (N,) in [0, 1].
        right: (N,) 0 or 1.
    """
    number = (confidence * BINS).long().clamp(max=BINS - 1)
    out = torch.zeros(3, BINS, dtype=torch.float64)
    for row, values in zip(out, (torch.ones_like(confidence), confidence, right), strict=True):
        row.index_add_(0, number, values.double())
    return out
