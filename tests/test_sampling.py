from __future__ import annotations

import functools

import pytest
import torch
from scipy.stats import chisquare
from torch._subclasses import FakeTensorMode

from anyorder.core.rng import uniforms
from anyorder.decoding.draw import Drafts, Drawer, Evaluated, Visible
from anyorder.decoding.sampling import AllowedTokens, Sampler, in_double, inverse_cdf

LOGITS = torch.tensor([[2.0, 1.0, 0.5, -1.0, 0.0]])
ROW = COLUMN = torch.zeros(1, dtype=torch.int64)


def process(sampler: Sampler, known: tuple[int, ...] = (0,)) -> torch.Tensor:
    return sampler.process(LOGITS, torch.tensor([known]), ROW, COLUMN)[0]


def test_no_settings_change_nothing():
    assert process(Sampler(do_sample=True)) is not None
    assert torch.equal(process(Sampler(do_sample=True)), LOGITS[0])


def test_settings_mean_what_they_mean_in_transformers():
    for two in (2.0, 2):
        torch.testing.assert_close(process(Sampler(True, temperature=two)), LOGITS[0] / 2)
    assert process(Sampler(True, top_k=2)).isfinite().tolist() == [True, True, False, False, False]
    assert process(Sampler(True, top_p=0.5)).isfinite().tolist() == [True, False, False, False, False]
    assert process(Sampler(True, min_p=0.3)).isfinite().tolist() == [True, True, False, False, False]


def test_the_repetition_penalty_counts_tokens_on_both_sides():
    penalised = process(Sampler(repetition_penalty=2.0), known=(0, 3, 0))
    assert penalised.tolist() == [1.0, 1.0, 0.5, -2.0, 0.0]


def test_draws_follow_the_distribution():
    sampler, N = Sampler(do_sample=True), 5_000
    u = uniforms([N], N, torch.Generator().manual_seed(0))[0]
    tokens = sampler.draw(LOGITS.expand(N, -1), u)
    expected = LOGITS[0].double().softmax(0) * N
    assert chisquare(torch.bincount(tokens, minlength=5).numpy(), expected.numpy()).pvalue > 0.01


def test_the_ends_of_the_unit_interval_draw_possible_tokens():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]] * 3)
    u = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert Sampler(do_sample=True).draw(logits, u).tolist() == [1, 3, 3]


def test_greedy_takes_the_most_likely():
    assert Sampler().draw(LOGITS, torch.zeros(1)).tolist() == [0]


def test_allowed_tokens_restrict_positions():
    allowed = AllowedTokens(torch.tensor([[True] * 5, [False, False, True, True, False]]), torch.tensor([[0, 1]]))
    sampler = Sampler(allowed=allowed)
    logits = LOGITS.repeat(2, 1)
    out = sampler.process(logits, torch.tensor([[0], [0]]), torch.tensor([0, 0]), torch.tensor([0, 1]))
    assert torch.equal(out[0], LOGITS[0])
    assert out[1].isfinite().tolist() == [False, False, True, True, False]
    assert sampler.draw(out, torch.zeros(2)).tolist() == [0, 2]
    with pytest.raises(ValueError, match="masks must be bool of shape"):
        AllowedTokens(torch.ones(2, 2), torch.tensor([[0]]))
    with pytest.raises(ValueError, match=r"numbers of masks, 0\.\.1"):
        AllowedTokens(torch.ones(2, 2).bool(), torch.tensor([[2]]))
    with pytest.raises(ValueError, match="mask 1 of the allowed tokens allows none"):
        AllowedTokens(torch.tensor([[True], [False]]), torch.tensor([[0]]))


def test_each_row_draws_its_own_numbers():
    one = uniforms([5], 5, [torch.Generator().manual_seed(7)])
    two = uniforms([3, 5], 6, [torch.Generator().manual_seed(1), torch.Generator().manual_seed(7)])
    assert torch.equal(two[1, :5], one[0])
    assert not two[0, 3:].any()
    a, b = uniforms([5, 5], 5, torch.Generator().manual_seed(0))
    assert not torch.equal(a, b)
    torch.manual_seed(3)
    c = uniforms([5], 5, None)
    torch.manual_seed(3)
    assert torch.equal(uniforms([5], 5, None), c)


