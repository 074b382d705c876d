"""The benchmark: it times what it says, on the same prompts, and its report holds what was measured."""

from __future__ import annotations

import argparse
import csv
import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from anyorder import AnyOrderForCausalLM, Factorization, load
from anyorder.bench import quality, report
from anyorder.bench.decoders import AnyOrder, Continuation, Decoder, Foreign, HuggingFace, foreign_function
from anyorder.bench.measure import Measured, measure
from anyorder.bench.others import LlamaCpp, LlamaCppServer
from anyorder.bench.run import _by_ones_first, _policies, _prompts, _sampling
from anyorder.cli import main
from anyorder.decoding.policies import parse
from anyorder.hub.resolve import gguf_file
from architectures import converted, couple

PROMPTS = torch.randint(3, 30, (5, 6), generator=torch.Generator().manual_seed(0))


def test_each_decoder_is_warmed_up_for_as_long_as_is_asked(monkeypatch):
    """Runs that are not counted: one, and more until so many seconds have passed since."""
    asked, now = [], [0.0]
    monkeypatch.setattr("anyorder.bench.measure.time.perf_counter", lambda: now[0])

    class Slow(Decoder):
        name = "slow"

        def __call__(self, ids, new, seeds):
            asked.append(list(seeds))
            now[0] += 0.05
            return Continuation(torch.nn.functional.pad(ids, (0, new)), new)

    (found,) = measure([Slow()], PROMPTS, 2, [2], warm_up=0.12)
    assert asked == [[0, 1]] * 4 + [[0, 1], [2, 3]]
    assert found.warm_up == pytest.approx(0.2)
    asked.clear()
    measure([Slow()], PROMPTS, 2, [2])
    assert asked == [[0, 1], [0, 1], [2, 3]]


def test_decoders_are_measured_on_the_same_prompts():
    model = converted("llama")
    decoders = [
        HuggingFace(model, None),
        *(AnyOrder(model, parse(t), t, None) for t in ("groupwise", "speculative:draft=query")),
    ]
    results = measure(decoders, PROMPTS, 8, [1, 2])
    assert [(r.decoder, r.batch_size, len(r.seconds)) for r in results] == [
        ("hugging face, greedy", 1, 5), ("groupwise, greedy", 1, 5), ("speculative:draft=query, greedy", 1, 5),
        ("hugging face, greedy", 2, 2), ("groupwise, greedy", 2, 2), ("speculative:draft=query, greedy", 2, 2),
    ]  # fmt: skip
    for result in results:  # greedy: all three write the same
        assert torch.equal(torch.stack(result.sequences), torch.stack(results[0].sequences[: len(result.sequences)]))
        assert torch.equal(torch.stack(result.sequences)[:, :6], PROMPTS[: len(result.sequences)])
    assert results[0].ratios == [1.0] * 5
    assert results[1].forwards_per_token == 1
    assert results[2].forwards_per_token < 1
    assert [r.same_as_alone for r in results] == [None, None, None, None, 4, 4]
    one = results[1]
    assert one.tokens_per_second[0] == pytest.approx(8 / one.seconds[0])
    assert one.ratios[0] == pytest.approx(results[0].seconds[0] / one.seconds[0])


def test_engines_stand_side_by_side(capsys, checkpoint, tmp_path, monkeypatch):
    asked, generate = [], AnyOrderForCausalLM.generate

    def eager(self, *arguments, engine, weights, **options):  # what engines do is tested where they are made
        asked.append((engine, weights))
        return generate(self, *arguments, **options)

    monkeypatch.setattr(AnyOrderForCausalLM, "generate", eager)
    arguments = ["bench", str(tmp_path / "out"), "--model", str(checkpoint), "--prompts", "1", "--batch-size", "1"]
    arguments += ["--prompt-tokens", "6", "--new-tokens", "4", "--greedy", "--policies", "groupwise:size=4"]
    assert main([*arguments, "--engines", "eager", "openvino:int8"]) == 0
    results = json.loads((tmp_path / "out" / "bench.json").read_text())["results"]
    assert [(r["decoder"], r["engine"], r["ratio_to"]) for r in results] == [
        ("hugging face, greedy", "eager", "hugging face, greedy"),
        ("groupwise:size=4, greedy", "eager", "hugging face, greedy"),
        ("groupwise:size=1, greedy, openvino int8", "openvino int8", "groupwise:size=1, greedy, openvino int8"),
        ("groupwise:size=4, greedy, openvino int8", "openvino int8", "groupwise:size=1, greedy, openvino int8"),
    ]
    assert asked == [("eager", None), ("openvino", "int8"), ("openvino", "int8")] * 2  # to warm up, and once more
    assert results[1]["base_nats_per_token"] == pytest.approx(results[3]["base_nats_per_token"], abs=1e-5)
    assert (results[0]["ratio"], results[2]["ratio"]) == (1, 1)
    out = capsys.readouterr().out
    assert "| times hugging face, greedy |" in out
    assert "warm-up, s" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engines", "openvin:int8"], "engine 'openvin' is not known: did you mean 'openvino'"),
        (["--engines", "auto"], "a bench names what it measures"),
        (["--against", "llama.cpp"], "reads the base's GGUF file, and .* comes from none|needs: pip install xllamacpp"),
        (["--against", "llama.cp"], "must be FILE.py:FUNCTION"),
    ],
)
def test_decoders_that_cannot_be_measured_are_named(capsys, checkpoint, tmp_path, options, message):
    arguments = ["bench", str(tmp_path / "out"), "--model", str(checkpoint), "--prompts", "1", "--batch-size", "1"]
    assert main([*arguments, "--prompt-tokens", "6", "--new-tokens", "2", *options]) == 2
    assert re.search(message, capsys.readouterr().err)


