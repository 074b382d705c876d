"""Curricula draw what they say, data is a function of its number, the objective is the likelihood, training learns."""

from __future__ import annotations

import csv
import gzip
import json

import pytest
import torch

from anyorder import AnyOrderForCausalLM, Factorization, head
from anyorder.adapters import Adapter
from anyorder.training.curriculum import (
    BUILT_IN,
    Curriculum,
    Document,
    LeftToRight,
    RandomGroups,
    SentenceBlanks,
    Spans,
    Stage,
    seeded,
)
from architectures import VOCABULARY, base_model, converted

pytest.importorskip("peft", reason="training needs the train extra")
pytest.importorskip("datasets", reason="training needs the train extra")

from anyorder.training.data import Sequences, TokenDocument, read_texts, tokenize
from anyorder.training.heldout import REGIMES, HeldOut

STORY = Document(20, (1, 6, 11, 16))


def draws(regime, count=400, document=STORY):
    return [regime.draw(document, seeded([i])) for i in range(count)]


def test_left_to_right_draws_contiguous_groups_of_its_sizes():
    drawn = draws(LeftToRight((1, 4)))
    ones = [f for f in drawn if f == Factorization.left_to_right(20, 1)]
    fours = [f for f in drawn if f == Factorization.left_to_right(20, 4)]
    assert len(ones) + len(fours) == 400
    assert 160 < len(ones) < 240


def test_random_groups_draw_every_position_alike_and_up_to_a_fraction_given():
    drawn = draws(RandomGroups((4,), given_up_to=0.5), 1000)
    given = torch.stack([f.is_given[0] for f in drawn]).float()
    assert given[:, 0].all()
    share = given[:, 1:].mean(dim=0)
    assert (share - share.mean()).abs().max() < 0.05
    assert given.sum(dim=1).max() <= 1 + 0.5 * 18
    assert given.sum(dim=1).min() == 1
    sizes = [int(torch.bincount(f.group_ids[f.is_predicted]).max()) for f in drawn]
    assert set(sizes) == {4}
    first = torch.stack([f.group_ids[0] == 0 for f in drawn]).float().mean(dim=0)
    assert first[1:].min() > 0.15


def test_spans_are_filled_from_left_to_right():
    for f in draws(Spans(2, (2, 5))):
        blank = f.group_ids[0][f.is_predicted[0]]
        assert torch.equal(blank, torch.arange(len(blank)))
        assert 2 <= len(blank) <= 10


def test_sentence_blanks_are_whole_sentences():
    sentences = [set(range(a, b)) for a, b in ((1, 6), (6, 11), (11, 16), (16, 20))]
    seen = set()
    for f in draws(SentenceBlanks(2)):
        blank = set(f.is_predicted[0].nonzero()[:, 0].tolist())
        chosen = tuple(k for k, sentence in enumerate(sentences) if sentence <= blank)
        assert set().union(*(sentences[k] for k in chosen)) == blank
        seen.add(chosen)
    assert len(seen) == 4 + 6  # every one and every pair
    assert draws(SentenceBlanks(), 3, Document(9))[0].is_predicted.any()


def test_the_shortest_documents_have_something_to_predict():
    for name, curriculum in BUILT_IN.items():
        for length in (2, 3, 5):
            for i in range(60):
                f = curriculum.draw(Document(length, (1,)), i / 60, [name, i])
                assert f.length == length
                assert f.is_predicted.any()
                assert f.is_given[0, 0]


def test_stages_follow_one_another_and_weights_are_kept():
    curriculum = Curriculum((
        Stage((LeftToRight((1,)),), (1.0,), share=1),
        Stage((LeftToRight((2,)), LeftToRight((5,))), (3.0, 1.0), share=3),
    ))  # fmt: skip
    assert curriculum.stage(0.2) is curriculum.stages[0]
    assert curriculum.stage(0.3) is curriculum.stages[1]
    assert curriculum.stage(1.0) is curriculum.stages[1]
    fives = sum(curriculum.draw(STORY, 0.9, [i]) == Factorization.left_to_right(20, 5) for i in range(400))
    assert 70 < fives < 130
    assert curriculum.draw(STORY, 0.9, [1]) == curriculum.draw(STORY, 0.9, [1])


