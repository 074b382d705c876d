"""Clients as they are: many at once, gone without a word, slow to read and slow to write, with keys and without."""

from __future__ import annotations

import json
import re
import socket
import struct
import threading
import time

import pytest

pytest.importorskip("fastapi", reason="pip install 'anyorder[serve]'")
httpx = pytest.importorskip("httpx")

from decoding_runs import generator  # noqa: E402
from serving import alone, post, serving  # noqa: E402

# ---------------------------------------------------------------------- clients that go, keys, load


def connect(address, small=False):
    host, port = address.removeprefix("http://").split(":")
    raw = socket.socket()
    if small:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    raw.settimeout(60)
    raw.connect((host, int(port)))
    return raw


def request_of(path, length=None, **body):
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return f"{head}Content-Length: {length or len(content)}\r\n\r\n".encode() + content


def rest_of(raw):
    return b"".join(iter(lambda: raw.recv(4096), b""))


def ends(engine, count):
    """Wait until so many requests have ended, and nothing is left."""
    until = time.monotonic() + 60
    while (engine.finished < count or engine.at_work or engine.queued) and time.monotonic() < until:
        time.sleep(0.05)
    assert engine.finished == count
    assert engine.at_work == engine.queued == 0


def test_a_client_that_goes_frees_its_slot(server):
    address, engine = server
    done = engine.finished
    for stream in (True, False):
        with connect(address) as raw:
            raw.sendall(request_of("/v1/completions", prompt="a", max_tokens=60, n=8, stream=stream))
            time.sleep(0.05)
    ends(engine, done + 16)


def test_clients_that_break_off_anywhere_harm_nobody(service, server):
    """In the head, in the body, before the answer and within it, politely and by a reset."""
    address, engine = server
    expected = alone(service, "a b", 6, generator=generator(4), do_sample=True)[0]
    whole = request_of("/v1/completions", prompt="b c a", max_tokens=50, seed=1, stream=True)
    ask = {"prompt": "a b", "max_tokens": 6, "seed": 4}
    for reset in (False, True):
        for sent, read in ((20, 0), (whole.index(b"\r\n\r\n") + 10, 0), (len(whole), 0), (len(whole), 200)):
            with connect(address) as raw:
                if reset:
                    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                raw.sendall(whole[:sent])
                if read:
                    assert b"200 OK" in raw.recv(read)
            assert post(server, "/v1/completions", **ask)["choices"][0]["text"] == expected
    ends(engine, engine.finished + engine.at_work + engine.queued)


def test_what_is_no_http_is_refused_or_hung_up_on(server):
    for text in (
        b"\x00" * 400 + b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"POST /infill HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\r\n\r\n",
    ):
        with connect(server[0]) as raw:
            raw.sendall(text)
            assert rest_of(raw)[:10] in (b"", b"HTTP/1.1 4"), text
    length = b"POST /infill HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %s\r\n\r\n"
    for wrong in (b"-1", b"x", b"9" * 400, b"1, 2"):
        with connect(server[0]) as raw:
            raw.sendall(length % wrong)
            assert rest_of(raw)[:10] in (b"", b"HTTP/1.1 4"), wrong
    assert httpx.get(f"{server[0]}/health", timeout=60).status_code == 200


def test_a_slow_reader_holds_nobody_up(service, server):
    """It gets all of its own text at last; meanwhile others get theirs."""
    expected = alone(service, "a b", 6, generator=generator(4), do_sample=True)[0]
    body = {"prompt": "c", "max_tokens": 50, "n": 3, "seed": 5, "logprobs": 20, "stream": True}
    with connect(server[0], small=True) as raw:
        raw.sendall(request_of("/v1/completions", **body))
        raw.recv(10)
        for _ in range(3):
            found = post(server, "/v1/completions", prompt="a b", max_tokens=6, seed=4)
            assert found["choices"][0]["text"] == expected
        answer = rest_of(raw).decode()
    parts = [json.loads(line) for line in re.findall(r"^data: (\{.*\})\r?$", answer, re.MULTILINE)]
    texts = [""] * 3
    for choice in (choice for part in parts for choice in part["choices"]):
        texts[choice["index"]] += choice["text"]
    whole = post(server, "/v1/completions", **body | {"stream": False})
    assert texts == [choice["text"] for choice in whole["choices"]]
    assert "data: [DONE]" in answer


def test_a_body_that_does_not_come_is_not_waited_for(service):
    with serving(service, body_seconds=0.5) as (address, engine):
        with connect(address) as raw:
            raw.sendall(request_of("/v1/completions", length=1000, prompt="a"))
            answer = rest_of(raw)
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"within 0.5 seconds" in answer
        assert engine.finished == 0
        body = {"prompt": "a", "max_tokens": 40, "n": 4}  # what takes long to answer has come
        assert httpx.post(f"{address}/v1/completions", json=body, timeout=60).status_code == 200


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
