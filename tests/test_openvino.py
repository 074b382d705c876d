"""OpenVINO: hidden states and logits are the eager ones, cached = parallel; prepared once, kept whole."""

from __future__ import annotations

import copy
import dataclasses
import os

import pytest
import torch

from anyorder import AnyOrderForCausalLM, Factorization, load, policies
from anyorder.core.layout import Arrangement, join, lay_out
from anyorder.model.kv_cache import KeyValueStore
from anyorder.runtime import engines
from anyorder.runtime.processor import has_amx
from anyorder.runtime.runner import EagerRunner
from architectures import ARCHITECTURES, VOCABULARY, converted, couple, gated
from decoding_runs import generator, run

pytest.importorskip("openvino", reason="needs anyorder[openvino]")

from anyorder.runtime.openvino import cache, prepare
from anyorder.runtime.openvino.compiled import CompiledRows

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of what exporting imports
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
QUICK = ("gated", "gemma2")
EXPORTED = [name for name in ARCHITECTURES if name != "qwen3_moe"]
NEAR = {"atol": 2e-4, "rtol": 0}

T = 14
IDS = torch.randint(3, VOCABULARY, (2, T), generator=generator(0))
ORDER = Factorization.stack(
    [Factorization.random(T, 1, given=4, generator=generator(1)), Factorization.left_to_right(11, 3, given=3)]
)


def slow_but(names):
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    return tmp_path_factory.mktemp("openvino")


@pytest.fixture(autouse=True)
def prepared(folders, monkeypatch):
    """Prepared once a session; the cache of the user is left alone."""
    monkeypatch.setattr(cache, "cache_directory", lambda: folders)


@pytest.fixture(scope="session")
def models():
    """Each architecture once: its runner stays with it."""
    made: dict[str, AnyOrderForCausalLM] = {}

    def model(name):
        if name not in made:
            made[name] = couple(gated("llama")) if name == "gated" else copy.deepcopy(converted(name))
        return made[name]

    return model


def decoded(model, order=ORDER, ids=IDS, **options):
    return run(model, ids, order, engine="openvino", weights="float32", **options)


@pytest.mark.parametrize("name", slow_but(["gated", *EXPORTED]))
def test_hidden_states_and_logits_are_the_models(models, name):
    model = models(name)
    runner, layout = engines.runner_for(model, "openvino", "float32"), lay_out(IDS, ORDER, "exact")
    store = KeyValueStore(runner.capacity(T))
    with torch.no_grad():
        expected = model.hidden_rows(layout.rows, layout.key_positions)
        for _ in range(2):  # on an empty store, and written over
            torch.testing.assert_close(runner.hidden(layout.rows, layout.key_positions, store), expected, **NEAR)
        for count in (1, 3):
            rows = expected[0, :count]
            torch.testing.assert_close(runner.logits(rows), model.head(rows), **NEAR)


def test_rows_without_content_rows(models):
    model, arranged = models("gated"), Arrangement(IDS, ORDER, "exact")
    runner, first = engines.runner_for(model, "openvino", "float32"), torch.zeros(len(IDS), dtype=torch.int64)
    arranged.append(torch.arange(4).expand(len(IDS), 4), first + 4)
    columns, used = torch.tensor([[4, 7]] * len(IDS)), torch.ones(len(IDS), 2, dtype=torch.bool)
    content, queries = arranged.content(first, first + 4), arranged.queries(columns, used, torch.full_like(columns, 4))
    nothing, nowhere = arranged.content(first, first), arranged.queries(columns[:, :0], used[:, :0], columns[:, :0])
    with torch.no_grad():
        expected = model.hidden_rows(join(content, queries), arranged.columns)[:, 4:]
        store = KeyValueStore(runner.capacity(T))
        runner.hidden(join(content, nowhere), arranged.columns, store)
        torch.testing.assert_close(runner.hidden(join(nothing, queries), arranged.columns, store), expected, **NEAR)