_XLLAMACPP = """
import json, os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import SimpleNamespace
from unittest.mock import MagicMock as CommonParams

class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with open(os.environ["ASKED"], "a") as asked:
            asked.write(body.decode() + "\\n")
        body = json.loads(body)
        tokens = [body["prompt"][-1] + 1] * min(body["n_predict"], 5)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"tokens": tokens}).encode())

    def log_message(self, *arguments):
        pass

def Server(settings):
    if not settings.model.path.endswith(".gguf"):
        raise RuntimeError(f"no model in {settings.model.path}")
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=http.serve_forever, daemon=True).start()
    return SimpleNamespace(listening_address=f"http://127.0.0.1:{http.server_port}")
"""
"""What package xllamacpp is to the process: a server that goes on with the prompt's last token plus one."""


@pytest.fixture
def xllamacpp(monkeypatch, tmp_path):
    """A stand-in for the package; what its server is asked lands in a file."""
    (tmp_path / "xllamacpp.py").write_text(_XLLAMACPP)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("ASKED", str(tmp_path / "asked.jsonl"))
    return tmp_path / "asked.jsonl"


def test_llama_cpp_is_asked_for_each_row(xllamacpp):
    decoder = LlamaCpp(Path("Some-Model.Q4_1.gguf"), {"temperature": 0.7})
    assert decoder.name == "llama.cpp (Q4_1)"
    found = decoder(PROMPTS[:2], 5, [7, 8])
    assert found.sequences.tolist() == [[*row, *[row[-1] + 1] * 5] for row in PROMPTS[:2].tolist()]
    asked = [json.loads(line) for line in xllamacpp.read_text().splitlines()]
    for body in asked:
        assert (body["temperature"], body["ignore_eos"], body["top_k"], body["cache_prompt"]) == (0.7, True, 0, False)
    assert sorted(body["seed"] for body in asked) == [7, 8]
    with pytest.raises(ValueError, match="made 5 of 6 tokens"):
        decoder(PROMPTS[:1], 6, [7])
    with pytest.raises(ValueError, match="got a batch of 33"):
        decoder(PROMPTS[:1].expand(33, -1), 5, range(33))


def test_llama_cpp_runs_in_a_process_of_its_own_that_ends_with_its_object(xllamacpp):
    server = LlamaCppServer(Path("some.gguf"), 1, 512)
    process = server._process
    assert process.poll() is None
    del server
    assert process.poll() == 0
    with pytest.raises(
        ValueError, match=r"does not begin on model\.txt; it said: RuntimeError: no model in model\.txt"
    ):
        LlamaCppServer(Path("model.txt"), 1, 512)


def test_the_gguf_file_of_a_model_is_found(tmp_path):
    file = tmp_path / "base.gguf"
    file.touch()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "config.json").write_text(json.dumps({"base": {"name": "./base.gguf"}}))
    assert gguf_file(str(tmp_path / "adapter")) == gguf_file(str(file)) == file
    assert gguf_file(str(tmp_path)) is None
    assert gguf_file("smollm2-135m-anyorder") == gguf_file("smollm2-135m")


class Named(Decoder):
    def __init__(self, name, engine, is_reference=False):
        self.name, self.engine, self.is_reference = name, engine, is_reference

    def __call__(self, ids, new, seeds):
        return Continuation(torch.cat([ids, ids[:, :1].expand(-1, new)], 1), new)


