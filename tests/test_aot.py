"""Compiled code on disk: the same function, found again by the same model only, and never half written."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch._inductor

from anyorder.model.lm_head import head_of
from anyorder.runtime import packages as aot
from architectures import converted, gated

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
    monkeypatch.setattr(aot, "cache_directory", lambda: tmp_path)
    return tmp_path


def head(model):
    """Its head by compiled code, the same by eager code, and hidden states for it."""
    hidden = torch.randn(2, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    function = head_of(model.causal_lm)
    compiled = aot.Packages(model, SETTINGS).load("head-2", function, (hidden,))
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
    names = [aot.state_of(model, SETTINGS)]
    assert aot.state_of(copy.deepcopy(model), SETTINGS) == names[0]
    names.append(aot.state_of(model, {"freezing": False}))
    for change in CHANGES:
        other = copy.deepcopy(model)
        change(other)
        names.append(aot.state_of(other, SETTINGS))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    names.append(aot.state_of(model, SETTINGS))
    monkeypatch.setattr(aot, "_processor", lambda: "another")
    names.append(aot.state_of(model, SETTINGS))
    monkeypatch.setattr(aot, "version", lambda package: "99")
    names.append(aot.state_of(model, SETTINGS))
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

    monkeypatch.setattr(aot, "package_aoti", full)
    with pytest.raises(ValueError, match=r"failed writing file. Give it room, .*ANYORDER_CACHE"):
        head(model)
    assert list(cache.glob("compiled/*/*")) == []


def test_what_was_read_longest_ago_makes_room(model, cache, monkeypatch):
    for name, age in (("older", 1), ("old", 2)):
        folder = cache / "compiled" / name
        folder.mkdir(parents=True)
        (folder / "code.pt2").write_bytes(b"0" * 1000)
        aot.os.utime(folder, (age, age))
    (cache / "compiled" / "old" / "renamed meanwhile").symlink_to("nowhere")
    newest = cache / "compiled" / "newest"
    newest.mkdir()
    (newest / "code.pt2").write_bytes(b"0" * 5000)
    left = lambda: sorted(folder.name for folder in (cache / "compiled").iterdir())  # noqa: E731
    for room, expected in ((7000, ["newest", "old", "older"]), (6000, ["newest", "old"]), (100, ["newest"])):
        monkeypatch.setattr(aot, "MOST_BYTES", room)
        aot._make_room(newest)
        assert left() == expected