@pytest.mark.parametrize("name", slow_but(["gated", *EXPORTED]))
def test_cached_equals_parallel_and_a_batch_its_rows(models, name):
    model = models(name)
    output = decoded(model, forced_ids=IDS)
    torch.testing.assert_close(output.log_probs, model.log_likelihood(IDS, ORDER), **NEAR)
    alone = decoded(model, ORDER.unstack()[0], IDS[:1], forced_ids=IDS[:1])
    torch.testing.assert_close(alone.log_probs[0], output.log_probs[0], **NEAR)


@pytest.mark.parametrize(
    "policy",
    [policies.groupwise(3), *(policies.speculative(draft=draft, draft_length=2) for draft in ("query", "state"))],
)
def test_policies_draw_the_same(models, policy):
    """Members of groups and drafts through the coupling's own graphs."""
    model = models("gated")
    assert set(engines.runner_for(model, "openvino", "float32")._members) == {"coupling", "scattered", "drafts"}
    options = {"policy": policy, "temperature": 1.0}
    expected = run(model, IDS, ORDER, engine="eager", generator=[generator(1), generator(2)], **options)
    found = decoded(model, generator=[generator(1), generator(2)], **options)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.log_probs, expected.log_probs, **NEAR)


def test_prompts_padded_on_the_left(models):
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[1, :2] = 0
    options = {"attention_mask": mask, "max_new_tokens": 5, "eos_token_id": ()}
    model, prompts = models("gated"), IDS[:, :6]
    expected = model.generate(prompts, engine="eager", **options)
    assert torch.equal(model.generate(prompts, engine="openvino", weights="float32", **options), expected)


def test_adapters_that_are_turned_off_are_noticed(models):
    model, order = models("gated"), Factorization.left_to_right(T, 5, given=4)
    on = decoded(model, order, IDS[:1], forced_ids=IDS[:1]).log_probs
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        off = decoded(model, order, IDS[:1], forced_ids=IDS[:1]).log_probs
        torch.testing.assert_close(off, model.log_likelihood(IDS[:1], order), **NEAR)
    finally:
        for layer in layers:
            layer.enable_adapters(True)
    assert (on - off).abs().max() > 1e-3


def test_a_runner_refuses_changed_weights(models):
    model = models("gated")
    runner = engines.runner_for(model, "openvino", "float32")
    with torch.no_grad():
        model.query_embedding[0] += 0.5
        with pytest.raises(ValueError, match="weights have changed since it was prepared for OpenVINO"):
            runner.check()
        model.query_embedding[0] -= 0.5
    assert engines.runner_for(copy.deepcopy(models("gated")), "eager").__class__ is EagerRunner


@pytest.mark.parametrize("weights", ["int8", "bfloat16", "int4"])
def test_fewer_bits_are_nearly_the_same(models, monkeypatch, weights):
    if weights == "bfloat16" and not has_amx():
        pytest.skip("bfloat16 needs AMX")
    if weights == "int4":
        int4 = pytest.importorskip("anyorder.runtime.openvino.int4")
        pytest.importorskip("nncf", reason="needs anyorder[int4]")
        monkeypatch.setattr(int4, "GROUP", 16)
        monkeypatch.setattr(int4, "TOKENS", 24)
    model = models("gated")
    found = run(model, IDS, ORDER, engine="openvino", weights=weights, forced_ids=IDS).log_probs
    own = model.log_likelihood(IDS, ORDER)
    errors = (found - own).abs()
    assert 0 < errors.mean() < {"int8": 0.1, "bfloat16": 0.1, "int4": 0.5}[weights]
    assert weights == "int4" or errors.max() < 1.0