def test_decoders_are_compared_with_the_first_of_their_engine_and_with_others():
    kinds = [("base", "eager", True), ("ours", "eager"), ("theirs", "c", True), ("by ones", "d"), ("fast", "d")]
    results = measure([Named(*kind) for kind in kinds], PROMPTS, 4, [1])
    for result, first in zip(results, (0, 0, 2, 3, 3), strict=True):
        assert result.ratio_to == results[first].decoder
        for found, other in [(result.ratios, first), (result.times["base"], 0), (result.times["theirs"], 2)]:
            pairs = zip(results[other].seconds, result.seconds, strict=True)
            assert found == pytest.approx([a / b for a, b in pairs])
        assert set(result.times) == {"base", "theirs"}


def test_one_token_at_a_time_is_the_first_of_an_engine():
    def names(*texts):
        return [text for _, text in _by_ones_first(_policies(texts))]

    assert names("speculative") == ["groupwise:size=1", "speculative"]
    assert names("groupwise:size=4", "groupwise") == ["groupwise", "groupwise:size=4"]


def test_temperature_zero_is_greedy():
    def sampling(**given):
        usual = {"greedy": False, "temperature": None, "top_p": None, "batch_size": [1], "prompts": 1}
        return _sampling(argparse.Namespace(**{**usual, **given}))

    assert sampling() == {"temperature": 1.0}
    assert sampling(temperature=0.5, top_p=0.9) == {"temperature": 0.5, "top_p": 0.9}
    assert sampling(greedy=True) is None
    assert sampling(temperature=0.0, top_p=0.9) is None


