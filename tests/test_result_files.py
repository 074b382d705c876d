"""Files of texts and of results, and the worker between them, without a cluster."""

from __future__ import annotations

import json
import shutil

import pytest

pa = pytest.importorskip("pyarrow", reason="pip install 'anyorder[ray]'")
from pyarrow import parquet  # noqa: E402

from anyorder.cli import build_parser, generate, tables  # noqa: E402
from anyorder.cli.on_ray import Job, Worker, Workers, settings_of  # noqa: E402
from result_files import TEXTS, lines, plain, rows_of, same  # noqa: E402


def test_blocks_cover_every_row_once(tmp_path):
    parquet.write_table(pa.table({"text": TEXTS}), tmp_path / "a.parquet", row_group_size=7)
    rows = ("", '{"text": "x"}', "", '"bare"', '{"text": 3}', "no", '{"text": "\\ud83d"}\r', '{"text": "last"}')
    (tmp_path / "b.jsonl").write_text("\n".join(rows))
    (tmp_path / "_c.jsonl").write_text("{}")
    files = tables.files_of(str(tmp_path))
    assert [file.rpartition("/")[2] for file in files] == ["a.parquet", "b.jsonl"]
    whole = [text for block in tables.blocks(files, "text", 1000) for text in tables.texts_of(block, "text")]
    assert whole[:23] == TEXTS
    assert [text if isinstance(text, str) else str(text)[:17] for text in whole[23:]] == [
        "x", "bare", "'text' is no text", "the line is no JS", "text has a lone s", "last",
    ]  # fmt: skip
    for count in (1, 2, 4, 7, 11):
        found = list(tables.blocks(files, "text", count))
        assert [block.first for block in found] == [sum(b.count for b in found[:n]) for n in range(len(found))]
        assert [str(t) for block in found for t in tables.texts_of(block, "text")] == [str(text) for text in whole]
        assert len({block.name("s") for block in found}) == len(found)
    shutil.copy(tmp_path / "a.parquet", tmp_path / "c.parquet")
    again = list(tables.blocks([str(tmp_path / "c.parquet")], "text", 11))
    assert [block.name("s") for block in again] == [block.name("s") for block in found[:3]]
    assert [block.name("t") for block in again] != [block.name("s") for block in again]


@pytest.mark.parametrize("slots", [1, 3])
def test_a_worker_writes_what_the_command_prints(capsys, checkpoint, tmp_path, slots):
    """Also where forwards of several texts are one; and twice the same."""
    texts = [*TEXTS[:5], "", *TEXTS[6:9]]
    source, out = lines(tmp_path / "in.jsonl", texts), tmp_path / "out"
    drawing = ["--max-new-tokens", "5", "--temperature", "0.8", "--seed", "3", "--group-size", "2"]
    options = build_parser().parse_args(["generate", "--model", str(checkpoint), "--out", str(out), *drawing])
    settings, workers = settings_of(options), Workers(slots=slots, context=64, rows=4)
    worker = Worker(
        Job("generate", settings, str(out), workers, lambda text: None, lambda: generate._begin(options, None))
    )
    blocks = {block.name(json.dumps(settings)): block for block in tables.blocks([str(source)], "text", 4)}
    for name, block in blocks.items():
        assert worker._answer(name, block) == 0
    found = rows_of(out)
    assert [row["number"] for row in found] == list(range(9))
    for row, record in zip(found, plain(capsys, "generate", checkpoint, texts, tmp_path, *drawing), strict=True):
        same(row, record)
    whole = {file.name: file.read_bytes() for file in out.iterdir()}
    worker._answer(*list(blocks.items())[1])
    assert {file.name: file.read_bytes() for file in out.iterdir()} == whole
    assert tables.about(str(out), next(iter(blocks)))["settings"] == settings
