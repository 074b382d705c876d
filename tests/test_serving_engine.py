"""Many requests at once give what each gives alone, and none of them harms another."""

from __future__ import annotations

import itertools
import threading
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anyorder import Factorization, Infiller, policies
from anyorder.decoding.constraints import Choice, Pattern
from anyorder.serving import joining, slots
from anyorder.serving.engine import Engine, TimeIsOverError, TooBusyError, UnwantedError
from anyorder.serving.joining import FORWARD, batches
from architectures import VOCABULARY, converted, coupled, gated
from decoding_runs import generator

IDS = torch.randint(3, VOCABULARY, (1, 40), generator=generator(7))
WAYS = [
    (policies.groupwise(1), False),
    (policies.groupwise(4), False),
    (policies.groupwise(1), True),
    (policies.speculative(draft="query", draft_length=3), False),
    (policies.speculative(draft="state", draft_length=2), True),
    (policies.dynamic("entropy", step_size=2), True),
]


@pytest.fixture
def engine():
    made = []

    def make(model, **options):
        made.append(Engine(model, **options).start())
        return made[-1]

    yield make
    for one in made:
        one.drain(30)


def work(number: int, **options):
    """A request of its own kind: its length, policy, order and seed come of its number."""
    policy, at_random = WAYS[number % len(WAYS)]
    n = 20 + number % 7
    given = torch.zeros(1, n, dtype=torch.bool)
    given[0, : 18 + number % 2] = True
    given[0, -1] = True
    order = Factorization.infill(~given, 1, "random" if at_random else "left_to_right", [generator(number)])

    def go(model, runner=None):
        return model.generate(
            IDS[:, :n],
            order,
            policy,
            eos_token_id=(),
            seed=number,
            runner=runner,
            return_dict_in_generate=True,
            **options,
        )  # fmt: skip

    return go


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_many_requests_are_what_each_is_alone(engine, architecture, monkeypatch):
    monkeypatch.setattr(joining, "FORWARD", 1000)  # however much padding that takes
    monkeypatch.setattr(slots, "LEAST", 2)  # buffers grow
    model = coupled(architecture)
    served = engine(model, slots=5, capacity=64)
    asked = [work(number) for number in range(14)]
    tickets = [served.submit(lambda runner, go=go: go(model, runner)) for go in asked]
    for go, ticket in zip(asked, tickets, strict=True):
        found, alone = ticket.future.result(60), go(model)
        assert found.sequences.tolist() == alone.sequences.tolist()
        torch.testing.assert_close(found.log_probs, alone.log_probs, atol=1e-4, rtol=1e-4)
    assert served.joiner.rows > 1.5 * served.joiner.forwards  # they did share forwards
    assert served.joiner.slots.version > 0


@pytest.mark.slow
def test_requests_share_forwards_of_another_engine(engine, tmp_path, monkeypatch):
    pytest.importorskip("openvino", reason="pip install 'anyorder[openvino]'")
    from anyorder.runtime.engines import runner_for

    monkeypatch.setattr("anyorder.runtime.openvino.cache.cache_directory", lambda: tmp_path)
    model = coupled("llama")
    served = engine(model, slots=4, capacity=48, runner=runner_for(model, "openvino", "float32"))
    asked = [work(number) for number in range(8)]
    tickets = [served.submit(lambda runner, go=go: go(model, runner)) for go in asked]
    for go, ticket in zip(asked, tickets, strict=True):
        assert ticket.future.result(60).sequences.tolist() == go(model).sequences.tolist()
    assert served.joiner.rows > served.joiner.forwards  # the first of each shape take long, and others do not wait


def test_a_long_start_keeps_no_short_steps_waiting():
    short = [(slot, 1, 3) for slot in (0, 1, 3)]
    assert batches([short[0], (2, 60, 0), *short[1:]], 0.5) == [[0, 2, 3], [1]]
    assert batches([(0, 20, 0), (1, 18, 2)], 0.5) == [[0, 1]]
    assert batches([(0, 2, 0), (9, 2, 0)], 0.5) == [[0, 1]]  # copies of two slots
    assert batches([(0, 2, 0), (9, 2, 0)], 9) == [[0], [1]]  # too long to be copied
    assert batches([], 0.5) == []


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(0, 8)), max_size=6),
    st.sampled_from([0.25, 2.0, 9.0]),
    st.randoms(use_true_random=False),
)
def test_forwards_are_put_together_where_that_costs_least(sizes, copy, random):
    slots = random.sample(range(8), len(sizes))
    calls = [(slot, *size) for slot, size in zip(slots, sizes, strict=True)]
    order = sorted(range(len(calls)), key=lambda n: (sum(calls[n][1:]), calls[n]))

    def cost(numbers):
        chosen, content, query = zip(*(calls[n] for n in numbers), strict=True)
        rows = max(content) + max(query)
        return FORWARD + min((max(chosen) - min(chosen) + 1) * rows, len(numbers) * (rows + copy))

    made = batches(calls, copy)
    assert sorted(itertools.chain(*made)) == list(range(len(calls)))
    cuts = itertools.chain.from_iterable(itertools.combinations(range(1, len(calls)), k) for k in range(len(calls)))
    for cut in cuts:
        parts = [order[a:b] for a, b in itertools.pairwise((0, *cut, len(order)))]
        assert sum(map(cost, made)) <= sum(map(cost, parts)) + 1e-9


