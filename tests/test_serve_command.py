"""`anyorder serve` as a process: it says where it is, answers, and ends without losing a request."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

pytest.importorskip("fastapi", reason="pip install 'anyorder[serve]'")
httpx = pytest.importorskip("httpx")

from architectures import coupled  # noqa: E402
from command_line import run  # noqa: E402


@pytest.fixture(scope="module")
def directory(tmp_path_factory, byte_tokenizer):
    path = tmp_path_factory.mktemp("served")
    model = coupled("llama", vocabulary=len(byte_tokenizer))
    model.save_pretrained(path)
    byte_tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def process(directory):
    with subprocess.Popen(
        [sys.executable, "-m", "anyorder", "serve", "--model", str(directory), "--port", "0", "--slots", "2",
         "--patience", "120"],  # a busy machine takes its time
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as one:  # fmt: skip
        yield one
        if one.poll() is None:
            one.kill()


def test_a_server_told_to_stop_ends_what_it_has_taken(process):
    address = re.search(r"http://127.0.0.1:\d+", process.stdout.readline())[0]
    assert httpx.get(f"{address}/health", timeout=60).json()["status"] == "ok"
    found = []

    def ask():
        body = {"prompt": "a b", "max_tokens": 40, "n": 6, "seed": 1}
        found.append(httpx.post(f"{address}/v1/completions", json=body, timeout=150))

    asking = [threading.Thread(target=ask) for _ in range(4)]
    for thread in asking:
        thread.start()
    until = time.monotonic() + 60
    while httpx.get(f"{address}/health").json()["at_work"] < 2 and not found and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    for thread in asking:
        thread.join()
    assert process.wait(150) == 0
    assert len(found) == 4  # one that comes after the signal is told so
    taken = [answer for answer in found if answer.status_code == 200]
    assert taken
    assert len({json.dumps(answer.json()["choices"]) for answer in taken}) == 1
    for answer in found:
        assert answer in taken or "the server is shutting down" in answer.json()["error"]["message"]
    assert '"path": "/v1/completions"' in process.stderr.read()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "99999"], "'99999' is no port"),
        (["--host", "no.such.host.invalid"], "no.such.host.invalid"),
        (["--api-keys", "missing.txt"], "missing.txt"),
        (["--slots", "0"], "0"),
        (["--engine", "openvin"], "did you mean 'openvino'?"),
        (["--engine", "cuda_graphs"], "choose eager"),
    ],
)
def test_mistakes(capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    try:
        code, _, errors = run(capsys, "serve", *arguments)
    except SystemExit as ended:
        code, errors = ended.code, capsys.readouterr().err
    assert code == 2
    assert message in errors


def test_a_file_without_keys_is_an_error(capsys, tmp_path):
    (tmp_path / "keys").write_text("\n")
    code, _, errors = run(capsys, "serve", "--api-keys", tmp_path / "keys")
    assert code == 2
    assert "holds no key" in errors
