"""The harness's own command with this backend: local tasks, caches, resuming, few-shot, chat templates, the plug-in."""

from __future__ import annotations

import functools
import importlib
import json
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from harness import QUESTIONS, TASKS, requests, write_tasks

pytest.importorskip("lm_eval", reason="the backend needs lm-eval: pip install 'anyorder[eval]'")
ROOT = Path(__file__).parents[1]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% if m.content == 'refused' %}{{ raise_exception('not this one') }}{% endif %}"
    "<s>{{ m.role[0] }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<s>a:{% endif %}"
)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("harness") / "tasks")


@pytest.fixture(scope="module")
def instruct(with_template):
    return with_template(TEMPLATE)


@pytest.fixture
def command(tasks, tmp_path, monkeypatch):
    """`lm_eval` in this process: the samples of each task that it writes, and its results."""
    from lm_eval.tasks import TaskManager

    from anyorder.evaluation.harness.__main__ import main

    # Reading the harness's own 14,000 task files takes longer than all else here.
    local = functools.partialmethod(TaskManager.__init__, include_defaults=False)
    monkeypatch.setattr(TaskManager, "__init__", local)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr("lm_eval.caching.cache.PATH", str(tmp_path / "requests"))
    monkeypatch.setattr("lm_eval.utils.setup_logging", lambda *args, **options: None)

    def run(model, pretrained, *more, model_args=(), names=TASKS):
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        arguments = [f"pretrained={pretrained}", "dtype=float32", *model_args]
        line = ["lm_eval", "run", "--model", model, "--model_args", *arguments, "--tasks", ",".join(names)]
        line += ["--include_path", tasks, "--output_path", out, "--log_samples", "--device", "cpu", *more]
        monkeypatch.setattr(sys, "argv", [str(one) for one in line])
        main()
        samples = {}
        for name in names:
            (file,) = out.rglob(f"samples_{name}_*.jsonl")
            lines = [json.loads(text) for text in file.read_text().splitlines()]
            samples[name] = [one["resps"] for one in sorted(lines, key=lambda one: one["doc_id"])]
        (results,) = out.rglob("results_*.json")
        return samples, json.loads(results.read_text())

    return run


def numbers(samples):
    """Every likelihood of some samples, and all else."""
    scores, others = [], []
    for value in _leaves(samples):
        try:
            scores.append(float(value))
        except ValueError:
            others.append(value)
    return scores, others


def _leaves(value):
    if isinstance(value, (list, tuple)):
        for one in value:
            yield from _leaves(one)
    else:
        yield value if isinstance(value, str) and value not in ("True", "False") else str(value)


def test_the_command_gives_the_stock_backends_results(command, checkpoint):
    """All three types of request, few-shot, batches: left to right the base model's own."""
    (own, results), (stock, expected) = (
        command(model, checkpoint, "--batch_size", "4", "--num_fewshot", "1") for model in ("anyorder", "hf")
    )
    for name in TASKS[:2]:
        (scores, greedy), (theirs, their_greedy) = numbers(own[name]), numbers(stock[name])
        assert len(scores) >= len(QUESTIONS)
        assert scores == pytest.approx(theirs, abs=1e-4)
        assert greedy == their_greedy
    assert own["answers"] == stock["answers"]
    assert len({text for (one,) in own["answers"] for text in one}) > 1
    assert results["results"]["choices"]["acc,none"] == expected["results"]["choices"]["acc,none"]
    assert results["config"]["anyorder_settings"]["order"] == "left_to_right"


def test_orders_policies_and_limits_by_the_command(command, checkpoint):
    plain, _ = command("anyorder", checkpoint, "--limit", "2")
    policy = "policy='dynamic:criterion=entropy,step_size=2'"
    other, results = command("anyorder", checkpoint, "--limit", "2", model_args=["order=random,group_size=2", policy])
    assert all(len(one) == 2 for one in plain.values())
    assert all(plain[name] != other[name] for name in TASKS)
    settings = results["config"]["anyorder_settings"]
    assert settings["policy"] == "dynamic:criterion=entropy,step_size=2"
    assert settings["group_size"] == 2


def test_resumed_equals_uninterrupted(command, checkpoint, tmp_path, monkeypatch):
    """Stopped in the middle of each type of request, the command goes on from its cache of responses."""
    from anyorder.evaluation.harness.likelihoods import Scorer

    arguments, cache = ["order=random", "order_average=2", "temperature=1.0"], ["--use_cache", tmp_path / "cache"]
    whole, _ = command("anyorder", checkpoint, model_args=arguments)
    forward, left = Scorer._forward, [9]

    def stopping(self, batch):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return forward(self, batch)

    monkeypatch.setattr(Scorer, "_forward", stopping)
    with pytest.raises(KeyboardInterrupt):
        command("anyorder", checkpoint, *cache, model_args=arguments)
    left[0] = 1000
    resumed, _ = command("anyorder", checkpoint, *cache, model_args=arguments)
    forwards = 1000 - left[0]
    assert resumed == whole
    left[0] = 1000
    again, _ = command("anyorder", checkpoint, *cache, model_args=arguments)
    assert again == whole
    assert left[0] == 1000
    command("anyorder", checkpoint, model_args=arguments)
    assert 1000 - left[0] > forwards > 0
    with pytest.raises(ValueError, match=r"were made with order_average=2 \(now 1\): name another file"):
        command("anyorder", checkpoint, *cache, model_args=["order=random", "temperature=1.0"])


