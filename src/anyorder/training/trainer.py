"""A thin subclass of transformers' Trainer: any-order batches in, cross-entropy of the query stream out."""

from __future__ import annotations

from collections.abc import Sized
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainerControl

from anyorder.adapters import WEIGHTS_FILE
from anyorder.checkpoint import QUERY_FILE, read_weights
from anyorder.factorization import Factorization


class AnyOrderTrainer(Trainer):
    """Trains on `data.Sequences`, whose order is part of the data: a sequence is a function of its number."""

    control: TrainerControl

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> SequentialSampler:
        return SequentialSampler(cast(Sized, train_dataset if train_dataset is not None else self.train_dataset))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Mean negative log-likelihood of the predicted tokens, in nats."""
        order = Factorization(inputs["group_ids"].cpu(), inputs["document_ids"].cpu())
        output = model(input_ids=inputs["input_ids"], factorization=order, labels=inputs["input_ids"])
        return (output.loss, output) if return_outputs else output.loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Held-out nats per token in four regimes, and their mean as the loss. The data set is a `HeldOut`."""
        held_out = eval_dataset if eval_dataset is not None else self.eval_dataset
        training = self.model.training
        self.model.eval()
        losses = held_out.losses(self.model)
        self.model.train(training)
        metrics = {f"{metric_key_prefix}_{name}": loss for name, loss in losses.items()}
        metrics[f"{metric_key_prefix}_loss"] = sum(losses.values()) / len(losses)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        model = self.model if model is None else model
        if model.config.adapter is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        directory = Path(resume_from_checkpoint)
        read_weights(model, directory / WEIGHTS_FILE, directory / QUERY_FILE)
