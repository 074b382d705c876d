"""Texts in files, results in Parquet, and whether these are what a command prints."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from command_line import run

WORDS = ("a", "b", "ab", "c a", "b b", "é", "c")
TEXTS = [" ".join(WORDS[(n * k) % 7] for k in range(1, 4 + n % 5)) for n in range(23)]


def lines(path, texts, column="text"):
    path.write_text("".join(json.dumps({"id": n, column: text}) + "\n" for n, text in enumerate(texts)))
    return path


def rows_of(directory):
    """All results, in order; a file is read as anyone would read it."""
    table = pa.concat_tables([parquet.read_table(file) for file in sorted(directory.glob("*.parquet"))])
    return table.to_pylist()


def plain(capsys, command, model, texts, tmp_path, *options):
    """What the command without --ray prints for these texts."""
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    arguments = ["--model", model, "--file", tmp_path / "texts.txt", "--lines", "--json", *options]
    _, out, _ = run(capsys, command, *arguments)
    return [json.loads(line) for line in out.splitlines()]


def same(row, record):
    """Whether a row is what the command prints."""
    assert row["error"] == record.get("error")
    for name, value in record.items():
        if name == "spans":
            for span, one in zip(row["spans"], value, strict=True):
                for key, said in one.items():
                    if isinstance(said, dict):
                        assert {str(p["key"]): pytest.approx(p["value"], abs=1e-4) for p in span[key]} == said
                    else:
                        assert span[key] == (pytest.approx(said, abs=1e-4) if isinstance(said, float) else said)
        else:
            assert row[name] == (pytest.approx(value, abs=1e-4) if isinstance(value, float) else value), name
