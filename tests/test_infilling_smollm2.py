"""Text with blanks on a real model: whitespace, characters, and ids that are the text's."""

from __future__ import annotations

import gzip
import json
import os
import re

import pytest
import torch

from anyorder import Infiller
from anyorder.decoding.constraints import Pattern
from anyorder.infill.prompt import Prompt
from anyorder.infill.token_bytes import TokenBytes

pytestmark = pytest.mark.smollm2

FOREIGN = [
    "日本の首都は___です。",
    "北京是___的首都。",
    "한국의 수도는 ___입니다.",
    "I love it 🎉 ___ 👍",
    "Le café ___ près de la forêt.",
]
HUMANEVAL = "ANYORDER_HUMANEVAL_INFILLING"


@pytest.fixture(scope="module")
def infiller(smollm2) -> Infiller:
    return Infiller(*smollm2)


def check_draws(infiller: Infiller, draws: int, lengths) -> int:
    count = 0
    for text in FOREIGN:
        for length in lengths:
            generator = torch.Generator().manual_seed(0)
            for found in infiller([text] * draws, length=length, temperature=1.0, generator=generator):
                assert "\ufffd" not in found.text
                assert infiller.pieces.tokenizer.decode(found.ids) == found.text
                count += 1
    return count


def test_draws_over_texts_of_many_scripts_are_whole_characters(infiller):
    assert check_draws(infiller, 2, [5]) == 10


@pytest.mark.slow
def test_two_hundred_draws_over_texts_of_many_scripts_are_whole_characters(infiller):
    assert check_draws(infiller, 20, [5, "auto"]) == 200


def test_indentation_is_what_the_user_wrote(infiller):
    found = infiller("def f(x):\n    ___\n    return y", length=5)
    assert re.match(r"def f\(x\):\n    \S.*\n    return y", found.text)
    tokenizer, own = infiller.pieces.tokenizer, list(found.ids)
    assert own[:6] == tokenizer.encode(found.text)[:6]  # as the text is cut where nothing is left open
    assert tokenizer.decode(found.spans[0].ids).startswith(" ")


def test_a_prompt_that_ends_in_whitespace_goes_on_as_its_text_would(infiller):
    model, pieces = infiller.model, infiller.pieces
    prompt = Prompt.of(pieces, "def f(x):\n    ")
    allowed = prompt.allowed_tokens(TokenBytes(pieces, model.vocabulary_size), 8)
    ids = model.generate(torch.tensor([prompt.ids]), max_new_tokens=8, allowed_tokens=allowed)
    text = prompt.text + prompt.continuation(ids[0, len(prompt.ids) :].tolist())
    assert re.match(r"def f\(x\):\n    \S", text)


def test_digits_have_as_many_tokens_as_there_are(infiller):
    found = infiller("She was born in ___ in a small town.", length=4, constraints=Pattern("[0-9]{4}"))
    assert re.fullmatch(r"She was born in [0-9]{4} in a small town\.", found.text)
    assert infiller.pieces.tokenizer.encode(found.text) == list(found.ids)


def test_a_text_begins_as_texts_begin(infiller):
    found = infiller("___ is the capital of France.", length=2)
    assert not found.text[0].isspace()
    assert "\n" not in found.text


@pytest.mark.slow
def test_no_line_of_python_breaks_its_indentation(infiller):
    """HumanEval-SingleLineInfilling (Bavarian et al., arXiv 2207.14255): the line's own indentation is given."""
    if HUMANEVAL not in os.environ:
        pytest.skip(f"{HUMANEVAL} names no file of HumanEval-SingleLineInfilling (.jsonl.gz)")
    with gzip.open(os.environ[HUMANEVAL], "rt") as lines:
        cases = [json.loads(line) for line in lines][::50][:20]
    for case in cases:
        line = case["canonical_solution"].rstrip("\n")
        indentation = line[: len(line) - len(line.lstrip())]
        before, behind = case["prompt"] + indentation, "\n" + case["suffix"]
        found = infiller(f"{before}___{behind}", length=8, single_line=True)
        fill = found.spans[0].text
        assert found.text == before + fill + behind
        assert not fill[0].isspace()
        assert len(fill.splitlines()) == 1
