"""Low-rank adapters on PEFT, gated so that they cannot make the base model worse.

`gated`: an adapter acts only on rows whose gate is open: rows that stand where the base model never stands (`layout`).
Every other row takes the base layer's output untouched, bit for bit, and costs nothing more (`gates`).

`lora`: PEFT's ordinary LoRA on every row.

On disk both are PEFT's own files. This module knows layers; which rows are open is the layout's business.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from anyorder.core.options import check_saved_fields
from anyorder.model import gates

if TYPE_CHECKING:
    from peft import LoraConfig

KINDS = ("gated", "lora")
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."  # of PEFT's files
_NAME = "default"


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What to add to a base model.

    Args:
        kind: "gated" or "lora".
        rank: of the two factors.
        alpha: updates are scaled by alpha / rank; default: rank.
        dropout: on the adapter's input, in training.
        target_modules: names of linear layers; default: all of the decoder (fused experts are none).

    Raises:
        ValueError: naming the value that cannot be meant.
    """

    kind: Literal["gated", "lora"] = "gated"
    rank: int = 64
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: list[str] | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"adapter must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if isinstance(self.target_modules, str):
            raise ValueError(f"target_modules must be a list of names, got {self.target_modules!r}")

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Adapter:
        """The adapter of a saved config; ValueError for a field that this version does not know."""
        check_saved_fields(fields, cls, "the adapter")
        return cls(**fields)

    def lora_config(self) -> LoraConfig:
        """PEFT's config of it."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank,
            lora_alpha=self.rank if self.alpha is None else self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.target_modules,
            task_type="CAUSAL_LM",
        )


def attach(causal_lm: PreTrainedModel, adapter: Adapter) -> None:
    """Freeze the base model and add a new adapter, whose update is zero until it is trained.

    Raises:
        ValueError: if a target is no layer that such an adapter can stand on.
    """
    from peft import inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    config, linear = adapter.lora_config(), (nn.Linear, Conv1D)
    decoder = getattr(causal_lm, causal_lm.base_model_prefix)
    if adapter.kind == "gated":
        served = {name for name, module in gates.inside_layers(causal_lm) if isinstance(module, linear)}
    else:
        served = {name for name, module in decoder.named_modules() if isinstance(module, linear)}
    if adapter.target_modules is None:
        config.target_modules = {name.rpartition(".")[2] for name in served}
    else:
        _check_targets(causal_lm, adapter, served)
    if adapter.kind == "gated":
        named = (name for name, _ in causal_lm.named_modules())
        config.exclude_modules = [
            name for name in named if name not in served and name.rpartition(".")[2] in config.target_modules
        ] or None
        config._register_custom_module({nn.Linear: gates.gated_linear(), Conv1D: gates.gated_linear()})
        gates.open_in_layers(causal_lm)
    causal_lm.requires_grad_(False)
    inject_adapter_in_model(config, causal_lm, adapter_name=_NAME)
    for name, parameter in causal_lm.named_parameters():
        if "lora_" in name:  # small updates vanish in 16 bits; `checkpoint` casts what is only read
            parameter.data = parameter.data.float()


def _check_targets(causal_lm: PreTrainedModel, adapter: Adapter, served: set[str]) -> None:
    """Raise ValueError unless every target names modules, and with gates only linear ones inside decoder layers."""
    every = [name for name, _ in causal_lm.named_modules() if name]
    leaves = sorted({name.rpartition(".")[2] for name in served})
    for target in adapter.target_modules or []:
        matched = [name for name in every if name == target or name.endswith(f".{target}")]
        if not matched:
            near = difflib.get_close_matches(target, leaves, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"its linear layers: {', '.join(leaves)}"
            raise ValueError(f"target_modules: the model has no module {target!r}; {hint}")
        outside = [name for name in matched if name not in served]
        if adapter.kind == "gated" and outside:
            raise ValueError(
                f"target_modules: a gated adapter acts on rows of linear layers inside the decoder's layers, and "
                f"{outside[0]} is none; leave {target!r} out, or use kind='lora', which acts everywhere"
            )


def check_bare(model: nn.Module) -> None:
    """Raise ValueError for a model that carries PEFT adapters already, whoever put them there."""
    if "peft" not in sys.modules:  # then nobody has
        return
    from peft import PeftMixedModel, PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    if isinstance(model, (PeftModel, PeftMixedModel)):
        raise ValueError(
            f"the model is a {type(model).__name__}: fold its adapters into the weights with merge_and_unload(), or "
            "take them off with unload(), and convert what that returns"
        )
    carried = (name for name, m in model.named_modules() if isinstance(m, (BaseTunerLayer, ModulesToSaveWrapper)))
    first = next(carried, None)
    if first is not None:
        raise ValueError(
            f"the model carries PEFT adapters already, on {first} for one: load its base, put them on it with "
            "peft.PeftModel.from_pretrained(base, directory), and convert what merge_and_unload() returns"
        )


def quantise_base(causal_lm: PreTrainedModel, config: Any) -> None:
    """Quantise the weights that an adapter stands beside; the adapter itself stays as it is.

    Args:
        causal_lm: with an adapter.
        config: a `transformers.TorchAoConfig`.

    Raises:
        ValueError: for another kind of config, or without torchao.
    """
    from transformers import TorchAoConfig

    if not isinstance(config, TorchAoConfig):
        raise ValueError(
            f"quantization_config of a model with an adapter must be a TorchAoConfig, got a {type(config).__name__}"
        )
    from torchao.quantization import quantize_

    quantize_(causal_lm, config.quant_type, filter_fn=lambda module, name: name.endswith(".base_layer"))


def first_layer(model: nn.Module) -> nn.Module | None:
    """One layer with an adapter; PEFT turns all of them off and on together (`disable_adapters`)."""
    return next((module for module in model.modules() if hasattr(module, "lora_A")), None)


def merge(causal_lm: PreTrainedModel) -> None:
    """Fold an ungated adapter into the weights and take it off.

    Raises:
        ValueError: for a gated one, which acts on some rows only and so is no change of weights.
    """
    from peft.tuners.lora import LoraLayer

    for name, layer in list(causal_lm.named_modules()):
        if isinstance(layer, LoraLayer):
            if isinstance(layer, gates.gated_linear()):
                raise ValueError("a gated adapter cannot be merged: it acts on some rows only")
            layer.merge()
            parent, _, child = name.rpartition(".")
            setattr(causal_lm.get_submodule(parent), child, layer.base_layer)


# ---------------------------------------------------------------------- on disk


def save(
    causal_lm: PreTrainedModel, directory: Path, base: str | None, state_dict: dict[str, Tensor] | None = None
) -> None:
    """Write PEFT's adapter_config.json and adapter_model.safetensors.

    `state_dict`: the model's, gathered, where its own parameters are split over several processes.
    """
    from peft import get_peft_model_state_dict

    directory.mkdir(parents=True, exist_ok=True)
    weights = get_peft_model_state_dict(causal_lm, state_dict, adapter_name=_NAME)
    config = copy.copy(causal_lm.peft_config[_NAME])
    config.base_model_name_or_path = base
    config.inference_mode = True
    config.save_pretrained(str(directory))
    save_file(
        {_PREFIX + name: tensor.contiguous() for name, tensor in weights.items()},
        directory / WEIGHTS_FILE,
        metadata={"format": "pt"},
    )


def load(causal_lm: PreTrainedModel, file: Path) -> None:
    """Read the weights of an attached adapter from PEFT's safetensors file.

    Raises:
        ValueError: if one is missing, unknown or of another shape.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    found = {name.removeprefix(_PREFIX): tensor for name, tensor in load_file(file).items()}
    expected = get_peft_model_state_dict(causal_lm, adapter_name=_NAME)
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "unknown": sorted(found.keys() - expected.keys()),
        "of another shape": [n for n in expected.keys() & found.keys() if expected[n].shape != found[n].shape],
    }
    wrong = [f"{kind}: {', '.join(names[:3])}" for kind, names in problems.items() if names]
    if wrong:
        raise ValueError(f"{file} does not fit the model; weights {'; '.join(wrong)}")
    if is_split(causal_lm):
        named: dict[str, Any] = {name.replace(".weight", f".{_NAME}.weight"): tensor for name, tensor in found.items()}
        set_model_state_dict(causal_lm, named, options=StateDictOptions(full_state_dict=True, strict=False))
    else:
        set_peft_model_state_dict(causal_lm, found, adapter_name=_NAME)


