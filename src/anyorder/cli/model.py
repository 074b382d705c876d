"""Which model a command works with: its options, and loading it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from anyorder.hub.resolve import DEFAULT_MODEL

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TorchAoConfig

    from anyorder.modeling import AnyOrderForCausalLM


def add_model(parser: argparse.ArgumentParser) -> None:
    """Which model, and how to load it."""
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, metavar="NAME",
        help=f"built-in name, directory, GGUF file or hub id; default: {DEFAULT_MODEL}",
    )  # fmt: skip
    parser.add_argument("--int8", action="store_true", help="hold the weights of linear layers in 8 bits, by torchao")
    add_device(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    """How to load a model."""
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="default: %(default)s"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps, ...; default: cpu")
    parser.add_argument(
        "--base-model",
        metavar="NAME",
        help="of an adapter whose base has moved: where that is; a name, directory or file",
    )


def load_model(options: argparse.Namespace, **more: Any) -> tuple[AnyOrderForCausalLM, PreTrainedTokenizerBase]:
    """The converted model and its tokenizer; `more` goes to `load`.

    Raises:
        ValueError: if there is no such model or device.
    """
    import torch

    device = find_device(options.device)
    if getattr(options, "int8", False):
        more["quantization_config"] = _int8()
    if options.base_model is not None:
        more["base_model"] = options.base_model
    from anyorder.loading import load

    dtype: torch.dtype = getattr(torch, options.dtype)
    model, tokenizer = load(options.model, recipe=getattr(options, "recipe", None), dtype=dtype, **more)
    return model.to(device), tokenizer


def load_ready(options: argparse.Namespace, **more: Any) -> tuple[AnyOrderForCausalLM, PreTrainedTokenizerBase]:
    """As `load_model`, the model made ready for --engine and --weights, which run its steps from then on.

    Raises:
        ValueError: likewise, and if the engine cannot run it; a mistyped one before the model is loaded.
    """
    from anyorder.runtime.engines import check_engine, prefer

    check_engine(options.engine, options.weights)
    model, tokenizer = load_model(options, **more)
    prefer(model, options.engine, options.weights)
    return model, tokenizer


def load_judge(options: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The plain causal LM that --judge names, as it is, and its tokenizer.

    Raises:
        ValueError: if there is no such model, or it is a converted one.
    """
    import torch
    from transformers import AutoTokenizer

    from anyorder.hub.converted import ConvertedModel
    from anyorder.hub.pretrained import load_causal_lm
    from anyorder.hub.resolve import resolve

    dtype: torch.dtype = getattr(torch, options.dtype)
    judge = load_causal_lm(options.judge, dtype=dtype)
    if isinstance(judge, ConvertedModel):
        raise ValueError(f"--judge {options.judge} is a converted model; a judge is a plain causal LM: name its base")
    return judge.to(find_device(options.device)).eval(), AutoTokenizer.from_pretrained(resolve(options.judge))


def find_device(name: str) -> torch.device:
    """The device of a name.

    Raises:
        ValueError: if there is none, or none on this machine.
    """
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)  # a device that torch knows may not be there
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        here = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        here += ["mps"] if torch.backends.mps.is_available() else []
        raise ValueError(f"--device {name!r} cannot be used; this machine has {', '.join(here)}") from error
    return device


def _int8() -> TorchAoConfig:
    try:
        from torchao.quantization import Int8WeightOnlyConfig
    except ImportError as error:
        raise ValueError("--int8 needs torchao: pip install 'anyorder[int8]'") from error
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())