def test_who_computes_for_long_keeps_nobody_waiting(engine):
    model = gated("llama")
    served = engine(model, slots=3, capacity=64)
    others_are_done = threading.Event()

    def slow(runner):
        found = runner.logits(torch.zeros(1, 32))
        return others_are_done.wait(60), runner.logits(torch.zeros(1, 32)).equal(found)

    late = served.submit(slow)
    others = [served.submit(lambda runner, k=k: work(k)(model, runner)) for k in range(4)]
    for k, other in enumerate(others):
        assert other.future.result(60).sequences.tolist() == work(k)(model).sequences.tolist()
    others_are_done.set()
    assert late.future.result(60) == (True, True)


@torch.inference_mode()  # as the thread that executes
def test_buffers_have_the_size_that_requests_need():
    kept = slots.Slots(3, 1000, grows=True)
    part, own = kept[0:3], kept[1:2]
    keys = torch.randn(3, 2, 5, 4)
    assert kept.capacity == slots.LEAST - 1
    part.append(0, keys, -keys, torch.arange(5).expand(3, 5), 0)
    kept.use(1, 300)
    kept.fit()
    assert kept.capacity == part.capacity == 511
    (key,), (value,) = part.buffers
    assert key.shape == (3, 2, 512, 4)
    assert torch.equal(key[:, :, :5], keys)
    assert torch.equal(value[:, :, :5], -keys)
    pair, ranks = kept.of([0, 2]), torch.tensor([[7], [8]])
    for found, which in zip(pair.append(0, keys[::2, :, :1], keys[::2, :, :1], ranks, None), (1, -1), strict=True):
        assert torch.equal(found[:, :, :5], which * keys[::2])  # copies of those slots
        assert torch.equal(found[0, :, 7], keys[0, :, 0])
    assert torch.equal(key[2, :, 8], keys[2, :, 0])  # what is written goes into the whole
    assert not key[1, :, 5:].any()
    own.append(0, keys[1:2], keys[1:2], torch.arange(5)[None], 0)
    assert torch.equal(value[1, :, :5], keys[1])  # a part writes into the whole
    kept.use(0, 600)
    kept.fit()
    assert kept.capacity == 1000  # and no more
    kept.free(0)
    kept.fit()
    assert kept.capacity == 1000  # 512 would do: the next may need more again
    kept.free(1)
    kept.begin(2, own.first_of(0, 5))
    assert torch.equal(part.buffers[1][0][2, :, :5], -keys[2])  # not yet: a forward may be at work
    kept.fit()
    assert kept.capacity == slots.LEAST - 1
    assert torch.equal(part.buffers[1][0][2, :, :5], keys[1])
    assert slots.Slots(3, 1000).capacity == 1000


def test_what_texts_begin_with_is_encoded_once(engine, monkeypatch):
    model = gated("llama")
    served = engine(model, slots=1, capacity=64)
    widths, hidden = [], served.joiner.runner.hidden
    monkeypatch.setattr(
        served.joiner.runner, "hidden", lambda rows, *more: (widths.append(rows.content_count), hidden(rows, *more))[1]
    )
    for ids in (IDS[:, :30], torch.cat([IDS[:, :25], IDS[:, 30:35]], dim=1)):
        go = lambda runner=None, ids=ids: model.generate(ids, max_new_tokens=4, eos_token_id=(), runner=runner)  # noqa: E731
        found = served.submit(go).future.result(60)
        assert found.tolist() == go().tolist()
    assert widths == [30, 1, 1, 1, 5, 1, 1, 1]