VISIBLE = Visible(torch.zeros(2, 4, dtype=torch.int64), torch.arange(5).expand(2, -1))


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampling"])
@pytest.mark.parametrize("verifying", [False, True], ids=["drawn", "verified"])
@pytest.mark.parametrize(
    ("bad", "allowed", "message"),
    [
        (
            [torch.nan] * 5,
            True,
            "row 1, position 2: the model's logits are not finite numbers; load it in a wider dtype",
        ),
        ([0.0, torch.nan, 0.0, 0.0, 0.0], True, "row 1, position 2: the model's logits are not finite numbers"),
        ([0.0, torch.inf, 0.0, 0.0, 0.0], True, "row 1, position 2: the model's logits are not finite numbers"),
        ([-torch.inf] * 5, True, "row 1, position 2: the model's logits are not finite numbers"),
        ([-torch.inf, 0.0, 0.0, 0.0, 0.0], False, "row 1, position 2: no token is left to draw; allowed tokens"),
    ],
)
def test_nothing_is_drawn_from_nothing(do_sample, verifying, bad, allowed, message):
    """Three positions of two rows; the last one has no distribution."""
    logits = torch.zeros(3, 5)
    logits[2] = torch.tensor(bad)
    masks = torch.tensor([[True] * 5, [True, False, False, False, False]])
    index = torch.zeros(2, 4, dtype=torch.int64)
    index[1, 2] = int(not allowed)
    drawer = Drawer(Sampler(do_sample, allowed=AllowedTokens(masks, index)), None, None)
    row, column, half = torch.tensor([0, 0, 1]), torch.tensor([1, 2, 2]), torch.full((2, 4), 0.5).double()
    found = Evaluated(row, column, column, logits)
    used, columns = torch.tensor([[True, True], [True, False]]), torch.tensor([[1, 2], [2, 3]])
    drafts = Drafts(torch.zeros(2, 1, dtype=torch.int64), torch.tensor([1, 0]), None)
    verify = functools.partial(drawer.verify, found, used, columns, drafts, (half, half))
    take = verify if verifying else functools.partial(drawer.draw, found, half[row, column])
    with pytest.raises(ValueError, match=message):
        take(VISIBLE)


@pytest.mark.parametrize("device", ["cpu", "mps", "xpu"])
def test_float64_is_on_the_cpu_where_a_device_may_have_none(device):
    """MPS has none: a cumulative sum there would raise."""
    with FakeTensorMode():
        weights = torch.empty(2, 5, device=device)
        assert in_double(weights).dtype == torch.float64
        assert in_double(weights).device.type == "cpu"
        assert inverse_cdf(weights, torch.empty(2, dtype=torch.float64)).device.type == "cpu"


def test_temperature_zero_is_greedy():
    sampler = Sampler(True, temperature=0, top_k=2, top_p=0.5)
    assert sampler == Sampler()
    with pytest.raises(ValueError, match="top_p"):
        Sampler(True, temperature=0, top_p=7.0)
    assert torch.equal(process(Sampler(True, top_k=0)), LOGITS[0])


def test_allowed_tokens_less_some():
    allowed = AllowedTokens(torch.tensor([[True] * 5, [False, True, True, False, False]]), torch.tensor([[0, 1, 1]]))
    less = allowed.without([1, 3], torch.tensor([[True, True, False]]))
    assert less.masks[less.index[0]].long().tolist() == [[1, 0, 1, 0, 1], [0, 0, 1, 0, 0], [0, 1, 1, 0, 0]]
    with pytest.raises(ValueError, match="allows none"):
        allowed.without([1, 2], torch.tensor([[False, True, False]]))


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.5}, {"top_k": 2}, {"do_sample": False}])
def test_log_probs_are_the_models_own_whatever_the_settings(settings):
    logits = torch.tensor([[0.0, 1.0, -150.0, 3.0], [2.0, -0.5, 0.5, 0.0]])  # the third has no probability in float32
    place = torch.arange(2)
    found = Evaluated(place, place, place + 1, logits)
    own = Drawer(Sampler(**({"do_sample": True} | settings))).distribution(found, VISIBLE)
    for token in ([3, 0], [2, 1]):
        expected = logits.double().log_softmax(-1)[place, token].float()
        assert torch.allclose(own.log_probs(torch.tensor(token)), expected, atol=1e-5)
