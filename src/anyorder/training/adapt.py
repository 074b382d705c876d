"""`anyorder adapt`: from a model and text files to an adapted model, in one command that can be cut and resumed.

OUTPUT/                the adapted model, written when the run is complete
OUTPUT/curves.csv      losses by regime, held-out losses, learning rate and speed, by step
OUTPUT/curves.png      the same as a picture
OUTPUT/checkpoints/    to resume from
OUTPUT/run.json        the options of the run; --resume needs the same
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerBase

    from anyorder.modeling import AnyOrderForCausalLM
    from anyorder.training.curriculum import Curriculum
    from anyorder.training.data import Sequences, Stream
    from anyorder.training.trainer import AnyOrderTrainer

SHUFFLE_BUFFER = 10_000
"""Documents of a stream among which the next one is drawn."""

LEARNING_RATES = {"none": 1e-4, "lora": 1e-3, "gated": 1e-3}
_FIXED = {
    "output_dir", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate",
    "warmup_steps", "use_cpu", "save_steps", "eval_strategy", "eval_steps", "eval_on_start", "logging_steps",
    "include_num_input_tokens_seen", "remove_unused_columns", "metric_for_best_model", "greater_is_better", "seed",
}  # fmt: skip
"""Training arguments that follow from the command's own options, so that --training may not change them."""

_NOT_OF_THE_RUN = {
    "run", "command", "as_typed", "debug", "json", "resume", "output", "device", "save_every", "log_every",
    "attn_implementation", "plan", "devices", "device_flops", "utilisation",
}  # fmt: skip


