"""What the processor has, and what OpenVINO is told because of it: none of its hints is left to guess."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

_ALWAYS = {
    "PERFORMANCE_HINT": "LATENCY",
    "NUM_STREAMS": 1,  # steps come one after the other
    "ENABLE_CPU_PINNING": False,  # others may run on the same cores
    "EXECUTION_MODE_HINT": "ACCURACY",
    "KV_CACHE_PRECISION": "f32",
    "INFERENCE_PRECISION_HINT": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
}
_OF_WEIGHTS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {
        "INFERENCE_PRECISION_HINT": "bf16",
        "KV_CACHE_PRECISION": "bf16",
        "EXECUTION_MODE_HINT": "PERFORMANCE",
    },
    # Activations in 8 bits, too, by 32.
    "int8": {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 32, "EXECUTION_MODE_HINT": "PERFORMANCE"},
}


def properties(weights: str) -> dict[str, Any]:
    """How graphs with such weights are compiled."""
    return _ALWAYS | _OF_WEIGHTS[weights] | {"INFERENCE_NUM_THREADS": threads()}


def threads() -> int:
    """As many as PyTorch takes, but no more than there are physical cores to run on: a second thread on a core waits
    for the first."""
    return max(1, min(torch.get_num_threads(), _physical_cores()))


def _physical_cores() -> int:
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = set()
    for number in allowed:
        topology = Path(f"/sys/devices/system/cpu/cpu{number}/topology")
        try:
            core = tuple((topology / name).read_text() for name in ("physical_package_id", "core_id"))
        except OSError:
            core = (str(number),)
        cores.add(core)
    return len(cores)


def has_amx() -> bool:
    """Whether products of bfloat16 are faster than those of float32: elsewhere they are slower."""
    return bool(torch.cpu._is_amx_tile_supported())
