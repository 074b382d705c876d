"""Fitting a length prior: where blanks are made, and the command that writes what was fitted."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anyorder import AnyOrderForCausalLM, Infiller
from anyorder.infill.lengths import AUTO, NEUTRAL, LengthPrior
from anyorder.infill.seeking import Seeker
from anyorder.infill.template import Template
from anyorder.scoring import conditional_log_likelihood
from anyorder.training import length_fitting
from architectures import converted
from command_line import run


@pytest.fixture
def model(tmp_path, checkpoint, byte_tokenizer):
    """A converted model's directory."""
    directory = tmp_path / "model"
    AnyOrderForCausalLM.from_causal_lm(str(checkpoint)).save_pretrained(directory)
    byte_tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def texts(tmp_path):
    chooser, file = random.Random(0), tmp_path / "texts.jsonl"
    words = ("a", "b", "ab", "cat")
    lines = [" ".join(" ".join(chooser.choices(words, k=3)) + "." for _ in range(3)) for _ in range(40)]
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return file


@given(st.text("ab .!\n", max_size=60), st.integers(0, 9), st.booleans())
def test_a_blank_is_made_inside_the_text_or_not_at_all(text, seed, whole_sentence):
    made = length_fitting.make_blank(text, random.Random(seed), whole_sentence)
    if made is None:
        return
    template, own = made
    assert template.blanks == 1
    assert own.strip()
    joined = template.fill([own])[0]
    assert " ".join(joined.split()) in " ".join(text.split())
    assert template.pieces[0].strip(), "nothing stands in front"
    if not whole_sentence:
        assert template.pieces[1].strip(), "nothing stands behind"
        assert 1 <= len(own.split()) <= length_fitting.MOST_WORDS


def test_what_is_fitted_on_is_what_is_asked_when_a_length_is_sought(byte_tokenizer):
    infiller = Infiller(converted("llama", vocabulary=len(byte_tokenizer)), byte_tokenizer, length_prior=NEUTRAL)
    (tries,) = infiller.seeker.tries([Template(("a cat ", " b"))])
    assert tuple(tries.lengths.tolist()) == AUTO
    start = [infiller.start_token_id, *infiller.pieces.encode("a cat", at_start=True)]
    for n, found in zip(AUTO, tries.behind[:, 0].tolist(), strict=True):
        ids = torch.tensor([[*start, *[0] * n, infiller.pieces.encode(" b")[0]]])
        alone = conditional_log_likelihood(infiller.model, ids, [len(start) + n], range(len(start)))
        assert found == pytest.approx(float(alone), abs=1e-4)


def test_the_command_writes_what_the_model_is_loaded_with(capsys, model, texts):
    before = json.loads((model / "config.json").read_text())
    code, out, _ = run(
        capsys, "fit-lengths", model, "--train-file", texts, "--blanks", 30, "--dtype", "float32", "--json"
    )
    assert code == 0
    report = json.loads(out)
    after = json.loads((model / "config.json").read_text())
    assert after["length_prior"] == report["length_prior"]
    assert {**after, "length_prior": None} == {**before, "length_prior": None}
    assert report["cases"] == 30
    assert report["nats_a_length"] < report["nats_of_even_odds"]
    assert sorted(model.glob("*.part")) == []
    loaded = AnyOrderForCausalLM.from_pretrained(model)
    assert LengthPrior.of(loaded.config.length_prior) == LengthPrior(**report["length_prior"])
    again = json.loads(
        run(capsys, "fit-lengths", model, "--train-file", texts, "--blanks", 30, "--dtype", "float32", "--json")[1]
    )
    assert again == report
    code, out, _ = run(capsys, "fit-lengths", model, "--train-file", texts)
    assert "fitted on 40 blanks" in out


def test_a_text_that_names_blanks_is_asked_about_one_of_those(tmp_path, capsys, model, monkeypatch):
    asked = []
    tries = Seeker.tries
    monkeypatch.setattr(Seeker, "tries", lambda own, templates: asked.extend(templates) or tries(own, templates))
    file = tmp_path / "own.jsonl"
    record = {"text": "a cat = ab b", "blanks": [[2, 5], [8, 10]]}
    file.write_text(f"{json.dumps(record)}\n" * 40)
    code, _, errors = run(capsys, "fit-lengths", model, "--train-file", file, "--blanks", 30)
    assert code == 0, errors
    assert len(asked) == 30
    assert {template.pieces for template in asked} == {("a ", " = ab b"), ("a cat = ", " b")}


def test_mistakes_are_told_before_a_model_is_loaded(capsys, tmp_path, checkpoint, model, texts):
    def told(*arguments):
        code, _, errors = run(capsys, "fit-lengths", *arguments)
        assert code == 2
        return errors

    assert "is no directory of a converted model: make one with anyorder convert" in told(
        tmp_path / "none", "--train-file", texts
    )
    plain = shutil.copytree(checkpoint, tmp_path / "plain")
    assert "holds a llama model, not a converted one" in told(plain, "--train-file", texts)
    short = tmp_path / "short.jsonl"
    short.write_text(json.dumps({"text": "a"}) + "\n")
    assert "only 0 of 1 texts can have a blank to fit on, 20 are needed" in told(model, "--train-file", short)