def add_options(parser: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    """The options of the command; `@FILE` stands for the options in a file, with `#` comments."""
    parser.fromfile_prefix_chars = "@"
    parser.convert_arg_line_to_args = _options_in  # type: ignore[method-assign]
    parser.add_argument("model", help="built-in name, directory, GGUF file or hub id to start from")
    parser.add_argument("output", type=Path, nargs="?", help="directory for the run and its result")
    parser.add_argument("--train-file", nargs="+", default=[], metavar="SOURCE",
                        help="texts: .jsonl, .json, .parquet (records with 'text'), .txt; also .gz; or a data set of "
                             "the hub as owner/name[:config[:split]]")  # fmt: skip
    parser.add_argument("--streaming", action="store_true",
                        help="read while training, shuffled in a buffer, instead of tokenizing all first")  # fmt: skip
    parser.add_argument("--mixture", type=float, nargs="+", metavar="W",
                        help="a weight for each source; default: all texts are one source")  # fmt: skip
    parser.add_argument(
        "--eval-file", nargs="+", default=[], metavar="SOURCE", help="texts for held-out loss in four regimes"
    )
    parser.add_argument("--eval-every", type=positive, default=100, metavar="N", help="steps; default: 100")
    parser.add_argument("--eval-documents", type=positive, default=64, metavar="N", help="the first; default: 64")
    parser.add_argument("--curriculum", default="exact", help="exact, paper, infill or a .yaml file; default: exact")
    parser.add_argument("--adapter", choices=tuple(LEARNING_RATES), default="gated",
                        help="gated (keeps the base model), lora, or none (all weights); default: gated")  # fmt: skip
    parser.add_argument("--rank", type=positive, default=32, metavar="N", help="of the adapter; default: 32")
    parser.add_argument("--recipe", choices=("exact", "paper"), help="default: exact, or what the model has")
    parser.add_argument("--tokens", type=positive, default=1_000_000, metavar="N",
                        help="tokens in the whole run, padding included; default: 1000000")  # fmt: skip
    parser.add_argument("--length", type=positive, default=256, metavar="N", help="tokens of a row; default: 256")
    parser.add_argument("--document-length", type=positive, default=128, metavar="N",
                        help="longer texts are cut at sentence ends; default: 128")  # fmt: skip
    parser.add_argument(
        "--batch-size", type=positive, default=4, metavar="N", help="rows a forward and device; default: 4"
    )
    parser.add_argument("--accumulate", type=positive, default=1, metavar="N", help="forwards a step; default: 1")
    parser.add_argument("--learning-rate", type=float, metavar="R", help="default: 1e-3 for adapters, else 1e-4")
    parser.add_argument("--warmup-steps", type=int, default=20, metavar="N", help="default: 20")
    parser.add_argument("--save-every", type=positive, default=100, metavar="N", help="steps; default: 100")
    parser.add_argument("--log-every", type=positive, default=10, metavar="N", help="steps; default: 10")
    parser.add_argument("--attn-implementation", choices=("sdpa", "flex_attention"),
                        help="default: flex_attention on cuda, else sdpa")  # fmt: skip
    parser.add_argument("--training", nargs="+", default=[], metavar="NAME=VALUE",
                        help="further fields of transformers.TrainingArguments: gradient_checkpointing=true, "
                             "report_to=tensorboard, deepspeed=zero3.json, ...")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    parser.add_argument("--resume", action="store_true", help="go on with the run in OUTPUT")
    planning = parser.add_argument_group("planning a run before paying for it")
    planning.add_argument("--plan", action="store_true",
                          help="print parameters, memory a device, tokens a second, days; train nothing")  # fmt: skip
    planning.add_argument("--devices", type=positive, default=1, metavar="N", help="default: 1")
    planning.add_argument("--device-flops", type=float, default=989e12, metavar="F",
                          help="of one device, per second; default: 989e12 (an H100 in bfloat16)")  # fmt: skip
    planning.add_argument("--utilisation", type=float, default=0.35, metavar="U",
                          help="the part of them that training reaches; default: 0.35")  # fmt: skip


def _options_in(arg_line: str) -> list[str]:
    return arg_line.partition("#")[0].split()


def run(options: argparse.Namespace, load: Callable[..., tuple[Any, Any]]) -> None:
    """Train, or go on training, and save.

    Args:
        options: parsed from `add_options`.
        load: loads the model that the options name, with `adapter=`.
    """
    from anyorder.training.curriculum import Curriculum
    from anyorder.training.heldout import HeldOut
    from anyorder.training.texts import open_texts, read_texts, tokenize

    curriculum = Curriculum.load(options.curriculum)
    if options.plan:
        return _plan(options, curriculum)
    if options.output is None or not options.train_file:
        raise ValueError("adapt needs an output directory and --train-file (or --plan, to estimate a run)")
    texts = [open_texts(source, options.streaming) for source in options.train_file]
    held_out_texts = read_texts(options.eval_file)
    if options.mixture is not None and len(options.mixture) != len(texts):
        raise ValueError(f"--mixture has {len(options.mixture)} weights for {len(texts)} training files")
    further = _training_arguments(options.training)
    attention = _attention(options)
    checkpoint = _prepare(options)  # writes; so a mistake above leaves nothing behind
    model, tokenizer = _model(options, load, attention)
    rows = options.batch_size * options.accumulate * int(os.environ.get("WORLD_SIZE", "1"))
    steps = max(1, options.tokens // (rows * options.length))
    data = _data(options, texts, tokenizer, curriculum, steps * rows)
    longest = min(options.document_length, options.length)
    held_out = tokenize(held_out_texts, tokenizer, longest)[: options.eval_documents] if held_out_texts else []
    trainer = _trainer(options, model, data, HeldOut(held_out) if held_out else None, steps, further)
    with _saved_when_interrupted(trainer) as state, _drawn_at_the_end(trainer, options):
        trainer.train(resume_from_checkpoint=checkpoint)
    if state["interrupted"]:
        print(f"saved at step {trainer.state.global_step} of {steps}; go on with the same command and --resume",
              file=sys.stderr)  # fmt: skip
        raise KeyboardInterrupt
    trainer.save_result(options.output)
    if not trainer.is_world_process_zero():
        return
    tokenizer.save_pretrained(options.output)
    last = [record["loss"] for record in trainer.state.log_history if "loss" in record][-1:]
    report = {"output": str(options.output), "steps": steps, "loss": last[0] if last else None}
    print(json.dumps(report) if options.json else f"{steps} steps, last loss {report['loss']} nats -> {options.output}")


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

    further = _training_arguments(options.training)
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


def _prepare(options: argparse.Namespace) -> str | None:
    """Check the output directory against --resume; the checkpoint to resume from, if any."""
    from anyorder.training import checkpoints

    described = {name: value for name, value in vars(options).items() if name not in _NOT_OF_THE_RUN}
    described = json.loads(json.dumps(described, default=str))
    file = options.output / "run.json"
    found = checkpoints.complete(options.output / "checkpoints") if options.resume else []
    newest = str(found[-1]) if found else None
    if int(os.environ.get("RANK", "0")) > 0:  # the first process checks and writes for all; if it fails, all end
        return newest
    if not options.resume:
        if options.output.exists() and any(options.output.iterdir()):
            raise ValueError(f"{options.output} is not empty: add --resume to go on, or choose another directory")
        options.output.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(described, indent=1) + "\n")
        return None
    if not file.is_file():
        raise ValueError(f"nothing to resume in {options.output}: it has no run.json")
    before = json.loads(file.read_text())
    for name, value in described.items():
        if before.get(name) != value:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"the run in {options.output} has {option} {before.get(name)}, not {value}: use the same")
    if newest is None:
        print("no checkpoint yet: starting from the beginning", file=sys.stderr)
    return newest