def test_curricula_from_yaml(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(
        "stages:\n- share: 2\n  mixture:\n  - {regime: spans, weight: 2, blanks: 1, lengths: [3, 3]}\n"
        "  - {regime: left_to_right, group_sizes: [4]}\n"
    )
    stage = Curriculum.load(str(file)).stages[0]
    assert stage == Stage((Spans(1, (3, 3)), LeftToRight((4,))), (2.0, 1.0), 2)
    assert Curriculum.load("paper") is BUILT_IN["paper"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "the file must be a mapping"),
        ({}, "the file needs a list 'stages'"),
        ({"stages": [], "x": 1}, "unknown key 'x' in the file"),
        ({"stages": [{"mixture": []}]}, r"stages\[0\] needs a list 'mixture'"),
        ({"stages": [{"mixture": [{"regime": "magic"}]}]}, r"mixture\[0\] needs a 'regime' out of"),
        ({"stages": [{"mixture": [{"regime": "spans", "blank": 1}]}]}, r"unknown key 'blank' in .*mixture"),
        ({"stages": [{"mixture": [{"regime": "spans", "blanks": 0}]}]}, r"blanks must hold .* got \(0,\)"),
        ({"stages": [{"mixture": [{"regime": "spans", "lengths": [5, 2]}]}]}, "the least and the greatest"),
        ({"stages": [{"mixture": [{"regime": "random_groups", "given_up_to": 2}]}]}, "given_up_to must be between"),
        ({"stages": [{"mixture": [{"regime": "spans", "weight": -1}]}]}, "weights must be at least 0"),
        ({"stages": [{"mixture": [{"regime": "spans"}], "share": 0}]}, "share must be above 0, got 0"),
    ],
)  # fmt: skip
def test_broken_curricula_name_the_key(data, message):
    with pytest.raises(ValueError, match=message):
        Curriculum.from_dict(data)


def test_a_curriculum_that_is_not_there():
    with pytest.raises(ValueError, match="no curriculum 'nothing': use paper, exact, infill or a .yaml file"):
        Curriculum.load("nothing")


# ---------------------------------------------------------------------- data


