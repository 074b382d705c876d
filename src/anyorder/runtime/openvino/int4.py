"""Weights in 4 bits, chosen by what the model's layers see: for machines short of memory.

NNCF chooses scales by activation (AWQ and scale estimation) on text that the model writes itself, read from left to
right and in random groups; what that costs in likelihood is in `docs/engines.md`. Layers too narrow for a group of
weights, an adapter's among them, stay out: the caller keeps them in 8 bits.

Needs NNCF: the extra `int4`.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import numpy as np
import openvino as ov
import torch

from anyorder.core.factorization import Factorization
from anyorder.core.layout import lay_out
from anyorder.model.base import AnyOrderPreTrainedModel
from anyorder.model.kv_cache import KeyValueStore
from anyorder.runtime.openvino.graph import linear_layers
from anyorder.runtime.openvino.inputs import inputs_of

GROUP = 64
"""Weights of a row that share a scale and an offset."""
TEXTS, TOKENS = 8, 128
"""Of the text that the model writes."""


def check_installed() -> None:
    """Raise ValueError where NNCF is not installed."""
    if importlib.util.find_spec("nncf") is None:
        raise ValueError("weights='int4' needs: pip install 'anyorder[int4]'")


def in_int4(graph: ov.Model, model: AnyOrderPreTrainedModel) -> None:
    """Weights of the linear layers of rows in 4 bits, in place, but for narrow ones.

    Args:
        graph: of `export.exported_rows`, with weights in float32.
        model: which it is of.
    """
    import nncf

    logging.getLogger("nncf").setLevel(logging.ERROR)
    narrow = [node.get_friendly_name() for node in linear_layers(graph) if min(node.input_value(1).get_shape()) < GROUP]
    nncf.compress_weights(
        graph, mode=nncf.CompressWeightsMode.INT4_ASYM, group_size=GROUP, ratio=1.0, all_layers=True, awq=True,
        scale_estimation=True, dataset=nncf.Dataset(_samples(graph, model)), subset_size=2 * TEXTS,
        ignored_scope=nncf.IgnoredScope(names=narrow, validate=False),
    )  # fmt: skip


@torch.no_grad()
def _samples(graph: ov.Model, model: AnyOrderPreTrainedModel) -> list[dict[str, np.ndarray[Any, Any]]]:
    """What goes into the graph for texts that the model writes: each from left to right, and in random groups."""
    sizes = {parameter.get_friendly_name(): parameter.partial_shape for parameter in graph.get_parameters()}
    start = model.generation_config.bos_token_id if model.generation_config is not None else None
    ids = torch.full((TEXTS, 1), int(start or 0))
    with torch.random.fork_rng():  # the base draws by the one global generator
        torch.manual_seed(0)
        base: Any = model.causal_lm
        texts = base.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, pad_token_id=0,
                              min_new_tokens=TOKENS - 1, max_new_tokens=TOKENS - 1)  # fmt: skip
    found = []
    for number, text in enumerate(texts):
        scattered = Factorization.random(TOKENS, 4, generator=torch.Generator().manual_seed(number))
        for order in (Factorization.left_to_right(TOKENS, given=1), scattered):
            layout = lay_out(text[None], order, model.recipe)
            inputs = inputs_of(model, layout.rows, layout.key_positions, KeyValueStore(TOKENS), 1)
            past = {name: np.zeros([1, shape[1].get_length(), 1, shape[3].get_length()], np.float32)
                    for name, shape in sizes.items() if name.startswith(("key.", "value."))}  # fmt: skip
            given = {name: tensor.numpy() for name, tensor in inputs.items() if name in sizes}
            found.append(given | past)
    return found
