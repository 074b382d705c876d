"""What editors send to llama.cpp's server, sent to it and to ours: the same fields of the same types."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("fastapi", reason="pip install 'anyorder[serve]'")
httpx = pytest.importorskip("httpx")
pytest.importorskip("gguf", reason="pip install 'anyorder[demo]'")
pytest.importorskip("xllamacpp", reason="llama.cpp's own server: pip install xllamacpp")

import editors  # noqa: E402
from llama_cpp import llama_cpp, tiny_gguf  # noqa: E402
from serving import service_of, serving  # noqa: E402

pytestmark = pytest.mark.slow

BODIES = {
    "llama.vscode": editors.VSCODE, "llama.vim": editors.VIM, "llama.vscode, ahead": editors.AHEAD,
    "llama.vim, ahead": editors.VIM_AHEAD, "at the end of a file": editors.VSCODE | {"input_suffix": ""},
    "with stop strings": editors.VIM | {"stop": ["a", "b"]},
    "parts named that there are not": editors.VIM | {"response_fields": ["content", "timings", "nothing", "a/b"]},
}  # fmt: skip


@pytest.fixture(scope="module")
def theirs(tmp_path_factory, byte_tokenizer):
    with llama_cpp(tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", byte_tokenizer)) as address:
        yield address


@pytest.fixture(scope="module")
def ours(byte_tokenizer):
    with serving(service_of(byte_tokenizer), capacity=256) as (address, _):
        yield address


def kinds(value):
    """A value's fields and types: numbers with a point are floats where they may be whole, as JSON has it in C++."""
    if isinstance(value, dict):
        return {name: kinds(one) for name, one in value.items()}
    return "list" if isinstance(value, list) else type(value).__name__


def answers(address, body):
    response = httpx.post(f"{address}/infill", json=body, timeout=60)
    assert response.status_code == 200, response.text
    if not body.get("stream"):
        return [response.json()]
    return [json.loads(line.removeprefix("data: ")) for line in response.text.split("\n\n") if line.strip()]


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_answers_have_the_same_fields_of_the_same_types(ours, theirs, body):
    (own,), (other,) = answers(ours, body), answers(theirs, body)
    assert kinds(own) == kinds(other)


def test_parts_of_streams_have_the_same_fields_of_the_same_types(ours, theirs):
    for body in (editors.VSCODE, editors.VSCODE | {"input_suffix": ""}):
        own, other = answers(ours, body | {"stream": True}), answers(theirs, body | {"stream": True})
        assert kinds(own[0]) == kinds(other[0])
        assert kinds(own[-1]) == kinds(other[-1])
        assert [part["stop"] for part in own] == [False] * (len(own) - 1) + [True]


def test_what_they_leave_out_of_a_request_breaks_theirs_and_not_ours(ours, theirs):
    assert httpx.post(f"{theirs}/infill", json={"input_prefix": "a"}, timeout=60).status_code == 400
    assert httpx.post(f"{ours}/infill", json={"input_prefix": "a"}, timeout=60).status_code == 200