def test_texts_are_read_from_every_kind_of_file(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": "three"}) + "\n" + json.dumps({"text": " "}) + "\n")
    assert read_texts([tmp_path / "a.txt", tmp_path / "b.jsonl.gz"]) == ["one\n\ntwo", "three"]


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bad.jsonl").write_text("{not json")
    (tmp_path / "other.jsonl").write_text('{"x": 1}\n')
    for name, message in (
        ("none.txt", "no such file"),
        ("a.pdf", "unknown kind of file"),
        ("empty.txt", "cannot be read|holds no text"),
        ("bad.jsonl", "cannot be read as json"),
        ("other.jsonl", "no column 'text' but x"),
    ):
        with pytest.raises(ValueError, match=rf"{name}.*({message})|({message}).*{name}"):
            read_texts([tmp_path / name])


def test_long_texts_are_cut_at_sentences_and_nothing_is_lost(byte_tokenizer):
    text = "One two. Three four! Five? " + "x" * 50 + ". Last one."
    documents = tokenize([text, ""], byte_tokenizer, 24)
    pieces = [byte_tokenizer.decode(d.ids[1:].tolist()) for d in documents]
    assert "".join(pieces) == text
    assert max(d.shape.length for d in documents) <= 24
    assert pieces[0] == "One two. Three four!"
    starts = [pieces[0][s - 1 :] for s in documents[0].shape.sentence_starts]
    assert starts == ["One two. Three four!", " Three four!"]
    assert all(int(d.ids[0]) == byte_tokenizer.bos_token_id for d in documents)


def documents(count=30):
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 12, (count,), generator=g).tolist()
    return [TokenDocument(torch.randint(3, VOCABULARY, (n,), generator=g), Document(n, (1,))) for n in lengths]


def test_every_document_is_seen_once_an_epoch():
    docs = documents()
    data = Sequences(docs, 16, BUILT_IN["exact"], count=100)
    assert sorted(i for row in data.rows for i in row) == list(range(30))
    for epoch in (0, 1):
        seen = []
        for i in range(epoch * len(data.rows), (epoch + 1) * len(data.rows)):
            item = data[i]
            f = Factorization(item["group_ids"][None], item["document_ids"][None])
            for d in range(int(f.documents.max()) + 1):
                here = (f.documents[0] == d) & f.is_present[0]
                seen.append(tuple(item["input_ids"][here].tolist()))
        assert sorted(seen) == sorted(tuple(d.ids.tolist()) for d in docs)


def test_a_sequence_is_a_function_of_its_number():
    a, b = (Sequences(documents(), 16, BUILT_IN["exact"], count=100, seed=3) for _ in range(2))
    for i in (99, 5, 40):
        assert all(torch.equal(a[i][key], b[i][key]) for key in a[i])
    other = Sequences(documents(), 16, BUILT_IN["exact"], count=100, seed=4)
    assert any(not torch.equal(a[i]["group_ids"], other[i]["group_ids"]) for i in range(5))


# ---------------------------------------------------------------------- objective and training


@pytest.mark.parametrize("recipe", ["exact", "paper"])
def test_the_objective_is_the_likelihood(recipe, monkeypatch):
    model = converted("gemma2", recipe)  # its head caps logits: the chunks must go through it
    data = Sequences(documents(), 16, BUILT_IN["exact"], count=100)
    items = [data[i] for i in range(3)]
    ids, groups, docs = (torch.stack([item[k] for item in items]) for k in ("input_ids", "group_ids", "document_ids"))
    order = Factorization(groups, docs)
    expected = model.log_likelihood(ids, order)
    grads = []
    for size in (512, 5):
        monkeypatch.setattr(head, "CHUNK", size)
        loss = model(ids, order, labels=ids).loss
        torch.testing.assert_close(-loss, expected[order.is_predicted].mean(), atol=1e-5, rtol=0)
        grads.append(torch.autograd.grad(loss, model.causal_lm.get_input_embeddings().weight)[0])
    torch.testing.assert_close(grads[0], grads[1], atol=1e-6, rtol=1e-4)


def test_no_logits_are_kept_in_training():
    """The widest tensor of a training step is a chunk of logits, not all of them."""
    model = AnyOrderForCausalLM.from_causal_lm(base_model("llama")).train()
    ids, order = torch.ones(1, 20, dtype=torch.int64), Factorization.left_to_right(20)
    output = model(ids, order, labels=ids)
    assert output.logits is None
    torch.testing.assert_close(output.loss, model.eval()(ids, order, labels=ids).loss)


def trainer(tmp_path, model, steps, **options):
    from transformers import TrainingArguments

    from anyorder.training.trainer import AnyOrderTrainer

    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=steps, report_to="none", use_cpu=True, remove_unused_columns=False,
        disable_tqdm=True, logging_steps=1, lr_scheduler_type="constant", weight_decay=0.0, **options,
    )  # fmt: skip
    count = steps * arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    data = Sequences(documents(10), 16, Curriculum((Stage((RandomGroups((1,)),), (1.0,)),)), count=count)
    return AnyOrderTrainer(model=model, args=arguments, train_dataset=data)


def losses(run):
    return [record["loss"] for record in run.state.log_history if "loss" in record]


def fresh(adapter):
    kinds = {"full": None, "lora": Adapter("lora", 8), "gated": Adapter("gated", 8)}
    torch.manual_seed(0)
    return AnyOrderForCausalLM.from_causal_lm(base_model("llama"), adapter=kinds[adapter])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("adapter", ["full", "lora", "gated"])