def test_a_cache_of_another_backend_is_refused(command, checkpoint, tmp_path):
    command("hf", checkpoint, "--use_cache", tmp_path / "cache", names=["choices"])
    with pytest.raises(ValueError, match="another backend made this cache"):
        command("anyorder", checkpoint, "--use_cache", tmp_path / "cache", names=["choices"])


def test_a_cache_of_other_weights_is_refused(checkpoint, tmp_path):
    from lm_eval.api.model import CachingLM

    from anyorder.evaluation.harness.lm_eval import AnyOrderLM

    lm = AnyOrderLM(pretrained=str(checkpoint), device="cpu")
    CachingLM(lm, str(tmp_path / "cache.db"))
    CachingLM(AnyOrderLM(pretrained=str(checkpoint), device="cpu", batch_size=3), str(tmp_path / "cache.db"))
    lm.model.query_embedding.data += 1
    with pytest.raises(ValueError, match="were made with weights="):
        CachingLM(lm, str(tmp_path / "cache.db"))


def test_built_requests_are_cached_by_chat_template(command, instruct, tmp_path):
    options = ["--cache_requests", "true", "--apply_chat_template"]
    first, _ = command("anyorder", instruct, *options, names=["answers"])
    assert command("anyorder", instruct, *options, names=["answers"])[0] == first
    assert len(list((tmp_path / "requests").iterdir())) == 1


def test_chats_score_as_in_the_stock_backend(command, instruct):
    """Built by the harness with the tokenizer's template, whose start tokens are not put there again."""
    options = ["--apply_chat_template", "--num_fewshot", "1", "--fewshot_as_multiturn", "true"]
    own, stock = (command(model, instruct, *options, names=["choices", "answers"])[0] for model in ("anyorder", "hf"))
    assert numbers(own["choices"])[0] == pytest.approx(numbers(stock["choices"])[0], abs=1e-4)
    assert own["answers"] == stock["answers"]


def test_chat_templates(instruct, checkpoint):
    from anyorder.evaluation.harness.lm_eval import AnyOrderLM

    lm = AnyOrderLM(pretrained=str(instruct), device="cpu")
    chat = [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]
    assert lm.apply_chat_template(chat[:1]) == "<s>u: b\n<s>a:"
    assert lm.apply_chat_template(chat, add_generation_prompt=False) == "<s>u: b\n<s>a: c"
    assert lm.encoder.prompt("<s>u: b\n<s>a:") == lm.tokenizer.encode("<s>u: b\n<s>a:")
    assert lm.encoder.prompt("<s>u: b\n<s>a:").count(1) == 2
    assert lm.apply_chat_template([{"role": "system", "content": "x"}, *chat[:1]]) == "<s>u: b\n<s>a:"
    with pytest.raises(ValueError, match="does not take these messages: not this one"):
        lm.apply_chat_template([{"role": "user", "content": "refused"}])
    assert lm.chat_template(False) is None
    name = lm.tokenizer_name
    assert lm.chat_template(True) == TEMPLATE
    assert lm.tokenizer_name == name
    assert "/" not in name
    plain = AnyOrderLM(pretrained=str(checkpoint), device="cpu")
    assert plain.tokenizer_name.rpartition("-")[2] != name.rpartition("-")[2]
    for ask in (lambda: plain.apply_chat_template(chat), lambda: plain.chat_template(True)):
        with pytest.raises(ValueError, match="no chat template: leave out --apply_chat_template"):
            ask()


def test_progress_is_shown_and_hidden(checkpoint, capsys):
    from anyorder.evaluation.harness.lm_eval import AnyOrderLM

    lm = AnyOrderLM(pretrained=str(checkpoint), device="cpu")
    capsys.readouterr()
    lm.loglikelihood(requests("loglikelihood", ("a", " b")))
    assert "Running loglikelihood requests: 100%" in capsys.readouterr().err
    lm.loglikelihood(requests("loglikelihood", ("a", " b")), disable_tqdm=True)
    assert not capsys.readouterr().err


def test_the_harness_finds_the_backend_by_its_entry_point(monkeypatch):
    """The value in pyproject.toml is the registered class, as releases that look for plug-ins want it."""
    from lm_eval.api import registry
    from lm_eval.api.model import LM

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (value,) = project["entry-points"]["lm_eval.models"].values()
    point = EntryPoint("anyorder", value, "lm_eval.models")
    backend = point.load()
    assert issubclass(backend, LM)
    assert value == f"{backend.__module__}:{backend.__qualname__}"
    assert registry.get_model("anyorder") is backend
    assert registry.get_model("hf").__name__ == "HFLM"  # importing the backend leaves the harness's own in place
    # As such a release does: what the entry point names is recorded, and imported when it is asked for.
    monkeypatch.setattr(registry.model_registry, "_objs", {"anyorder": point})
    monkeypatch.delitem(sys.modules, backend.__module__)
    assert issubclass(registry.get_model("anyorder"), LM)


def test_without_the_harness_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    with pytest.raises(ValueError, match=r"pip install 'anyorder\[eval\]'"):
        importlib.import_module("anyorder.evaluation.harness.__main__").main()
