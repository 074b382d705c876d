"""A server that has answered many requests needs no more memory than one that has answered some."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="pip install 'anyorder[serve]'")
httpx = pytest.importorskip("httpx")

STATUS = Path("/proc/self/status")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not STATUS.exists(), reason="no /proc here that tells a process' memory"),
]


def resident() -> int:
    """Kilobytes."""
    gc.collect()
    return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith("VmRSS"))


def ask(client: httpx.Client, number: int) -> None:
    """One of each kind in turn, no two with the same text, some of them mistakes."""
    start = " ".join("abc"[(number >> bit) % 3] for bit in range(8))
    kinds = [
        ("/v1/completions", {"prompt": start, "max_tokens": 8, "seed": number, "logprobs": 2}, 200),
        ("/v1/completions", {"prompt": start, "max_tokens": 8, "stream": True, "policy": "groupwise:size=2"}, 200),
        ("/v1/completions", {"prompt": start, "suffix": " c", "max_tokens": 4}, 200),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": start}], "max_tokens": 6}, 200),
        ("/v1/infill", {"text": f"{start} ___ b", "top_logprobs": 3, "stream": True}, 200),
        ("/v1/infill", {"text": f"{start} ___", "constraints": {"choices": ["a", f"b{number}"]}}, 200),
        ("/v1/score", {"text": f"{start} b c", "given": [[0, 1]]}, 200),
        ("/infill", {"input_prefix": start, "input_suffix": "b", "n_predict": 4}, 200),
        ("/v1/infill", {"text": "no blank", "stream": True}, 400),
        ("/v1/completions", {"prompt": start, "temperature": -1}, 400),
    ]
    path, body, status = kinds[number % len(kinds)]
    assert client.post(path, json=body).status_code == status


def test_memory_stays_over_500_requests(server):
    with httpx.Client(base_url=server[0], timeout=60) as client:
        for number in range(200):
            ask(client, number)
        before = resident()
        for number in range(200, 700):
            ask(client, number)
        assert resident() < 1.02 * before
