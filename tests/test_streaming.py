"""While `generate` runs: streamers and streams are told what is settled, and texts stop where they shall."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from transformers import StoppingCriteria, TextIteratorStreamer

from anyorder import AnyOrderForCausalLM, policies
from architectures import base_model, converted
from decoding_runs import PROMPTS, Recorder, generator


@pytest.mark.parametrize(
    "policy", [None, policies.groupwise(3), policies.speculative(draft="query", draft_length=3), policies.speculative()]
)
def test_a_streamer_gets_what_is_settled(policy):
    model = converted("llama")
    mask = torch.ones_like(PROMPTS)
    mask[1, :2] = 0
    for ends in ((), (3, 6, 19, 22, 30)):
        streamer = Recorder()
        options = {"attention_mask": mask, "policy": policy, "eos_token_id": ends, "max_new_tokens": 8}
        expected = model.generate(PROMPTS, **options)
        assert torch.equal(model.generate(PROMPTS, streamer=streamer, **options), expected)
        prompts, *columns = streamer.values
        assert torch.equal(prompts, PROMPTS)
        assert torch.equal(torch.stack(columns, dim=1), expected[:, 5:])
        assert streamer.ended


def test_a_streamer_is_told_while_decoding_goes_on():
    """Each token as soon as its step is done, not all at the end."""
    model, forwards, seen = converted("llama"), [], []

    class Counting(Recorder):
        def put(self, value):
            seen.append(len(forwards))

    hook = model.causal_lm.model.register_forward_hook(lambda *_: forwards.append(1))
    try:
        model.generate(PROMPTS[:1], max_new_tokens=3, eos_token_id=(), streamer=Counting())
    finally:
        hook.remove()
    assert seen == [0, 1, 2, 3]


def test_transformers_streamers_give_the_new_text(byte_tokenizer):
    model = AnyOrderForCausalLM.from_causal_lm(base_model("llama", vocabulary=len(byte_tokenizer)))
    streamer = TextIteratorStreamer(byte_tokenizer, skip_prompt=True)
    ids = torch.tensor([byte_tokenizer.encode("ab c")])
    tokens = model.generate(ids, max_new_tokens=8, streamer=streamer, eos_token_id=())
    assert "".join(streamer) == byte_tokenizer.decode(tokens[0, ids.shape[1] :])


@pytest.mark.parametrize("policy", [None, policies.groupwise(3), policies.speculative(draft="query", draft_length=3)])
def test_stop_strings_stop_where_transformers_does(byte_tokenizer, policy):
    V = len(byte_tokenizer)
    base = base_model("llama", vocabulary=V)
    ids = torch.randint(3, V, (3, 5), generator=generator(4))
    model = AnyOrderForCausalLM.from_causal_lm(base_model("llama", vocabulary=V))
    texts = [byte_tokenizer.decode([token]) for token in range(V)]
    others = [token for token, text in enumerate(texts) if not (text.isascii() and text.isprintable())] + [0, 1, 2]
    # An end id that never comes: with none at all transformers goes on writing in rows that have stopped.
    options = {"max_new_tokens": 12, "eos_token_id": 1, "pad_token_id": 0, "suppress_tokens": others}
    plain = model.generate(ids, policy=policy, **options)
    stops = [byte_tokenizer.decode(plain[0, 7:9]), byte_tokenizer.decode(plain[1, 11])]
    options |= {"stop_strings": stops, "tokenizer": byte_tokenizer}
    stopped = model.generate(ids, policy=policy, **options)
    if policy is None or isinstance(policy, policies.Speculative):
        expected = base.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **options)
        assert torch.equal(stopped, expected)
    assert (stopped == 0).sum(1)[0] >= stopped.shape[1] - 9
    assert (stopped != 0).sum(1)[1] <= 12
    for row, whole in zip(stopped, plain, strict=True):  # up to the end it is the same text
        n = int((row != 0).sum())
        assert torch.equal(row[:n], whole[:n])


def test_criteria_get_each_text_by_itself():
    model, seen = converted("llama"), []

    class AtLength(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            seen.extend(input_ids.tolist())
            return torch.full((len(input_ids),), input_ids.shape[1] >= 7)

    mask = torch.ones_like(PROMPTS)
    mask[1, :2] = 0
    options = {"max_new_tokens": 6, "eos_token_id": (), "pad_token_id": 0, "suppress_tokens": [0]}
    output = model.generate(PROMPTS, attention_mask=mask, stopping_criteria=[AtLength()], **options)
    assert (output[:, 5:] != 0).sum(1).tolist() == [2, 4, 2]
    assert all(text == output[1, 2:].tolist()[: len(text)] for text in seen if text[0] == int(PROMPTS[1, 2]))
    assert model.generate(PROMPTS, max_new_tokens=6, eos_token_id=(), max_time=1e-9).shape[1] == 6


@pytest.mark.parametrize("name", ["watch", "pad_token_id", "streamer", "return_dict_in_generate", "output_scores"])
def test_a_stream_takes_what_a_stream_can_use(name):
    with pytest.raises(ValueError, match=f"{name} is for generate"):
        converted("llama").stream(PROMPTS, **{name: None})


def test_a_stream_that_is_left_half_way_ends_in_silence():
    """What is suspended when the interpreter ends is closed after the modules that it needs are gone."""
    code = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from architectures import converted\nfrom decoding_runs import IDS\n"
        "stream = converted('llama').stream(IDS[:1, :4], max_new_tokens=30, eos_token_id=())\n"
        "next(stream)\nprint('left')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "left\n"
    assert "Exception" not in done.stderr
    assert "Traceback" not in done.stderr
    torch.set_grad_enabled(True)
    stream = converted("llama").stream(PROMPTS, max_new_tokens=9, eos_token_id=())
    next(stream)
    assert not torch.is_inference_mode_enabled(), "a mode that is on between two steps is the caller's, too"
    stream.close()
