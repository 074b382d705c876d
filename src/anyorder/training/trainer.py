"""A thin subclass of transformers' Trainer: any-order batches in, cross-entropy of the query stream out."""

from __future__ import annotations

import logging
import time
from collections.abc import Sized
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainerControl, TrainingArguments
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from anyorder.core.factorization import Factorization
from anyorder.hub.checkpoint import read_weights
from anyorder.training import checkpoints
from anyorder.training.data import Sequences, Stream, check_workers, collate

logger = logging.getLogger(__name__)

COUPLING_FASTER = 2.0
"""Its learning rate, of the others'."""


class AnyOrderTrainer(Trainer):
    """Trains on `data.Sequences` or a `data.Stream`, whose order is part of the data: it is never shuffled here.

    Beside the loss it logs `loss_<regime>`, the mean over the tokens since the last log that were predicted under this
    regime of the curriculum, and `tokens_per_second`.
    """

    control: TrainerControl
    train_dataset: Sequences | Stream

    def __init__(self, *, args: TrainingArguments, train_dataset: Sequences | Stream, **kwargs: Any):
        if isinstance(train_dataset, Stream):
            check_workers(args.dataloader_num_workers)
        if args.n_gpu > 1:  # DataParallel would take as many batches a step, and cannot split a packed row
            logger.warning("%d devices are visible, one is used; for all of them: torchrun", args.n_gpu)
            args._n_gpu = 1  # what transformers itself does to keep DataParallel away
        super().__init__(args=args, train_dataset=train_dataset, data_collator=collate, **kwargs)
        if not self.args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(LiveProgress)
        self.taught = self.accelerator.unwrap_model(self.model).coupling is not None
        self._regimes = self.train_dataset.curriculum.names
        self._start_counting()

    def _start_counting(self) -> None:
        self._sums = torch.zeros(2, len(self._regimes), dtype=torch.float64)  # of losses, of predicted tokens
        self._tokens, self._since = 0, time.monotonic()

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> SequentialSampler:
        return SequentialSampler(cast(Sized, train_dataset if train_dataset is not None else self.train_dataset))

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """transformers' own; a coupling, which starts from nothing, learns faster than what stands already."""
        begun = self.optimizer is None
        optimizer = super().create_optimizer(model)
        coupling = {id(p) for n, p in (model or self.model).named_parameters() if "coupling." in n}
        for group in list(optimizer.param_groups) if begun else []:
            own = [p for p in group["params"] if id(p) in coupling]
            if own:
                group["params"] = [p for p in group["params"] if id(p) not in coupling]
                optimizer.add_param_group(group | {"params": own, "lr": COUPLING_FASTER * group["lr"]})
        return optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Mean negative log-likelihood, in nats, of the predicted tokens of the whole step; of a model with a coupling
        the distance from its base where that is in the forward (see `AnyOrderForCausalLM.forward`)."""
        order = Factorization(inputs["group_ids"].cpu(), inputs["document_ids"].cpu())
        named: dict[str, Any] = {"input_ids": inputs["input_ids"], "factorization": order, "labels": inputs["labels"]}
        named["taught"] = self.taught
        loss, output = super().compute_loss(model, named, True, num_items_in_batch)
        self._count(inputs, output.token_losses)
        return (loss, output) if return_outputs else loss

    def _count(self, inputs: dict[str, Tensor], losses: Tensor) -> None:
        predicted = inputs["labels"] != -100
        regimes, kinds = inputs["regime_ids"][predicted].cpu(), len(self._regimes)
        weights = losses[predicted].double().cpu()
        self._sums += torch.stack([torch.bincount(regimes, weights, kinds), torch.bincount(regimes, None, kinds)])
        self._tokens += predicted.numel()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the losses by regime and the speed beside a training loss."""
        if "loss" in logs:
            tokens = torch.tensor([float(self._tokens)], dtype=torch.float64)
            sums, tokens = self.accelerator.reduce([self._sums.to(self.args.device), tokens.to(self.args.device)])
            for name, total, count in zip(self._regimes, *sums.tolist(), strict=True):
                if count:
                    logs[f"loss_{name}"] = total / count
            logs["tokens_per_second"] = tokens.item() / (time.monotonic() - self._since)
            self._start_counting()
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Held-out nats per token in four regimes, and their mean as the loss. The data set is a `HeldOut`."""
        held_out, started = eval_dataset if eval_dataset is not None else self.eval_dataset, time.monotonic()
        training = self.model.training
        self.model.eval()
        losses = held_out.losses(self.model)
        self.model.train(training)
        metrics = {f"{metric_key_prefix}_{name}": loss for name, loss in losses.items()}
        metrics[f"{metric_key_prefix}_loss"] = sum(losses.values()) / len(losses)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._since += time.monotonic() - started  # not training
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """The best so far is saved wherever it is measured."""
        best = super()._determine_best_metric(metrics, trial)
        self.control.should_save |= best and self.state.global_step > 0
        return best

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial))
        with checkpoints.writing(folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"):
            super()._save_checkpoint(model, trial)

    def save_result(self, directory: Path) -> None:
        """Write the model for users, without the trainer's own files; to be called in every process."""
        split = self.is_fsdp_enabled or self.is_deepspeed_enabled
        state_dict = self.accelerator.get_state_dict(self.model_wrapped) if split else None
        self.model.save_pretrained(directory, state_dict=state_dict, is_main_process=self.is_world_process_zero())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        model, directory = self.model if model is None else model, Path(resume_from_checkpoint)
        with checkpoints.reading(directory):
            if model.config.adapter is None:
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            else:
                read_weights(model, directory.joinpath)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            with checkpoints.reading(Path(checkpoint)):
                super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            with checkpoints.reading(Path(checkpoint)):
                super()._load_rng_state(checkpoint)


class LiveProgress(ProgressCallback):
    """One bar that shows the newest losses by regime and the speed, in place of a printed record at every log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Show what a training log holds; held-out losses get a line of their own."""
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        shown = {name.removeprefix("loss_"): f"{value:.3f}" for name, value in logs.items() if name.startswith("loss")}
        if shown:
            shown["tokens/s"] = f"{logs['tokens_per_second']:.0f}"
            self.training_bar.set_postfix(shown)
        elif "eval_loss" in logs:
            losses = ", ".join(f"{n.removeprefix('eval_')} {v:.3f}" for n, v in logs.items() if n.count("_") > 1)
            self.training_bar.write(f"step {state.global_step}, held out: {losses}")
