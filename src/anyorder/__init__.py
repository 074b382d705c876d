"""Any-order language models out of pretrained left-to-right ones.

Names are imported on first use, so that `import anyorder` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anyorder import policies
    from anyorder.configuration import AnyOrderConfig
    from anyorder.factorization import Factorization
    from anyorder.infilling import Infiller
    from anyorder.modeling import AnyOrderForCausalLM
    from anyorder.sources import load

__version__ = "0.1.0"
DEFAULT_MODEL = "smollm2-135m-anyorder"

_HOMES = {
    "AnyOrderConfig": "configuration",
    "AnyOrderForCausalLM": "modeling",
    "Factorization": "factorization",
    "Infiller": "infilling",
    "load": "sources",
}

__all__ = ["AnyOrderConfig", "AnyOrderForCausalLM", "Factorization", "Infiller", "load", "policies"]


def __getattr__(name: str) -> Any:
    if name == "policies":
        return importlib.import_module("anyorder.policies")
    if name in _HOMES:
        return getattr(importlib.import_module(f"anyorder.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'anyorder' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
