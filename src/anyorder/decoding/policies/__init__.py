"""Policies: which positions decoding predicts and commits next. Each is an immutable object, passed as `policy=`."""

from __future__ import annotations

from typing import Any

from anyorder.core.options import check_options, parse_options
from anyorder.decoding.policies.base import GroupPolicy, MeasuringPolicy, Policy
from anyorder.decoding.policies.dynamic import Criterion, Dynamic
from anyorder.decoding.policies.groupwise import GroupWise
from anyorder.decoding.policies.speculative import Speculative

__all__ = [
    "Dynamic", "GroupPolicy", "GroupWise", "MeasuringPolicy", "Policy", "Speculative", "dynamic", "groupwise", "parse",
    "speculative",
]  # fmt: skip


def groupwise(size: int | None = None) -> GroupWise:
    """Commit the factorization's groups one after the other: see `GroupWise`."""
    return GroupWise(size)


def dynamic(criterion: Criterion = "confidence", **options: Any) -> Dynamic:
    """Commit the positions that the model is surest of: see `Dynamic`."""
    check_options(options, Dynamic)
    return Dynamic(criterion, **options)


def speculative(**options: Any) -> Speculative:
    """The factorization's order one token at a time, exactly, in fewer forwards: see `Speculative`."""
    check_options(options, Speculative)
    return Speculative(**options)


_BY_NAME: dict[str, type[Policy]] = {"groupwise": GroupWise, "dynamic": Dynamic, "speculative": Speculative}


def parse(text: str) -> Policy:
    """A policy written as `NAME` or `NAME:OPTION=VALUE,OPTION=VALUE`, as on the command line.

    Raises:
        ValueError: if there is no such policy or option, or its value cannot be meant.
    """
    name, _, rest = text.partition(":")
    if name not in _BY_NAME:
        raise ValueError(f"no policy {name!r}: use groupwise, dynamic or speculative")
    options = parse_options(rest, "policy option")
    check_options(options, _BY_NAME[name])
    return _BY_NAME[name](**options)
