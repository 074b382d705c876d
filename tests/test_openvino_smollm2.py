"""The built-in model through OpenVINO: the same greedy text in float32, near likelihoods in int8."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("openvino", reason="pip install 'anyorder[openvino]'")

from anyorder import Factorization
from anyorder.decoding.draw import NOT_FORCED
from anyorder.runtime.openvino import cache

pytestmark = [pytest.mark.slow, pytest.mark.smollm2]
PROMPTS = (
    "Once upon a time there was a little girl who",
    "The capital of France is",
    "def fibonacci(n):\n",
    "In 1812 the army of Napoleon",
    "My favourite food is",
)
TEXT = (
    "The tower is 324 metres tall, about the same height as an 81-storey building, and the tallest structure in Paris. "
    "Its base is square, measuring 125 metres on each side. During its construction, it passed the Washington Monument "
    "to become the tallest structure made by people in the world, a title it held for 41 years."
)


@pytest.fixture(autouse=True)
def prepared(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.getbasetemp() / "prepared"
    monkeypatch.setattr(cache, "cache_directory", lambda: folder)


def test_greedy_text_in_float32_is_the_models_own(smollm2):
    model, tokenizer = smollm2
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        ask = {"max_new_tokens": 48, "eos_token_id": ()}
        found = model.generate(ids, engine="openvino", weights="float32", **ask)
        assert found.tolist() == model.generate(ids, engine="eager", **ask).tolist()


def test_int8_costs_little_and_float32_nothing(smollm2):
    """Nats a token of one text, one token at a time: in int8 within 0.03 of float32 on these 70 tokens."""
    model, tokenizer = smollm2
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    order = Factorization.left_to_right(ids.shape[1], given=1)
    forced = ids.clone()
    forced[:, 0] = NOT_FORCED
    own = float(model.log_likelihood(ids, order).sum()) / (ids.shape[1] - 1)

    def nats(weights: str) -> float:
        output = model.generate(
            ids, order, forced_ids=forced, engine="openvino", weights=weights, eos_token_id=(),
            return_dict_in_generate=True,
        )  # fmt: skip
        assert torch.equal(output.sequences, ids)
        return float(output.log_probs.sum()) / (ids.shape[1] - 1)

    assert nats("float32") == pytest.approx(own, abs=1e-3)
    assert nats("int8") == pytest.approx(own, abs=0.03)


def test_no_compiler_is_needed(tmp_path):
    """Prepared and used where no program at all is found."""
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX")}
    environment |= {"PATH": str(nothing), "ANYORDER_CACHE": str(tmp_path / "cache")}
    asked = ["generate", PROMPTS[0], "--max-new-tokens", "8", "--engine", "openvino"]
    ran = subprocess.run(
        [sys.executable, "-m", "anyorder", *asked], env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert len(ran.stdout.split()) > len(PROMPTS[0].split())
