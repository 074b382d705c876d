"""The examples of the extension guide run as they stand, on a tiny model, and do what the page says."""

from __future__ import annotations

import pytest
import torch

from anyorder import Factorization
from anyorder.decoding.policies.speculative import SOURCES
from anyorder.training.curriculum import REGIMES
from architectures import couple, gated
from pages import ROOT, blocks

PAGE = ROOT / "docs" / "extending.md"
if not PAGE.exists():  # the tests of an installed wheel may lie elsewhere
    pytest.skip("no pages beside the tests", allow_module_level=True)


@pytest.fixture(autouse=True)
def _registered_for_the_page_alone(monkeypatch):
    monkeypatch.setitem(SOURCES, "known", None)
    monkeypatch.setitem(REGIMES, "scattered", None)


def test_the_examples_run(byte_tokenizer, monkeypatch, capsys):
    model = couple(gated("llama", vocabulary=len(byte_tokenizer)))
    monkeypatch.setattr("anyorder.loading.load", lambda name: (model, byte_tokenizer))
    names = run(PAGE.read_text())
    assert names["output"].steps[0, 3:9].tolist() == [0, 1, 2, 2, 1, 0]
    assert isinstance(names["factorization"], Factorization)
    assert names["regime"] == "scattered"
    plain, drafted = names["plain"], names["drafted"]
    assert torch.equal(plain.sequences, drafted.sequences)
    assert drafted.forwards == 4 < plain.forwards == 16
    assert names["runner"].rows[1:] == [7, 7, 7]
    assert "4 forwards instead of 16" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.smollm2
@pytest.mark.usefixtures("smollm2")
def test_the_examples_run_on_the_built_in_model():
    names = run(PAGE.read_text())
    assert names["drafted"].forwards < names["plain"].forwards


def run(text: str) -> dict:
    names: dict = {}
    for block in blocks(text, "python"):
        exec(block, names)
    return names