def is_split(model: nn.Module) -> bool:
    """Whether each process holds a part of the parameters only (FSDP2, DeepSpeed ZeRO-3)."""
    return any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in model.parameters())


# ---------------------------------------------------------------------- which base


def fingerprint(causal_lm: PreTrainedModel, samples: int = 8) -> dict[str, list[float]]:
    """A few values of some weights, by which a base model is known again whatever dtype it is loaded in."""
    named = [(name, p) for name, p in causal_lm.named_parameters() if "lora_" not in name]
    chosen = named[:: max(1, len(named) // 16)]
    out = {}
    for name, parameter in chosen:
        flat = parameter.detach().flatten()
        index = torch.arange(samples, device=flat.device) * (flat.numel() - 1) // (samples - 1)
        out[name.replace(".base_layer.", ".")] = flat[index].float().cpu().tolist()
    return out


def check_fingerprint(causal_lm: PreTrainedModel, expected: dict[str, list[float]], name: str) -> None:
    """Raise ValueError unless the weights are those that the adapter was trained on, up to rounding to 16 bits."""
    found = fingerprint(causal_lm)
    if found.keys() != expected.keys():
        raise ValueError(f"the adapter was trained on another model than {name}: its layers have other names")
    for key, values in expected.items():
        a, b = torch.tensor(values), torch.tensor(found[key])
        if a.shape != b.shape or not torch.allclose(a, b, rtol=8e-3, atol=1e-6):
            raise ValueError(f"the adapter was trained on another model than {name}: {key} differs")
