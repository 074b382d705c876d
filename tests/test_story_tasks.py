"""Missing sentences of stories: one or two at once, and what a left-to-right model can do instead."""

from __future__ import annotations

import pytest
import torch

from anyorder import Factorization, load
from anyorder.evaluation import questions
from anyorder.evaluation.questions import answer, fill, of_pieces, suffix_first
from anyorder.evaluation.story_tasks import SecondAndFourthSentence, Story, ThirdAndFourthSentence, ThirdSentence
from anyorder.evaluation.task import Subject
from anyorder.evaluation.text_metrics import rouge

STORY = {"sentences": ["Tom ran.", "He fell.", "It hurt.", "He cried a bit.", "Mom came."]}
OTHER = {"sentences": ["A.", "B b.", "It did so.", "Oh.", "Ha."]}
PARTS = ["Tom ran.", " He fell.", " It hurt.", " He cried a bit.", " Mom came."]


@pytest.fixture(scope="module")
def subject(checkpoint):
    return Subject(*load(str(checkpoint)))


def nats(subject, parts, target, **absent):
    return -answer(subject.model, [of_pieces(subject.pieces, parts, target, **absent)])[0]


def filled(subject, parts, target, **absent):
    return fill(subject.model, [of_pieces(subject.pieces, parts, target, **absent)], subject.policy)[0]


def test_several_parts_are_one_question(subject):
    """log P of two parts is that of a text with two blanks."""
    both = of_pieces(subject.pieces, PARTS, (1, 3))
    lengths = [len(subject.pieces.encode(PARTS[n])) for n in (1, 3)]
    assert len(both.targets) == sum(lengths)
    assert sorted(both.targets + both.given) == list(range(len(both.ids)))
    blank = torch.zeros(1, len(both.ids), dtype=torch.bool)
    blank[0, list(both.targets)] = True
    exact = subject.model.log_likelihood(torch.tensor([both.ids]), Factorization.infill(blank))
    assert answer(subject.model, [both])[0] == pytest.approx(float(exact.double().sum()), abs=1e-3)


@pytest.mark.parametrize(("task", "blanks"), [(SecondAndFourthSentence(), (1, 3)), (ThirdAndFourthSentence(), (2, 3))])
def test_two_sentences_at_once(subject, task, blanks):
    (result, _) = task.evaluate(subject, [task.item(STORY), task.item(OTHER)])
    assert result["nats"] == pytest.approx(nats(subject, PARTS, blanks), abs=1e-3)
    assert result["tokens"] == sum(len(subject.pieces.encode(PARTS[n])) for n in blanks)
    assert result["reference"] == " ".join(STORY["sentences"][n] for n in blanks)
    ids, first = filled(subject, PARTS, blanks), len(subject.pieces.encode(PARTS[blanks[0]]))
    texts = [subject.pieces.decode(part).strip() for part in (ids[:first], ids[first:])]
    assert result["text"] == " ".join(texts)
    each = [rouge(text, STORY["sentences"][n]) for text, n in zip(texts, blanks, strict=True)]
    assert result["rougeL"] == pytest.approx(sum(one["rougeL"] for one in each) / 2)
    assert task.evaluate(subject, [task.item(STORY)])[0]["text"] == result["text"]


def test_a_left_to_right_model_is_asked_for_one_sentence_after_the_other(subject):
    (result,) = SecondAndFourthSentence().evaluate(subject, [Story.of(STORY, "t")])
    expected = nats(subject, PARTS[:2], 1) + nats(subject, PARTS[:4], 3)
    assert result["nats_prefix_only"] == pytest.approx(expected, abs=1e-3)
    own = list(PARTS)
    for blank in (1, 3):  # it fills behind its own words
        own[blank] = subject.pieces.decode(filled(subject, own[: blank + 1], blank))
    assert result["text_prefix_only"] == " ".join(own[blank].strip() for blank in (1, 3))


def test_it_is_prompted_with_what_is_behind_the_blank_first(subject):
    (result,) = ThirdSentence().evaluate(subject, [Story.of(STORY, "t")])
    prompt = "He cried a bit. Mom came.\n\nTom ran. He fell."
    assert result["nats_reordered"] == pytest.approx(nats(subject, (prompt, " It hurt."), 1), abs=1e-3)
    text = subject.pieces.decode(filled(subject, (prompt, " It hurt."), 1)).strip()
    assert result["text_reordered"] == text
    assert result["rouge1_reordered"] == rouge(text, "It hurt.")["rouge1"]
    (two,) = SecondAndFourthSentence().evaluate(subject, [Story.of(STORY, "t")])
    first, second = "It hurt. Mom came.\n\nTom ran.", "Mom came.\n\nTom ran. He fell. It hurt."
    expected = nats(subject, (first, PARTS[1]), 1) + nats(subject, (second, PARTS[3]), 1)
    assert two["nats_reordered"] == pytest.approx(expected, abs=1e-3)


def test_the_prompt_of_a_left_to_right_model():
    assert suffix_first("a ", "\n  b\n") == "  b\n\na "
    assert questions.suffix_first("a", " \n") == "a"  # nothing is behind the blank
