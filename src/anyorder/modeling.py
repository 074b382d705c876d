"""The face: a causal LM that predicts any group of tokens in any order. Composition only.

The forward is `model.base`'s, likelihoods are `scoring`'s, generation is `decoding.generate`'s, names and files are
`hub`'s.
"""

from __future__ import annotations

from transformers import AutoModelForCausalLM

from anyorder.decoding.generate import GenerationMixin
from anyorder.hub.converted import ConvertedModel
from anyorder.model.base import AnyOrderOutput
from anyorder.model.configuration import AnyOrderConfig
from anyorder.scoring import LikelihoodMixin

__all__ = ["AnyOrderForCausalLM", "AnyOrderOutput"]


class AnyOrderForCausalLM(LikelihoodMixin, GenerationMixin, ConvertedModel):
    """A causal LM that predicts any group of tokens in any order.

    Make one with `from_causal_lm`, or load a converted one with `from_pretrained`.

    Attributes:
        causal_lm: the wrapped Hugging Face model itself, usable as such.
        query_embedding: (E,) parameter w, from which a query row starts where its left neighbour is unknown.
    """


AutoModelForCausalLM.register(AnyOrderConfig, AnyOrderForCausalLM)
