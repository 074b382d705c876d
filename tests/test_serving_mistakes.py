"""What is wrong with a request is said in one clear error, never by a 500 and never by silence."""

from __future__ import annotations

import contextlib
import json
import random
import re
import time

import pytest

pytest.importorskip("fastapi", reason="pip install 'anyorder[serve]'")
httpx = pytest.importorskip("httpx")

from anyorder.serving import contract  # noqa: E402
from anyorder.serving.engine import TimeIsOverError  # noqa: E402
from anyorder.serving.service import Piece  # noqa: E402
from decoding_runs import generator  # noqa: E402
from serving import JSON, alone, events, post, serving  # noqa: E402

PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/infill", "/v1/score", "/infill")


# ---------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/v1/completions", {"prompt": "a", "temprature": 1}, "temprature"),
        ("/v1/completions", {"prompt": "a", "temperature": -1}, "temperature"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 1000}, "more than the 64"),
        ("/v1/completions", {"prompt": [10**6]}, "prompt holds 1000000"),
        ("/v1/completions", {"prompt": {"a": 1}}, "prompt"),
        ("/v1/completions", {"prompt": "a", "n": 2, "best_of": 5}, "best_of"),
        ("/v1/completions", {"prompt": "a", "policy": "guess"}, "no policy 'guess'"),
        ("/v1/completions", {"prompt": "\ud800"}, "surrogate|unicode|string"),
        ("/v1/completions", {"prompt": "a", "seed": "x"}, "seed"),
        ("/v1/chat/completions", {"messages": []}, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "nobody", "content": "a"}]}, "messages.0.role"),
        ("/v1/infill", {"text": "no blank"}, "no blank in"),
        ("/v1/infill", {"text": "___ a" * 10000}, "10000 blanks: at most 64"),
        ("/v1/infill", {"text": "a ___", "length": 3000}, "3002 tokens with its blanks; the model's context is 64"),
        ("/v1/infill", {"text": "a ___", "constraints": {"pattern": "("}}, "pattern|regular"),
        ("/v1/infill", {"text": "a ___", "constraints": {}}, "one of choices, pattern and json_schema"),
        ("/v1/score", {"text": ""}, "empty"),
        ("/v1/score", {"text": "ab", "targets": [[1, 9]]}, r"targets holds \[1, 9\]"),
        ("/v1/score", {"text": "a b", "targets": [[0, 1]], "given": [[0, 1]]}, "both a target and given"),
        ("/infill", {"prompt": [1, 2]}, "prompt must be a text"),
    ],
)
def test_mistakes_are_named(server, path, body, message):
    response = httpx.post(f"{server[0]}{path}", content=json.dumps(body), headers=JSON, timeout=60)
    assert response.status_code == 400, response.text
    assert re.search(message, response.json()["error"]["message"] + str(response.json()["error"]["param"]))


def test_other_paths_methods_and_kinds_of_body(server):
    assert httpx.post(f"{server[0]}/v1/completions", content=b'{"prompt": "a"}').status_code == 415
    assert httpx.post(f"{server[0]}/v2/x", headers=JSON).json()["error"]["message"] == "Not Found"
    assert httpx.get(f"{server[0]}/v1/completions").status_code == 405