@pytest.mark.parametrize("weights", ["float32", "int8", "bfloat16"])
def test_rows_with_closed_gates_are_the_same_without_adapters(models, monkeypatch, weights):
    """The graph whose weights are cut down to what the base has, in each dtype of weights."""
    if weights == "bfloat16" and not has_amx():
        pytest.skip("bfloat16 needs AMX")
    model = models("gated")
    runner, layout = engines.runner_for(model, "openvino", weights), lay_out(IDS, ORDER, "exact")
    rows = dataclasses.replace(layout.rows, gates=torch.zeros_like(layout.rows.gates))

    def hidden():
        return runner.hidden(rows, layout.key_positions, KeyValueStore(runner.capacity(T)))

    without, sources = hidden(), dict(runner.graphs._sources)
    monkeypatch.setattr(runner, "graphs", CompiledRows(sources[True], False, runner._compiled))
    bound = {"float32": 2e-4, "int8": 2e-2, "bfloat16": 2e-2}[weights] * float(without.abs().max())
    torch.testing.assert_close(hidden(), without, atol=bound, rtol=0)
    sizes = [sum(node.get_type_name() == "MatMul" for node in sources[with_].get_ordered_ops())
             for with_ in (True, False)]  # fmt: skip
    layers = len(model.causal_lm.model.layers)
    assert sizes[0] - sizes[1] == 4 * layers  # what adapters add; what they read is part of the products beside them


def test_closed_rows_that_a_forward_begins_with_may_go_first(models, monkeypatch):
    """Without adapters, whatever stands behind them; the results are what they were."""
    model = models("gated")
    order = Factorization.stack([Factorization.random(T, 3, given=given, generator=generator(1)) for given in (5, 8)])
    runner, went = engines.runner_for(model, "openvino", "float32"), []
    hidden = runner._hidden
    monkeypatch.setattr(runner, "_hidden", lambda rows, *more: (went.append(rows), hidden(rows, *more))[1])
    monkeypatch.setattr("anyorder.runtime.openvino.runner.CLOSED", 1)
    output = decoded(model, order, forced_ids=IDS, policy=policies.groupwise())
    torch.testing.assert_close(output.log_probs, model.log_likelihood(IDS, order), **NEAR)
    first, second = went[:2]
    assert not first.gates.any()
    assert second.gates.any()
    assert first.count == first.content_count > 0
    whole = lay_out(IDS, order, "exact").rows
    start, end = whole.split(whole.closed_start)
    assert not start.gates.any()
    assert torch.equal(torch.cat([start.hi, end.hi], dim=1), whole.hi)
    assert lay_out(IDS, order, "paper").rows.closed_start == 0  # where given tokens read each other, none goes first


def test_sizes_that_come_often_get_a_graph_of_their_own(models, monkeypatch):
    model = models("gated")
    runner = engines.runner_for(model, "openvino", "float32")
    monkeypatch.setattr(CompiledRows, "often", 3)
    monkeypatch.setattr(CompiledRows, "most_fixed", 2)
    graphs, kept = runner.graphs, set()
    for ids, order in ((IDS, ORDER), (IDS[:1], ORDER.unstack()[0]), (IDS[1:], Factorization.left_to_right(T, given=1))):
        output = run(
            model, ids, order, engine="openvino", weights="float32", policy=policies.groupwise(1), forced_ids=ids
        )
        expected = model.log_likelihood(ids, order.regroup(1))
        torch.testing.assert_close(output.log_probs, expected, **NEAR)
        assert 0 < len(graphs._fixed) <= 2
        kept |= set(graphs._fixed)
    assert len(kept) > 2  # some made room for others
    assert {sizes.is_open for sizes in kept} == {True, False}


def test_what_was_prepared_is_found_by_who_uses_it(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "cache_directory", lambda: tmp_path)
    model = gated("llama")
    made = prepare.prepare(model, "float32")
    engines.runner_for(model, "openvino", "float32")
    assert [path.name for path in (tmp_path / "openvino").iterdir() if path.is_dir()] == [made.name]


@pytest.mark.slow
def test_what_cannot_be_exported_is_refused_with_the_reason(models):
    with pytest.raises(ValueError, match="a Qwen3MoeForCausalLM cannot be exported to OpenVINO .*use engine='eager'"):
        engines.runner_for(models("qwen3_moe"), "openvino", "float32")


def test_bfloat16_is_refused_without_amx(models, monkeypatch):
    monkeypatch.setattr(prepare, "has_amx", lambda: False)
    with pytest.raises(ValueError, match="slower than float32 on this processor"):
        prepare.prepare(models("gated"), "bfloat16")


