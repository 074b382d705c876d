"""One rule, several ways to run it: blocks == one mask, FlexAttention == SDPA, fast == the slow twin."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from anyorder import AnyOrderForCausalLM, Factorization
from anyorder.model import attention
from anyorder.model.reference import reference_logits
from architectures import ARCHITECTURES, RECIPES, VOCABULARY, WINDOWED, base_model, converted
from factorizations import groups_of, of_every_constructor, rows

T = 12
IDS = torch.randint(3, VOCABULARY, (1, T), generator=torch.Generator().manual_seed(0))
ORDERS = {name: f for name, f in of_every_constructor(T).items() if name != "conditional"}


@torch.no_grad()
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fast_equals_the_slow_twin(architecture, recipe):
    model = converted(architecture, recipe)
    for name, order in ORDERS.items():
        slow = reference_logits(model, IDS[0], groups_of(order))
        torch.testing.assert_close(
            model(IDS, order).logits[0], slow, atol=2e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


@torch.no_grad()
@pytest.mark.parametrize("recipe", RECIPES)
@given(order=rows(max_length=T))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_fast_equals_the_slow_twin_on_any_factorization(recipe, order):
    for architecture in ("llama", "gemma3"):
        model = converted(architecture, recipe)
        ids = IDS[:, : order.length]
        slow = reference_logits(model, ids[0], groups_of(order))
        torch.testing.assert_close(model(ids, order).logits[0], slow, atol=2e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("architecture", ["llama", "gemma2", *WINDOWED])
def test_blocks_of_rows_equal_one_mask(architecture, recipe, monkeypatch):
    model = converted(architecture, recipe)
    order = Factorization.stack([ORDERS["random_3"], ORDERS["left_to_right_2"]])
    ids = IDS.repeat(2, 1)
    whole = model(ids, order).logits
    monkeypatch.setattr(attention, "MASK_ELEMENTS", 200)
    monkeypatch.setattr(attention, "KEPT_ELEMENTS", 0)
    torch.testing.assert_close(model(ids, order).logits, whole, atol=2e-5, rtol=0)


def test_rows_that_read_everything_need_no_mask():
    from anyorder.core.layout import lay_out

    layout = lay_out(IDS, Factorization.from_groups([list(range(T - 1)), [T - 1]]), "paper")
    reads = attention.Reads(layout.rows, layout.key_positions, torch.device("cpu"))
    (content, query) = (slice(0, 1), slice(T, T + 1))
    every, none = slice(0, T), torch.empty(0)
    assert reads._mask(query, slice(0, T - 1), None, 1, torch.bool, none) is None
    assert reads._mask(slice(0, T + 1), every, None, 1, torch.bool, none) is not None
    assert reads._mask(content, every, 2, 1, torch.bool, none) is not None


@pytest.mark.parametrize("window", [None, 3])
def test_masks_in_floats_say_what_boolean_ones_say(window):
    """The former are filled only where not every row reads; heads that share a key head are rows of the mask."""
    from anyorder.core.layout import lay_out

    orders = [ORDERS["random_3"], ORDERS["left_to_right_2"], Factorization.left_to_right(T - 3)]
    layout = lay_out(IDS.repeat(3, 1), Factorization.stack(orders), "exact")
    reads = attention.Reads(layout.rows, layout.key_positions, torch.device("cpu"))
    none = torch.empty(0)
    for chosen, keys in ((slice(0, 5), slice(0, T)), (slice(6, 9), slice(0, T)), (slice(T, T + 4), slice(0, T))):
        plain = reads._mask(chosen, keys, window, 2, torch.bool, none)
        assert torch.equal(plain, reads._mask(chosen, keys, window, 1, torch.bool, none).repeat(1, 1, 2, 1))
        for scratch in (none, torch.full((1000,), 7.0)):
            floats = reads._mask(chosen, keys, window, 2, torch.float32, scratch)
            assert torch.equal(floats, attention.additive(plain, torch.float32))


def test_large_masks_are_not_kept_and_small_ones_are_made_once(monkeypatch):
    model = converted("llama")
    made = []
    mask = attention.Reads._mask
    monkeypatch.setattr(attention.Reads, "_mask", lambda self, *a: made.append(a) or mask(self, *a))
    with torch.no_grad():
        model(IDS, ORDERS["random_3"])
        once = len(made)
        monkeypatch.setattr(attention, "KEPT_ELEMENTS", 0)
        model(IDS, ORDERS["random_3"])
    assert len(made) - once == 3 * once  # layers
    made.clear()
    model(IDS, ORDERS["random_3"])  # the backward pass needs them all: the layers share them
    assert len(made) == once


@torch.no_grad()
def test_the_mask_of_a_forward_in_one_block_is_made_once_for_all_layers(monkeypatch):
    """As text from left to right is, or a step that verifies drafts: no query rows."""
    model = converted("llama")
    made = []
    mask = attention.Reads._mask
    monkeypatch.setattr(attention.Reads, "_mask", lambda self, *a: made.append(a) or mask(self, *a))
    model(IDS, Factorization.left_to_right(T))
    assert len(made) == 1


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_flex_attention_equals_sdpa(architecture, recipe):
    flex = converted(architecture, recipe, attn_implementation="flex_attention")
    order = Factorization.stack([ORDERS["random_3"], Factorization.left_to_right(T - 3, 2)])
    ids = IDS.repeat(2, 1)
    expected = converted(architecture, recipe)(ids, order).logits
    torch.testing.assert_close(flex(ids, order).logits, expected, atol=2e-5, rtol=0)
    tokens = flex.generate(ids, factorization=order, do_sample=False)
    assert torch.equal(tokens, converted(architecture, recipe).generate(ids, factorization=order, do_sample=False))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch 2.9's own code
def test_flex_attention_trains_like_sdpa():
    order = ORDERS["random_3"]
    grads = {}
    for name in ("sdpa", "flex_attention"):
        model = AnyOrderForCausalLM.from_causal_lm(base_model("llama"), attn_implementation=name)
        try:
            model(IDS, order, labels=IDS).loss.backward()
        except NotImplementedError as error:
            pytest.skip(f"FlexAttention has no backward on this platform: {error}")
        grads[name] = model.causal_lm.model.layers[0].self_attn.q_proj.weight.grad
    torch.testing.assert_close(grads["flex_attention"], grads["sdpa"], atol=1e-5, rtol=1e-4)


def test_gradient_checkpointing_gives_the_same_gradients():
    grads = []
    for checkpointing in (False, True):
        model = AnyOrderForCausalLM.from_causal_lm(base_model("llama")).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(IDS, ORDERS["random_3"], labels=IDS).loss.backward()
        grads.append(model.causal_lm.model.layers[0].self_attn.q_proj.weight.grad)
    torch.testing.assert_close(grads[0], grads[1])


def test_attention_extras_that_are_not_implemented_are_refused():
    module = torch.nn.Module()
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(ValueError, match="s_aux"):
        attention.anyorder_attention(module, q, q, q, None, s_aux=torch.zeros(2))
