"""Text that a policy writes, judged: by whom, by which numbers, and that every option of it counts."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from anyorder import AnyOrderForCausalLM, load, policies
from anyorder.cli import main
from anyorder.evaluation import judge, text_metrics, writing_tasks
from anyorder.evaluation.judge import Judge, nats_of_ids
from anyorder.evaluation.task import Subject
from anyorder.evaluation.writing_tasks import Continuations, Fills
from architectures import base_model, couple

STORY = {"sentences": ["Tom ran.", "He fell.", "It hurt a lot.", "He cried.", "Mom came."]}
TEXTS = ["ab a c and so on and on", "c c a b ab", "once there was a bear"]


@pytest.fixture(scope="module")
def subject(checkpoint):
    return Subject(*load(str(checkpoint)))


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(writing_tasks, "PROMPT_TOKENS", 6)
    monkeypatch.setattr(writing_tasks, "NEW_TOKENS", 8)


def plain_nats(causal_lm, ids, first):
    with torch.no_grad():
        log_p = causal_lm(torch.tensor([ids])).logits[0].log_softmax(-1)
    return -sum(float(log_p[k - 1, ids[k]]) for k in range(first, len(ids)))


# ---------------------------------------------------------------------- the judge


def test_the_judge_gives_each_text_its_likelihood(checkpoint, monkeypatch):
    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    rows, first = [[1, 5, 9, 11], [1, 7], [1, 20, 6, 7, 8, 30, 12]], [2, 1, 5]
    expected = [plain_nats(base, ids, k) for ids, k in zip(rows, first, strict=True)]
    assert nats_of_ids(base, rows, first) == pytest.approx(expected, abs=1e-4)
    monkeypatch.setattr(judge, "TOKENS_AT_ONCE", 1)  # each text by itself
    assert nats_of_ids(base, rows, first) == pytest.approx(expected, abs=1e-4)


def test_the_judge_reads_text_in_its_own_tokens(subject, space_adding_tokenizer):
    causal_lm = base_model("llama", vocabulary=len(space_adding_tokenizer))
    own, other = Judge(subject.model.causal_lm, subject.tokenizer), Judge(causal_lm, space_adding_tokenizer)
    (said,) = own([("ab", " c a")])
    assert said.tokens == len(subject.pieces.encode(" c a"))
    ids = [subject.pieces.start_token(), *subject.pieces.encode("ab", at_start=True)]
    assert said.nats == pytest.approx(
        plain_nats(subject.model.causal_lm, ids + subject.pieces.encode(" c a"), len(ids)), abs=1e-4
    )
    pieces = other.pieces
    row = [pieces.start_token(), *pieces.encode("ab", at_start=True), *pieces.encode(" T")]
    (said,) = other([("ab", " T")])
    assert said.tokens == 1
    assert said.nats == pytest.approx(plain_nats(causal_lm, row, len(row) - 1), abs=1e-4)
    (empty,) = own([("ab", "")])
    assert (empty.nats, empty.tokens) == (0, 0)


def test_a_judge_need_not_be_convertible_and_forgets_what_it_cannot_read(byte_tokenizer):
    """GPT-2 with learned positions, 64 of them."""
    gpt2 = base_model("gpt2", vocabulary=len(byte_tokenizer))
    (short, long) = Judge(gpt2, byte_tokenizer)([("b" * 20, "ac"), ("b" * 100, "ac")])
    ids = byte_tokenizer.encode("b" * 62 + "ac", add_special_tokens=False)
    assert long.nats == pytest.approx(plain_nats(gpt2, ids, 62), abs=1e-4)
    assert short.tokens == long.tokens == 2
    with pytest.raises(ValueError, match="a text of 70 tokens does not fit the judge, which reads 64"):
        Judge(gpt2, byte_tokenizer)([("a", "b" * 70)])


# ---------------------------------------------------------------------- numbers


def test_entropy_by_hand():
    assert text_metrics.entropy([3, 3, 3]) == 0
    assert text_metrics.entropy([1, 2, 3, 4]) == pytest.approx(math.log(4))
    assert text_metrics.entropy(["a", "a", "b", "a"]) == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))


def test_a_continuation_is_judged_behind_its_prompt(subject):
    results = Continuations().evaluate(subject, TEXTS)
    for text, result in zip(TEXTS, results, strict=True):
        assert text.startswith(result["prompt"])
        assert result["tokens"] == 8
        (said,) = subject.judge([(result["prompt"], result["text"])])
        assert result["judge_nats"] == pytest.approx(said.nats, abs=1e-4)
        assert result["judge_tokens"] == said.tokens
        assert result["steps"] == 8
        assert Continuations().evaluate(subject, [text])[0]["text"] == result["text"]


def test_numbers_of_a_text_are_of_its_tokens(subject, monkeypatch):
    monkeypatch.setattr(writing_tasks, "write", lambda *args, **options: [writing_tasks.Written([7, 8, 7, 8, 7], 3)])
    (result,) = Continuations().evaluate(subject, TEXTS[:1])
    assert result["entropy"] == pytest.approx(text_metrics.entropy([3, 2, 3, 2, 3]))
    assert result["distinct_2"] == 2 / 4
    assert result["repetition_4"] == 0
    assert (result["steps"], result["tokens"]) == (3, 5)


def test_no_special_token_is_written(checkpoint):
    """They would end the text, or be lost in it."""
    model, tokenizer = load(str(checkpoint))
    special = tokenizer.all_special_ids
    head = model.causal_lm.get_output_embeddings()
    right = head.forward
    likelier = torch.zeros(len(tokenizer)).index_fill(0, torch.tensor(special), 100.0)
    head.forward = lambda hidden: right(hidden) + likelier
    prompt = torch.tensor([[tokenizer.bos_token_id, 9]])
    free = model.generate(prompt, max_new_tokens=4, do_sample=False, eos_token_id=())
    assert set(free[0, 2:].tolist()) <= set(special)
    (result,) = Continuations().evaluate(Subject(model, tokenizer), TEXTS[:1])
    assert not any(token in result["text"] for token in tokenizer.all_special_tokens)


def test_a_fill_is_judged_with_what_is_behind_it(subject):
    task = Fills()
    item = task.item(STORY)
    (result,) = task.evaluate(subject, [item])
    before, behind = "Tom ran. He fell.", " He cried. Mom came."
    pairs = [(before, result["text"]), (before + result["text"], behind), (before, " It hurt a lot."),
             (before + " It hurt a lot.", behind)]  # fmt: skip
    names = ["judge_nats", "judge_nats_behind", "judge_nats_reference", "judge_nats_behind_reference"]
    said = subject.judge(pairs)
    for name, one in zip(names, said, strict=True):
        assert result[name] == pytest.approx(one.nats, abs=1e-4)
    assert result["judge_tokens_behind"] == said[1].tokens
    assert result["tokens"] == len(subject.pieces.encode(" It hurt a lot."))
    assert result["reference"] == " It hurt a lot."


def test_temperature_seed_and_policy_count(subject):
    def text(**changed):
        one = Subject(subject.model, subject.tokenizer, **changed)
        return Continuations().evaluate(one, TEXTS[:1])[0]

    assert text()["text"] == text()["text"]
    assert text()["text"] != text(seed=1)["text"]
    greedy = text(temperature=0.0)
    assert greedy["text"] == text(temperature=0.0, seed=1)["text"] != text()["text"]
    groups = text(policy=policies.groupwise(4))
    assert groups["steps"] == 2
    assert text(policy=policies.dynamic("entropy", step_size=2))["steps"] == 4


# ---------------------------------------------------------------------- the command


@pytest.fixture
def command(checkpoint, tmp_path, capsys):
    data, stories = tmp_path / "texts.jsonl", tmp_path / "stories.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    stories.write_text(json.dumps(STORY) + "\n")

    def run(name, *more, model=checkpoint):
        line = ["eval", "continuations", "fills", "--data", f"continuations={data}", f"fills={stories}", "--json"]
        code = main([*line, "--model", str(model), "--out", str(tmp_path / name), *map(str, more)])
        captured = capsys.readouterr()
        return json.loads(captured.out) if code == 0 else captured.err

    return run


def test_the_command_writes_and_judges(command):
    report = command("out", "--temperature", 0.5)
    assert set(report["tasks"]["continuations"]) == set(Continuations.metrics)
    assert set(report["tasks"]["fills"]) == set(Fills.metrics)
    assert report["tasks"]["continuations"]["steps_per_token"]["value"] == 1
    assert report["settings"]["temperature"] == 0.5
    assert report["settings"]["judge"] is None


def test_another_judge_reads_the_same_text(command, byte_tokenizer, tmp_path):
    torch.manual_seed(5)
    base_model("llama", vocabulary=len(byte_tokenizer), num_hidden_layers=1).save_pretrained(tmp_path / "judge")
    byte_tokenizer.save_pretrained(tmp_path / "judge")
    own, other = command("own"), command("other", "--judge", tmp_path / "judge")
    assert other["settings"]["judge"] == str(tmp_path / "judge")
    texts = [[json.loads(line)["text"] for line in (tmp_path / name / "fills.jsonl").read_text().splitlines()]
             for name in ("own", "other")]  # fmt: skip
    assert texts[0] == texts[1]
    values = [one["tasks"]["fills"]["judge_nats_per_token"]["value"] for one in (own, other)]
    assert values[0] != pytest.approx(values[1], abs=1e-3)


def test_groups_without_their_coupling(command, checkpoint, byte_tokenizer, tmp_path):
    couple(AnyOrderForCausalLM.from_causal_lm(checkpoint)).save_pretrained(tmp_path / "model")
    byte_tokenizer.save_pretrained(tmp_path / "model")
    groups = ["--policy", "groupwise:size=4"]
    with_it, without = (
        command(name, *groups, *more, model=tmp_path / "model") for name, more in (("a", []), ("b", ["--uncoupled"]))
    )
    assert without["settings"]["uncoupled"]
    assert not with_it["settings"]["uncoupled"]
    values = [one["tasks"]["continuations"]["judge_nats_per_token"]["value"] for one in (with_it, without)]
    assert values[0] != values[1]
    assert "--uncoupled takes a coupling away" in command("c", "--uncoupled")


@pytest.mark.parametrize(
    ("more", "message"), [(["--temperature", "-1"], "temperature"), (["--judge", "./none"], "no model at './none'")]
)
def test_what_cannot_be_meant_is_said(command, more, message):
    assert message in command("out", *more)


def test_a_converted_model_is_no_judge(command, checkpoint, byte_tokenizer, tmp_path):
    AnyOrderForCausalLM.from_causal_lm(checkpoint).save_pretrained(tmp_path / "model")
    byte_tokenizer.save_pretrained(tmp_path / "model")
    assert "a judge is a plain causal LM: name its base" in command("out", "--judge", tmp_path / "model")