def _model(
    options: argparse.Namespace, load: Callable[..., tuple[Any, Any]], attention: str
) -> tuple[AnyOrderForCausalLM, PreTrainedTokenizerBase]:
    import torch

    from anyorder.model.adapters import Adapter

    torch.manual_seed(options.seed)  # the adapter's first factor is random
    more = {} if options.adapter == "none" else {"adapter": Adapter(options.adapter, options.rank)}
    model, tokenizer = load(options, attn_implementation=attention, **more)
    for parameter in model.parameters():  # small updates vanish in 16 bits; the forward casts
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model.train(), tokenizer


def _attention(options: argparse.Namespace) -> str:
    import torch

    device, chosen = torch.device(options.device).type, options.attn_implementation
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
        use_cpu=options.device == "cpu",
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
    assert settings.keys() >= _FIXED
    arguments = TrainingArguments(**settings | further)
    return AnyOrderTrainer(model=model, args=arguments, train_dataset=data, eval_dataset=held_out)


@contextmanager
def _saved_when_interrupted(trainer: AnyOrderTrainer) -> Iterator[dict[str, bool]]:
    """Ctrl-C ends the step that runs, then saves and stops; a second one stops at once."""
    from transformers import TrainerCallback

    state = {"interrupted": False}

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, trainer_state: Any, control: Any, **kwargs: Any) -> None:
            if state["interrupted"]:
                control.should_save = control.should_training_stop = True

    def interrupt(number: int, frame: Any) -> None:
        if state["interrupted"]:
            raise KeyboardInterrupt
        state["interrupted"] = True

    trainer.add_callback(Stop())
    previous = signal.signal(signal.SIGINT, interrupt)
    try:
        yield state
    finally:
        signal.signal(signal.SIGINT, previous)


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


def _training_arguments(pairs: list[str]) -> dict[str, Any]:
    """`name=value` pairs, values in YAML, for what TrainingArguments has and the command has no option for."""
    import yaml
    from transformers import TrainingArguments

    from anyorder.core.validation import check_options

    values = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--training takes NAME=VALUE, got {pair!r}")
        if name in _FIXED:
            raise ValueError(f"--training {name}: {name} follows from the other options of adapt")
        if name.startswith("torch_compile"):
            raise ValueError(f"--training {name}: training is not compiled: rows differ in number at every step")
        check_options([name], TrainingArguments)
        values[name] = yaml.safe_load(value)
    return values