def test_interrupted_and_resumed_is_uninterrupted(adapter, tmp_path):
    options = {"per_device_train_batch_size": 2, "learning_rate": 1e-2, "save_steps": 3}
    whole = trainer(tmp_path / "a", fresh(adapter), 6, **options)
    whole.train()
    again = trainer(tmp_path / "a", fresh(adapter), 6, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert losses(again)[-3:] == losses(whole)[-3:]
    for (name, a), (_, b) in zip(whole.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("adapter", ["full", "lora", "gated"])
def test_training_learns(adapter, tmp_path):
    rate = 3e-3 if adapter == "full" else 1e-2
    run = trainer(tmp_path, fresh(adapter), 60, per_device_train_batch_size=4, learning_rate=rate, save_strategy="no")
    run.train()
    curve = losses(run)
    assert sum(curve[-5:]) < 0.8 * sum(curve[:5])


# ---------------------------------------------------------------------- the command


@pytest.fixture
def stories(tmp_path):
    file = tmp_path / "stories.jsonl"
    words = ("a b", "ab c", "b b a", "c ab a")
    texts = [". ".join(words[(i + k) % 4] for k in range(4)) + "." for i in range(12)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def adapt(checkpoint, stories, output, *more):
    from anyorder.cli import main

    return main([
        "adapt", str(checkpoint), str(output), "--train-file", str(stories), "--tokens", str(30 * 2 * 32),
        "--length", "32", "--document-length", "32", "--batch-size", "2", "--rank", "4", "--learning-rate", "1e-2",
        "--log-every", "1", "--save-every", "10", "--dtype", "float32", "--warmup-steps", "2", *map(str, more),
    ])  # fmt: skip


def curve(output, column="loss"):
    with (output / "curves.csv").open() as file:
        return [float(row[column]) for row in csv.DictReader(file) if row[column]]


GOLDEN = [5.5557, 4.8942, 4.5334]  # first, sixth, thirtieth step


@pytest.mark.filterwarnings("ignore")
def test_adapt_follows_its_golden_trajectory_and_saves_a_model_that_infills(checkpoint, stories, tmp_path):
    from anyorder import Infiller, load

    output = tmp_path / "run"
    assert adapt(checkpoint, stories, output) == 0
    curve_ = curve(output)
    assert len(curve_) == 30
    assert [curve_[0], curve_[5], curve_[29]] == pytest.approx(GOLDEN, abs=0.02)
    assert curve(output, "eval_random_1") == []
    model, tokenizer = load(str(output))
    assert model.config.adapter["kind"] == "gated"
    assert Infiller(model, tokenizer)("a ___ b", length=2).text.startswith("a ")


@pytest.mark.filterwarnings("ignore")
def test_held_out_loss_is_measured_in_four_regimes(checkpoint, stories, tmp_path):
    from anyorder import load

    assert adapt(checkpoint, stories, tmp_path / "run", "--eval-file", stories, "--eval-every", 15) == 0
    curves = {name: curve(tmp_path / "run", f"eval_{name}") for name in REGIMES}
    assert {len(values) for values in curves.values()} == {3}  # at the start, after 15 steps, after 30
    assert len(set(curves["left_to_right_1"])) == 1  # gated: the base model's, whatever was trained
    for name in ("left_to_right_4", "random_1", "random_4"):
        assert curves[name][-1] < curves[name][0]
    model, tokenizer = load(str(tmp_path / "run"))
    texts = [json.loads(line)["text"] for line in stories.read_text().splitlines()]
    held_out = HeldOut(tokenize(texts, tokenizer, 32))
    assert len(held_out) == 12
    assert held_out.losses(model) == pytest.approx({name: values[-1] for name, values in curves.items()}, abs=1e-4)
    with pytest.raises(ValueError, match="no documents to measure on"):
        HeldOut([])


@pytest.mark.filterwarnings("ignore")
def test_ctrl_c_saves_and_resume_goes_on_as_if_nothing_had_happened(checkpoint, stories, tmp_path, capsys, monkeypatch):
    import os
    import signal

    from anyorder.training.trainer import AnyOrderTrainer

    assert adapt(checkpoint, stories, tmp_path / "whole") == 0
    step = AnyOrderTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 13:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(AnyOrderTrainer, "training_step", interrupted)
    output = tmp_path / "cut"
    assert adapt(checkpoint, stories, output) == 130
    assert "saved at step 14 of 30; go on with the same command and --resume" in capsys.readouterr().err
    assert not (output / "adapter_model.safetensors").exists()
    monkeypatch.setattr(AnyOrderTrainer, "training_step", step)
    assert adapt(checkpoint, stories, output, "--rank", 8, "--resume") == 2
    assert "has --rank 4, not 8: use the same" in capsys.readouterr().err
    assert adapt(checkpoint, stories, output) == 2
    assert "is not empty: add --resume" in capsys.readouterr().err
    assert adapt(checkpoint, stories, output, "--resume") == 0
    assert curve(output) == curve(tmp_path / "whole")
    one, two = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert one == two


def test_adapt_tells_mistakes_in_one_line(checkpoint, stories, tmp_path, capsys):
    for number, (more, message) in enumerate((
        (["--curriculum", "magic"], "no curriculum 'magic'"),
        (["--train-file", "none.jsonl"], "no such file: none.jsonl"),
        (["--resume"], "nothing to resume"),
    )):  # fmt: skip
        assert adapt(checkpoint, stories, tmp_path / str(number), *more) == 2
        assert not (tmp_path / str(number)).exists()
        assert message in capsys.readouterr().err.splitlines()[-1]
