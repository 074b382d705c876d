"""On a CUDA device: the same numbers as on the CPU, by FlexAttention's kernels, CUDA graphs and mixed precision."""

from __future__ import annotations

import copy

import pytest
import torch

from anyorder import AnyOrderForCausalLM, Factorization, policies
from anyorder.runtime.engines import runner_for
from architectures import RECIPES, VOCABULARY, base_model, gated
from decoding_runs import generator, run
from training_runs import adapt, curve

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore"),
]

T = 40
IDS = torch.randint(3, VOCABULARY, (2, T), generator=generator(0))
ORDER = Factorization.stack(
    [Factorization.random(T, 3, given=4, generator=generator(1)), Factorization.left_to_right(T - 3, 2)]
)
HEADS = {"head_dim": 16}  # FlexAttention's least on CUDA


def model_of(architecture: str, recipe: str, attn_implementation: str) -> AnyOrderForCausalLM:
    base = base_model(architecture, **HEADS)
    model = AnyOrderForCausalLM.from_causal_lm(base, recipe=recipe, attn_implementation=attn_implementation)
    torch.manual_seed(1)
    model.query_embedding.data.normal_(std=0.5)
    return model


def losses_and_gradient(model: AnyOrderForCausalLM) -> tuple[torch.Tensor, torch.Tensor]:
    output = model.train()(IDS.to(model.device), ORDER, labels=IDS.to(model.device))
    output.loss.backward()
    weights = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    return output.token_losses.cpu(), torch.cat(weights).cpu()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
@pytest.mark.parametrize("attn_implementation", ["sdpa", "flex_attention"])
def test_losses_and_gradients_are_those_of_the_cpu(architecture, recipe, attn_implementation):
    expected = losses_and_gradient(model_of(architecture, recipe, "sdpa"))
    found = losses_and_gradient(model_of(architecture, recipe, attn_implementation).cuda())
    torch.testing.assert_close(found[0], expected[0], atol=1e-3, rtol=0)
    assert (found[1] - expected[1]).norm() < 1e-3 * expected[1].norm()


@pytest.mark.parametrize("attn_implementation", ["sdpa", "flex_attention"])
def test_mixed_precision_is_near_full_precision(attn_implementation):
    expected = losses_and_gradient(model_of("llama", "exact", "sdpa"))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        found = losses_and_gradient(model_of("llama", "exact", attn_implementation).cuda())
    assert (found[0] - expected[0]).abs().mean() < 0.1
    assert (found[1] - expected[1]).norm() < 0.1 * expected[1].norm()


def decoded(model: AnyOrderForCausalLM, policy: policies.Policy, turn: int, **options):
    ids = IDS[:, : T - 4 * (turn % 2)]
    order = Factorization.stack([Factorization.left_to_right(ids.shape[1], 4, given=5)] * 2)
    draws = {"generator": [generator(turn), generator(9)], "temperature": 1.0}
    return run(model, ids, order, policy=policy, **draws, **options)


@pytest.mark.parametrize("policy", [policies.groupwise(4), policies.speculative(draft="query")])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gated"])
def test_compiled_steps_in_cuda_graphs_equal_eager_ones(architecture, policy):
    model = gated("llama") if architecture == "gated" else model_of(architecture, "exact", "sdpa")
    on_cpu, model = copy.deepcopy(model.eval()), model.eval().cuda()
    for turn in range(4):  # every run has a store of its own, whose addresses a graph holds
        expected, compiled = decoded(on_cpu, policy, turn), decoded(model, policy, turn, engine="cuda_graphs")
        assert torch.equal(compiled.sequences, expected.sequences)
        torch.testing.assert_close(compiled.log_probs, expected.log_probs, atol=1e-4, rtol=0)
    assert runner_for(model, "cuda_graphs").shapes


def test_adapt_trains_on_cuda_as_on_the_cpu(byte_tokenizer, stories, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    base_model("llama", vocabulary=len(byte_tokenizer), **HEADS).save_pretrained(checkpoint)
    byte_tokenizer.save_pretrained(checkpoint)
    assert adapt(checkpoint, stories, tmp_path / "cpu") == 0
    assert adapt(checkpoint, stories, tmp_path / "cuda", "--device", "cuda") == 0
    assert curve(tmp_path / "cuda") == pytest.approx(curve(tmp_path / "cpu"), abs=5e-3)