def test_what_was_measured_is_printed_before_anything_is_written(capsys, checkpoint, tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr(report, "write", fail)
    arguments = ["bench", str(tmp_path / "out"), "--model", str(checkpoint), "--prompts", "1", "--batch-size", "1"]
    assert main([*arguments, "--prompt-tokens", "6", "--new-tokens", "2", "--policies", "groupwise"]) == 2
    captured = capsys.readouterr()
    assert "| groupwise | 1 |" in captured.out
    assert "no space left" in captured.err


def test_groups_are_measured_without_the_coupling_too(capsys, checkpoint, byte_tokenizer, tmp_path):
    couple(AnyOrderForCausalLM.from_causal_lm(checkpoint)).save_pretrained(tmp_path / "model")
    byte_tokenizer.save_pretrained(tmp_path / "model")
    arguments = ["bench", str(tmp_path / "out"), "--model", str(tmp_path / "model"), "--prompts", "1", "--batch-size",
                 "1", "--prompt-tokens", "6", "--new-tokens", "4", "--uncoupled", "--policies", "groupwise:size=4",
                 "speculative"]  # fmt: skip
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "| groupwise:size=4 | 1 |" in out
    assert "| groupwise:size=4, uncoupled | 1 |" in out
    assert "speculative, uncoupled" not in out


def test_without_a_coupling_there_is_nothing_to_take_away(capsys, checkpoint, tmp_path):
    arguments = ["bench", str(tmp_path / "out"), "--model", str(checkpoint), "--uncoupled", "--prompts", "1"]
    assert main([*arguments, "--batch-size", "1"]) == 2
    assert "--uncoupled compares with a coupling" in capsys.readouterr().err


def test_sampling_is_the_same_in_every_batch():
    model = converted("llama")
    sampling = {"temperature": 1.0, "top_p": 0.9}
    decoders = [HuggingFace(model, sampling), AnyOrder(model, parse("speculative:draft=query"), "s", sampling)]
    results = measure(decoders, PROMPTS, 8, [1, 4], seed=3)
    assert results[3].same_as_alone == 4
    again = measure(decoders[1:], PROMPTS, 8, [1], seed=4)
    assert not torch.equal(torch.stack(again[0].sequences), torch.stack(results[1].sequences))


def test_a_batch_size_without_prompts():
    with pytest.raises(ValueError, match="batch size 6 needs as many prompts; there are 5"):
        measure([], PROMPTS, 8, [1, 6])


def test_nats_per_token_is_the_exact_likelihood():
    model = converted("llama")
    left_to_right = Factorization.stack([Factorization.left_to_right(6, given=2)] * 5)
    expected = -float(model.log_likelihood(PROMPTS, left_to_right).sum()) / 20
    assert quality.nats_per_token(model.causal_lm, list(PROMPTS), 4) == pytest.approx(expected, abs=1e-5)


def test_distinct_and_rouge():
    assert quality.distinct([torch.tensor([9, 1, 2, 1, 2, 1])], 5) == 2 / 4
    assert quality.distinct([torch.tensor([1, 2, 3])], 3) == 1
    assert quality.rouge_l(["the cat sat"], ["the cat sat"]) == pytest.approx(1)
    assert quality.rouge_l(["the cat sat"], ["the dog sat"]) == pytest.approx(2 / 3)


def test_someone_elses_sampler(tmp_path):
    model, file = converted("llama"), tmp_path / "other.py"
    file.write_text(
        "import torch\n"
        "def zeros(model, ids, new, seeds):\n    return torch.cat([ids, ids.new_zeros(len(ids), new)], 1), 3\n"
        "def short(model, ids, new, seeds):\n    return ids\n"
    )
    result = measure([Foreign(*foreign_function(f"{file}:zeros"), model)], PROMPTS, 4, [1])[0]
    assert result.decoder == "other:zeros"
    assert not torch.stack(result.sequences)[:, 6:].any()
    assert result.forwards_per_token == 3 / 4
    with pytest.raises(ValueError, match=r"other:short returned \(1, 6\), not ids of shape \(1, 10\)"):
        Foreign(*foreign_function(f"{file}:short"), model)(PROMPTS[:1], 4, [0])
    with pytest.raises(ValueError, match="has no function 'nothing'"):
        foreign_function(f"{file}:nothing")
    with pytest.raises(ValueError, match=r"must be FILE.py:FUNCTION"):
        foreign_function("nowhere.py:f")


def test_the_report_is_medians_and_ranges():
    result = Measured("d", 2, 10, 0.5, [1.0, 2.0, 4.0], [1.0, 3.0, 2.0], "e", [5, 5, 5], [torch.zeros(3)] * 6)
    record = result.record()
    assert (record["tokens_per_second"], record["tokens_per_second_min"], record["ratio"]) == (10, 5, 2)
    assert record["ms_per_forward"] == 400
    assert "| d | 2 | 10.0 (5.0 .. 20.0) | 2.00 (1.00 .. 3.00) | 0.500 | 400.0 |" in report.table([record])


def test_the_command(capsys, checkpoint, tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"a b c ab {i} and so on and on"}) + "\n" for i in range(3)))
    arguments = ["bench", str(tmp_path / "out"), "--model", str(checkpoint), "--prompts", "2", "--batch-size", "1", "2"]
    arguments += ["--prompt-tokens", "6", "--new-tokens", "4", "--prompt-file", str(texts), "--json"]
    assert main([*arguments, "--policies", "groupwise:size=2"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "out" / "bench.json").read_text()) == printed
    assert [record["decoder"] for record in printed["results"]] == ["hugging face", "groupwise:size=2"] * 2
    assert printed["results"][1]["forwards_per_token"] == 0.5
    assert 0 <= printed["results"][1]["rouge_l"] <= 1
    assert len(list(csv.DictReader((tmp_path / "out" / "bench.csv").open()))) == 4
    assert (tmp_path / "out" / "bench.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "out" / "bench.md").read_text()
    assert "same as alone" in page
    assert page.endswith("in float32 it shows the decoder itself.\n")
    assert f"    {shlex.join(['anyorder', *arguments, '--policies', 'groupwise:size=2'])}\n" in page  # how to repeat it


def test_default_prompts_are_the_base_models_own(checkpoint):
    model, tokenizer = load(str(checkpoint))
    options = argparse.Namespace(prompts=3, prompt_tokens=40, new_tokens=4, seed=0)
    ids, references = _prompts(options, None, model, tokenizer)
    assert ids.shape == (3, 40)
    assert references is None
    assert torch.equal(ids, _prompts(options, None, model, tokenizer)[0])
    options.prompt_tokens = 5  # shorter than the opening
    assert _prompts(options, None, model, tokenizer)[0].shape == (3, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policies", "greedy"], "no policy 'greedy'"),
        (["--temperature", "-1"], "temperature"),
        (["--against", "nowhere.py:f"], "must be FILE.py:FUNCTION"),
        (["--prompt-file", "nowhere.txt"], "nowhere.txt"),
        (["--greedy", "--top-p", "0.9"], "--greedy takes the most likely token"),
        (["--prompts", "2", "--batch-size", "4"], "--batch-size 4 needs as many prompts"),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr("anyorder.cli.bench.load_model", None)
    assert main(["bench", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