def test_auto_takes_what_is_prepared_and_prepares_nothing(models):
    model = models("gated")
    engines.runner_for(model, "openvino", "float32")
    assert type(engines.runner_for(model, "auto", "float32")).__name__ == "OpenVINORunner"
    assert type(engines.runner_for(copy.deepcopy(converted("llama", "paper")))) is EagerRunner


def test_a_model_is_the_same_however_many_were_loaded_before_it(checkpoint):
    """Hooks are numbered through a process: they are not what a model was prepared as."""
    kinds = {cache.kind_of(load(str(checkpoint))[0]) for _ in range(2)}
    assert len(kinds) == 1


def test_a_model_is_loaded_for_an_engine(checkpoint, tmp_path):
    model, _ = load(str(checkpoint), engine="openvino", weights="float32")
    runner = engines.runner_for(model)
    assert (type(runner).__name__, runner.weights) == ("OpenVINORunner", "float32")
    assert type(engines.runner_for(model, "eager")) is EagerRunner
    with pytest.raises(ValueError, match="did you mean 'openvino'"):
        load(str(tmp_path / "nothing"), engine="openvin")  # before it looks for a model


@pytest.mark.parametrize(
    ("engine", "weights", "message"),
    [
        ("openvin", None, "engine 'openvin' is not known: did you mean 'openvino'"),
        ("openvino", "int3", "weights 'int3' is not known: did you mean 'int"),
        ("eager", "int8", "weights='int8' is for engine='openvino'"),
        ("cuda_graphs", None, "needs the model on a CUDA device; it is on 'cpu'"),
    ],
)
def test_mistakes_are_named(models, engine, weights, message):
    with pytest.raises(ValueError, match=message):
        models("gated").generate(IDS[:, :5], engine=engine, weights=weights)


# ---------------------------------------------------------------------- the cache, without a model


def filled(folder):
    for name in cache.FILES:
        (folder / name).write_text(name)


def test_a_folder_is_whole_and_ones_own(tmp_path, monkeypatch):
    folder = tmp_path / "openvino" / "one"
    assert not cache.find(folder)
    cache.write(folder, filled)
    assert cache.find(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    (folder / "rows.bin").chmod(0o622)
    with pytest.raises(ValueError, match="others than you can write there"):
        cache.find(folder)
    (folder / "rows.bin").chmod(0o600)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    folder.chmod(0o700)
    if folder.stat().st_uid:
        with pytest.raises(ValueError, match="others than you can write there"):
            cache.find(folder)


def test_a_damaged_folder_is_not_prepared_and_made_anew(tmp_path):
    folder = tmp_path / "one"
    cache.write(folder, filled)
    (folder / "rows.bin").write_text("rows.bIn")
    assert not cache.find(folder)
    cache.write(folder, filled)
    assert cache.find(folder)
    (folder / "files.json").unlink()
    assert not cache.find(folder)


def test_what_is_not_finished_leaves_nothing(tmp_path):
    def half(folder):
        (folder / "rows.xml").write_text("half")
        raise OSError("no space left")

    with pytest.raises(ValueError, match="no space left. Give it room, .*ANYORDER_CACHE"):
        cache.write(tmp_path / "one", half)
    assert list(tmp_path.iterdir()) == []


def test_the_first_of_two_writers_stays(tmp_path):
    folder = tmp_path / "one"

    def meanwhile(part):
        filled(part)
        cache.write(folder, filled)
        (folder / "mark").touch()

    cache.write(folder, meanwhile)
    assert (folder / "mark").exists()


def test_folders_read_longest_ago_make_room(tmp_path, monkeypatch):
    for age, name in enumerate(("one", "two", "three")):
        cache.write(tmp_path / name, filled)
        os.utime(tmp_path / name, (age, age))
    size = sum(file.stat().st_size for file in (tmp_path / "one").iterdir())
    monkeypatch.setattr(cache, "MOST_BYTES", 2 * size)
    cache._make_room(tmp_path / "three")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["three", "two"]
