"""What OpenVINO is told of the processor: none of its hints is left to guess."""

from __future__ import annotations

from typing import Any

from anyorder.runtime.processor import threads

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
    # Activations in 8 bits, too, by 64: by 32 a step of 15 rows takes a tenth longer.
    "int8": {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 64, "EXECUTION_MODE_HINT": "PERFORMANCE"},
    "int4": {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 64, "EXECUTION_MODE_HINT": "PERFORMANCE"},
}


def properties(weights: str) -> dict[str, Any]:
    """How graphs with such weights are compiled."""
    return _ALWAYS | _OF_WEIGHTS[weights] | {"INFERENCE_NUM_THREADS": threads()}
