"""A converted model by name and as files: what every model on rows of a decoder has, whatever its objective.

Loading and converting a plain causal LM, loading a converted one, saving, and folding an adapter in. Which rows a
forward has and what it predicts is the subclass's business.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, Self

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import PushToHubMixin

from anyorder.hub.checkpoint import load_converted, save_adapted, share_weights
from anyorder.hub.pretrained import load_causal_lm
from anyorder.hub.resolve import portable_name
from anyorder.model import adapters
from anyorder.model.base import AnyOrderPreTrainedModel
from anyorder.model.conversion import convert


class ConvertedModel(AnyOrderPreTrainedModel):
    """Made with `from_causal_lm`, or loaded with `from_pretrained`."""

    @classmethod
    def from_causal_lm(
        cls,
        model: str | PreTrainedModel,
        recipe: str = "exact",
        adapter: str | adapters.Adapter | None = None,
        attn_implementation: str = "sdpa",
        **kwargs: Any,
    ) -> Self:
        """Convert a pretrained left-to-right model.

        The weights are shared with a model that is passed in, and its attention function is replaced by one that
        computes the same left-to-right attention. The query embedding starts as the mean token embedding.

        Args:
            model: a loaded model, a built-in name, a directory, a GGUF file or a hub id.
            recipe: "exact" or "paper".
            adapter: None (all weights are trained), or an adapter on the frozen base: "gated", "lora", an `Adapter`.
            attn_implementation: "sdpa" or "flex_attention".
            kwargs: passed to `AutoModelForCausalLM.from_pretrained` (dtype, device_map, revision, ...).

        Raises:
            ValueError: for an architecture that cannot be served, or a model that carries PEFT adapters, with the
                reason. The model stays as it was.
        """
        if isinstance(model, nn.Module):
            adapters.check_bare(model)
            if not isinstance(model, PreTrainedModel):
                raise ValueError(f"a model must be a causal LM of transformers, got a {type(model).__name__}")
            if kwargs:
                raise ValueError(f"options {', '.join(kwargs)} are for loading; the model given is loaded already")
            causal_lm, name = model, model.name_or_path or None
        else:
            causal_lm, name = load_causal_lm(model, **kwargs), model
        name, revision = portable_name(name), kwargs.get("revision")
        return convert(cls, causal_lm, recipe, adapter, attn_implementation, name, revision)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Load a converted model by its built-in name, from a directory or from the hub; safetensors only.

        Raises:
            ValueError: if the checkpoint is not a converted model, or a weight is missing, unknown or of a wrong shape.
        """
        return load_converted(cls, super().from_pretrained, pretrained_model_name_or_path, *args, **kwargs)

    def save_pretrained(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write what `from_pretrained` reads: the whole model, or with an adapter only that and where it belongs.

        Args:
            save_directory: made if need be.
            is_main_process: of several, one writes.
            state_dict: gathered weights, of a model whose parameters are split over processes.
            push_to_hub: also upload it.
            kwargs: as transformers' own takes them: repo_id (default: the directory's name), token, private, ...
        """
        directory = Path(save_directory)
        if self.config.adapter is None:
            kwargs |= {"is_main_process": is_main_process, "state_dict": state_dict, "push_to_hub": push_to_hub}
            super().save_pretrained(save_directory, **kwargs)
            if is_main_process:
                share_weights(directory)
        elif is_main_process:
            save_adapted(self, directory, state_dict)
            if push_to_hub:
                known = inspect.signature(PushToHubMixin.push_to_hub).parameters
                repository = kwargs.pop("repo_id", directory.name)
                self.push_to_hub(repository, **{name: kwargs[name] for name in kwargs if name in known})

    def merge_adapter(self) -> Self:
        """Fold an ungated adapter into the weights; the model is then saved whole. ValueError for a gated one."""
        if self.config.adapter is None:
            raise ValueError("this model has no adapter to merge")
        adapters.merge(self.causal_lm)
        self.config.adapter = self.config.base = None
        return self
