"""`anyorder adapt`: from a model and text files to an adapted model, in one command that can be cut and resumed.

OUTPUT/                the adapted model, written when the run is complete
OUTPUT/curves.csv      losses by regime, held-out losses, learning rate and speed, by step
OUTPUT/curves.png      the same as a picture
OUTPUT/checkpoints/    to resume from
OUTPUT/run.json        the options of the run; --resume needs the same
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import sys
from collections.abc import Callable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from anyorder.training.options import FIXED, LEARNING_RATES, add_options, training_arguments

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from transformers import PreTrainedTokenizerBase

    from anyorder.modeling import AnyOrderForCausalLM
    from anyorder.training.curriculum import Curriculum
    from anyorder.training.data import Sequences, Stream
    from anyorder.training.interruption import Interruption
    from anyorder.training.trainer import AnyOrderTrainer

__all__ = ["add_options", "run"]

SHUFFLE_BUFFER = 10_000
"""Documents of a stream among which the next one is drawn."""


def run(options: argparse.Namespace, load: Callable[..., tuple[Any, Any]]) -> None:
    """Train, or go on training, and save.

    Args:
        options: parsed from `add_options`.
        load: loads the model that the options name, with `adapter=`.
    """
    from anyorder.training.curriculum import Curriculum

    curriculum = Curriculum.load(options.curriculum)
    if options.plan:
        return _plan(options, curriculum)
    interruption = _run(options, load, curriculum)
    _leave_the_others()
    if interruption is not None:
        interruption.stop()


def _run(
    options: argparse.Namespace, load: Callable[..., tuple[Any, Any]], curriculum: Curriculum
) -> Interruption | None:
    """The run; what comes back is what ended it before its last step."""
    from anyorder.training import run_directory
    from anyorder.training.data import check_workers
    from anyorder.training.heldout import HeldOut
    from anyorder.training.interruption import saved_when_interrupted
    from anyorder.training.texts import open_texts, read_texts, tokenize

    if options.output is None or not options.train_file:
        raise ValueError("adapt needs an output directory and --train-file (or --plan, to estimate a run)")
    texts = [open_texts(source, options.streaming) for source in options.train_file]
    held_out_texts = read_texts(options.eval_file)
    if options.mixture is not None and len(options.mixture) != len(texts):
        raise ValueError(f"--mixture has {len(options.mixture)} weights for {len(texts)} training files")
    further = training_arguments(options.training)
    if options.streaming:
        check_workers(further.get("dataloader_num_workers", 0))
    attention = _attention(options)
    checkpoint = run_directory.check(options)
    model, tokenizer = _model(options, load, attention)
    rows = options.batch_size * options.accumulate * int(os.environ.get("WORLD_SIZE", "1"))
    steps = max(1, options.tokens // (rows * options.length))
    data = _data(options, texts, tokenizer, curriculum, steps * rows)
    longest = min(options.document_length, options.length)
    held_out = tokenize(held_out_texts, tokenizer, longest)[: options.eval_documents] if held_out_texts else []
    with run_directory.begun(options):
        trainer = _trainer(options, model, data, HeldOut(held_out) if held_out else None, steps, further)
    with saved_when_interrupted(trainer) as interruption, _drawn_at_the_end(trainer, options):
        trainer.train(resume_from_checkpoint=checkpoint)
    if interruption.signal is not None and trainer.state.global_step < steps:
        print(f"saved at step {trainer.state.global_step} of {steps}; go on with the same command and --resume",
              file=sys.stderr)  # fmt: skip
        return interruption
    trainer.save_result(options.output)
    if not trainer.is_world_process_zero():
        return None
    tokenizer.save_pretrained(options.output)
    last = [record["loss"] for record in trainer.state.log_history if "loss" in record][-1:]
    report = {"output": str(options.output), "steps": steps, "loss": last[0] if last else None}
    print(json.dumps(report) if options.json else f"{steps} steps, last loss {report['loss']} nats -> {options.output}")
    return None


def _leave_the_others() -> None:
    """Leave the process group, if there is one, and end its threads, while Python is whole.

    A thread of gloo that lets go of a tensor while the interpreter ends aborts the process ("terminate called without
    an active exception"). Not for runs that fail: the others may be waiting, and only an exit tells them.
    """
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        gc.collect()  # threads live as long as the group, and the wrapped model, which refers to itself, holds it


def _data(
    options: argparse.Namespace,
    texts: list[Any],
    tokenizer: PreTrainedTokenizerBase,
    curriculum: Curriculum,
    count: int,
) -> Sequences | Stream:
    from anyorder.training.data import Sequences, Stream
    from anyorder.training.texts import Documents, tokenized

    longest = min(options.document_length, options.length)
    sources = [tokenized(found, tokenizer, longest) for found in texts]
    if not options.streaming:
        documents = [Documents(source) for source in sources]
        return Sequences(documents, options.length, curriculum, count, options.seed, options.mixture)
    import datasets

    weights = [weight / sum(options.mixture) for weight in options.mixture] if options.mixture else None
    if len(sources) > 1:
        sources = [datasets.interleave_datasets(sources, weights, options.seed, stopping_strategy="all_exhausted")]
    shuffled = sources[0].shuffle(options.seed, buffer_size=SHUFFLE_BUFFER)
    return Stream(shuffled, options.length, curriculum, count, options.seed)


def _plan(options: argparse.Namespace, curriculum: Curriculum) -> None:
    from transformers import AutoConfig

    from anyorder.hub.resolve import resolve
    from anyorder.training.plan import Machine, Run, plan

    further = training_arguments(options.training)
    if options.objective == "masked_diffusion":
        raise ValueError("--plan counts the rows of any-order training: leave --objective masked_diffusion out")
    if not 0 < options.utilisation <= 1 or options.device_flops <= 0:
        raise ValueError(f"--utilisation {options.utilisation} must be in (0, 1], --device-flops above 0")
    config = AutoConfig.from_pretrained(resolve(options.model)).get_text_config()
    run = Run(
        curriculum,
        options.recipe or "exact",
        None if options.adapter == "none" else options.rank,
        options.adapter == "gated",
        options.tokens,
        options.length,
        options.document_length,
        options.batch_size,
        4 if options.dtype == "float32" else 2,
        bool(further.get("gradient_checkpointing")),
    )
    machine = Machine(options.devices, options.device_flops, options.utilisation)
    result = plan(config, run, machine)
    print(json.dumps(result.record()) if options.json else result.describe())


def _model(
    options: argparse.Namespace, load: Callable[..., tuple[Any, Any]], attention: str
) -> tuple[AnyOrderForCausalLM, PreTrainedTokenizerBase]:
    import torch

    from anyorder.model.adapters import Adapter
    from anyorder.model.coupling import Coupling

    torch.manual_seed(options.seed)  # the adapter's first factor is random
    more = {} if options.adapter == "none" else {"adapter": Adapter(options.adapter, options.rank)}
    model, tokenizer = load(options, attn_implementation=attention, **more)
    if model.coupling is None and (options.coupling or options.coupling_only):
        model.couple(Coupling(drafts=options.adapter != "lora"))  # these learn from the base's own rows
    if options.scattered_only:
        _add_scattered(model)
    if options.coupling_only or options.scattered_only:
        model.requires_grad_(False)
        assert model.coupling is not None
        trained = model.coupling.scattered if options.scattered_only else model.coupling
        trained.requires_grad_(True)
    for parameter in model.parameters():  # small updates vanish in 16 bits; the forward casts
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model.train(), tokenizer


def _add_scattered(model: AnyOrderForCausalLM) -> None:
    """Layers for scattered members, if the model's coupling has none.

    Raises:
        ValueError: if it has no coupling.
    """
    from anyorder.model.coupling import Coupling

    if model.coupling is None:
        raise ValueError("--scattered-only adds to a coupling, and the model has none: train one with --coupling-only")
    if model.coupling.scattered is None:
        model.couple(dataclasses.replace(Coupling.from_dict(model.config.coupling), scattered=True))


def _device(name: str) -> torch.device:
    """The device to train on: the first of its kind, as the trainer takes that one whatever it is told.

    Raises:
        ValueError: for a name that torch does not know, or another device than the first.
    """
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name!r} is no device: cpu, cuda or mps") from None
    if device.index:
        visible = f"CUDA_VISIBLE_DEVICES={device.index}" if device.type == "cuda" else "the environment"
        raise ValueError(
            f"--device {name}: training takes the first device that is visible; make this one the first by {visible} "
            f"and use --device {device.type}"
        )
    return device


def _attention(options: argparse.Namespace) -> str:
    device, chosen = _device(options.device).type, options.attn_implementation
    if chosen == "flex_attention" and device == "cpu":
        raise ValueError("--attn-implementation flex_attention has no backward pass on cpu: use sdpa, or --device cuda")
    return chosen or ("flex_attention" if device == "cuda" else "sdpa")


def _trainer(
    options: argparse.Namespace,
    model: AnyOrderForCausalLM,
    data: Any,
    held_out: Any,
    steps: int,
    further: dict[str, Any],
) -> AnyOrderTrainer:
    from transformers import TrainingArguments

    from anyorder.training.trainer import AnyOrderTrainer

    rate = options.learning_rate if options.learning_rate is not None else LEARNING_RATES[options.adapter]
    settings: dict[str, Any] = dict(
        output_dir=str(options.output / "checkpoints"),
        max_steps=steps,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulate,
        learning_rate=rate,
        warmup_steps=min(options.warmup_steps, steps // 2),
        lr_scheduler_type="linear",
        weight_decay=0.0,
        adam_beta2=0.98,
        bf16=options.dtype == "bfloat16",
        use_cpu=_device(options.device).type == "cpu",
        save_steps=options.save_every,
        save_total_limit=2,
        eval_strategy="no" if held_out is None else "steps",
        eval_steps=options.eval_every,
        eval_on_start=held_out is not None,
        logging_steps=options.log_every,
        include_num_input_tokens_seen="all",
        report_to="none",
        remove_unused_columns=False,
        accelerator_config={"dispatch_batches": False},  # every process reads the stream and takes its own rows
        disable_tqdm=not sys.stderr.isatty(),
        metric_for_best_model=None if held_out is None else "loss",
        greater_is_better=False,
        seed=options.seed,
    )
    assert settings.keys() >= FIXED
    arguments = TrainingArguments(**settings | further)
    return AnyOrderTrainer(model=model, args=arguments, train_dataset=data, eval_dataset=held_out)


@contextmanager
def _drawn_at_the_end(trainer: AnyOrderTrainer, options: argparse.Namespace) -> Iterator[None]:
    """Curves are written at every checkpoint and however the run ends."""
    from transformers import TrainerCallback

    from anyorder.training import curves

    def draw() -> None:
        history = trainer.state.log_history
        if trainer.is_world_process_zero() and curves.rows(history):
            curves.write_csv(history, options.output / "curves.csv")
            curves.plot(history, options.output / "curves.png", f"{options.model}, {options.curriculum}")

    class Draw(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            draw()

    trainer.add_callback(Draw())
    try:
        yield
    finally:
        draw()
