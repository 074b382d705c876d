"""The face: a causal LM that predicts any group of tokens in any order. Composition only.

The forward is `model.base`'s, likelihoods are `scoring`'s, generation is `decoding.generate`'s, names and files are
`hub`'s.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from anyorder.decoding.generate import GenerationMixin
from anyorder.hub.checkpoint import load_converted, save_adapted
from anyorder.hub.pretrained import load_causal_lm
from anyorder.model import adapters
from anyorder.model.base import AnyOrderOutput, AnyOrderPreTrainedModel
from anyorder.model.configuration import AnyOrderConfig
from anyorder.model.conversion import convert
from anyorder.scoring import LikelihoodMixin

__all__ = ["AnyOrderForCausalLM", "AnyOrderOutput"]


class AnyOrderForCausalLM(LikelihoodMixin, GenerationMixin, AnyOrderPreTrainedModel):
    """A causal LM that predicts any group of tokens in any order.

    Make one with `from_causal_lm`, or load a converted one with `from_pretrained`.

    Attributes:
        causal_lm: the wrapped Hugging Face model itself, usable as such.
        query_embedding: (E,) parameter w, from which a query row starts where its left neighbour is unknown.
    """

    @classmethod
    def from_causal_lm(
        cls,
        model: str | PreTrainedModel,
        recipe: str = "exact",
        adapter: str | adapters.Adapter | None = None,
        attn_implementation: str = "sdpa",
        **kwargs: Any,
    ) -> AnyOrderForCausalLM:
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
            ValueError: for an architecture that cannot be served, with the reason.
        """
        if isinstance(model, PreTrainedModel):
            if kwargs:
                raise ValueError(f"options {', '.join(kwargs)} are for loading; the model given is loaded already")
            causal_lm, name = model, model.name_or_path or None
        else:
            causal_lm, name = load_causal_lm(model, **kwargs), model
        return convert(cls, causal_lm, recipe, adapter, attn_implementation, name, kwargs.get("revision"))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> AnyOrderForCausalLM:
        """Load a converted model by its built-in name, from a directory or from the hub; safetensors only.

        Raises:
            ValueError: if the checkpoint is not a converted model, or a weight is missing, unknown or of a wrong shape.
        """
        return load_converted(cls, super().from_pretrained, pretrained_model_name_or_path, *args, **kwargs)

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Write what `from_pretrained` reads: the whole model, or with an adapter only that and where it belongs."""
        if self.config.adapter is None:
            super().save_pretrained(save_directory, **kwargs)
        elif kwargs.pop("push_to_hub", False):
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)
        elif kwargs.get("is_main_process", True):
            save_adapted(self, Path(save_directory), kwargs.get("state_dict"))

    def merge_adapter(self) -> AnyOrderForCausalLM:
        """Fold an ungated adapter into the weights; the model is then saved whole. ValueError for a gated one."""
        if self.config.adapter is None:
            raise ValueError("this model has no adapter to merge")
        adapters.merge(self.causal_lm)
        self.config.adapter = self.config.base = None
        return self


AutoModelForCausalLM.register(AnyOrderConfig, AnyOrderForCausalLM)
