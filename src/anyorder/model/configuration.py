"""Config of a converted model: the base model's config, and the recipe of the conversion."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from anyorder.core.layout import RECIPES
from anyorder.model.adapters import Adapter
from anyorder.model.coupling import Coupling

FORMAT_VERSION = 2
"""Of what is saved: higher where an older version would read it wrongly. 2: with a coupling."""


class AnyOrderConfig(PretrainedConfig):
    """Config of a converted model.

    Args:
        base_config: config of the wrapped causal LM, as an object or as a dict with its `model_type`.
        recipe: "exact" (equal to its base before any training) or "paper" (A3 as published).
        adapter: fields of an `adapters.Adapter`, or None: the weights are the model's own.
        base: of an adapter: the base model's `name`, `revision` and `fingerprint`. A name that begins with "./" is that
            of a directory or file, wherever it lies.
        coupling: fields of a `coupling.Coupling`, or None: the tokens of a group do not know each other.
        length_prior: the weights by which blanks of unknown length are measured (`infill.lengths.LengthPrior`), fitted
            on this model; None: it has none of its own.
        format_version: of the saved config; None: this version's.

    Raises:
        ValueError: for a config that a newer version has written, an adapter with unknown fields, or another value that
            cannot be meant.
    """

    model_type = "anyorder"

    def __init__(
        self,
        base_config: PretrainedConfig | dict[str, Any] | None = None,
        recipe: str = "exact",
        adapter: dict[str, Any] | None = None,
        base: dict[str, Any] | None = None,
        length_prior: dict[str, float] | None = None,
        coupling: dict[str, Any] | None = None,
        format_version: int | None = None,
        **kwargs: Any,
    ):
        if format_version is not None and format_version > FORMAT_VERSION:
            raise ValueError(
                f"the config has format version {format_version}, this anyorder reads up to {FORMAT_VERSION}: "
                "install a newer one"
            )
        own = list(inspect.signature(AnyOrderConfig).parameters)[:-1]
        for name in kwargs:
            near = difflib.get_close_matches(name, own, n=1, cutoff=0.8)
            if near:
                raise ValueError(f"unknown field {name!r} of the config; did you mean {near[0]!r}?")
        if adapter is not None:
            Adapter.from_dict(adapter)
        if coupling is not None:
            Coupling.from_dict(coupling)
        if recipe not in RECIPES:
            raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, got {recipe!r}")
        if isinstance(base_config, dict):
            if "model_type" not in base_config:
                raise ValueError("base_config has no model_type: it must be the config of a causal LM")
            base_config = AutoConfig.for_model(**base_config)
        self.base_config = base_config
        self.recipe = recipe
        self.adapter = adapter
        self.base = base
        self.length_prior = length_prior
        self.couple(coupling)
        super().__init__(**kwargs)

    @property
    def is_gated(self) -> bool:
        """Whether its adapters act only where a row stands as no row of the base model does."""
        return self.adapter is not None and self.adapter["kind"] == "gated"

    def couple(self, coupling: dict[str, Any] | None) -> None:
        """Say which coupling the model has; without one, older versions can read what is saved."""
        self.coupling = coupling
        self.format_version = 1 if coupling is None else FORMAT_VERSION

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PretrainedConfig:
        """The base model's config: where Hugging Face tools look for vocabulary and sizes."""
        return self if self.base_config is None else self.base_config

    def to_dict(self) -> dict[str, Any]:
        """As transformers'; where the base model lay on the machine that converted it stays out."""
        out = super().to_dict()
        if isinstance(out.get("base_config"), dict):
            out["base_config"].pop("_name_or_path", None)
        return out

    def __getattr__(self, name: str) -> Any:
        # vocab_size, hidden_size, eos_token_id, ...: one concept, one place.
        base = self.__dict__.get("base_config")
        if base is None or name.startswith("_"):
            raise AttributeError(name)
        try:
            return getattr(base, name)
        except Exception as error:  # some configs refuse with errors of their own, where hasattr expects only this one
            raise AttributeError(f"{base.model_type} config: {error}") from error


def hub_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """Those options of `from_pretrained` that say where on the hub a file lies."""
    names = ("revision", "token", "cache_dir", "local_files_only", "subfolder")
    return {name: options[name] for name in names if name in options}


def of_any_repository(options: dict[str, Any]) -> dict[str, Any]:
    """Those options that hold for another repository as well."""
    return {name: value for name, value in options.items() if name not in ("revision", "subfolder")}


AutoConfig.register(AnyOrderConfig.model_type, AnyOrderConfig)
