"""A server on a tiny model, for tests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import torch

from anyorder.serving.api import create_app
from anyorder.serving.engine import Engine
from anyorder.serving.server import addresses, listen, running
from anyorder.serving.service import Service
from architectures import coupled

CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def service_of(tokenizer: Any) -> Service:
    model = coupled("llama", vocabulary=len(tokenizer))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return Service(model, tokenizer, "tiny")


@contextmanager
def serving(
    service: Service, slots: int = 4, capacity: int = 64, waiting: int = 256, **options: Any
) -> Iterator[tuple[str, Engine]]:
    """The address of a server, and its engine."""
    engine = Engine(service.model, slots, capacity, waiting).start()
    bound = listen("127.0.0.1", 0)
    server, thread = running(create_app(service, engine, **options), bound)
    try:
        yield addresses([bound])[0], engine
    finally:
        server.should_exit = True
        thread.join(30)
        engine.drain(30)


def events(response: httpx.Response) -> list[Any]:
    """The data of server-sent events."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


JSON = {"Content-Type": "application/json"}


def post(server: Any, path: str, status: int = 200, **body: Any) -> Any:
    response = httpx.post(f"{server[0]}{path}", json=body, timeout=60)
    assert response.status_code == status, response.text
    return response.json()


def alone(service: Service, text: Any, new: int, **options: Any) -> tuple[str, list[float], list[int]]:
    """The library's own continuation."""
    prompt = service.prompt(text)
    output = service.model.generate(
        torch.tensor([prompt.ids]), max_new_tokens=new, return_dict_in_generate=True, **options
    )
    ids = output.sequences[0, len(prompt.ids) :].tolist()
    special = set(service.tokenizer.all_special_ids)
    return (
        prompt.continuation([i for i in ids if i not in special]),
        output.log_probs[0, len(prompt.ids) :].tolist(),
        ids,
    )
