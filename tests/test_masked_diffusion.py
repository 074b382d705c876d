"""Masked diffusion, the control: its loss is the bound, what it samples is what it learned, nothing leaks."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from anyorder import AnyOrderForCausalLM, Factorization, load
from anyorder.evaluation.baselines.diffusion_bound import negative_elbo
from anyorder.evaluation.baselines.diffusion_sampling import fill
from anyorder.evaluation.baselines.masked_diffusion import MaskedDiffusionLM
from anyorder.evaluation.baselines.noise import blanks, noised
from anyorder.model.adapters import Adapter
from anyorder.model.coupling import Coupling
from architectures import VOCABULARY, base_model

V, N = 4, 3  # of the model whose likelihood is computed by brute force; one token more is given


def diffusion(architecture="llama", adapter=None, vocabulary=VOCABULARY, **sizes):
    model = MaskedDiffusionLM.from_causal_lm(base_model(architecture, vocabulary, **sizes), adapter=adapter)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name or name == "query_embedding":
            parameter.data.normal_(std=0.3)
    return model.eval()


def texts(rows=1, length=9, vocabulary=VOCABULARY):
    ids = torch.randint(3 % vocabulary, vocabulary, (rows, length), generator=torch.Generator().manual_seed(2))
    given = torch.zeros(rows, length, dtype=torch.bool)
    given[:, 0] = True
    return ids, given


def generators(count, seed=0):
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


# ---------------------------------------------------------------------- rows


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_a_row_predicts_the_next_token_and_reads_both_sides(architecture):
    """Against the base itself, called with embeddings of its own and a mask that hides nothing."""
    model = diffusion(architecture)
    ids, given = texts(length=4)  # within the sliding windows
    given[0, 3] = True
    order = blanks(ids, given)
    logits = model(ids, order).logits
    embeds = model.get_input_embeddings()(ids)
    embeds[0, 1:3] = model.query_embedding
    everything = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    plain = model.causal_lm(inputs_embeds=embeds, attention_mask=everything, use_cache=False).logits
    torch.testing.assert_close(logits[0, 1:3], plain[0, 0:2], atol=1e-5, rtol=1e-4)
    assert not logits[0, [0, 3]].any()


@torch.no_grad()
def test_masked_tokens_are_not_read_and_given_ones_are():
    model = diffusion()
    ids, given = texts()
    given[0, 6:] = True
    order, other = blanks(ids, given), ids.clone()
    other[0, 1:6] = 5
    assert torch.equal(model(ids, order).logits, model(other, order).logits)
    other = ids.clone()
    other[0, 8] = 5
    assert not torch.allclose(model(ids, order).logits[0, 1], model(other, order).logits[0, 1], atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_packed_documents_do_not_see_each_other(architecture):
    model = diffusion(architecture)
    ids, _ = texts(length=15)
    lengths = (4, 6, 5)
    orders = [Factorization.left_to_right(n, group_size=n) for n in lengths]
    masked, _ = noised(Factorization.pack(orders), torch.Generator().manual_seed(0))
    together = model(ids, masked).logits[0]
    first = 0
    for n in lengths:
        here = slice(first, first + n)
        own = Factorization(masked.group_ids[:, here])
        torch.testing.assert_close(together[here], model(ids[:, here], own).logits[0], atol=1e-5, rtol=1e-4)
        first += n


@torch.no_grad()
def test_absent_tokens_are_not_read():
    model = diffusion()
    ids, given = texts(length=9)
    present = torch.ones_like(given)
    present[0, 7:] = False
    whole = model(ids, blanks(ids, given, present)).logits[0, :7]
    alone = model(ids[:, :7], blanks(ids[:, :7], given[:, :7])).logits[0]
    torch.testing.assert_close(whole, alone, atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------------- noise and loss


def test_given_tokens_are_never_masked_and_every_count_is_as_likely():
    ids, given = texts(rows=3, length=6)
    given[1, 3], given[2, 1:] = True, True
    order, counts = blanks(ids, given), torch.zeros(6)
    g = torch.Generator().manual_seed(0)
    for _ in range(500):
        masked, weights = noised(order, g)
        assert not (masked.is_predicted & given).any()
        assert masked.is_present.all()
        k = masked.is_predicted.sum(dim=1)
        assert k[0] >= 1
        assert k[2] == 0
        assert weights[0, 0] == pytest.approx(5 / int(k[0]))
        counts[k[0]] += 1
    assert (counts[1:] - 100).abs().max() < 5 * (500 * 0.2 * 0.8) ** 0.5


def test_levels_of_packed_documents_are_spread_and_what_another_row_holds_changes_nothing():
    packed = Factorization.pack([Factorization.left_to_right(21)] * 5)
    masked, _ = noised(packed, torch.Generator().manual_seed(3))
    k = torch.bincount(masked.documents[masked.is_predicted], minlength=5).sort().values
    assert (k.diff() == 4).all()  # of 20: a fifth apart
    rows = Factorization.stack([Factorization.left_to_right(7), Factorization.random(12)])
    both, _ = noised(rows, generators(2))
    alone, _ = noised(Factorization.left_to_right(7), generators(1))
    assert torch.equal(both.group_ids[:1, :7], alone.group_ids)


def test_the_loss_has_the_expectation_of_the_published_one():
    """t ~ U(0, 1), each token masked with probability t, weight 1/t: the integral over t for each number of masks."""
    t = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    for n in (1, 4, 7):
        for k in range(1, n + 1):
            published = float((math.comb(n, k) * t**k * (1 - t) ** (n - k) / t).mean())
            assert published == pytest.approx(1 / n * n / k, abs=1e-4)  # P(k) times the weight N/k


@pytest.mark.parametrize("training", [True, False])
def test_the_loss_of_a_batch(training):
    model = diffusion().train(training)
    ids, _ = texts(length=12)
    order = Factorization.pack([Factorization.left_to_right(5), Factorization.random(7)])
    torch.manual_seed(0)
    out = model(ids, order, labels=ids, num_items_in_batch=5)
    assert (out.token_losses.sum() / 5).item() == pytest.approx(out.loss.item(), rel=1e-5)
    assert not out.token_losses[~order.is_predicted].any()
    out.loss.backward()
    assert model.query_embedding.grad.any()
    again = model(ids, order, labels=ids, num_items_in_batch=5)
    assert torch.equal(again.loss, out.loss) != training  # one batch is always measured under the same masks


# ---------------------------------------------------------------------- bound


@torch.no_grad()
def log_probs_of_orders(model, ids, size=1):
    """(rows, N!) float64: log p of (rows, 1 + N) ids, `size` tokens at a time, in every order of the last N."""
    rows = []
    for order in itertools.permutations(range(1, N + 1)):
        total = torch.zeros(len(ids), dtype=torch.float64)
        for j, i in enumerate(order):
            group = torch.full((len(ids), N + 1), -1)
            group[:, list(order[j - j % size :])] = 0
            logits = model(ids, Factorization(group)).logits[:, i].double()
            total += logits.log_softmax(-1).gather(1, ids[:, i : i + 1])[:, 0]
        rows.append(total)
    return torch.stack(rows, dim=1)


@pytest.fixture(scope="module")
def brute_force():
    """A tiny model, all V**N texts behind one given token, and their log-probabilities in all orders."""
    model = diffusion(vocabulary=V)
    ids = torch.tensor([[1, *text] for text in itertools.product(range(V), repeat=N)])
    return model, ids, {size: log_probs_of_orders(model, ids, size) for size in (1, 2)}


@pytest.mark.parametrize("size", [1, 2])
def test_the_bound_is_the_mean_over_orders_and_above_the_exact_likelihood(brute_force, size):
    model, ids, logs = brute_force
    logs = logs[size]
    exact = -(logs.logsumexp(dim=1) - math.log(logs.shape[1]))  # -log of the mean over orders of p
    assert (-exact).exp().sum().item() == pytest.approx(1, abs=1e-5)
    elbo = -logs.mean(dim=1)
    assert (elbo >= exact).all()
    assert (elbo - exact).max() > 0.01  # its orders do differ
    given = (torch.arange(N + 1) == 0).expand(ids.shape)
    bound = negative_elbo(model, ids, given, 150, torch.Generator().manual_seed(0), group_size=size)
    away = (bound.mean - elbo) / bound.standard_error
    assert away.abs().max() < 4
    assert 0.7 < away.std() < 1.3  # the spread is what it says: 64 texts
    assert (bound.mean + 4 * bound.standard_error > exact).all()


def test_what_is_given_is_conditioned_on(brute_force):
    model, ids, _ = brute_force
    given = torch.tensor([True, True, False, True]).expand(ids.shape)
    bound = negative_elbo(model, ids, given, 2, torch.Generator().manual_seed(0))
    assert not bound.standard_error.any()  # one token: nothing is left to chance
    sums = (-bound.mean).exp().view(V, V, V).sum(dim=1)
    torch.testing.assert_close(sums, torch.ones_like(sums), atol=1e-5, rtol=0)


def test_bound_of_a_batch_is_that_of_each_row():
    model = diffusion()
    ids, given = texts(rows=3, length=8)
    present = torch.arange(8) < torch.tensor([[8], [5], [7]])
    bound = negative_elbo(model, ids, given, 4, generators(3), present)
    for b, n in enumerate((8, 5, 7)):
        alone = negative_elbo(model, ids[b : b + 1, :n], given[b : b + 1, :n], 4, generators(1, seed=b))
        torch.testing.assert_close(bound.mean[b], alone.mean[0], atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(bound.standard_error[b], alone.standard_error[0], atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------- sampling


@pytest.mark.parametrize("size", [1, 2])
def test_random_order_has_the_distribution_that_is_bounded(brute_force, size):
    model, _, logs = brute_force
    logs = logs[size]
    p = (logs.logsumexp(dim=1) - math.log(logs.shape[1])).exp()
    rows = 4000
    start = torch.ones(rows, N + 1, dtype=torch.int64)
    given = (torch.arange(N + 1) == 0).expand(start.shape)
    steps = math.ceil(N / size)
    filled = fill(model, start, given, steps, order="random", generator=torch.Generator().manual_seed(0))
    assert filled.forwards == steps
    number = (filled.ids[:, 1:] * torch.tensor([V * V, V, 1])).sum(dim=1)
    found = torch.bincount(number, minlength=V**N) / rows
    chi_square = (rows * (found - p).square() / p).sum().item()
    assert chi_square < 63 + 4 * (2 * 63) ** 0.5


@pytest.mark.parametrize("order", ["confidence", "random"])
@pytest.mark.parametrize("steps", [1, 3, 50])
def test_sampling(order, steps):
    model = diffusion()
    ids, given = texts(rows=3, length=9)
    given[0, 4], given[2, 1:] = True, True
    given[1, 7:] = True
    present = torch.ones_like(given)
    present[1, 8] = False
    filled = fill(model, ids, given, steps, order, 0.7, generators(3), present, banned=range(20, VOCABULARY))
    open_ = ~given & present
    assert filled.forwards == min(steps, int(open_.sum(dim=1).max()))
    assert torch.equal(filled.ids[~open_], ids[~open_])
    assert (filled.ids[open_] < 20).all()
    other = ids.masked_fill(open_, 7)
    again = fill(model, other, given, steps, order, 0.7, generators(3), present, banned=range(20, VOCABULARY))
    assert torch.equal(again.ids[open_], filled.ids[open_])  # what stood in the blanks is not read
    for b, n in enumerate((9, 8, 9)):
        own = (ids[b : b + 1, :n], given[b : b + 1, :n], steps, order, 0.7, generators(1, seed=b))
        assert torch.equal(fill(model, *own, banned=range(20, VOCABULARY)).ids[0], filled.ids[b, :n])


def test_confidence_fills_the_surest_first_and_is_greedy_at_temperature_0():
    model = diffusion()
    ids, given = texts(length=6)
    expected, left = ids.clone(), [1, 2, 3, 4, 5]
    while left:
        group = torch.full((1, 6), -1)
        group[0, left] = 0
        with torch.no_grad():
            p = model(expected, Factorization(group)).logits[0, left].softmax(-1)
        best = int(p.amax(-1).argmax())
        expected[0, left.pop(best)] = p[best].argmax()
    assert torch.equal(fill(model, ids, given, 5, temperature=0).ids, expected)


# ---------------------------------------------------------------------- files and mistakes


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("adapter", [None, Adapter("lora", 4)])
def test_saved_and_loaded_is_the_same(adapter, tmp_path, checkpoint):
    model, tokenizer = load(str(checkpoint), model_class=MaskedDiffusionLM, adapter=adapter)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert {file.suffix for file in tmp_path.glob("*model*")} == {".safetensors"}
    again, _ = load(str(tmp_path), model_class=MaskedDiffusionLM)
    ids, given = texts()
    order = blanks(ids, given)
    assert torch.equal(model(ids, order).logits, again(ids, order).logits)
    with pytest.raises(ValueError, match="holds a anyorder_masked_diffusion model, not a AnyOrderForCausalLM"):
        load(str(tmp_path))
    with pytest.raises(ValueError, match="not a converted one: use AnyOrderForCausalLM"):
        AnyOrderForCausalLM.from_pretrained(tmp_path)


def test_as_many_parameters_learn_as_in_the_any_order_model():
    for adapter in (None, Adapter("lora", 4)):
        counts = []
        for cls in (AnyOrderForCausalLM, MaskedDiffusionLM):
            model = cls.from_causal_lm(base_model("llama"), adapter=adapter)
            counts.append(sum(p.numel() for p in model.parameters() if p.requires_grad))
        assert counts[0] == counts[1]


def test_mistakes_are_one_clear_error():
    model = diffusion()
    ids, given = texts()
    for arguments, message in (
        ({"order": "entropy"}, "order must be one of confidence, random, got 'entropy'"),
        ({"steps": 0}, "steps must be a whole number of at least 1"),
        ({"temperature": -1.0}, "temperature"),
        ({"given": given[:, :4]}, "given must be bool of the shape of input_ids"),
        ({"given": ~given}, "row 0, position 0: no token before it"),
        ({"given": given & False}, "has no given position"),
    ):
        with pytest.raises(ValueError, match=message):
            fill(model, ids, **{"given": given, "steps": 2} | arguments)
    with pytest.raises(ValueError, match="samples must be a whole number of at least 2"):
        negative_elbo(model, ids, given, 1)
    with pytest.raises(ValueError, match="group_size must be a whole number of at least 1"):
        negative_elbo(model, ids, given, group_size=0)
    with pytest.raises(ValueError, match="predicts one group"):
        model(ids, Factorization.left_to_right(9))
    with pytest.raises(ValueError, match="it takes no coupling"):
        model.couple(Coupling())
    with pytest.raises(ValueError, match="use adapter='lora'"):
        MaskedDiffusionLM.from_causal_lm(base_model("llama"), adapter="gated")
    with pytest.raises(ValueError, match="leave recipe='paper' out"):
        MaskedDiffusionLM.from_causal_lm(base_model("llama"), recipe="paper")
