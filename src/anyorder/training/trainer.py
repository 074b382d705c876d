"""A thin subclass of transformers' Trainer: any-order batches in, cross-entropy of the query stream out.

One process so far: the loss is computed beside the model's forward, which wrappers for several processes need.
"""

from __future__ import annotations

from collections.abc import Sized
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer

from anyorder import adapters
from anyorder.checkpoint import QUERY_FILE
from anyorder.factorization import Factorization
from anyorder.modeling import AnyOrderForCausalLM
from anyorder.training.objective import negative_log_likelihoods


class AnyOrderTrainer(Trainer):
    """Trains on `data.Sequences`, whose order is part of the data: a sequence is a function of its number."""

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> SequentialSampler:
        return SequentialSampler(cast(Sized, train_dataset if train_dataset is not None else self.train_dataset))

    def compute_loss(
        self,
        model: AnyOrderForCausalLM,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Mean negative log-likelihood of the predicted tokens, in nats."""
        order = Factorization(inputs["group_ids"].cpu(), inputs["document_ids"].cpu())
        losses, _ = negative_log_likelihoods(model, inputs["input_ids"], order)
        loss = losses.mean()
        return (loss, {"loss": loss}) if return_outputs else loss

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        model = self.model if model is None else model
        if model.config.adapter is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        directory = Path(resume_from_checkpoint)
        adapters.load(model.causal_lm, directory / adapters.WEIGHTS_FILE)
        with torch.no_grad():
            model.query_embedding.copy_(load_file(directory / QUERY_FILE)["query_embedding"])
