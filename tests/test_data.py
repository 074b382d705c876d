"""Text files become sequences that are functions of their numbers; nothing is lost."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from anyorder import Factorization
from anyorder.training.curriculum import BUILT_IN

pytest.importorskip("datasets", reason="training needs the train extra")

from anyorder.training.data import Sequences, Stream, collate
from anyorder.training.texts import Documents, open_texts, read_texts, tokenize, tokenized
from training_data import documents

IN_A_NEW_PROCESS = """
import torch
from torch.utils.data import DataLoader

from anyorder.training.curriculum import BUILT_IN
from anyorder.training.data import Sequences, collate
from training_data import documents

data = Sequences([documents()], 16, BUILT_IN["exact"], count=12)
alone, shared = (list(DataLoader(data, batch_size=2, num_workers=n, collate_fn=collate)) for n in (0, 2))
assert len(alone) == len(shared) == 6
assert all(torch.equal(one[key], two[key]) for one, two in zip(alone, shared) for key in one)
print("the same")
"""


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


def test_blanks_of_a_text_come_through_files_beside_texts_without(tmp_path, byte_tokenizer):
    records = [{"text": "abc def", "blanks": [[4, 6]]}, {"text": "One. Two."}, {"text": "xyz", "blanks": []}]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "none.jsonl").write_text('{"text": "plain", "other": 1}\n')
    for streaming in (False, True):
        found = [
            tokenized(open_texts(tmp_path / n, streaming), byte_tokenizer, 40) for n in ("own.jsonl", "none.jsonl")
        ]
        shapes = {
            byte_tokenizer.decode(r["ids"][1:]): ([*map(list, r["blanks"])], r["sentence_starts"])
            for own in found
            for r in own
        }
        assert shapes == {
            "abc def": ([[3, 6]], []),  # of <s> ab c _ d e f, with the space in front of it
            "One. Two.": ([], [1, 5]),
            "xyz": ([], [1]),
            "plain": ([], [1]),
        }
    tables = [tokenize([text], byte_tokenizer, 40) for text in ("one", "two")]
    assert (
        len(
            Sequences(
                [Documents(tokenized(open_texts(tmp_path / "own.jsonl"), byte_tokenizer, 40)), *tables],
                64,
                BUILT_IN["exact"],
                3,
            )
        )
        == 3
    )


def test_blanks_that_are_none_name_the_text(tmp_path, byte_tokenizer):
    (tmp_path / "bad.jsonl").write_text('{"text": "abc", "blanks": [[2, 9]]}\n')
    with pytest.raises(ValueError, match=r"blanks must be .*3 characters; got \[2, 9\]"):
        tokenized(open_texts(tmp_path / "bad.jsonl"), byte_tokenizer, 40)


def test_every_document_is_seen_once_an_epoch():
    docs = documents()
    data = Sequences([docs], 16, BUILT_IN["exact"], count=100)
    assert sorted(i for row in data.rows[0] for i in row) == list(range(30))
    for epoch in (0, 1):
        seen = []
        for i in range(epoch * len(data.rows[0]), (epoch + 1) * len(data.rows[0])):
            item = data[i]
            f = Factorization(item["group_ids"][None], item["document_ids"][None])
            for d in range(int(f.documents.max()) + 1):
                here = (f.documents[0] == d) & f.is_present[0]
                seen.append(tuple(item["input_ids"][here].tolist()))
        assert sorted(seen) == sorted(tuple(d.ids.tolist()) for d in docs)


def test_a_sequence_is_a_function_of_its_number():
    a, b = (Sequences([documents()], 16, BUILT_IN["exact"], count=100, seed=3) for _ in range(2))
    for i in (99, 5, 40):
        assert all(torch.equal(a[i][key], b[i][key]) for key in a[i])
    other = Sequences([documents()], 16, BUILT_IN["exact"], count=100, seed=4)
    assert any(not torch.equal(a[i]["group_ids"], other[i]["group_ids"]) for i in range(5))


def test_a_mixture_draws_each_source_as_often_as_it_weighs():
    one, two = documents(), documents(5)
    for number, document in enumerate(two):
        document.ids[0] = number - 9  # to be told apart
    sequences = Sequences([one, two], 16, BUILT_IN["exact"], count=600, weights=[1, 3])
    data = [sequences[i] for i in range(600)]
    from_two = [bool((item["input_ids"] < 0).any()) for item in data]
    assert 410 < sum(from_two) < 490
    seen = [tuple(ids.tolist()) for i in range(600) if from_two[i] for ids in _documents(data[i])]
    counts = [seen.count(tuple(document.ids.tolist())) for document in two]
    assert max(counts) - min(counts) <= 1
    again = Sequences([one, two], 16, BUILT_IN["exact"], count=600, weights=[1, 3])
    assert all(torch.equal(again[i]["input_ids"], data[i]["input_ids"]) for i in (599, 0, 300))


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [0.0, 0.0]])
def test_weights_that_do_not_fit_are_an_error(weights):
    with pytest.raises(ValueError, match="2 sources need as many weights of at least 0, not all 0; got"):
        Sequences([documents(), documents()], 16, BUILT_IN["exact"], count=10, weights=weights)


def test_collate_keeps_documents_apart_and_marks_what_is_predicted():
    items = [Sequences([documents()], 16, BUILT_IN["exact"], count=10)[i] for i in range(4)]
    batch = collate(items)
    assert {value.shape for value in batch.values()} == {(1, sum(len(item["input_ids"]) for item in items))}
    numbers = batch["document_ids"][0]
    assert torch.equal(numbers.unique(), torch.arange(sum(int(item["document_ids"].max()) + 1 for item in items)))
    assert torch.equal(batch["labels"] != -100, Factorization(batch["group_ids"], batch["document_ids"]).is_predicted)
    apart = [ids for item in items for ids in _documents(item)]
    assert all(torch.equal(a, b) for a, b in zip(apart, _documents({k: v[0] for k, v in batch.items()}), strict=True))


def _documents(item):
    return [item["input_ids"][item["document_ids"] == d] for d in range(int(item["document_ids"].max()) + 1)]


def test_a_stream_of_a_mixture_loses_nothing_and_starts_again(tmp_path, byte_tokenizer):
    import datasets

    texts = [f"Number {n}. " + "word " * (n % 5) for n in range(23)]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "b.txt").write_text("Another source altogether.")
    sources = [tokenized(open_texts(tmp_path / name, True), byte_tokenizer, 40) for name in ("a.jsonl", "b.txt")]
    eager = tokenize([*texts, "Another source altogether."], byte_tokenizer, 40)
    mixed = datasets.interleave_datasets(sources, [0.9, 0.1], seed=0, stopping_strategy="all_exhausted")
    data = list(Stream(mixed.shuffle(0, buffer_size=4), 64, BUILT_IN["exact"], 60))
    seen = [tuple(ids.tolist()) for item in data for ids in _documents(item)]
    assert set(seen) == {tuple(document.ids.tolist()) for document in eager}
    assert len(data) == 60
    assert len(seen) > 2 * len(eager)
    again = list(Stream(mixed.shuffle(0, buffer_size=4), 64, BUILT_IN["exact"], 60))
    assert all(torch.equal(a[key], b[key]) for a, b in zip(data, again, strict=True) for key in a)
    alone = list(Stream(sources[0], 64, BUILT_IN["exact"], 9))
    first = [document for item in alone for document in _documents(item)][: len(texts)]
    assert [byte_tokenizer.decode(ids[1:].tolist()) for ids in first] == texts


def test_several_processes_draw_the_stream_of_one_and_workers_are_refused(tmp_path, byte_tokenizer, monkeypatch):
    from accelerate.data_loader import IterableDatasetShard
    from torch.utils.data import DataLoader

    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": f"Number {n}. " + "word " * (n % 5)}) + "\n" for n in range(23)))
    documents = tokenized(open_texts(file, True), byte_tokenizer, 40).shuffle(0, buffer_size=4)
    stream = Stream(documents, 64, BUILT_IN["exact"], 24)
    whole = list(stream)
    expected = [collate(whole[first : first + 3]) for first in range(0, 24, 3)]
    found = {}
    for process in range(2):
        own = IterableDatasetShard(stream, batch_size=3, num_processes=2, process_index=process)
        batches = DataLoader(own, batch_size=3, collate_fn=collate)
        found |= {process + 2 * number: batch for number, batch in enumerate(batches)}
    assert sorted(found) == list(range(8))
    assert all(torch.equal(found[n][key], expected[n][key]) for n in found for key in found[n])
    for workers in (1, 2):
        monkeypatch.setattr("anyorder.training.data.get_worker_info", lambda n=workers: SimpleNamespace(num_workers=n))
        with pytest.raises(ValueError, match="by the training process itself"):
            next(iter(stream))


def test_workers_make_the_sequences_that_one_process_makes():
    """Workers are copies of their process, here a new one: that of many tests has threads of many libraries, of which a
    copy has none, and it has died of such workers."""
    ran = subprocess.run(
        [sys.executable, "-c", IN_A_NEW_PROCESS], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    assert ran.stdout == "the same\n", ran.stderr


def test_a_data_set_of_the_hub_or_of_a_directory(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text(json.dumps({"text": "one", "id": 3}) + "\n")
    assert read_texts([tmp_path / "set"]) == ["one"]
    assert [record["text"] for record in open_texts(tmp_path / "set", streaming=True)] == ["one"]
    for source, message in (
        ("a/b/c/d", "neither a file nor a data set of the form owner/name"),
        ("no-such-owner/no-such-set", "no-such-owner/no-such-set cannot be read as a data set"),
    ):
        with pytest.raises(ValueError, match=message):
            open_texts(source)


def test_documents_are_read_when_they_are_asked_for(byte_tokenizer):
    found = tokenize(["one. Two.", "three"], byte_tokenizer, 40)
    assert isinstance(found, Documents)
    assert found.lengths == [len(document.ids) for document in found]
    assert [document.shape.length for document in found[:1]] == found.lengths[:1]
