"""Clients as they are: many at once, gone without a word, slow to read and slow to write, with keys and without."""

from __future__ import annotations

import json
import socket
import threading
import time

import pytest

pytest.importorskip("fastapi", reason="pip install 'anyorder[serve]'")
httpx = pytest.importorskip("httpx")

from decoding_runs import generator  # noqa: E402
from serving import CHAT, alone, post, service_of, serving  # noqa: E402


@pytest.fixture(scope="module")
def service(byte_tokenizer):
    byte_tokenizer.chat_template = CHAT
    yield service_of(byte_tokenizer)
    byte_tokenizer.chat_template = None


@pytest.fixture(scope="module")
def server(service):
    with serving(service) as (address, engine):
        yield address, engine


# ---------------------------------------------------------------------- clients that go, keys, load


def test_a_client_that_goes_frees_its_slot(server):
    address, engine = server
    host, port = address.removeprefix("http://").split(":")
    done = engine.finished
    for stream in (True, False):
        body = json.dumps({"prompt": "a", "max_tokens": 60, "n": 8, "stream": stream}).encode()
        with socket.create_connection((host, int(port))) as raw:
            raw.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
            )
            raw.sendall(str(len(body)).encode() + b"\r\n\r\n" + body)
            time.sleep(0.05)
    until = time.monotonic() + 30
    while engine.finished < done + 16 and time.monotonic() < until:
        time.sleep(0.05)
    assert engine.finished == done + 16
    assert engine.at_work == engine.queued == 0


def test_keys(service):
    with serving(service, keys=["right", "too"]) as (address, _):
        for key, status in (("right", 200), ("too", 200), ("wrong", 401), ("", 401), ("rightt", 401)):
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            assert httpx.get(f"{address}/v1/models", headers=headers).status_code == status
        assert httpx.get(f"{address}/health").status_code == 200


def test_many_clients_at_once_get_their_own_texts(service, server):
    asked = [
        {"prompt": text, "max_tokens": 12, "seed": seed} for seed, text in enumerate(["a b", "c", "ab", "b c a"] * 4)
    ]
    expected = [alone(service, one["prompt"], 12, generator=generator(one["seed"]), do_sample=True)[0] for one in asked]
    found = [""] * len(asked)

    def ask(number):
        found[number] = post(server, "/v1/completions", **asked[number])["choices"][0]["text"]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(asked))]
    before = server[1].joiner.forwards, server[1].joiner.rows
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected
    forwards, rows = (
        now - then for now, then in zip((server[1].joiner.forwards, server[1].joiner.rows), before, strict=True)
    )
    assert rows > 1.5 * forwards


def test_no_time_is_an_error_of_its_own(service):
    with serving(service, seconds=1e-9) as (address, _):
        response = httpx.post(f"{address}/v1/completions", json={"prompt": "a"}, timeout=60)
        assert response.status_code == 504
        assert response.json()["error"]["code"] == "timeout"
