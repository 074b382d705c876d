"""The public path of `anyorder.decoding.policies`."""

from anyorder.decoding.policies import (
    Dynamic,
    GroupPolicy,
    GroupWise,
    MeasuringPolicy,
    Policy,
    Speculative,
    dynamic,
    groupwise,
    parse,
    speculative,
)

__all__ = [
    "Dynamic", "GroupPolicy", "GroupWise", "MeasuringPolicy", "Policy", "Speculative", "dynamic", "groupwise", "parse",
    "speculative",
]  # fmt: skip
