"""Compiled code for the CPU: the same steps, on disk for the same model only, never half written or anyone else's."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch._inductor

from anyorder import Factorization, policies
from anyorder.model.lm_head import head_of
from anyorder.runtime import packages
from anyorder.runtime.compiled import compiled_runner
from architectures import converted, gated
from decoding_runs import run

# Inductor's own imports warn of what PyTorch deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
SETTINGS = {"freezing": True}


@pytest.fixture
def model():
    return copy.deepcopy(converted("llama", "exact"))  # tests change it


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(packages, "cache_directory", lambda: tmp_path)
    return tmp_path


def head(model):
    """Its head by compiled code, the same by eager code, and hidden states for it."""
    hidden = torch.randn(2, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    function = head_of(model.causal_lm)
    compiled = packages.Packages(model, SETTINGS).load("head-2", function, (hidden,))
    return compiled(hidden), function(hidden).detach()


def forbid_compiling(monkeypatch):
    def compile_(*arguments, **options):
        raise AssertionError("compiled again")

    monkeypatch.setattr(torch._inductor, "aot_compile", compile_)


def test_code_is_compiled_once_and_again_when_it_is_damaged(model, cache, monkeypatch, caplog):
    compiled, eager = head(model)
    torch.testing.assert_close(compiled, eager, atol=1e-5, rtol=0)
    (file,) = cache.glob("compiled/*/*")
    assert file.name == "head-2.pt2"
    with monkeypatch.context() as patch:
        forbid_compiling(patch)
        again, _ = head(copy.deepcopy(model))
    assert torch.equal(again, compiled)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with caplog.at_level(logging.WARNING, "anyorder.runtime.packages"):
        again, _ = head(model)
    assert "head-2.pt2 is damaged: it is compiled anew" in caplog.text
    assert torch.equal(again, compiled)
    with torch.no_grad():
        next(model.causal_lm.get_output_embeddings().parameters()).add_(1.0)
    changed, eager = head(model)
    torch.testing.assert_close(changed, eager, atol=1e-5, rtol=0)
    assert (changed - compiled).abs().max() > 1e-2


def test_whatever_code_depends_on_is_in_the_name_of_its_folder(monkeypatch):
    model = gated("llama")
    names = [packages.state_of(model, SETTINGS)]
    assert packages.state_of(copy.deepcopy(model), SETTINGS) == names[0]
    names.append(packages.state_of(model, {"freezing": False}))
    for change in CHANGES:
        other = copy.deepcopy(model)
        change(other)
        names.append(packages.state_of(other, SETTINGS))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    names.append(packages.state_of(model, SETTINGS))
    monkeypatch.setattr(packages, "_processor", lambda: "another")
    names.append(packages.state_of(model, SETTINGS))
    monkeypatch.setattr(packages, "version", lambda package: "99")
    names.append(packages.state_of(model, SETTINGS))
    assert len(set(names)) == len(names) == 5 + len(CHANGES)


def _one_bit(model):
    weight = next(p for name, p in model.named_parameters() if "lora_B" in name)
    weight.data.view(torch.int32)[0, 0] ^= 1


def _epsilon(model):
    model.causal_lm.model.norm.variance_epsilon *= 2


def _scale(model):
    layer = next(module for module in model.modules() if hasattr(module, "lora_A"))
    layer.scaling["default"] *= 2


def _configuration(model):
    model.causal_lm.config.rms_norm_eps *= 2


CHANGES = [_one_bit, _epsilon, _scale, _configuration, torch.nn.Module.double]


def test_a_folder_that_cannot_be_written_to_is_one_clear_error(model, cache, monkeypatch):
    (cache / "compiled").write_text("a file")
    with monkeypatch.context() as patch:
        forbid_compiling(patch)  # known before the minutes are spent
        with pytest.raises(ValueError, match=r"cannot keep compiled code in .*ANYORDER_CACHE"):
            head(model)
    (cache / "compiled").unlink()

    def full(file, made):
        with open(file, "w") as out:
            out.write("half")
        raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr(packages, "package_aoti", full)
    with pytest.raises(ValueError, match=r"failed writing file. Give it room, .*ANYORDER_CACHE"):
        head(model)
    assert list(cache.glob("compiled/*/*")) == []


def test_packages_read_longest_ago_make_room_one_by_one(cache, monkeypatch):
    files = []
    for age, name in enumerate(("one/rows-1", "one/rows-2", "two/rows-1", "one/head-2")):
        file = cache / "compiled" / f"{name}.pt2"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"0" * 1000)
        packages.os.utime(file, (age, age))
        files.append(file)
    (cache / "compiled" / "one" / "renamed meanwhile.pt2").symlink_to("nowhere")
    for room, left in ((4000, files), (2999, files[2:]), (10, files[-1:])):
        monkeypatch.setattr(packages, "MOST_BYTES", room)
        packages._make_room(files[-1])
        assert [file for file in files if file.exists()] == left
    assert not (cache / "compiled" / "two").exists()


def test_code_that_others_could_have_written_is_not_loaded(model, cache):
    head(model)
    (file,) = cache.glob("compiled/*/*.pt2")
    for path in (file, file.parent):
        mode = path.stat().st_mode
        assert mode & 0o077 == 0
        path.chmod(mode | 0o002)
        with pytest.raises(ValueError, match="is not loaded: others than you can write there"):
            head(model)
        path.chmod(mode)
    head(model)


def test_a_cache_that_cannot_be_written_to_still_serves(model, cache, monkeypatch):
    expected, _ = head(model)

    def read_only(*arguments, **options):
        raise PermissionError("read-only file system")

    monkeypatch.setattr(packages.os, "utime", read_only)
    forbid_compiling(monkeypatch)
    assert torch.equal(head(model)[0], expected)


def test_compiled_steps_are_the_eager_ones_before_and_after_the_weights_change(cache, monkeypatch):
    """The one real case: a gated model through the compiler, and again when its weights are others."""
    monkeypatch.setitem(packages.ON_CPU, "max_autotune", False)  # chooses among kernels: minutes, and speed alone
    model = gated("llama", num_hidden_layers=1)
    order, ids = Factorization.left_to_right(14, 5, given=4), torch.arange(3, 17)[None]

    def log_probs(**options):
        return run(model, ids, order, policy=policies.groupwise(5), forced_ids=ids, **options).log_probs

    before = log_probs(compile=True)
    torch.testing.assert_close(before, log_probs(), atol=1e-5, rtol=0)
    assert compiled_runner(model).shapes
    model.load_state_dict({name: tensor * 0.5 for name, tensor in model.state_dict().items()})
    after = log_probs(compile=True)
    torch.testing.assert_close(after, log_probs(), atol=1e-5, rtol=0)
    assert (after - before).abs().max() > 1e-2
