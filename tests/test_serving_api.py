"""The APIs: what real clients send, what mistakes get, and that answers are those of the library."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("fastapi", reason="pip install 'anyorder[serve]'")
httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai", reason="the client of OpenAI's API")

import torch  # noqa: E402

import editors  # noqa: E402
from anyorder import Factorization, policies  # noqa: E402
from anyorder.scoring import conditional_log_likelihood  # noqa: E402
from anyorder.serving.service import Service  # noqa: E402
from decoding_runs import generator  # noqa: E402
from serving import alone, events, post  # noqa: E402


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0) as one:
        yield one


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


@pytest.mark.parametrize("policy", [None, "dynamic:criterion=entropy", "groupwise:size=2", "speculative:draft=query"])
def test_alternatives_of_tokens_in_blanks(server, policy):
    """The model's own, the likeliest first; what was taken may be less likely: others are banned."""
    found = post(server, "/v1/infill", text="a ___ b", length=4, policy=policy, top_logprobs=20)["trace"]
    assert len(found) == 4
    for one in found:
        best = one["top_logprobs"]
        assert len(best) == 20
        assert [part["logprob"] for part in best] == sorted((part["logprob"] for part in best), reverse=True)
        own = [part["logprob"] for part in best if part["token"] == one["token"]]
        if own:
            assert own == [pytest.approx(one["logprob"], abs=1e-4)]
        else:
            assert one["logprob"] <= best[-1]["logprob"] + 1e-4


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


def test_coupling_can_be_left_out(service, server):
    """Of continuations, blanks and scores; each is then that of the model without."""
    plain = service.model.uncoupled()
    grouped = {"group_size": 4, "temperature": 0.8, "seed": 3}
    asked = {"prompt": "a b", "max_tokens": 8, **grouped}
    texts = []
    for coupling in (True, False):
        text = post(server, "/v1/completions", coupling=coupling, **asked)["choices"][0]["text"]
        model = service.model if coupling else plain
        twin = Service(model, service.tokenizer, "tiny")
        drawn = {"policy": policies.groupwise(4), "temperature": 0.8, "generator": generator(3)}
        assert text == alone(twin, "a b", 8, **drawn)[0]
        blank = post(server, "/v1/infill", text="a ___ c", length=8, coupling=coupling, **grouped)["text"]
        assert blank == twin.infiller("a ___ c", length=8, group_size=4, temperature=0.8, generator=generator(3)).text
        texts.append((text, blank))
    assert texts[0] != texts[1]
    text = "ab abc c"
    scores = [post(server, "/v1/score", text=text, group_size=4, coupling=one)["log_prob"] for one in (True, False)]
    ids = [service.pieces.start_token(), *service.tokenizer.encode(text, add_special_tokens=False)]
    order = Factorization.left_to_right(len(ids), 4, given=1)
    for model, score in zip((service.model, plain), scores, strict=True):
        assert score == pytest.approx(float(model.log_likelihood(torch.tensor([ids]), order).sum()), abs=1e-4)
    assert abs(scores[0] - scores[1]) > 1e-3


def test_editors(service, server):
    found = post(server, "/infill", **editors.VSCODE)
    before = "x.py\na = b\n\ndef f(a):\n    b = "
    assert found["content"] == service.infiller(before + "___\n    return b\n", length=(1, 8)).spans[0].text
    assert found["timings"]["predicted_n"] == found["tokens_predicted"] > 0
    assert found["stop"] is True
    parts = events(httpx.post(f"{server[0]}/infill", json=editors.VSCODE | {"stream": True}, timeout=60))
    assert "".join(part["content"] for part in parts) == found["content"]
    assert [part["stop"] for part in parts] == [False] * (len(parts) - 1) + [True]
    grown = post(server, "/infill", **editors.VSCODE | {"input_suffix": ""})
    assert "\n" not in grown["content"]
    assert post(server, "/infill", input_suffix="b")["stop"]  # fields that are left out
    assert post(server, "/infill")["stop"]


def test_editors_get_the_fields_that_they_name(server):
    whole = post(server, "/infill", **editors.VSCODE)
    found = post(server, "/infill", **editors.VIM)
    assert set(found) == set(editors.FIELDS)
    assert found["content"] == whole["content"]
    assert found["timings/predicted_n"] == whole["timings"]["predicted_n"]
    assert post(server, "/infill", **editors.VIM | {"response_fields": ["nothing", "timings/nothing"]}) == {}


@pytest.mark.parametrize("body", [editors.AHEAD, editors.VIM_AHEAD, editors.VSCODE | {"n_predict": 0}])
def test_editors_may_ask_for_no_token(server, body):
    before = server[1].joiner.forwards
    found = post(server, "/infill", **body)
    assert found.get("content", "") == ""
    assert server[1].joiner.forwards == before


def test_long_files_are_cut_to_what_is_near_the_cursor(server):
    """To what this server takes, with a context of 64 tokens: a file is no reason for an error."""
    file = "\n".join(f"line {number} = a b c" for number in range(200))
    for behind in (file, ""):
        body = editors.VSCODE | {"input_prefix": file + "\n", "input_suffix": behind, "prompt": "    c = "}
        found = post(server, "/infill", **body)
        assert found["prompt"].endswith("    c = ")
        assert found["tokens_evaluated"] + found["tokens_predicted"] <= 64


def test_time_that_an_editor_gives_ends_a_fill_with_what_there_is(service, server):
    found = post(server, "/infill", **editors.VSCODE | {"t_max_predict_ms": 0.001})
    assert found["stop_type"] == "limit"
    assert found["tokens_predicted"] == 1
