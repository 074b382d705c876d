"""Any-order language models out of pretrained left-to-right ones.

Names are imported on first use, so that `import anyorder` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anyorder import policies
    from anyorder.core.factorization import Factorization
    from anyorder.infill.infiller import Infiller
    from anyorder.loading import load
    from anyorder.model.configuration import AnyOrderConfig
    from anyorder.modeling import AnyOrderForCausalLM

__version__ = "0.1.0"

_HOMES = {
    "AnyOrderConfig": "model.configuration",
    "AnyOrderForCausalLM": "modeling",
    "DEFAULT_MODEL": "hub.resolve",
    "Factorization": "core.factorization",
    "Infiller": "infill.infiller",
    "load": "loading",
}

__all__ = ["AnyOrderConfig", "AnyOrderForCausalLM", "Factorization", "Infiller", "load", "policies"]


def __getattr__(name: str) -> Any:
    if name == "policies":
        return importlib.import_module("anyorder.decoding.policies")
    if name in _HOMES:
        return getattr(importlib.import_module(f"anyorder.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'anyorder' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
