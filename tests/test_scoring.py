"""Likelihoods are exact: they sum to one, leak nothing, and do not depend on padding, packing or the batch."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anyorder import Factorization, scoring
from anyorder.scoring import conditional_log_likelihood, order_spread
from architectures import ARCHITECTURES, RECIPES, VOCABULARY, converted
from factorizations import of_every_constructor, rows

THREE = torch.tensor(list(itertools.product(range(3), repeat=4)))  # 81 sequences over a vocabulary of 3
START = torch.zeros(81, 1, dtype=torch.int64)
IDS = torch.randint(0, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt2"])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", of_every_constructor(5))
def test_probabilities_sum_to_one(architecture, recipe, name):
    model = converted(architecture, recipe, vocabulary=3)
    order = of_every_constructor(5)[name]
    ids = torch.cat([START, THREE], dim=1)
    total = model.log_likelihood(ids, Factorization.stack([order] * 81)).sum(dim=1).exp().double()
    # Every outcome of the predicted positions appears once for each filling of the others.
    for fixed in {tuple(row) for row in ids[:, ~order.is_predicted[0]].tolist()}:
        same = (ids[:, ~order.is_predicted[0]] == torch.tensor(fixed)).all(dim=1)
        assert abs(float(total[same].sum()) - 1) < 1e-5
        if name != "conditional":
            continue
        repeats = 3 ** int((order.group_ids[0] == -2).sum())
        assert repeats * int(same.sum()) == 81 / 3 ** (int(order.is_given.sum()) - 1)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt2"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_conditionals_of_any_two_sets_sum_to_one(architecture, recipe):
    model = converted(architecture, recipe, vocabulary=3)
    for targets, known in (([1], [4]), ([4, 2], [0]), ([0], [3, 2]), ([1, 2, 3], [4, 0]), ([0, 4], [2])):
        for size in (1, 2):
            ids = torch.zeros(3 ** len(targets), 5, dtype=torch.int64)
            ids[:, targets] = torch.tensor(list(itertools.product(range(3), repeat=len(targets))))
            ids[:, known] = torch.tensor([1, 2][: len(known)])
            total = conditional_log_likelihood(model, ids, targets, known, group_size=size).exp().sum()
            assert abs(float(total) - 1) < 1e-5


def test_a_conditional_ignores_what_it_leaves_out():
    model = converted("llama")
    other = IDS.clone()
    other[:, [3, 5, 6]] = 1
    kept = {"targets": [4, 8], "given": [0, 1, 2, 9]}
    assert torch.equal(conditional_log_likelihood(model, IDS, **kept), conditional_log_likelihood(model, other, **kept))


@torch.no_grad()
@pytest.mark.parametrize("recipe", RECIPES)
@given(parts=st.lists(rows(), min_size=1, max_size=2), pad=st.integers(0, 2), data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_leak(recipe, parts, pad, data):
    """Tokens of groups >= k, of other documents and of the padding leave the logits of group k bit-identical."""
    packed = Factorization.pack(parts)
    f = Factorization.stack([packed, Factorization.left_to_right(packed.length + pad)])
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    model = converted(data.draw(st.sampled_from(["llama", "gemma2", "mistral", "gpt2"])), recipe)
    ids = torch.randint(0, VOCABULARY, f.group_ids.shape, generator=generator)
    document = data.draw(st.integers(0, int(f.documents[0].max())))
    inside = (f.documents[0] == document) & f.is_predicted[0]
    if not inside.any():
        return
    k = data.draw(st.integers(0, int(f.group_ids[0][inside].max())))
    may_change = (f.group_ids[0] >= k) | (f.documents[0] != document) | ~f.is_present[0]
    changed = ids.clone()
    changed[0, may_change] = (ids[0, may_change] + 1 + int(torch.randint(30, (), generator=generator))) % VOCABULARY
    group = inside & (f.group_ids[0] == k)
    assert torch.equal(model(ids, f).logits[0, group], model(changed, f).logits[0, group])


@torch.no_grad()
def test_what_is_visible_does_matter():
    """Else a model that reads nothing would pass the test above."""
    model, f = converted("llama"), Factorization.random(12, 2, generator=torch.Generator().manual_seed(1))
    for k in range(1, int(f.num_groups)):
        changed = IDS[:1].clone()
        earlier = f.group_ids < k
        changed[earlier] = (changed[earlier] + 1) % VOCABULARY
        group = (f.group_ids == k)[0]
        assert (model(IDS[:1], f).logits[0, group] != model(changed, f).logits[0, group]).any()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_batched_padded_and_packed_equal_one_by_one(architecture, recipe):
    model = converted(architecture, recipe)
    g = torch.Generator().manual_seed(3)
    parts = [Factorization.random(12, 3, given=2, generator=g), Factorization.left_to_right(7, 2), Factorization.infill(
        torch.tensor([False, True, True, False, True]), order="random", generator=g)]  # fmt: skip
    single = [model.log_likelihood(IDS[b : b + 1, : f.length], f)[0] for b, f in enumerate(parts)]
    batch = model.log_likelihood(IDS, Factorization.stack(parts))
    packed_ids = torch.cat([IDS[b, : f.length] for b, f in enumerate(parts)])[None]
    packed = model.log_likelihood(packed_ids, Factorization.pack(parts))[0].split([f.length for f in parts])
    for b, f in enumerate(parts):
        torch.testing.assert_close(batch[b, : f.length], single[b], atol=1e-5, rtol=0)
        torch.testing.assert_close(packed[b], single[b], atol=1e-5, rtol=0)
        assert not batch[b, f.length :].any()


def test_group_size_one_multiplies_up_and_group_order_matters():
    model = converted("llama")
    forwards = Factorization.from_groups([[0], [1], [2]])
    backwards = Factorization.from_groups([[0], [2], [1]])
    a, b = (float(model.log_likelihood(IDS[:1, :3], f).sum()) for f in (forwards, backwards))
    assert abs(a - b) > 1e-3
    step = conditional_log_likelihood(model, IDS[:1, :3], [2], [0]) + conditional_log_likelihood(
        model, IDS[:1, :3], [1], [0, 2]
    )
    assert abs(float(step) - b) < 1e-5


def test_order_spread():
    model = converted("llama")
    spread = order_spread(model, IDS, orders=5, generator=torch.Generator().manual_seed(0))
    assert spread.log_likelihoods.shape == (3, 5)
    assert (spread.standard_deviation > 0).all()
    again = order_spread(model, IDS, orders=5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(spread.log_likelihoods, again.log_likelihoods)
    assert torch.equal(spread.mean, spread.log_likelihoods.mean(dim=1))
    with pytest.raises(ValueError, match="at least 2 orders, got 1"):
        order_spread(model, IDS, orders=1)


@pytest.mark.parametrize(("tokens", "forwards"), [(10_000, 1), (12 * 4, 4), (1, 15)])
def test_orders_share_forwards(tokens, forwards, monkeypatch):
    model, counts = converted("llama"), []
    monkeypatch.setattr(scoring, "TOKENS_AT_ONCE", tokens)
    start = Factorization.stack([Factorization.left_to_right(n) for n in (12, 9, 12)])
    handle = model.causal_lm.model.register_forward_hook(lambda *args: counts.append(1))
    spread = order_spread(model, IDS, start, orders=5, generator=torch.Generator().manual_seed(0))
    handle.remove()
    assert len(counts) == forwards
    g = torch.Generator().manual_seed(0)
    each = [model.log_likelihood(IDS, start.regroup(1, "random", g)).sum(dim=1) for _ in range(5)]
    torch.testing.assert_close(spread.log_likelihoods, torch.stack(each, dim=1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("alike", [1, 2, 7])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_texts_that_begin_alike_are_compared_as_one_by_one(architecture, alike):
    model = converted(architecture)
    ids = torch.randint(0, model.vocabulary_size, (3, 15), generator=torch.Generator().manual_seed(1))
    ids[:, :alike] = ids[0, :alike]
    lengths = [15, 9, 12]
    predicted = torch.stack([(torch.arange(15) >= alike) & (torch.arange(15) < n) for n in lengths])
    together = scoring.compared_by_base(model, ids, predicted)
    assert bool((together[~predicted] == 0).all())
    for row, n, own in zip(ids, lengths, together, strict=True):
        alone = scoring.log_likelihood(model, row[None, :n], Factorization.left_to_right(n, given=alike))
        assert torch.allclose(own[:n], alone[0], atol=1e-4)


def test_nothing_to_predict_scores_zero():
    model = converted("llama")
    assert model.log_likelihood(IDS[:1, :3], Factorization.left_to_right(3, given=3)).tolist() == [[0, 0, 0]]


def test_chunks_do_not_change_scores(monkeypatch):
    from anyorder.model import lm_head as head

    model, f = converted("llama"), Factorization.random(12, 2, generator=torch.Generator().manual_seed(1))
    whole = model.log_likelihood(IDS[:1], f)
    monkeypatch.setattr(head, "CHUNK", 3)
    torch.testing.assert_close(model.log_likelihood(IDS[:1], f), whole, atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are reset through /proc")
def test_long_texts_take_the_memory_of_their_rows():
    """Masks come block by block: scoring 16,384 tokens peaks where the base model's own forward of them does."""
    script = """
import sys, torch
torch.set_num_threads(1)
from architectures import VOCABULARY, base_model
from anyorder import AnyOrderForCausalLM, Factorization

N = 16384

def mib(name):
    (line,) = [line for line in open("/proc/self/status") if line.startswith(name)]
    return int(line.split()[1]) / 1024

ids = torch.randint(3, VOCABULARY, (1, N), generator=torch.Generator().manual_seed(0))
model = AnyOrderForCausalLM.from_causal_lm(base_model("llama", max_position_embeddings=N, num_hidden_layers=2))
order = Factorization.left_to_right(N)
for what in (lambda: model.causal_lm.model(ids, use_cache=True), lambda: model.log_likelihood(ids, order)):
    with torch.no_grad():
        before = mib("VmRSS")
        open("/proc/self/clear_refs", "w").write("5")
        what()
        print(mib("VmHWM") - before)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    base, ours = map(float, done.stdout.split())
    assert ours <= 1.3 * base + 8, f"{ours} MiB; the base model {base}"
