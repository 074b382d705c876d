"""The options of `anyorder adapt`, and what they say to transformers' trainer.

Knows names, defaults and which of them go together; loads nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from anyorder.core.options import check_options

LEARNING_RATES = {"none": 1e-4, "lora": 1e-3, "gated": 1e-3}
FIXED = {
    "output_dir", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate",
    "warmup_steps", "use_cpu", "save_steps", "eval_strategy", "eval_steps", "eval_on_start", "logging_steps",
    "include_num_input_tokens_seen", "remove_unused_columns", "metric_for_best_model", "greater_is_better", "seed",
}  # fmt: skip
"""Training arguments that follow from the command's own options, so that --training may not change them."""


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
    parser.add_argument("--objective", choices=("any_order", "masked_diffusion"),
                        help="masked_diffusion: the control, with --adapter lora or none (docs/evaluation.md); "
                             "default: any_order")  # fmt: skip
    parser.add_argument("--adapter", choices=tuple(LEARNING_RATES), default="gated",
                        help="gated (keeps the base model), lora, or none (all weights); default: gated")  # fmt: skip
    parser.add_argument("--rank", type=positive, default=32, metavar="N", help="of the adapter; default: 32")
    coupling = parser.add_mutually_exclusive_group()
    coupling.add_argument("--coupling", action="store_true",
                          help="train with it a coupling, by which the tokens of a group know each other")  # fmt: skip
    coupling.add_argument("--coupling-only", action="store_true",
                          help="train only that; everything else stays as it is")  # fmt: skip
    coupling.add_argument("--scattered-only", action="store_true",
                          help="train only its layers for members that stand apart, as in random order (which it is "
                               "given if it has none); groups that stand together stay as they are")  # fmt: skip
    parser.add_argument("--recipe", choices=("exact", "paper"), help="default: exact, or what the model has")
    _add_sizes(parser, positive)
    parser.add_argument("--attn-implementation", choices=("sdpa", "flex_attention"),
                        help="default: flex_attention on cuda, else sdpa")  # fmt: skip
    parser.add_argument("--training", nargs="+", default=[], metavar="NAME=VALUE",
                        help="further fields of transformers.TrainingArguments: gradient_checkpointing=true, "
                             "report_to=tensorboard, deepspeed=zero3.json, ...")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    parser.add_argument("--resume", action="store_true", help="go on with the run in OUTPUT")
    _add_planning(parser, positive)


def _add_sizes(parser: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
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


def _add_planning(parser: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
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


def training_arguments(pairs: list[str]) -> dict[str, Any]:
    """`name=value` pairs, values in YAML, for what TrainingArguments has and the command has no option for."""
    import yaml
    from transformers import TrainingArguments

    values = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--training takes NAME=VALUE, got {pair!r}")
        if name in FIXED:
            raise ValueError(f"--training {name}: {name} follows from the other options of adapt")
        if name.startswith("torch_compile"):
            raise ValueError(f"--training {name}: training is not compiled: rows differ in number at every step")
        check_options([name], TrainingArguments)
        values[name] = yaml.safe_load(value)
    return values
