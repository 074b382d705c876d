"""One contract for all that execute decoding steps, tested without a compiler.

`Uncompiled` runs the very functions of static shapes that compilers are given: padding, buckets, gates and the store
are theirs, the arithmetic is eager PyTorch's.
"""

from __future__ import annotations

import copy
import re

import pytest
import torch

from anyorder import AnyOrderForCausalLM, Factorization, policies
from anyorder.core.layout import lay_out
from anyorder.model.adapters import Adapter
from anyorder.model.kv_cache import KeyValueStore
from anyorder.runtime import cuda_graphs, engines, processor
from anyorder.runtime.runner import EagerRunner
from anyorder.runtime.static_shapes import MOST_ROWS, StaticRunner
from architectures import VOCABULARY, base_model, converted, gated
from decoding_runs import generator, run

# The compiler's own imports warn of what PyTorch deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
T = 14
IDS = torch.randint(3, VOCABULARY, (2, T), generator=generator(0))
ORDER = Factorization.stack(
    [Factorization.random(T, 1, given=4, generator=generator(1)), Factorization.left_to_right(11, given=3)]
)


class Uncompiled(StaticRunner):
    def build(self, name, function, inputs):
        shapes = [tensor.shape for tensor in inputs if isinstance(tensor, torch.Tensor)]

        def of_these_shapes(*given):
            assert [tensor.shape for tensor in given if isinstance(tensor, torch.Tensor)] == shapes
            return function(*given)

        return of_these_shapes


@pytest.fixture(params=[EagerRunner, Uncompiled])
def kind(request):
    return request.param


def runner_of(model, kind):
    """One of this kind, kept with the model as `engines` keeps them."""
    return model.__dict__.setdefault("_tested_runners", {}).setdefault(kind, kind(model))


def decoded(model, kind, order=ORDER, **options):
    return run(model, IDS[: order.batch_size], order, runner=runner_of(model, kind), **options)


CASES = [
    ("llama", "exact", policies.groupwise(1)),
    ("llama", "paper", policies.groupwise(4)),
    ("gpt2", "exact", policies.dynamic("entropy", step_size=2)),
    ("gemma2", "paper", policies.groupwise(2)),
    ("gemma3", "exact", policies.speculative(draft="query", draft_length=2)),
    ("gated", "exact", policies.groupwise(3)),
    ("gated", "exact", policies.speculative(draft="query")),
]


@pytest.mark.parametrize(("architecture", "recipe", "policy"), CASES)
def test_steps_of_static_shapes_give_what_eager_ones_give(architecture, recipe, policy):
    model = copy.deepcopy(gated("llama") if architecture == "gated" else converted(architecture, recipe))

    def drawn(kind):
        return decoded(model, kind, policy=policy, temperature=1.0, generator=[generator(1), generator(2)])

    expected, found = drawn(EagerRunner), drawn(Uncompiled)
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(found.steps, expected.steps)
    torch.testing.assert_close(found.log_probs, expected.log_probs, atol=1e-5, rtol=0)
    shapes = runner_of(model, Uncompiled).shapes
    assert shapes
    assert all(shape[3] == 64 for shape in shapes)
    drawn(Uncompiled)
    assert runner_of(model, Uncompiled).shapes == shapes  # built once


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gated"])
def test_cached_equals_parallel(kind, architecture):
    model = copy.deepcopy(gated("llama") if architecture == "gated" else converted(architecture))
    output = decoded(model, kind, policy=policies.groupwise(2), forced_ids=IDS)
    order = Factorization.stack([part.regroup(2) for part in ORDER.unstack()])
    torch.testing.assert_close(output.log_probs, model.log_likelihood(IDS, order), atol=1e-5, rtol=0)


