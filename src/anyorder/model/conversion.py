"""A plain causal LM -> a converted one, and the evidence that it is still itself.

The second of two nets (the first: `compatibility`): converted rows run over a few tokens and their logits are compared
with the base model's. So an architecture nobody thought of is refused on evidence, never converted into something else.

Shapes: T tokens of the probe, V vocabulary, E hidden size.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from anyorder.core.factorization import Factorization
from anyorder.core.layout import Rows, lay_out
from anyorder.model import adapters
from anyorder.model.base import AnyOrderPreTrainedModel
from anyorder.model.compatibility import check_model, refuse
from anyorder.model.kv_cache import KeyValueStore

Model = TypeVar("Model", bound=AnyOrderPreTrainedModel)

PROBE_LENGTH = 8
PROBE_TOLERANCE = {torch.float32: 0.01, torch.float64: 0.01}
PROBE_TOLERANCE_16_BIT = 0.2
"""Greatest root mean square difference of the probe's logits, relative to their spread. Kernels that round differently
stay well under it; a mask or a position that is off by one gives about 1."""


def convert(
    cls: type[Model],
    causal_lm: PreTrainedModel,
    recipe: str = "exact",
    adapter: str | adapters.Adapter | None = None,
    attn_implementation: str = "sdpa",
    base_name: str | None = None,
    base_revision: str | None = None,
) -> Model:
    """Convert a loaded model, whose weights are shared and whose attention function is replaced.

    Args:
        cls: the class of the result.
        causal_lm: the base model.
        recipe, adapter, attn_implementation: as in `AnyOrderForCausalLM.from_causal_lm`.
        base_name, base_revision: where an adapter finds its base again.

    Raises:
        ValueError: for an architecture that cannot be served, with the reason. The model stays as it was.
    """
    adapters.check_bare(causal_lm)
    if isinstance(causal_lm, AnyOrderPreTrainedModel):
        raise ValueError("this model is converted already: use from_pretrained, or convert its .causal_lm anew")
    if isinstance(adapter, str):
        adapter = adapters.Adapter(kind=adapter)  # type: ignore[arg-type]
    check_model(causal_lm)
    probed = probe(causal_lm)
    config = cls.config_class(
        base_config=causal_lm.config, recipe=recipe, attn_implementation=attn_implementation, dtype=causal_lm.dtype
    )
    with left_as_it_was_if_refused(causal_lm):
        converted = cls(config, causal_lm)
        check_conversion(converted, probed)
        converted.query_embedding.data.copy_(_mean_embedding(causal_lm.get_input_embeddings()))
        if adapter is not None:
            config.adapter = dataclasses.asdict(adapter)
            fingerprint = adapters.fingerprint(causal_lm)
            config.base = {"name": base_name, "revision": base_revision, "fingerprint": fingerprint}
            adapters.attach(causal_lm, adapter)
            converted.query_embedding.data = converted.query_embedding.data.float()
    return converted.train(causal_lm.training)


@contextmanager
def left_as_it_was_if_refused(causal_lm: PreTrainedModel) -> Iterator[None]:
    """If what is inside fails, undo what it did to the model: attention, hooks, adapters, frozen weights."""
    attention = causal_lm.config._attn_implementation
    learns = [(parameter, parameter.requires_grad) for parameter in causal_lm.parameters()]
    modules = list(causal_lm.modules())
    attributes = [vars(module).copy() for module in modules]
    contents = [{name: copy.copy(value) for name, value in of.items() if isinstance(value, dict)} for of in attributes]
    try:
        yield
    except BaseException:
        causal_lm.set_attn_implementation(attention)
        for module, before, inside in zip(modules, attributes, contents, strict=True):
            vars(module).clear()
            vars(module).update(before)
            for name, entries in inside.items():  # the same dictionaries: others may hold them
                before[name].clear()
                before[name].update(entries)
        for parameter, flag in learns:
            parameter.requires_grad_(flag)
        raise


@torch.no_grad()
def _mean_embedding(embedding: nn.Module) -> Tensor:
    """(E,) mean of what the embedding returns over the vocabulary, whatever scale the family applies."""
    weight = cast(Tensor, embedding.weight)
    total = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
    for ids in torch.arange(weight.shape[0], device=weight.device).split(8192):
        total += embedding(ids).double().sum(dim=0)
    return (total / weight.shape[0]).to(weight.dtype)


@torch.no_grad()
def probe(causal_lm: PreTrainedModel) -> tuple[Tensor, Tensor] | None:
    """Token ids (1, T) spread over the vocabulary and the plain model's (T, V) logits; to be called before converting.

    None for weights on the meta device, which have no values to compare.
    """
    weight = causal_lm.get_input_embeddings().weight
    if weight.is_meta:
        return None
    ids = (torch.arange(1, PROBE_LENGTH + 1, device=weight.device)[None] * 7919 + 31) % weight.shape[0]
    training = causal_lm.training
    causal_lm.eval()
    try:
        return ids, causal_lm(input_ids=ids, use_cache=False).logits[0].float()
    finally:
        causal_lm.train(training)


@torch.no_grad()
def check_conversion(model: AnyOrderPreTrainedModel, probed: tuple[Tensor, Tensor] | None) -> None:
    """Raise ValueError unless the converted model, left to right, gives the logits that its base gave."""
    if probed is None:
        return
    training = model.causal_lm.training
    model.causal_lm.eval()
    try:
        reason = _misfit(model, *probed)
    except Exception as error:
        reason = f"its modelling code fails on rows of intervals: {type(error).__name__}: {error}"
    finally:
        model.causal_lm.train(training)
    if reason is not None:
        refuse(model.causal_lm.config, reason)


def _misfit(model: AnyOrderPreTrainedModel, ids: Tensor, base: Tensor) -> str | None:
    """Why the converted model is not its base, or cannot be sorted; None: it fits.

    The rows stand in another order than the tokens, with one among them that nothing reads: whatever mixes rows outside
    attention gives other logits then. They must also respond to positions: a model without any passes the first test.
    """
    order = (torch.arange(len(base)) * 3 + 1) % len(base)
    ours, calls = probed_rows(model, ids, order)
    wrong = _wrong_calls(model.causal_lm.config, calls)
    if wrong is not None:
        return wrong
    ignores_positions = "its modelling code ignores position_ids, so tokens cannot be sorted"
    if _fits(model, ours, base):
        stretched, _ = probed_rows(model, ids, order, stride=3)
        return ignores_positions if torch.equal(stretched, ours) else None
    in_order, _ = probed_rows(model, ids)
    if not _fits(model, in_order, base):
        difference = _difference(in_order, base)
        return f"its logits change by {difference:.2g} of their spread when attention runs over intervals"
    stretched, _ = probed_rows(model, ids, stride=3)
    if torch.equal(stretched, in_order):
        return ignores_positions
    return "its layers mix neighbouring tokens outside attention (a shift or a convolution), so tokens cannot be sorted"


def _difference(logits: Tensor, base: Tensor) -> float:
    return float((logits.float() - base).square().mean().sqrt() / base.std().clamp(min=1e-6))


def _fits(model: AnyOrderPreTrainedModel, logits: Tensor, base: Tensor) -> bool:
    return _difference(logits, base) < PROBE_TOLERANCE.get(model.causal_lm.dtype, PROBE_TOLERANCE_16_BIT)


def _wrong_calls(config: PretrainedConfig, calls: Sequence[tuple[int, int | None]]) -> str | None:
    """Attention is called once a layer, and every sliding layer tells its window; if not, what is wrong."""
    layers = {layer for layer, _ in calls}
    if len(layers) != config.num_hidden_layers:
        return f"{len(layers)} of its {config.num_hidden_layers} layers go through the attention interface"
    if len(calls) != len(layers):
        return f"its {len(layers)} layers call attention {len(calls)} times; the cache keeps one call a layer"
    told = sum(window is not None for _, window in calls)
    layer_types = getattr(config, "layer_types", None)
    if layer_types:
        expected = list(layer_types).count("sliding_attention")
    else:
        expected = config.num_hidden_layers if getattr(config, "sliding_window", None) else 0
    if told < expected:
        return f"{expected} of its layers have a sliding window, but only {told} tell the attention function"
    return None


@torch.no_grad()
def left_to_right_difference(model: AnyOrderPreTrainedModel, input_ids: Tensor) -> float:
    """Greatest absolute difference between left-to-right logits of a converted model and of its base.

    Args:
        model: converted with the exact recipe.
        input_ids: (B, T) int64, at least two tokens a row.
    """
    base = model.causal_lm(input_ids=input_ids, use_cache=False).logits[:, :-1]
    ours = model(input_ids).logits[:, 1:]
    return float((base.float() - ours.float()).abs().max())


def probed_rows(
    model: AnyOrderPreTrainedModel, ids: Tensor, order: Tensor | None = None, stride: int = 1
) -> tuple[Tensor, list[tuple[int, int | None]]]:
    """(T, V) logits of left-to-right content rows, and every call of the attention.

    Args:
        model: a converted model.
        ids: (1, T).
        order: (T,) int64, tokens in the order in which their rows stand, about one that nothing reads; None: text
            order, without it.
        stride: positions from one token to the next.
    """
    layout = lay_out(ids.cpu(), Factorization.left_to_right(ids.shape[1]), "exact")
    rows, key_positions = layout.rows, layout.key_positions * stride
    rows = dataclasses.replace(rows, positions=rows.positions * stride)
    if order is None:
        hidden, reads = model.run_rows(rows, key_positions)
        return model.head(hidden[0, : ids.shape[1]]), reads.calls
    T, half = len(order), len(order) // 2
    filler = {"seed_ids": int(ids[0, 0]), "seeded": True, "positions": 0, "lo": 0, "hi": 1, "gates": False, "ranks": T}
    moved = {name: getattr(rows, name)[:, order] for name in filler}
    about = {name: torch.full((1, 1), value, dtype=moved[name].dtype) for name, value in filler.items()}
    halves = {name: torch.cat([moved[name][:, :half], about[name], moved[name][:, half:]], dim=1) for name in filler}
    hidden, reads = model.run_rows(Rows(**halves), key_positions, KeyValueStore(T))
    place = order.argsort()
    return model.head(hidden[0, torch.where(place < half, place, place + 1)]), reads.calls