def test_large_bodies_are_refused_before_they_are_read(server):
    response = httpx.post(f"{server[0]}/v1/completions", json={"prompt": "a" * (10 << 20)}, timeout=60)
    assert response.status_code == 413
    assert "1048576 bytes" in response.json()["error"]["message"]

    def chunks():
        for _ in range(40):
            yield b"a" * (1 << 18)

    # The connection may be closed on what is still to come.
    with contextlib.suppress(httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
        assert httpx.post(f"{server[0]}/v1/completions", content=chunks(), headers=JSON, timeout=60).status_code == 413


def test_fuzzed_bodies_never_harm(server):
    """Half of each is right, so that many get past the first check."""
    draw = random.Random(0)
    fields = {
        "prompt": ["a", "", ["a", "b"], [3, 4], 5, None, [[]], "é🎉", ["a", 3], "\ud800"],
        "text": ["a ___ b", "", "___", 3, None, "a", "___ ___ ___"],
        "max_tokens": [0, 1, 5, -1, 10**9, "3", 2.5, None, True],
        "temperature": [0, 1, 0.5, -0.1, "hot", 1e308, None, []],
        "top_p": [1, 0.5, 0, 2, -1], "top_k": [0, 3, -3, 1.5], "n": [1, 2, 0, 99], "seed": [0, 7, -1, 2**70, "s"],
        "stop": ["a", ["a", ""], "", 5, [1], ["b"] * 40], "logprobs": [0, 2, -1, 99, True], "echo": [True, "x"],
        "length": ["auto", 2, [1, 2], 0, -1, [3, 1], "long", [[1, 2]], [1, 2, 3]],
        "policy": ["groupwise:size=2", "dynamic:step_size=2", "x", "groupwise:size=x", "", "speculative:draft=query"],
        "targets": [[[0, 1]], [[2, 1]], "x", [[0]], []], "given": [[[0, 1]], None, [[-1, 2]]],
        "messages": [[{"role": "user", "content": "a"}], [], [{"role": "user"}], "x"],
        "suffix": ["b", "", None, 3], "order": ["random", "x"], "group_size": [1, 3, 0, "x"],
        "input_prefix": ["a\n", 3], "input_suffix": ["\nb", None], "n_predict": [4, -1, -5, 0],
    }  # fmt: skip
    of = {
        "/v1/completions": [
            "prompt", "max_tokens", "temperature", "top_p", "top_k", "n", "seed", "stop", "logprobs", "echo", "policy",
            "suffix",
        ],
        "/v1/infill": ["text", "length", "temperature", "policy", "order", "group_size", "seed"],
        "/v1/score": ["text", "targets", "given", "order", "group_size", "seed"],
        "/v1/chat/completions": ["messages", "max_tokens", "temperature", "stop", "n", "logprobs"],
        "/infill": ["input_prefix", "input_suffix", "prompt", "n_predict", "temperature", "seed", "stop"],
    }  # fmt: skip
    with httpx.Client(timeout=60) as one:
        for _ in range(60):
            path = draw.choice(sorted(of))
            names = draw.sample(of[path], draw.randint(1, 4)) + of[path][:1]
            body = {name: fields[name][0] if draw.random() < 0.5 else draw.choice(fields[name]) for name in names}
            response = one.post(f"{server[0]}{path}", content=json.dumps(body), headers=JSON)
            assert response.status_code in (200, 400), (path, body, response.text)


def test_mistakes_in_streams_have_a_status(server):
    """What goes wrong before there is a first part is no stream that breaks off."""
    for path, body, message in (
        ("/v1/infill", {"text": "no blank"}, "no blank in"),
        ("/v1/infill", {"text": "a" * 90 + "___"}, "at most 64"),
        ("/v1/completions", {"prompt": "a", "policy": "dynamic:step_size=0"}, "policy: step_size"),
        ("/v1/completions", {"prompt": "a" * 40, "suffix": "b" * 40}, "context is 64|at most 64"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "a"}], "temperature": 1e-300},
            "temperature",
        ),
    ):
        response = httpx.post(f"{server[0]}{path}", json=body | {"stream": True}, timeout=60)
        assert response.status_code == 400, (path, response.text)
        assert re.search(message, response.json()["error"]["message"])


def test_streams_that_break_off_say_why_and_no_more(service, monkeypatch):
    def grow(prompt, new, asked, stops, best, number, put):
        def work(runner):
            put(Piece("a", []))
            time.sleep(0.3)
            raise KeyError("a secret of the server's") if asked.seed else TimeIsOverError("the time is over")

        return work

    monkeypatch.setattr(service, "grow", grow)
    with serving(service) as (address, _):
        for seed, code in ((0, "timeout"), (1, None)):
            body = {"prompt": "a", "stream": True, "seed": seed}
            _, broken, end = events(httpx.post(f"{address}/v1/completions", json=body, timeout=60))
            assert broken["error"]["code"] == code
            assert "secret" not in broken["error"]["message"]
            assert end == "[DONE]"


