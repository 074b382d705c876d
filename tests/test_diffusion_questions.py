"""`anyorder eval` of masked diffusion: bounds and fills of each question, whatever its batch mates; what it refuses."""

from __future__ import annotations

import json

import pytest
import torch

from anyorder import policies
from anyorder.cli import main
from anyorder.evaluation.baselines import diffusion_questions
from anyorder.evaluation.baselines.diffusion_bound import negative_elbo
from anyorder.evaluation.baselines.diffusion_sampling import fill as diffusion_fill
from anyorder.evaluation.baselines.masked_diffusion import MaskedDiffusionLM
from anyorder.evaluation.baselines.noise import generator_of
from anyorder.evaluation.questions import Question, answer, fill, write
from anyorder.evaluation.tasks import task_of
from architectures import VOCABULARY
from test_masked_diffusion import diffusion

SUREST = policies.dynamic(step_size=2)
QUESTIONS = [
    Question((1, *range(3, 3 + length)), tuple(range(first, first + targets)), tuple(range(first)))
    for length, first, targets in ((6, 2, 3), (9, 4, 5), (4, 1, 2), (9, 2, 1))
]  # what stands behind the targets is absent


def alone(question):
    ids, given = torch.tensor([question.ids]), torch.zeros(1, len(question.ids), dtype=torch.bool)
    given[0, list(question.given)] = True
    present = given.clone()
    present[0, list(question.targets)] = True
    return ids, given, present


@pytest.mark.parametrize("size", [1, 2])
def test_answers_are_bounds_whatever_else_is_asked(size):
    model = diffusion()
    found = answer(model, QUESTIONS, size, tokens_at_once=25)
    for question, value in zip(QUESTIONS, found, strict=True):
        ids, given, present = alone(question)
        chance = [generator_of(ids[0])]
        bound = negative_elbo(model, ids, given, diffusion_questions.SAMPLES, chance, present, size)
        assert value == pytest.approx(-float(bound.mean), abs=1e-4)
        assert answer(model, [question], size)[0] == pytest.approx(value, abs=1e-4)


def test_fills_are_those_of_its_own_sampler_whatever_else_is_asked():
    model = diffusion()
    found = fill(model, QUESTIONS, SUREST)
    for question, tokens in zip(QUESTIONS, found, strict=True):
        ids, given, present = alone(question)
        steps = -(-len(question.targets) // 2)
        own = diffusion_fill(model, ids, given, steps, "confidence", 0.0, attention_mask=present).ids
        assert tokens == own[0, list(question.targets)].tolist()
        assert write(model, [question], SUREST, do_sample=False)[0].steps == steps


def test_draws_come_from_each_questions_generator_and_hold_no_suppressed_token():
    model, banned = diffusion(), list(range(0, VOCABULARY, 2))

    def drawn(questions, seeds):
        chances = [torch.Generator().manual_seed(seed) for seed in seeds]
        made = write(model, questions, SUREST, temperature=2.0, generator=chances, suppress_tokens=banned)
        return [one.ids for one in made]

    together = drawn(QUESTIONS, range(4))
    assert together == [drawn([question], [seed])[0] for seed, question in enumerate(QUESTIONS)]
    assert together != drawn(QUESTIONS, range(4, 8))
    assert not set(banned) & {token for ids in together for token in ids}


@pytest.fixture(scope="module")
def saved(checkpoint, tmp_path_factory):
    from anyorder import load

    folder = tmp_path_factory.mktemp("diffusion")
    model, tokenizer = load(str(checkpoint), recipe=None, model_class=MaskedDiffusionLM)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def evaluated(saved, tmp_path, *more, tasks=("piqa", "stories", "lambada", "fills")):
    story = ["Ann ran.", "She fell.", "It hurt a lot.", "She cried.", "Bob helped."]
    lines = {
        "piqa_dev": [{"goal": "Open a jar", "sol1": "Turn it", "sol2": "Eat it", "label": 0}] * 2,
        "cloze_test_val__spring2016": [{"sentences": story}] * 2,
        "lambada_dev": [{"text": "Ann met Bob"}] * 2,
        "tinystories": [{"text": "Ann met Bob and fell."}] * 2,
    }
    for name, records in lines.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    where = ["--model", str(saved), "--data-dir", str(tmp_path), "--out", str(tmp_path / "out")]
    return main(["eval", *tasks, *where, "--json", *more])


def test_eval_asks_it_what_it_asks_others(saved, tmp_path, capsys):
    assert evaluated(saved, tmp_path, "--policy", "dynamic") == 0
    found = json.loads(capsys.readouterr().out)["tasks"]
    assert found["stories"]["nats_per_token"]["value"] > 0
    assert 0 <= found["piqa"]["accuracy"]["value"] <= 1
    assert found["fills"]["steps_per_token"]["value"] == 1
    assert evaluated(saved, tmp_path, "--policy", "dynamic") == 0  # nothing is left to ask


@pytest.mark.parametrize(
    ("more", "tasks", "message"),
    [
        (
            (),
            ("piqa",),
            "fills in an order of its own, not by GroupWise(size=1): --policy dynamic:criterion=confidence",
        ),
        (("--policy", "dynamic:window=4"), ("piqa",), "window=4"),
        (("--policy", "dynamic:criterion=entropy"), ("piqa",), "criterion='entropy'"),
        (("--policy", "dynamic", "--engine", "openvino"), ("piqa",), "no steps for engine='openvino'"),
        (("--policy", "dynamic"), ("piqa", "order_spread"), "task order_spread asks for what a masked diffusion model"),
    ],
)
def test_what_it_cannot_be_asked_is_refused_and_leaves_nothing_behind(saved, tmp_path, capsys, more, tasks, message):
    if "order_spread" in tasks:
        (tmp_path / f"{task_of('order_spread').file}.jsonl").write_text(json.dumps({"text": "Ann met Bob."}) + "\n")
    assert evaluated(saved, tmp_path, *more, tasks=tasks) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
