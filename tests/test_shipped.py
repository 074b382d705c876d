"""The adapter that comes with the package: the base model left to right, a better one where both sides are given."""

from __future__ import annotations

import pytest
import torch

from anyorder import AnyOrderForCausalLM, Factorization, Infiller, load
from anyorder.hub import resolve as sources
from anyorder.infill.pieces import Pieces

NAME = "smollm2-135m-anyorder"
DIRECTORY = sources.SHIPPED / NAME
STORIES = (
    "Ben found a coin on the street.| He ran to the store with it.| He bought a big red apple.| The apple was sweet."
    "| Ben gave half of it to his sister.",
    "Maria had a test on Friday.| She was very nervous.| She studied every night that week."
    "| On Friday she knew every answer.| Her teacher gave her the best grade.",
    "The dog heard a noise at night.| He began to bark.| The man woke up and looked outside."
    "| A cat was sitting on the car.| The man laughed and went back to bed.",
)


def test_its_files_come_with_the_package():
    assert sources.shipped() == [NAME]
    weights = ("adapter_model.safetensors", "coupling.safetensors", "query_embedding.safetensors")
    assert sum((DIRECTORY / name).stat().st_size for name in weights) < 60_000_000
    card = (DIRECTORY / "README.md").read_text()
    for word in ("license: apache-2.0", "TinyStories", "tokens", "anyorder adapt", "Limits"):
        assert word in card


@pytest.fixture(scope="module")
def shipped(smollm2):
    model = AnyOrderForCausalLM.from_pretrained(NAME, dtype=torch.float32)
    return model, smollm2[1]


@pytest.mark.smollm2
def test_left_to_right_it_is_the_base_model(shipped, smollm2):
    (model, tokenizer), (base, _) = shipped, smollm2
    ids = tokenizer("The first thing that she saw was", return_tensors="pt").input_ids
    assert torch.equal(model(ids).logits, base(ids).logits)
    assert torch.equal(model.generate(ids, max_new_tokens=24), base.generate(ids, max_new_tokens=24))


@pytest.mark.slow
@pytest.mark.smollm2
def test_both_sides_help_and_groups_are_learned(shipped, smollm2):
    pieces, totals = Pieces(smollm2[1]), torch.zeros(2, 2)
    for story in STORIES:
        parts = [pieces.encode(sentence, at_start=k == 0) for k, sentence in enumerate(story.split("|"))]
        ids = torch.tensor([[pieces.start_token(), *(token for part in parts for token in part)]])
        blank = torch.zeros(ids.shape, dtype=torch.bool)
        begin = 1 + len(parts[0]) + len(parts[1])
        blank[0, begin : begin + len(parts[2])] = True
        orders = Factorization.infill(blank), Factorization.left_to_right(ids.shape[1], group_size=4)
        for row, model in enumerate((shipped[0], smollm2[0])):
            for column, order in enumerate(orders):
                totals[row, column] -= model.log_likelihood(ids, order).sum()
    assert (totals[0] < 0.9 * totals[1]).all()


@pytest.mark.smollm2
def test_it_is_loaded_by_name_with_its_base_models_tokenizer(smollm2):
    model, tokenizer = load(NAME, dtype=torch.float32)
    assert model.config.adapter["kind"] == "gated"
    assert model.coupling.drafts is not None
    assert tokenizer.get_vocab() == smollm2[1].get_vocab()
    assert Infiller(model, tokenizer)("The cat ___ on the mat.", length=2).text.endswith(" on the mat.")
