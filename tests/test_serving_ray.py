"""`serving.ray_app` on a cluster of two replicas: the plain server's answers, and no way to break it by killing one."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="pip install 'anyorder[serve]'")
httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai", reason="the client of OpenAI's API")

import local_ray  # noqa: E402 (first: it says how Ray is to be imported)
from anyorder.serving.ray_app import NAME, Arguments, build  # noqa: E402
from serving import events, serving  # noqa: E402

REPLICA = f"ServeReplica:default:{NAME}"
SLOTS, CONTEXT, LONG = 2, 64, 60


@pytest.fixture(scope="module")
def deployed(service, tmp_path_factory):
    """The address of two replicas."""
    directory = tmp_path_factory.mktemp("deployed")
    service.model.save_pretrained(directory)
    service.tokenizer.save_pretrained(directory)
    arguments = Arguments(model=str(directory), min_replicas=2, max_replicas=2, slots=SLOTS, context=CONTEXT)
    with local_ray.cluster(), serving(service) as (free, _):
        port = int(free.rpartition(":")[2]) + 1
        local_ray.serve.start(http_options={"port": port})
        local_ray.serve.run(build(arguments))
        yield f"http://127.0.0.1:{port}"
        local_ray.serve.shutdown()


ASKED = [
    ("/v1/completions", {"prompt": ["a b", "c"], "n": 2, "max_tokens": 9, "seed": 1, "logprobs": 2, "echo": True}),
    ("/v1/completions", {"prompt": "ab", "max_tokens": 9, "seed": 2, "stream": True, "policy": "groupwise:size=3"}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 7, "seed": 3}),
    ("/v1/infill", {"text": "a ___ b ___.", "length": [2, [1, 3]], "policy": "dynamic:criterion=entropy"}),
    ("/v1/infill", {"text": "a ___ b", "length": 3, "stream": True}),
    ("/v1/score", {"text": "a b c", "targets": [[2, 3]], "order": "random"}),
    ("/infill", {"input_prefix": "a b ", "input_suffix": " c", "prompt": ""}),
    ("/v1/completions", {"prompt": "a", "temperature": -1}),
    ("/v1/infill", {"text": "a ___", "policy": "dynamics"}),
]


def comparable(response):
    """A response without what no two have in common."""
    own = {"id", "created", "model", "timings"}

    def without(one):
        if isinstance(one, dict):
            return {name: without(value) for name, value in one.items() if name not in own}
        if isinstance(one, list):
            return [without(value) for value in one]
        return pytest.approx(one, abs=1e-4) if isinstance(one, float) else one

    is_stream = response.headers["content-type"].startswith("text/event-stream")
    return response.status_code, without(events(response) if is_stream else response.json())


@pytest.mark.slow
@pytest.mark.parametrize(("path", "body"), ASKED, ids=[f"{path}-{n}" for n, (path, _) in enumerate(ASKED)])
def test_answers_are_those_of_the_plain_server(service, deployed, path, body):
    with serving(service, SLOTS, CONTEXT) as (address, _):
        plain = httpx.post(f"{address}{path}", json=body, timeout=60)
    assert comparable(httpx.post(f"{deployed}{path}", json=body, timeout=60)) == comparable(plain)


@pytest.mark.slow
def test_streams_come_as_they_grow_and_a_client_that_goes_takes_its_request_along(deployed):
    long = {"prompt": "a b", "max_tokens": LONG, "seed": 1, "n": 16, "temperature": 0.01}
    begun = time.monotonic()
    whole = httpx.post(f"{deployed}/v1/completions", json=long, timeout=60)
    seconds = time.monotonic() - begun
    assert whole.status_code == 200, whole.text
    for _ in range(4):
        with httpx.stream("POST", f"{deployed}/v1/completions", json=long | {"stream": True}, timeout=60) as response:
            assert response.status_code == 200
            first = next(response.iter_lines())
        assert json.loads(first.removeprefix("data: "))["choices"][0]["finish_reason"] is None
    for _ in range(2):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{deployed}/v1/completions", json=long, timeout=0.3)
    idle, begun = 0, time.monotonic()
    while idle < 8 and time.monotonic() - begun < seconds:  # both replicas had some of these, of so many seconds each
        state = httpx.get(f"{deployed}/health", timeout=60).json()
        idle = idle + 1 if state["at_work"] + state["queued"] == 0 else 0
    assert idle == 8  # in a row they are one replica's alone once in 128 times


@pytest.mark.slow
def test_a_replica_that_is_killed_under_load_comes_back_without_help(deployed):
    body = {"prompt": "a b", "max_tokens": 60, "seed": 1}
    expected = httpx.post(f"{deployed}/v1/completions", json=body, timeout=60).json()["choices"]
    before = local_ray.workers(REPLICA)
    assert len(before) == 2
    found, stop = [], threading.Event()

    def ask(stream):
        while not stop.is_set():
            found.append(outcome(deployed, body | {"stream": stream}, expected))

    asking = [threading.Thread(target=ask, args=(n % 2 == 1,)) for n in range(6)]
    for thread in asking:
        thread.start()
    try:
        wait(lambda: len(found) >= 12)
        os.kill(before[0], signal.SIGKILL)
        wait(lambda: len(set(local_ray.workers(REPLICA)) - {before[0]}) == 2)
        back = len(found)
        wait(lambda: len(found) >= back + 12)
    finally:
        stop.set()
        for thread in asking:
            thread.join(60)
    assert not any(thread.is_alive() for thread in asking)  # none hangs
    assert set(found) <= {"right", "failed"}, set(found)
    assert found.count("failed") <= 2 * SLOTS  # what the replica had taken
    assert found[-6:] == ["right"] * 6
    after = local_ray.workers(REPLICA)
    assert len(after) == 2
    assert before[0] not in after


def wait(until, seconds=120):
    """However fast the machine is."""
    late = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < late
        time.sleep(0.2)


def outcome(address, body, expected):
    """How a request ended: right, failed and said so, or anything else."""
    try:
        response = httpx.post(f"{address}/v1/completions", json=body, timeout=60)
    except httpx.RemoteProtocolError:  # a stream that has begun is cut off: no end is made up for it
        return "failed"
    if response.status_code != 200:
        return "failed" if response.status_code in (500, 503) else f"status {response.status_code}"
    if not body["stream"]:
        return "right" if response.json()["choices"] == expected else response.text
    said = events(response)
    text = "".join(part["choices"][0]["text"] for part in said[:-1])
    return "right" if said[-1] == "[DONE]" and text == expected[0]["text"] else response.text


@pytest.mark.slow
def test_clients_of_openai_ask_again_by_themselves(deployed):
    with openai.OpenAI(base_url=f"{deployed}/v1", api_key="none", max_retries=4, timeout=60) as client:

        def ask():
            return client.completions.create(model="any", prompt="a b", max_tokens=60, seed=1).choices[0].text

        expected = ask()
        found, killed = [], local_ray.workers(REPLICA)[0]
        asking = [threading.Thread(target=lambda: found.extend(ask() for _ in range(10))) for _ in range(4)]
        for thread in asking:
            thread.start()
        time.sleep(0.5)
        os.kill(killed, signal.SIGKILL)
        for thread in asking:
            thread.join(120)
        assert found == [expected] * 40


# ---------------------------------------------------------------------- without a cluster


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"slots": 0}, "slots"),
        ({"min_replicas": 3, "max_replicas": 2}, "max_replicas 2 is less than min_replicas 3"),
        ({"engine": "openvin"}, "did you mean 'openvino'?"),
        ({"engine": "cuda_graphs"}, "choose eager"),
        ({"gpus": 2}, "gpus"),
        ({"dtype": "int4"}, "float32"),
        ({"replica": 2}, "replica"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(ValueError, match=message):
        Arguments(**arguments)


def _built_by_ray(arguments):
    """As its commands do."""
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as built

    return built(build, arguments)


def test_what_was_typed_is_taken_and_what_cannot_be_meant_named():
    typed = {"min_replicas": "2", "max_replicas": "5", "slots": "3", "dtype": "bfloat16"}  # Ray hands over strings
    options = _built_by_ray(typed)._bound_deployment
    assert options._deployment_config.autoscaling_config.max_replicas == 5
    assert options.max_ongoing_requests == 6
    with pytest.raises(ValueError, match="slotz"):
        _built_by_ray({"slotz": "3"})


def test_replicas_are_scaled_by_requests_at_work():
    options = build(Arguments(min_replicas=1, max_replicas=8, slots=16, gpus=1))._bound_deployment
    scale = options._deployment_config.autoscaling_config
    assert (scale.min_replicas, scale.max_replicas, scale.target_ongoing_requests) == (1, 8, 16)
    assert options.ray_actor_options["num_gpus"] == 1
    assert options.max_ongoing_requests == 32
    assert build(Arguments(min_replicas=3, max_replicas=3))._bound_deployment.num_replicas == 3


def test_the_example_is_a_file_that_serve_deploy_takes():
    yaml = pytest.importorskip("yaml")
    from ray.serve.schema import ServeDeploySchema

    file = Path(__file__).parents[1] / "examples" / "ray_serve.yaml"
    if not file.exists():
        pytest.skip("no examples beside the tests")
    (application,) = ServeDeploySchema.model_validate(yaml.safe_load(file.read_text())).applications
    assert application.import_path == "anyorder.serving.ray_app:build"
    assert _built_by_ray(application.args)._bound_deployment.name == NAME
    assert [deployment.name for deployment in application.deployments] == [NAME]