def test_blanks_choices_and_patterns(engine, byte_tokenizer):
    model = converted("llama", vocabulary=len(byte_tokenizer))
    served, infiller = engine(model, slots=3, capacity=64), Infiller(model, byte_tokenizer)
    asked = [
        ("a ___ b", {}),
        ("a ___ b ___", {"length": [2, "auto"], "temperature": 0.9}),
        ("c ___", {"constraints": Choice("a", "ab", "b c")}),
        ("ab ___ c", {"constraints": Pattern("[ab]{2,4}"), "length": 3}),
    ]

    def fill(text, options, runner=None):
        more = {"generator": generator(3)} if "temperature" in options else {}
        return infiller(text, runner=runner, **options, **more)

    tickets = [served.submit(lambda runner, one=one: fill(*one, runner)) for one in asked]
    for one, ticket in zip(asked, tickets, strict=True):
        assert fill(*one).text == ticket.future.result(60).text


def test_one_that_fails_harms_no_other(engine):
    model = gated("llama")
    served = engine(model, slots=4, capacity=32)
    good, bad = work(0), work(1, allowed_tokens="nonsense")
    tickets = [served.submit(lambda runner, go=go: go(model, runner)) for go in (good, bad, good)]
    long = served.submit(lambda runner: model.generate(IDS[:, :30], max_new_tokens=10, runner=runner))
    assert tickets[0].future.result(60).sequences.tolist() == good(model).sequences.tolist()
    assert tickets[2].future.result(60).sequences.tolist() == good(model).sequences.tolist()
    with pytest.raises(Exception, match="nonsense|str"):
        tickets[1].future.result(60)
    with pytest.raises(ValueError, match="the text has 40 tokens, new ones included; this server takes at most 32"):
        long.future.result(60)


def test_an_error_of_a_joint_forward_is_that_of_the_request_that_made_it(engine, monkeypatch):
    model = gated("llama")
    served = engine(model, slots=3, capacity=64)
    logits = served.joiner.runner.logits

    def fails_for_nan(hidden):
        if bool(hidden.isnan().any()):
            raise ArithmeticError("no numbers")
        return logits(hidden)

    monkeypatch.setattr(served.joiner.runner, "logits", fails_for_nan)
    good = work(0)
    bad = served.submit(lambda runner: runner.logits(torch.full((1, 32), torch.nan)))
    others = [served.submit(lambda runner: good(model, runner)) for _ in range(2)]
    with pytest.raises(ArithmeticError, match="no numbers"):
        bad.future.result(60)
    for other in others:
        assert other.future.result(60).sequences.tolist() == good(model).sequences.tolist()


def test_a_request_that_is_cancelled_or_late_ends_before_its_next_forward(engine):
    model = gated("llama")
    served = engine(model, slots=1, capacity=64)
    begun, go_on = threading.Event(), threading.Event()

    def slow(runner):
        begun.set()
        go_on.wait(30)
        return work(0)(model, runner)

    at_work, waits = served.submit(slow), served.submit(slow)
    late = served.submit(slow, seconds=0.01)
    assert begun.wait(30)
    at_work.cancel()
    waits.cancel()
    time.sleep(0.02)
    go_on.set()
    for ticket, error in ((at_work, UnwantedError), (waits, UnwantedError), (late, TimeIsOverError)):
        with pytest.raises(error):
            ticket.future.result(60)
    assert served.submit(lambda runner: work(0)(model, runner)).future.result(60) is not None  # the slot is free
    assert served.joiner.forwards < 10


def test_who_waits_takes_turns_by_client_and_too_many_are_refused(engine):
    served = engine(gated("llama"), slots=1, capacity=64, waiting=4)
    go_on, begun, order = threading.Event(), threading.Event(), []
    first = served.submit(lambda runner: (begun.set(), go_on.wait(30)))
    assert begun.wait(30)
    tickets = [served.submit(lambda runner, c=c: order.append(c), client=c[0]) for c in ("a1", "a2", "a3", "b1")]
    with pytest.raises(TooBusyError, match="4 requests are waiting already"):
        served.submit(lambda runner: None)
    go_on.set()
    for ticket in (first, *tickets):
        ticket.future.result(60)
    assert order == ["a1", "b1", "a2", "a3"]


def test_draining_ends_what_was_taken_and_takes_no_more():
    model = coupled("llama")
    served = Engine(model, slots=2, capacity=64).start()
    tickets = [served.submit(lambda runner, k=k: work(k)(model, runner)) for k in range(5)]
    forever = Engine(model, slots=1, capacity=64).start()
    endless = forever.submit(lambda runner: [work(0)(model, runner) for _ in range(10**6)])
    served.drain(60)
    assert all(ticket.future.result(1) is not None for ticket in tickets)
    with pytest.raises(TooBusyError, match="shutting down"):
        served.submit(lambda runner: None)
    forever.drain(0.2)
    with pytest.raises(UnwantedError):
        endless.future.result(1)


@pytest.mark.parametrize("name", ["slots", "capacity", "waiting"])
def test_sizes_that_cannot_be_meant(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        Engine(gated("llama"), **{name: 0})
