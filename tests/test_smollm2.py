"""The whole path on a real model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from anyorder import Factorization, Infiller, policies

pytestmark = pytest.mark.smollm2

PROMPTS = [
    "Once upon a time",
    "def quicksort(values):",
]
MORE_PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):",
    "In 1969, the first",
    "Water boils at 100 degrees because",
]
PARAGRAPH = (
    "The lighthouse stood at the end of the pier, white against the grey sea. Every evening, Anna climbed its 199 "
    "steps, lit the lamp, and wrote one line into the book that her grandmother had begun: wind, weather, ships."
)


@torch.no_grad()
def test_left_to_right_is_the_base_model(smollm2):
    model, tokenizer = smollm2
    for text in (PARAGRAPH, *PROMPTS, *MORE_PROMPTS):
        ids = torch.tensor([tokenizer.encode(text)])
        base = model.causal_lm(input_ids=ids).logits[:, :-1]
        ours = model(ids).logits[:, 1:]
        assert float((base - ours).abs().max()) < 1e-3
        assert torch.equal(base.argmax(-1), ours.argmax(-1))
        scores = base.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        got = model.log_likelihood(ids, Factorization.left_to_right(ids.shape[1]))[:, 1:]
        torch.testing.assert_close(got, scores, atol=1e-4, rtol=0)


@pytest.mark.parametrize("prompts", [PROMPTS, pytest.param(MORE_PROMPTS, marks=pytest.mark.slow)], ids=["", "more"])
def test_greedy_generation_is_the_base_models_own(smollm2, prompts):
    model, tokenizer = smollm2
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        expected = model.causal_lm.generate(ids, max_new_tokens=48, do_sample=False)
        assert torch.equal(model.generate(ids, max_new_tokens=48, do_sample=False), expected)


@pytest.mark.parametrize("draft", ["query", "ngram"])
@pytest.mark.parametrize("prompts", [PROMPTS, pytest.param(MORE_PROMPTS, marks=pytest.mark.slow)], ids=["", "more"])
def test_greedy_speculative_is_greedy_one_at_a_time(smollm2, draft, prompts):
    model, tokenizer = smollm2
    policy = policies.speculative(draft=draft, draft_length=3)
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        expected = model.generate(ids, max_new_tokens=48, return_dict_in_generate=True)
        output = model.generate(ids, max_new_tokens=48, policy=policy, return_dict_in_generate=True)
        assert torch.equal(output.sequences, expected.sequences)
        assert output.forwards <= expected.forwards
        torch.testing.assert_close(output.log_probs, expected.log_probs, atol=2e-3, rtol=0)


def test_cached_equals_parallel(smollm2):
    model, tokenizer = smollm2
    ids = torch.tensor([tokenizer.encode(PARAGRAPH)])
    for order in (
        Factorization.random(ids.shape[1], 4, generator=torch.Generator().manual_seed(0)),
        Factorization.left_to_right(ids.shape[1], 4, given=10),
    ):
        output = model.generate(ids, order, forced_ids=ids, eos_token_id=(), return_dict_in_generate=True)
        expected = model.log_likelihood(ids, order)
        torch.testing.assert_close(output.log_probs, expected, atol=2e-3, rtol=0)


def test_order_matters_to_an_untrained_conversion(smollm2):
    """Honest: before adaptation only left to right is good."""
    model, tokenizer = smollm2
    ids = torch.tensor([[0, *tokenizer.encode(PARAGRAPH)]])
    forward = float(model.log_likelihood(ids, Factorization.left_to_right(ids.shape[1])).sum())
    random = Factorization.random(ids.shape[1], 1, generator=torch.Generator().manual_seed(0))
    assert forward > float(model.log_likelihood(ids, random).sum()) + 50


TEXTS = {
    "one blank": "The cat ___ on the mat.",
    "at the start": "___ is the capital of France.",
    "at the end": "The capital of France is ___",
    "two blanks": "She ___ the door and ___ away.",
    "five blanks": "___ one ___ two ___ three ___ four ___",
    "unicode and emoji": "Grüße aus Köln 🎉 und ___ 👩‍👩‍👧, naïve café ___",
    "code": "def add(a, b):\n    return ___\n\nprint(add(1, 2))  # ___\n",
    "windows line ends": "first line\r\n___\r\nthird line\r\n",
    "nothing but a blank": "___",
    "an empty prompt before it": "\n___",
}


@pytest.mark.parametrize("name", TEXTS)
def test_infill(smollm2, name):
    model, tokenizer = smollm2
    text = TEXTS[name]
    result = Infiller(model, tokenizer)(text, length=4)
    rebuilt = result.text
    for span in reversed(result.spans):
        assert rebuilt[span.start : span.end] == span.text
        rebuilt = rebuilt[: span.start] + "___" + rebuilt[span.end :]
    assert rebuilt.encode() == text.encode()
    assert len(result.spans) == text.count("___")
    assert result.log_prob < 0
    for token in tokenizer.all_special_tokens:
        assert result.text.count(token) == 0


def test_infill_batched_is_infill_alone(smollm2):
    infiller = Infiller(*smollm2)
    texts = [TEXTS[name] for name in ("one blank", "two blanks", "at the start")]
    for text, result in zip(texts, infiller(texts, length=3), strict=True):
        assert infiller(text, length=3).text == result.text


def test_infill_errors(smollm2):
    infiller = Infiller(*smollm2)
    with pytest.raises(ValueError, match="no blank in"):
        infiller("The cat sat on the mat.")
    with pytest.raises(ValueError, match="the model's context is 8192"):
        infiller("word " * 9000 + "___")


MEMORY = """
import json, sys
import torch
from anyorder import Factorization, load
model, tokenizer = load("smollm2-135m", dtype=torch.float32)
weights = sum(p.numel() * p.element_size() for p in model.parameters())
ids = torch.randint(0, 49152, (1, 4096), generator=torch.Generator().manual_seed(0))
scores = model.log_likelihood(ids, Factorization.random(4096, 4, generator=torch.Generator().manual_seed(0)))
# Of this process; ru_maxrss would be the peak of the process that started it, were that larger.
(line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
peak = int(line.split()[1]) * 1024
json.dump({"weights": weights, "peak": peak, "finite": bool(scores.isfinite().all())}, sys.stdout)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells a process's own peak of memory")
def test_scoring_4096_tokens_stays_under_3_gib_over_the_weights(smollm2):
    """The logits alone would be 0.8 GB, a square float mask of both streams 134 MB a layer."""
    report = json.loads(
        subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, check=True, text=True).stdout
    )
    assert report["finite"]
    assert report["peak"] - report["weights"] < 3 * 2**30
