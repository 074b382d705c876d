"""Compiled steps: the same results as eager ones, in few shapes."""

from __future__ import annotations

import copy

import pytest
import torch

from anyorder import AnyOrderForCausalLM, Factorization, policies
from anyorder.runtime.compiled import compiled_runner
from anyorder.runtime.packages import ON_CPU
from architectures import VOCABULARY, converted, gated
from decoding_runs import generator, run

# Inductor's own imports warn of what PyTorch deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.usefixtures("code_cache"),
]

T = 14
IDS = torch.randint(3, VOCABULARY, (2, T), generator=generator(0))


def turn_adapters(model: AnyOrderForCausalLM, on: bool) -> None:
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.enable_adapters(on)


@pytest.fixture(autouse=True)
def _few_trials(request, monkeypatch):
    """Trying kernels takes longer than all else, and what is chosen changes the speed alone: one case does it."""
    if TUNED not in request.node.name:
        monkeypatch.setitem(ON_CPU, "max_autotune", False)


TUNED = "llama-exact-policy0"
CASES = [
    ("llama", "exact", policies.groupwise(1)),
    ("llama", "paper", policies.groupwise(4)),
    ("gemma3", "exact", policies.speculative(draft="query", draft_length=2)),
    ("gated", "exact", policies.groupwise(3)),
]


@pytest.mark.parametrize(("architecture", "recipe", "policy"), CASES)
def test_compiled_equals_eager(architecture, recipe, policy):
    model = gated("llama") if architecture == "gated" else converted(architecture, recipe)
    parts = [Factorization.random(T, 1, given=4, generator=generator(1)), Factorization.left_to_right(11, given=3)]
    order = Factorization.stack(parts)

    def decoded(**options):
        draws = {"generator": [generator(1), generator(2)], "temperature": 1.0}
        return run(model, IDS, order, policy=policy, **draws, **options)

    eager, compiled = decoded(), decoded(compile=True)
    assert torch.equal(compiled.sequences, eager.sequences)
    assert torch.equal(compiled.steps, eager.steps)
    torch.testing.assert_close(compiled.log_probs, eager.log_probs, atol=1e-5, rtol=0)
    shapes = compiled_runner(model).shapes
    assert shapes
    assert all(shape[3] == 64 for shape in shapes)
    decoded(compile=True)
    assert compiled_runner(model).shapes == shapes  # compiled once
    model.train()
    assert compiled_runner(model).shapes == []  # weights may change from here on
    model.eval()


def test_compiled_steps_are_of_their_own_model_and_its_adapters():
    """Most guards are dropped: neither another model of the same shapes nor adapters turned off may go unnoticed."""
    first = gated("llama", num_hidden_layers=1)
    second = copy.deepcopy(first)
    for parameter in second.parameters():
        parameter.data.mul_(1.5)
    order = Factorization.left_to_right(T, 5, given=4)  # one shape of a step: compiling takes seconds

    def log_probs(model, **options):
        return run(model, IDS[:1], order, policy=policies.groupwise(5), forced_ids=IDS[:1], **options).log_probs

    for model in (first, second):
        torch.testing.assert_close(log_probs(model, compile=True), log_probs(model), atol=1e-5, rtol=0)
    on = log_probs(first)
    turn_adapters(first, on=False)
    torch.testing.assert_close(log_probs(first, compile=True), log_probs(first), atol=1e-5, rtol=0)
    assert (log_probs(first) - on).abs().max() > 1e-3
    turn_adapters(first, on=True)
    torch.testing.assert_close(log_probs(first, compile=True), on, atol=1e-5, rtol=0)


def test_stores_come_in_few_sizes():
    assert [compiled_runner(converted("llama")).capacity(n) + 1 for n in (1, 63, 64, 200)] == [64, 64, 128, 256]


def test_a_whole_model_under_torch_compile_runs_eagerly():
    """Traced, a gated adapter would take part in no row, and nobody would be told."""
    model = gated("llama").train()
    order = Factorization.stack([Factorization.random(T, 2, given=4, generator=generator(1))] * 2)
    compiled = torch.compile(model)
    assert torch.equal(compiled(IDS, order, labels=IDS).loss, model(IDS, order, labels=IDS).loss)
