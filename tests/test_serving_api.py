"""The APIs: what real clients send, what mistakes get, and that answers are those of the library."""

from __future__ import annotations

import contextlib
import json
import random
import re
import socket
import threading
import time

import pytest

pytest.importorskip("fastapi", reason="pip install 'anyorder[serve]'")
httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai", reason="the client of OpenAI's API")

import torch  # noqa: E402

from anyorder import Factorization, policies  # noqa: E402
from anyorder.scoring import conditional_log_likelihood  # noqa: E402
from decoding_runs import generator  # noqa: E402
from serving import CHAT, events, service_of, serving  # noqa: E402


@pytest.fixture(scope="module")
def service(byte_tokenizer):
    byte_tokenizer.chat_template = CHAT
    yield service_of(byte_tokenizer)
    byte_tokenizer.chat_template = None


@pytest.fixture(scope="module")
def server(service):
    with serving(service) as (address, engine):
        yield address, engine


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0) as one:
        yield one


JSON = {"Content-Type": "application/json"}


def post(server, path, status=200, **body):
    response = httpx.post(f"{server[0]}{path}", json=body, timeout=60)
    assert response.status_code == status, response.text
    return response.json()


def alone(service, text, new, **options):
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


# ---------------------------------------------------------------------- OpenAI's client


def test_completion(service, client):
    text, log_probs, ids = alone(service, "a b", 6)
    found = client.completions.create(model="tiny", prompt="a b", max_tokens=6, temperature=0, logprobs=2)
    choice = found.choices[0]
    assert choice.text == text
    assert choice.logprobs.token_logprobs == pytest.approx(log_probs, abs=1e-4)
    assert found.usage.completion_tokens == len(ids)
    assert found.usage.prompt_tokens == len(service.prompt("a b").ids)
    for own, best in zip(choice.logprobs.token_logprobs, choice.logprobs.top_logprobs, strict=True):
        assert max(best.values()) == pytest.approx(own, abs=1e-5)  # greedy takes the likeliest
    assert choice.finish_reason == ("stop" if ids[-1] == service.tokenizer.eos_token_id else "length")


@pytest.mark.parametrize("policy", ["groupwise:size=3", "speculative:draft=state,draft_length=2"])
def test_a_seed_and_a_policy_give_the_librarys_own_text(service, server, policy):
    text, *_ = alone(service, "b c", 8, policy=policies.parse(policy), generator=generator(5), temperature=0.8)
    found = post(server, "/v1/completions", prompt="b c", max_tokens=8, temperature=0.8, seed=5, policy=policy)
    assert found["choices"][0]["text"] == text


def test_several_prompts_and_several_texts_of_each(service, server):
    found = post(server, "/v1/completions", prompt=["a", [4, 9, 7]], n=2, max_tokens=5, seed=3)
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2, 3]
    for choice, (text, seed) in zip(
        found["choices"], [("a", 3), ("a", 4), ([4, 9, 7], 3), ([4, 9, 7], 4)], strict=True
    ):
        assert choice["text"] == alone(service, text, 5, generator=generator(seed), do_sample=True)[0]


