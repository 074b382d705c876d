"""Other people's decoders: llama.cpp on the same GGUF file, Hugging Face compiled, anyone's function.

llama.cpp runs in a process of its own (`llama_cpp_process` says why) behind a port on loopback, which is how its token
ids come back. It has the base's weights in the file's precision, not in that of the model measured.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from anyorder.bench import llama_cpp_process
from anyorder.bench.decoders import Continuation, Decoder, Foreign, HuggingFace, Sampling, foreign_function
from anyorder.hub.pretrained import load_causal_lm
from anyorder.hub.resolve import gguf_file
from anyorder.modeling import AnyOrderForCausalLM

LLAMA_CPP, COMPILED = "llama.cpp", "torch.compile"
MOST_SLOTS = 32
"""Requests that llama.cpp decodes at once; its context is shared out among them."""


class CompiledHuggingFace(HuggingFace):
    """The base model under `generate` with a static cache, its forward through torch.compile.

    Args:
        model: a converted model, whose base is loaded once more.
        sampling: as of `HuggingFace`.
    """

    engine = COMPILED
    more: ClassVar[Sampling] = {"cache_implementation": "static"}

    def __init__(self, model: AnyOrderForCausalLM, sampling: Sampling | None):
        super().__init__(model, sampling)
        self.base: Any = base_of_its_own(model)
        self.base.forward = torch.compile(self.base.forward)
        self.name = "hugging face, compiled" + ", greedy" * (sampling is None)


def base_of_its_own(model: AnyOrderForCausalLM) -> PreTrainedModel:
    """The base of a converted model, loaded once more: the one inside has another attention function and, with an
    adapter, other modules."""
    name = (model.config.base or {}).get("name") or model.causal_lm.name_or_path
    return load_causal_lm(name, dtype=model.causal_lm.dtype)


class LlamaCppServer:
    """llama.cpp's server, in a process of its own with as many threads as PyTorch has here; it ends with the object.

    Args:
        file: the GGUF file.
        slots: requests that it decodes at once.
        context: tokens of each.

    Attributes:
        address: where it is, on loopback.

    Raises:
        ValueError: if it cannot begin, with what it said last.
    """

    def __init__(self, file: Path, slots: int, context: int):
        threads = torch.get_num_threads()
        asked = json.dumps({"file": str(file), "slots": slots, "context": context, "threads": threads})
        with tempfile.TemporaryFile("w+") as errors:
            self._process = subprocess.Popen(
                [sys.executable, llama_cpp_process.__file__, asked],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
            )  # fmt: skip
            assert self._process.stdout is not None
            for line in self._process.stdout:
                if line.startswith(llama_cpp_process.ADDRESS):
                    self.address = line.removeprefix(llama_cpp_process.ADDRESS).strip()
                    return
            self.close()
            errors.seek(0)
            said = errors.read().strip().splitlines() or ["nothing"]
            raise ValueError(f"{LLAMA_CPP} does not begin on {file}; it said: {said[-1]}")

    def __del__(self) -> None:
        if hasattr(self, "_process"):
            self.close()

    def close(self) -> None:
        """End it."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.wait()


class LlamaCpp(Decoder):
    """llama.cpp's server on a GGUF file.

    Args:
        file: the GGUF file.
        sampling: temperature, top_k, top_p, min_p; None: greedy.
    """

    engine = LLAMA_CPP
    by_row = False  # rows of one batch are rounded together
    is_reference = True

    def __init__(self, file: Path, sampling: Sampling | None):
        self.file, self._sampling = file, sampling
        self.name = f"{LLAMA_CPP} ({file.stem.rpartition('.')[2]})" + ", greedy" * (sampling is None)

    @cached_property
    def _server(self) -> LlamaCppServer:
        return LlamaCppServer(self.file, MOST_SLOTS, 512)

    def __call__(self, ids: Tensor, new: int, seeds: Sequence[int]) -> Continuation:
        if len(ids) > MOST_SLOTS:
            raise ValueError(f"{LLAMA_CPP} is given {MOST_SLOTS} rows at once at most, got a batch of {len(ids)}")
        address = self._server.address
        with ThreadPoolExecutor(len(ids)) as threads:
            found = list(threads.map(lambda row, seed: self._ask(address, row, new, seed), ids.tolist(), seeds))
        return Continuation(torch.cat([ids, torch.tensor(found, device=ids.device)], dim=1), new)

    def _ask(self, address: str, row: list[int], new: int, seed: int) -> list[int]:
        draws: Sampling = {"temperature": 0.0} if self._sampling is None else dict(self._sampling)
        body = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0, **draws, "seed": seed, "prompt": row,
                "n_predict": new, "ignore_eos": True, "cache_prompt": False, "return_tokens": True}  # fmt: skip
        request = urllib.request.Request(
            f"{address}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            tokens = json.load(answer)["tokens"]
        if len(tokens) != new:
            raise ValueError(f"{LLAMA_CPP} made {len(tokens)} of {new} tokens: the prompt is too long for its context")
        return [int(token) for token in tokens]


Places = dict[str, tuple[Callable[..., Any], str] | None]
"""What --against names, and of a function of anyone's that and its name."""


def read(places: Sequence[str]) -> Places:
    """What --against names; raise ValueError for what cannot be measured, before a model is loaded."""
    if LLAMA_CPP in places and importlib.util.find_spec("xllamacpp") is None:
        raise ValueError(f"--against {LLAMA_CPP} needs: pip install xllamacpp")
    return {place: None if place in (LLAMA_CPP, COMPILED) else foreign_function(place) for place in places}


def others(places: Places, model: AnyOrderForCausalLM, sampling: Sampling | None, name: str) -> list[Decoder]:
    """The decoders that --against names.

    Args:
        places: of `read`.
        model: a converted model.
        sampling: as of `HuggingFace`.
        name: what the model was loaded from.

    Raises:
        ValueError: for llama.cpp on a model whose base is no GGUF file.
    """
    found: list[Decoder] = []
    for place, function in places.items():
        if function is not None:
            found.append(Foreign(*function, model))
        elif place == COMPILED:
            found.append(CompiledHuggingFace(model, sampling))
        else:
            file = gguf_file(name)
            if file is None:
                raise ValueError(f"--against {LLAMA_CPP} reads the base's GGUF file, and {name} comes from none")
            found.append(LlamaCpp(file, sampling))
    return found
