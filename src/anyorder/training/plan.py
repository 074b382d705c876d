"""What a run of adaptation will need, before it is paid for: parameters, memory, arithmetic, days.

Plain arithmetic on the base model's config and on factorizations drawn from the curriculum. Nothing is loaded. The
memory of activations is an estimate: kernels and allocators add to it.

Notation: a token is a content row and, where it is predicted by a row of its own, a query row.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from anyorder.core.layout import lay_out
from anyorder.model.lm_head import CHUNK
from anyorder.training.curriculum import Curriculum, Document

_DRAWS = 64


@dataclass(frozen=True)
class Machine:
    """Where the run would take place.

    Args:
        devices: how many.
        flops: of one device, per second, at the dtype of the run (an H100 in bfloat16: 989e12).
        utilisation: the part of them that training reaches; 0.3 to 0.5 is usual on GPUs.
        sharded: weights, gradients and optimizer are split over the devices (FSDP, ZeRO-3) instead of copied to each.
    """

    devices: int = 1
    flops: float = 989e12
    utilisation: float = 0.35
    sharded: bool = True


@dataclass(frozen=True)
class Run:
    """What would be trained; the fields are those of `anyorder adapt`."""

    curriculum: Curriculum
    recipe: str = "exact"
    rank: int | None = None
    """Of the adapter; None: all weights are trained."""
    gated: bool = True
    """The adapter's kind: rows that it cannot change need no backward pass."""
    tokens: int = 1_000_000
    length: int = 256
    document_length: int = 128
    batch_size: int = 4
    bytes_per_weight: int = 2
    """Of weights that are only read; those that are trained are float32, as are their gradients and Adam's moments."""
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class Plan:
    """The answer. Memory in bytes a device, time in seconds."""

    parameters: int
    trained: int
    rows_per_token: float
    flops_per_token: float
    weights: float
    gradients: float
    optimizer: float
    activations: float
    tokens_per_second: float
    seconds: float

    @property
    def memory(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations

    def describe(self) -> str:
        """A table for people."""
        lines = [
            ("parameters", f"{self.parameters:,}"),
            ("of which trained", f"{self.trained:,} ({self.trained / self.parameters:.2%})"),
            ("rows a token", f"{self.rows_per_token:.2f}"),
            ("arithmetic a token", f"{self.flops_per_token / 1e9:,.2f} GFLOP, forward and backward"),
            ("memory a device", f"{_size(self.memory)} and what kernels and allocator add"),
            ("  weights", _size(self.weights)),
            ("  gradients", _size(self.gradients)),
            ("  optimizer", _size(self.optimizer)),
            ("  activations", f"{_size(self.activations)} (estimate)"),
            ("tokens a second", f"{self.tokens_per_second:,.0f}"),
            ("time", f"{self.seconds / 86400:,.2f} days ({self.seconds / 3600:,.1f} hours)"),
        ]
        return "\n".join(f"{name:22}{value}" for name, value in lines)

    def record(self) -> dict[str, float]:
        """The same for programs."""
        return dataclasses.asdict(self) | {"memory": self.memory}


def plan(config: PretrainedConfig, run: Run, machine: Machine) -> Plan:
    """Estimate a run.

    Args:
        config: of the base model.
        run: what is trained.
        machine: on what.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    decoder = cast(nn.Module, getattr(model, model.base_model_prefix))
    parameters = sum(p.numel() for p in model.parameters())
    linears = [m for m in decoder.modules() if isinstance(m, (nn.Linear, Conv1D))]
    multiplied = sum(m.weight.numel() for m in linears)
    added = 0 if run.rank is None else run.rank * sum(sum(m.weight.shape) for m in linears)
    sizes = config.get_text_config()
    shares = _rows(run)
    layers, hidden = sizes.num_hidden_layers, sizes.hidden_size
    heads = sizes.num_attention_heads * (getattr(sizes, "head_dim", None) or hidden // sizes.num_attention_heads)
    row, attention = 2 * (multiplied + added), 4 * layers * heads * shares["reads"]
    head = 2 * sizes.vocab_size * hidden * shares["predicted"]
    # Backward: gradients of activations cost a forward each; gradients of weights another, where weights are trained.
    through = shares["open"] if run.rank is not None and run.gated else shares["rows"]
    weight_gradients = (2 * multiplied if run.rank is None else 2 * added) * through
    again = (row + attention) * through if run.gradient_checkpointing else 0.0
    heads_backward = head * (2 if run.rank is None else 1)
    forward = (row + attention) * shares["rows"] + head
    flops = forward + (row + 2 * attention) * through + weight_gradients + again + heads_backward
    trained = (parameters if run.rank is None else added) + hidden
    split = machine.devices if machine.sharded else 1
    frozen = parameters + added + hidden - trained
    speed = machine.devices * machine.flops * machine.utilisation / flops
    rows_held = run.batch_size * run.length * shares["rows"]
    return Plan(
        parameters=parameters + added + hidden,
        trained=trained,
        rows_per_token=shares["rows"],
        flops_per_token=flops,
        weights=(frozen * run.bytes_per_weight + trained * 4) / split,
        gradients=trained * 4 / split,
        optimizer=2 * trained * 4 / split,
        activations=rows_held * _activation_bytes(sizes, run) + 2 * 4 * CHUNK * sizes.vocab_size,
        tokens_per_second=speed,
        seconds=run.tokens / speed,
    )


def _rows(run: Run) -> dict[str, float]:
    """Per token, averaged over draws from the whole curriculum: rows, rows with a backward pass, predictions, and keys
    that a row reads."""
    totals = {"rows": 0.0, "open": 0.0, "predicted": 0.0, "reads": 0.0}
    length = min(run.document_length, run.length)
    for i in range(_DRAWS):
        document = Document(length, tuple(range(1, length, 16)))
        order, _ = run.curriculum.draw(document, i / _DRAWS, ["plan", i])
        rows = lay_out(torch.zeros_like(order.group_ids), order, run.recipe).rows
        totals["rows"] += rows.count
        totals["open"] += int((~rows.frozen).sum()) if run.recipe == "exact" else rows.count
        totals["predicted"] += int(order.is_predicted.sum())
        totals["reads"] += float((rows.hi - rows.lo).float().mean()) * length
    return {name: total / (_DRAWS * length) for name, total in totals.items()}


def _activation_bytes(sizes: Any, run: Run) -> float:
    """What the backward pass keeps of one row, in all layers."""
    hidden, inner = sizes.hidden_size, getattr(sizes, "intermediate_size", None) or 4 * sizes.hidden_size
    key_share = (getattr(sizes, "num_key_value_heads", None) or sizes.num_attention_heads) / sizes.num_attention_heads
    # inputs of norms and projections, queries, keys, values, attention's output; gate, up and their product
    layer = hidden * (8 + 2 * key_share) + 4 * inner
    if run.gradient_checkpointing:
        return 2.0 * (sizes.num_hidden_layers * hidden + layer)
    return 2.0 * sizes.num_hidden_layers * layer


def _size(count: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count / 1024:,.1f} KiB"