@pytest.mark.parametrize("model", [converted("llama"), gated("qwen2")], ids=["plain", "gated"])
def test_hidden_states_and_logits_are_the_models(kind, model):
    runner, layout = kind(model), lay_out(IDS, Factorization.stack([Factorization.left_to_right(T, 3)] * 2), "exact")
    expected = model.hidden_rows(layout.rows, layout.key_positions)
    stores = [KeyValueStore(runner.capacity(T)), KeyValueStore(runner.capacity(T))]
    with torch.no_grad():
        for store in stores:  # a static runner leaves the first forward of a store to the model
            first = runner.hidden(layout.rows, layout.key_positions, store)
        again = runner.hidden(layout.rows, layout.key_positions, stores[0])
        used = layout.rows.hi > 0
        torch.testing.assert_close(first, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(again[used], expected[used], atol=1e-5, rtol=0)
        for count in (1, 3, MOST_ROWS + 1):
            rows = expected[0, :1].expand(count, -1)
            torch.testing.assert_close(runner.logits(rows), model.head(rows), atol=1e-5, rtol=0)


def test_adapters_that_are_turned_off_and_on_are_noticed(kind):
    model = gated("llama")
    order = Factorization.left_to_right(T, 5, given=4)

    def log_probs(kind):
        return decoded(model, kind, order, forced_ids=IDS[:1]).log_probs

    on = log_probs(EagerRunner)
    torch.testing.assert_close(log_probs(kind), on, atol=1e-5, rtol=0)
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.enable_adapters(False)
    torch.testing.assert_close(log_probs(kind), log_probs(EagerRunner), atol=1e-5, rtol=0)
    assert (log_probs(kind) - on).abs().max() > 1e-3


def _load(model):
    model.load_state_dict({name: tensor * 0.5 for name, tensor in model.state_dict().items()})


def _average(model):
    for parameter in model.parameters():
        parameter.data.mul_(0.9)  # PyTorch does not count what is done to .data


def _one_weight(model):
    with torch.no_grad():
        model.causal_lm.model.layers[1].mlp.up_proj.weight[0, 0] += 0.5


def _another_dtype(model):
    model.to(torch.float64)


def _merged(model):
    model.merge_adapter()


def _steps_of_an_optimizer(model):
    model.query_embedding.grad = torch.ones_like(model.query_embedding)
    torch.optim.SGD([model.query_embedding], 0.1).step()


@pytest.mark.parametrize("change", [_load, _average, _one_weight, _another_dtype, _merged, _steps_of_an_optimizer])
def test_changed_weights_are_noticed(kind, change):
    if change is _merged:
        model = AnyOrderForCausalLM.from_causal_lm(base_model("llama"), adapter=Adapter("lora", rank=2))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    else:
        model = copy.deepcopy(converted("llama"))
    order = Factorization.left_to_right(T, 2, given=4)
    decoded(model, kind, order, forced_ids=IDS[:1])
    runner = runner_of(model, kind)
    runner.check()
    change(model)
    if kind is EagerRunner:
        runner.check()
    else:
        with pytest.raises(ValueError, match="weights have changed since its steps were compiled"):
            runner.check()
        del model.__dict__["_tested_runners"][kind]
    found = decoded(model, kind, order, forced_ids=IDS[:1]).log_probs
    torch.testing.assert_close(found, model.log_likelihood(IDS[:1], order), atol=1e-5, rtol=0)


def test_compiled_steps_are_kept_until_the_weights_change_and_not_copied(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "CudaGraphRunner", Uncompiled)
    model = copy.deepcopy(converted("llama"))
    made = engines._cuda_graphs(model)
    run(model, IDS[:1], Factorization.left_to_right(T, 2, given=4), runner=made)
    assert engines._cuda_graphs(model) is made
    assert made.shapes
    assert engines._cuda_graphs(copy.deepcopy(model)).shapes == []
    _average(model)
    assert engines._cuda_graphs(model).shapes == []


def test_few_functions_are_kept_and_the_one_used_longest_ago_goes(monkeypatch):
    model = copy.deepcopy(converted("llama"))
    monkeypatch.setattr(Uncompiled, "most_built", 2)
    policy = policies.speculative(draft="query", draft_length=3)
    expected = decoded(model, EagerRunner, policy=policy)
    found = decoded(model, Uncompiled, policy=policy)
    assert torch.equal(found.sequences, expected.sequences)
    runner = runner_of(model, Uncompiled)
    assert len(runner.shapes) > 2
    assert len(runner._built) == 2


def test_stores_come_in_few_sizes():
    runner = Uncompiled(converted("llama"))
    assert [runner.capacity(n) + 1 for n in (1, 63, 64, 200)] == [64, 64, 128, 256]


def test_a_whole_model_under_torch_compile_runs_eagerly():
    """Traced, a gated adapter would take part in no row, and nobody would be told."""
    model = gated("llama").train()
    order = Factorization.stack([Factorization.random(T, 2, given=4, generator=generator(1))] * 2)
    compiled = torch.compile(model)
    assert torch.equal(compiled(IDS, order, labels=IDS).loss, model(IDS, order, labels=IDS).loss)


def test_the_processor_is_told_by_class(monkeypatch):
    has = dict.fromkeys(("_is_amx_tile_supported", "_is_vnni_supported", "_is_avx512_supported", "_is_avx2_supported"))
    for name in has:
        monkeypatch.setattr(torch.cpu, name, lambda name=name: bool(has[name]))
    found = [processor.processor_class()]
    for name in reversed(list(has)):
        if name == "_is_vnni_supported":  # some have it without AVX-512
            has["_is_avx512_supported"] = False
            has[name] = True
            assert processor.processor_class() == "avx2"
            has["_is_avx512_supported"] = True
        has[name] = True
        found.append(processor.processor_class())
    assert found == list(reversed(processor.CLASSES))
    assert 1 <= processor.threads() <= torch.get_num_threads()
    assert re.search(r"\(amx\), \d+ cores, \d+ threads", processor.describe())