def test_stream(service, client):
    whole = client.completions.create(model="tiny", prompt="ab", max_tokens=9, seed=1, logprobs=1)
    parts = list(
        client.completions.create(
            model="tiny",
            prompt="ab",
            max_tokens=9,
            seed=1,
            logprobs=1,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(part.choices[0].text for part in parts if part.choices) == whole.choices[0].text
    tokens = [token for part in parts if part.choices for token in part.choices[0].logprobs.tokens]
    assert tokens == whole.choices[0].logprobs.tokens
    assert [part.choices[0].finish_reason for part in parts if part.choices][-1] == whole.choices[0].finish_reason
    assert parts[-1].usage == whole.usage


def test_stop_strings_end_a_text_and_are_not_in_it(service, client):
    whole = client.completions.create(model="tiny", prompt="a", max_tokens=20, seed=2).choices[0].text
    stop = whole[4:6]
    cut = whole[: whole.index(stop)]
    for stream in (False, True):
        found = client.completions.create(model="tiny", prompt="a", max_tokens=20, seed=2, stop=[stop], stream=stream)
        parts = list(found) if stream else [found]
        assert "".join(part.choices[0].text for part in parts) == cut
        assert parts[-1].choices[0].finish_reason == "stop"


def test_echo_scores_the_prompt(service, client):
    found = client.completions.create(model="tiny", prompt="a b c", max_tokens=0, echo=True, logprobs=1, temperature=0)
    ids = service.prompt("a b c").ids
    expected = service.model.log_likelihood(torch.tensor([ids]), Factorization.left_to_right(len(ids), given=1))[0]
    assert found.choices[0].text == "a b c"
    assert found.choices[0].logprobs.token_logprobs[0] is None
    assert found.choices[0].logprobs.token_logprobs[1:] == pytest.approx(expected[1:].tolist(), abs=1e-4)


def test_suffix_is_the_infillers_own(service, client):
    found = client.completions.create(model="tiny", prompt="a b ", suffix=" c", max_tokens=4, temperature=0)
    assert found.choices[0].text == service.infiller("a b ___ c", length=(1, 4)).spans[0].text


@pytest.mark.parametrize("stop", [None, "a"])
def test_usage_counts_what_a_suffix_needs(service, client, stop):
    """All tokens that were drawn, whatever a stop string leaves of their text; in streams, too."""
    ask = {"model": "tiny", "prompt": "a b ", "suffix": " c", "max_tokens": 4, "n": 2, "seed": 3, "stop": stop}
    drawn = [
        service.infiller("a b ___ c", length=(1, 4), generator=generator(seed), do_sample=True).spans[0].tokens
        for seed in (3, 4)
    ]
    found = client.completions.create(**ask)
    assert found.usage.completion_tokens == sum(drawn) > 0
    assert found.usage.prompt_tokens == len(service.pieces.encode("a b ")) + len(service.pieces.encode(" c"))
    *_, last = client.completions.create(**ask, stream=True, stream_options={"include_usage": True})
    assert last.usage == found.usage


def test_chat(service, client):
    said = [{"role": "user", "content": "a b"}]
    ids = service.tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
    text, log_probs, _ = alone(service, ids, 6)
    ask = {"model": "tiny", "messages": said, "max_tokens": 6, "temperature": 0, "logprobs": True, "top_logprobs": 1}
    found = client.chat.completions.create(**ask)
    assert found.choices[0].message.content == text
    assert [one.logprob for one in found.choices[0].logprobs.content] == pytest.approx(log_probs, abs=1e-4)
    parts = list(client.chat.completions.create(**ask, stream=True))
    assert "".join(part.choices[0].delta.content or "" for part in parts) == text
    assert parts[0].choices[0].delta.role == "assistant"


def test_models_health_metrics_and_page(client, server):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert httpx.get(f"{server[0]}/health").json()["status"] == "ok"
    page = httpx.get(server[0])
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    numbers = httpx.get(f"{server[0]}/metrics").text
    assert 'anyorder_requests_total{path="/v1/models",status="200"}' in numbers
    assert "anyorder_forwards_total" in numbers


# ---------------------------------------------------------------------- blanks, likelihoods, editors


def test_infill(service, server):
    text = "a ___ b ___ c"
    asked = {"text": text, "length": [2, [1, 3]], "policy": "dynamic:criterion=entropy"}
    expected = service.infiller(text, length=[2, (1, 3)], policy=policies.dynamic("entropy"))
    found = post(server, "/v1/infill", **asked)
    assert found["text"] == expected.text
    assert found["log_prob"] == pytest.approx(expected.log_prob, abs=1e-4)
    assert [span["tokens"] for span in found["spans"]] == [span.tokens for span in expected.spans]
    assert sum(one["logprob"] for one in found["trace"]) == pytest.approx(expected.log_prob, abs=1e-4)
    assert [one["blank"] for one in sorted(found["trace"], key=lambda one: one["position"])] == [0, 0] + [1] * (
        len(found["trace"]) - 2
    )
    *steps, last = events(httpx.post(f"{server[0]}/v1/infill", json=asked | {"stream": True}, timeout=60))[:-1]
    assert [{k: v for k, v in step.items() if k != "final"} for step in steps] == found["trace"]
    assert last["final"]
    assert last["text"] == found["text"]


@pytest.mark.parametrize(
    ("constraint", "text"), [({"choices": ["ab", "ba"]}, "ab|ba"), ({"pattern": "[ab]{3}"}, "[ab]{3}")]
)
def test_constrained_blanks(server, constraint, text):
    found = post(server, "/v1/infill", text="c ___ c", constraints=constraint)
    assert re.fullmatch(text, found["spans"][0]["text"])


def test_score_of_any_part_given_any_other(service, server):
    text = "ab abc c"
    ids = service.tokenizer.encode(text, add_special_tokens=False)
    found = post(server, "/v1/score", text=text, targets=[[3, 5]], given=[[0, 2], [7, 8]])
    roles = [one["role"] for one in found["details"]]
    targets = [n + 1 for n, role in enumerate(roles) if role == "target"]
    given = [0] + [n + 1 for n, role in enumerate(roles) if role == "given"]
    whole = torch.tensor([[service.pieces.start_token(), *ids]])
    expected = conditional_log_likelihood(service.model, whole, targets, given)
    assert found["log_prob"] == pytest.approx(float(expected), abs=1e-4)
    assert "ignored" in roles
    everything = post(server, "/v1/score", text=text, order="random", group_size=2, seed=4)
    assert everything["tokens"] == len(ids)


EDITOR = {
    # what llama.vim and llama.vscode send
    "input_prefix": "def f(a):\n", "input_suffix": "\n    return b\n", "prompt": "    b = ", "n_predict": 8,
    "n_indent": 4,
    "input_extra": [{"filename": "x.py", "text": "a = b", "time": 1}], "top_k": 40, "top_p": 0.99, "stream": False,
    "samplers": ["top_k", "top_p", "infill"], "cache_prompt": True, "t_max_prompt_ms": 500, "t_max_predict_ms": 60000,
    "id_slot": 0, "stop": [], "response_fields": ["content"],
}  # fmt: skip


def test_editors(service, server):
    found = post(server, "/infill", **EDITOR)
    before = "x.py\na = b\n\ndef f(a):\n    b = "
    assert found["content"] == service.infiller(before + "___\n    return b\n", length=(1, 8)).spans[0].text
    assert found["timings"]["predicted_n"] == found["tokens_predicted"] > 0
    for name in ("prompt_n", "prompt_ms", "prompt_per_second", "predicted_ms", "predicted_per_second"):
        assert isinstance(found["timings"][name], (int, float))
    assert found["stop"] is True
    parts = events(httpx.post(f"{server[0]}/infill", json=EDITOR | {"stream": True}, timeout=60))
    assert "".join(part["content"] for part in parts) == found["content"] or parts[-1]["stop"]
    grown = post(server, "/infill", **EDITOR | {"input_suffix": ""})
    assert "\n" not in grown["content"]
    assert post(server, "/infill", input_suffix="b")["stop"]  # fields that are left out
    assert post(server, "/infill")["stop"]


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


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'{"prompt": NaN}', b'{"temperature": Infinity}', b"\xff\xfe"]
)
def test_bodies_that_are_none(server, body):
    for path in ("/v1/completions", "/v1/infill", "/v1/score"):
        response = httpx.post(f"{server[0]}{path}", content=body, headers=JSON, timeout=60)
        assert response.status_code == 400
        assert response.json()["error"]["type"] == "invalid_request_error"


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
        for _ in range(250):
            path = draw.choice(sorted(of))
            names = draw.sample(of[path], draw.randint(1, 4)) + of[path][:1]
            body = {name: fields[name][0] if draw.random() < 0.5 else draw.choice(fields[name]) for name in names}
            response = one.post(f"{server[0]}{path}", content=json.dumps(body), headers=JSON)
            assert response.status_code in (200, 400), (path, body, response.text)


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
