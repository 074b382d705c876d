"""`--chat`: answers to a message, on a tiny checkpoint with a chat template."""

from __future__ import annotations

import json

import pytest
import torch

from anyorder import AnyOrderForCausalLM, Factorization, Infiller, load
from command_line import run

TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'refused' %}{{ raise_exception('not this one') }}{% endif %}"
    "<s>{{ m.role[0] }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<s>a: {% endif %}"
)


@pytest.fixture(scope="module")
def instruct(with_template):
    return with_template(TEMPLATE)


def test_chat_answers_a_message(capsys, instruct):
    model, tokenizer = load(str(instruct))
    ids = tokenizer.encode("<s>u: hello ___\n<s>a: ")
    expected = model.causal_lm.generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False)[0, len(ids) :]
    arguments = ("generate", "--chat", "hello ___", "--model", instruct, "--max-new-tokens", 5)
    record = json.loads(run(capsys, *arguments, "--json")[1])
    assert record["text"] == record["continuation"]
    assert record["tokens"] == len(expected)
    assert record["text"] == tokenizer.decode(expected, skip_special_tokens=True).rstrip("\ufffd")
    assert run(capsys, *arguments)[1] == record["text"] + "\n"
    code, _, errors = run(capsys, "generate", "refused", "--chat", "--model", instruct)
    assert code == 2
    assert "the chat template does not take these messages: not this one" in errors


def test_blanks_in_an_answer(capsys, instruct):
    text = "b ___ c"
    arguments = ("infill", text, "--model", instruct, "--length", 3, "--json")
    record = json.loads(run(capsys, *arguments, "--chat", "what ___")[1])
    messages = [{"role": "user", "content": "what ___"}]
    filled = Infiller(*load(str(instruct)), messages=messages)(text, length=3)
    assert record["text"] == filled.text
    assert record["text"].startswith("b ")
    assert record["log_prob"] == pytest.approx(filled.log_prob)
    assert record["log_prob"] != json.loads(run(capsys, *arguments)[1])["log_prob"]


def test_a_fill_of_an_answer_is_scored_behind_the_message(instruct):
    """Exactly: the blank's log-probability is the model's own of these tokens behind the template's."""
    model, tokenizer = load(str(instruct))
    messages = [{"role": "user", "content": "what"}]
    filled = Infiller(model, tokenizer, messages=messages)("b c___", length=3)
    start = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    ids = torch.tensor([[*start, *filled.ids]])
    order = Factorization.left_to_right(ids.shape[1], given=ids.shape[1] - 3)
    assert filled.log_prob == pytest.approx(float(model.log_likelihood(ids, order).sum()), abs=1e-5)
    assert tokenizer.decode(filled.ids) == filled.text


def test_score_of_an_answer(capsys, instruct):
    model, tokenizer = load(str(instruct))
    start, own = tokenizer.encode("<s>u: hello\n<s>a: "), tokenizer.encode("a b")
    order = Factorization.left_to_right(len(start) + len(own), given=len(start))
    expected = float(model.log_likelihood(torch.tensor([start + own]), order).sum())
    record = json.loads(run(capsys, "score", "a b", "--chat", "hello", "--model", instruct, "--json")[1])
    assert record["log_prob"] == pytest.approx(expected)
    assert record["tokens"] == len(own)


def test_a_model_that_ends_at_once_says_so(capsys, checkpoint, instruct, monkeypatch):
    generate = AnyOrderForCausalLM.generate

    def end_at_once(self, ids, **options):
        output = generate(self, ids, **{**options, "max_new_tokens": 1})
        output.sequences[0, -1] = 2
        return output

    monkeypatch.setattr(AnyOrderForCausalLM, "generate", end_at_once)
    code, out, errors = run(capsys, "generate", "a b", "--model", instruct)
    assert (code, out) == (0, "a b\n")
    assert errors == "anyorder generate: the model ended at once; it was trained to answer messages: --chat asks it so"
    assert run(capsys, "generate", "a b", "--model", checkpoint)[2].endswith("the model ended at once")
    assert run(capsys, "generate", "a b", "--chat", "--model", instruct)[2].endswith("the model ended at once")


@pytest.mark.smollm2
def test_the_built_in_model_answers(capsys, smollm2, monkeypatch):
    monkeypatch.setattr("anyorder.cli.generate.load_ready", lambda options: smollm2)
    assert "Paris" in run(capsys, "generate", "--chat", "What is the capital of France?")[1]