@pytest.mark.parametrize("stream", [False, True])
def test_where_not_all_texts_are_taken_none_is(service, stream):
    """Eight texts where one works and two wait: an error, and those that were taken are let go."""
    with serving(service, slots=1, waiting=2) as (address, engine):
        body = {"prompt": "a", "max_tokens": 60, "n": 8, "stream": stream}
        response = httpx.post(f"{address}/v1/completions", json=body, timeout=60)
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "overloaded"
        until = time.monotonic() + 30
        while engine.at_work and time.monotonic() < until:
            time.sleep(0.02)
        assert engine.at_work == engine.queued == 0
        assert engine.joiner.forwards < 30


def test_errors_name_their_field_and_are_short(server):
    for path, body, param in (
        ("/v1/completions", {"prompt": "a", "policy": "guess"}, "policy"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 1000}, "max_tokens"),
        ("/v1/completions", {"prompt": "a", "n": 2, "best_of": 5}, "best_of"),
        ("/v1/completions", {"prompt": ["a"], "suffix": "b"}, "prompt"),
        ("/v1/completions", {"prompt": "a", "suffix": "b", "echo": True}, "echo"),
        ("/v1/completions", {"prompt": "a", "repetition_penalty": 1e-300}, "repetition_penalty"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2}, "top_logprobs"),
        ("/v1/infill", {"text": "___ a" * 10000}, "text"),
        ("/v1/infill", {"text": "a ___", "constraints": {}}, "constraints"),
        ("/v1/score", {"text": "ab", "targets": [[1, 9]]}, "targets"),
        ("/infill", {"prompt": [1, 2]}, "prompt"),
        ("/infill", {"input_prefix": "a", "temperature": 1e9}, "temperature"),
        ("/v1/infill", {"text": "a ___", "constraints": {"choices": ["a" * 1000] * 256}}, None),
    ):
        error = post(server, path, 400, **body)["error"]
        assert error["param"] == param, error
        assert len(error["message"]) <= 1000
        assert "\n" not in error["message"]


NASTY = {
    "a hundred thousand brackets": b"[" * 100_000,
    "nested deep in a field": b'{"prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    "objects nested deep": b'{"text": "a", "user": ' + b'{"a":' * 9000 + b"1" + b"}" * 9001,
    "a number of 5,000 digits": b'{"prompt": "a", "input_prefix": "a", "text": "___", "seed": ' + b"9" * 5000 + b"}",
    "a number beyond floats": b'{"prompt": "a", "text": "___", "temperature": 1e999}',
    "NaN": b'{"prompt": "a", "text": "___", "messages": [], "temperature": NaN}',
    "minus infinity": b'{"prompt": "a", "text": "___", "messages": [], "top_p": -Infinity}',
    "half a character": b'{"prompt": "\\ud800", "text": "\\ud800___", "input_prefix": "\\ud800"}',
    "half a character in a list": b'{"prompt": ["\\ud800"], "stop": ["\\udfff"], "text": "___"}',
    "no UTF-8": b'{"prompt": "\xff\xfe"}',
    "a raw null byte": b'{"prompt": "a\x00"}',
    "two bodies": b'{"prompt": "a"}{"prompt": "b"}',
    "nothing": b"",
    "a word": b"hello",
    "a string": b'"prompt"',
    "a null": b"null",
}  # fmt: skip


@pytest.mark.parametrize("body", NASTY.values(), ids=NASTY)
def test_bodies_that_mean_harm(server, body):
    for path in PATHS:
        response = httpx.post(f"{server[0]}{path}", content=body, headers=JSON, timeout=60)
        assert response.status_code == 400, (path, response.text)
        error = response.json()["error"]
        assert error["type"] == "invalid_request_error"
        assert 0 < len(error["message"]) <= 1000


def test_null_bytes_and_fields_that_come_twice_are_as_json_has_them(service, server):
    twice = b'{"prompt": "b", "max_tokens": 5, "seed": 9, "prompt": "a\\u0000"}'
    response = httpx.post(f"{server[0]}/v1/completions", content=twice, headers=JSON, timeout=60)
    expected = alone(service, "a\0", 5, generator=generator(9), do_sample=True)[0]
    assert response.json()["choices"][0]["text"] == expected


@pytest.mark.parametrize(
    "kind", ["text/plain", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded", "", None]
)
def test_kinds_of_body_that_a_page_elsewhere_may_post_are_refused(server, kind):
    headers = {} if kind is None else {"Content-Type": kind}
    for path in PATHS:
        response = httpx.post(f"{server[0]}{path}", content=b'{"prompt": "a"}', headers=headers, timeout=60)
        assert response.status_code == 415
        assert "application/json" in response.json()["error"]["message"]


def test_fields_of_editors_that_have_no_bound_at_llama_cpp_have_none_here(server):
    body = {"input_prefix": "a", "input_suffix": "b", "n_predict": 2, "top_k": 10**30, "seed": 10**30, "min_p": -3.0}
    assert post(server, "/infill", **body | {"top_p": 7.0, "temperature": -1.0, "n_indent": 10**30})["stop"]


# ---------------------------------------------------------------------- the contract


def fuzz(server, service, examples):
    """Bodies that the contract allows and such that it does not: each is answered as the contract says."""
    schemathesis = pytest.importorskip("schemathesis", reason="pip install schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import strategies as st
    from schemathesis.specs.openapi import checks

    contract = schemathesis.openapi.from_url(f"{server[0]}/openapi.json")
    kinds = [
        contract[path]["POST"].as_strategy(generation_mode=mode)
        for path in PATHS
        for mode in schemathesis.GenerationMode
    ]
    own = {"prompt": "a b", "max_tokens": 6, "seed": 4}
    expected = alone(service, "a b", 6, generator=generator(4), do_sample=True)[0]
    found: list[int] = []

    @settings(max_examples=examples, database=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
    @given(st.one_of(kinds))
    def ask(case):
        response = case.call(timeout=60)
        assert response.status_code in (200, 400, 413), (case.path, case.body, response.text)
        streamed = response.headers["content-type"][0].startswith("text/event-stream")
        assert response.status_code != 200 or not streamed or b'"error"' not in response.content
        case.validate_response(
            response,
            checks=[checks.status_code_conformance, checks.content_type_conformance]
            + ([] if streamed else [checks.response_schema_conformance]),
        )
        found.append(response.status_code)
        if len(found) % 10 == 0:  # in between somebody asks for what is known
            assert post(server, "/v1/completions", **own)["choices"][0]["text"] == expected

    ask()
    assert len(found) >= examples
    assert 200 in found
    assert 400 in found


def test_what_the_contract_allows_and_what_it_does_not(server, service):
    fuzz(server, service, 40)


@pytest.mark.slow
def test_a_thousand_bodies(server, service):
    fuzz(server, service, 1000)


def test_the_contract_says_what_every_endpoint_takes_and_answers(server):
    contract = httpx.get(f"{server[0]}/openapi.json").json()
    schemas = contract["components"]["schemas"]
    for path in PATHS:
        asked = contract["paths"][path]["post"]
        body = asked["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        assert schemas[body]["properties"]
        assert asked["description"]
        for status in ("400", "401", "408", "413", "415", "503", "504", "default"):
            wrong = asked["responses"][status]["content"]["application/json"]["schema"]
            assert wrong["$ref"].endswith("ErrorAnswer")
        assert "422" not in asked["responses"]
        right = asked["responses"]["200"]["content"]
        assert schemas[right["application/json"]["schema"]["$ref"].rpartition("/")[2]]["properties"]
        assert ("text/event-stream" in right) == (path != "/v1/score")


def test_answers_hold_what_the_contract_says(server):
    """Every field of it, and no other."""
    for path, body, model in (
        ("/v1/completions", {"prompt": "a", "max_tokens": 3, "logprobs": 2, "echo": True}, contract.CompletionAnswer),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "a"}], "max_tokens": 3, "logprobs": True, "top_logprobs": 2},
            contract.ChatAnswer,
        ),
        ("/v1/infill", {"text": "a ___ b"}, contract.InfillAnswer),
        ("/v1/infill", {"text": "a ___ b", "constraints": {"choices": ["a", "b"]}}, contract.InfillAnswer),
        ("/v1/score", {"text": "a b", "given": [[0, 1]]}, contract.ScoreAnswer),
        ("/infill", {"input_prefix": "a", "input_suffix": "b", "n_predict": 3}, contract.EditorAnswer),
    ):
        found = post(server, path, **body)
        assert model.model_validate(found, strict=True).model_dump() == found
    for path, model in (("/v1/models", contract.ModelsAnswer), ("/health", contract.HealthAnswer)):
        model.model_validate(httpx.get(f"{server[0]}{path}").json(), strict=True)
