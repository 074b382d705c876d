"""Texts in Parquet and JSON Lines files, and results in Parquet, one file a block of texts.

A block's file is named after its rows and after a hash of its texts and of all that its results depend on, and appears
whole or not at all. So what is done is seen from the names alone, whoever has done it, and doing it twice changes
nothing. Files may lie wherever PyArrow reads and writes: `/data/x.parquet`, `s3://bucket/x.parquet`.

This module knows files; no models and no cluster. Rows are numbered from 0 over all files, in order of their names.
"""

from __future__ import annotations

import hashlib
import io
import json
import posixpath
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anyorder.core.text import check_text

if TYPE_CHECKING:
    from pyarrow import DataType, Schema
    from pyarrow.fs import FileSystem

SUFFIXES = (".parquet", ".jsonl")
ABOUT = b"anyorder"
"""The key in a result file's metadata under which it says what it is of."""


@dataclass(frozen=True)
class Block:
    """Neighbouring rows of one file."""

    file: str
    first: int
    """Number of its first row among those of all files."""
    count: int
    start: int
    """In the file: a row of Parquet, a byte of JSON Lines."""
    end: int
    key: str
    """Hash of its texts."""

    def name(self, settings: str) -> str:
        """Of the file with its results, if they depend on such settings."""
        key = hashlib.sha256(f"{settings}\n{self.first}\n{self.key}".encode()).hexdigest()[:16]
        return f"{self.first:012d}-{self.first + self.count:012d}-{key}.parquet"


def place_of(name: str) -> tuple[FileSystem, str]:
    """Where a path or a URI is.

    Raises:
        ValueError: for a URI of a kind that is not known.
    """
    from pyarrow.fs import FileSystem, LocalFileSystem

    if "://" not in name:
        return LocalFileSystem(), str(Path(name).absolute())
    try:
        system, path = FileSystem.from_uri(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name!r} cannot be reached: {error}") from error
    return system, path


# ---------------------------------------------------------------------- in


def files_of(source: str) -> list[str]:
    """A file, or those of a directory and its own that hold texts, in order of their names; each as `blocks` takes it.

    Raises:
        ValueError: if there is none.
    """
    from pyarrow.fs import FileSelector, FileType

    system, path = place_of(source)
    kind = system.get_file_info(path).type
    if kind == FileType.File and path.endswith(SUFFIXES):
        return [source]
    if kind == FileType.File:
        raise ValueError(f"{source} is none of {', '.join(SUFFIXES)}")
    if kind != FileType.Directory:
        raise ValueError(f"there is no file or directory {source}")
    inside = [one.path for one in system.get_file_info(FileSelector(path, recursive=True)) if one.is_file]
    found = sorted(one for one in inside if one.endswith(SUFFIXES) and posixpath.basename(one)[0] not in "._")
    if not found:
        raise ValueError(f"{source} holds no file of {', '.join(SUFFIXES)}")
    return [source.rstrip("/") + one.removeprefix(path.rstrip("/")) for one in found]


def blocks(files: Sequence[str], column: str, rows: int) -> Iterator[Block]:
    """The texts of some files, at most so many in a block.

    Raises:
        ValueError: if a file has no such column, or cannot be read.
    """
    first = 0
    for file in files:
        parts = _parquet_parts(file, column, rows) if file.endswith(".parquet") else _line_parts(file, column, rows)
        for count, start, end, key in parts:
            yield Block(file, first, count, start, end, key)
            first += count


def texts_of(block: Block, column: str) -> list[str | ValueError]:
    """The texts of a block; an error for a row that has none."""
    read = _parquet_texts if block.file.endswith(".parquet") else _line_texts
    return read(block, column)


def _parquet_parts(file: str, column: str, rows: int) -> Iterator[tuple[int, int, int, str]]:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    system, path = place_of(file)
    with system.open_input_file(path) as source:
        try:
            table = ParquetFile(source)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{file} is no Parquet file: {error}") from error
        if column not in table.schema_arrow.names:
            raise _no_column(file, column, table.schema_arrow.names)
        start, texts = 0, []
        for batch in table.iter_batches(batch_size=rows, columns=[column]):
            texts += batch.column(0).to_pylist()
            while len(texts) >= rows:
                yield rows, start, start + rows, _hash(texts[:rows])
                start, texts = start + rows, texts[rows:]
        if texts:
            yield len(texts), start, start + len(texts), _hash(texts)


def _parquet_texts(block: Block, column: str) -> list[str | ValueError]:
    from pyarrow.parquet import ParquetFile

    system, path = place_of(block.file)
    with system.open_input_file(path) as source:
        table, groups, skipped, before = ParquetFile(source), [], 0, 0
        for number in range(table.metadata.num_row_groups):
            count = table.metadata.row_group(number).num_rows
            if before + count <= block.start:
                skipped = before + count
            elif before < block.end:
                groups.append(number)
            before += count
        found = table.read_row_groups(groups, columns=[column]).slice(block.start - skipped, block.count)
    return [_text(one, column) for one in found.column(0).to_pylist()]


def _line_parts(file: str, column: str, rows: int) -> Iterator[tuple[int, int, int, str]]:
    system, path = place_of(file)
    start = end = 0
    lines: list[bytes] = []
    with system.open_input_file(path) as source:
        for line in io.BufferedReader(source):
            end += len(line)
            if line.strip():
                if not (lines or start):
                    _check_first(file, line, column)
                lines.append(line.rstrip())
            if len(lines) == rows:
                yield rows, start, end, _hash(lines)
                start, lines = end, []
    if lines:
        yield len(lines), start, end, _hash(lines)


def _line_texts(block: Block, column: str) -> list[str | ValueError]:
    system, path = place_of(block.file)
    with system.open_input_file(path) as source:
        source.seek(block.start)
        lines = [line for line in source.read(block.end - block.start).split(b"\n") if line.strip()]
    found: list[str | ValueError] = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError as error:
            found.append(ValueError(f"the line is no JSON: {error}"))
        else:
            found.append(_text(row.get(column) if isinstance(row, dict) else row, column))
    return found


def _check_first(file: str, line: bytes, column: str) -> None:
    """A name that no row has is a mistake of the command; what is wrong with one row is told with its result."""
    try:
        row = json.loads(line)
    except ValueError:
        return
    if isinstance(row, dict) and column not in row:
        raise _no_column(file, column, list(row))


def _no_column(file: str, column: str, names: Sequence[str]) -> ValueError:
    return ValueError(f"{file} has no column {column!r}: name one of {', '.join(names) or 'none'}")


def _text(value: Any, column: str) -> str | ValueError:
    if not isinstance(value, str):
        return ValueError(f"{column!r} is no text but {str(value)[:80]}")
    try:
        check_text(column, value)
    except ValueError as error:
        return error
    return value


def _hash(texts: Sequence[Any]) -> str:
    return hashlib.sha256(repr(texts).encode("utf-8", "backslashreplace")).hexdigest()


# ---------------------------------------------------------------------- out


def write(directory: str, name: str, command: str, rows: Sequence[dict[str, Any]], about: dict[str, Any]) -> None:
    """Results of a block, whole or not at all.

    Args:
        directory: where.
        name: of the file.
        command: whose results they are.
        rows: with `number`, and what `--json` prints.
        about: is kept with them.
    """
    import pyarrow as pa
    from pyarrow.parquet import write_table

    schema = schema_of(command).with_metadata({ABOUT: json.dumps(about)})
    table = pa.Table.from_pylist([{key: _plain(value) for key, value in row.items()} for row in rows], schema=schema)
    system, path = place_of(directory)
    system.create_dir(path)
    hidden = posixpath.join(path, f".{name}.{secrets.token_hex(4)}")
    write_table(table, hidden, filesystem=system, compression="zstd")
    system.move(hidden, posixpath.join(path, name))


def results_in(directory: str) -> set[str]:
    """Names of the files with results there."""
    from pyarrow.fs import FileSelector

    system, path = place_of(directory)
    inside = system.get_file_info(FileSelector(path, allow_not_found=True))
    return {one.base_name for one in inside if one.is_file and one.extension == "parquet"} - {""}


def remove_unfinished(directory: str) -> None:
    """What was being written when it was stopped."""
    from pyarrow.fs import FileSelector

    system, path = place_of(directory)
    for one in system.get_file_info(FileSelector(path, allow_not_found=True)):
        if one.is_file and one.base_name.startswith(".") and ".parquet." in one.base_name:
            system.delete_file(one.path)


def about(directory: str, name: str) -> dict[str, Any]:
    """What a file with results says it is of."""
    from pyarrow.parquet import read_schema

    system, path = place_of(directory)
    metadata = read_schema(posixpath.join(path, name), filesystem=system).metadata or {}
    said: dict[str, Any] = json.loads(metadata.get(ABOUT, b"{}"))
    return said


def schema_of(command: str) -> Schema:
    """Of a command's results: every file has the same, whatever it holds. A row without a result has an `error`."""
    import pyarrow as pa

    text, whole, real = pa.string(), pa.int64(), pa.float64()

    def each(key: DataType) -> DataType:
        return pa.list_(pa.struct({"key": key, "value": real}))

    span = {"text": text, "start": whole, "end": whole, "log_prob": real, "tokens": whole, "ids": pa.list_(whole),
            "probabilities": each(text), "log_probs_given_length": each(text), "lengths": each(whole)}  # fmt: skip
    own = {
        "generate": {"continuation": text, "log_prob": real, "tokens": whole, "forwards": whole},
        "infill": {"spans": pa.list_(pa.struct(span)), "log_prob": real, "forwards": whole},
        "score": {"log_prob": real, "tokens": whole, "nats_per_token": real, "bits_per_byte": real, "order": text,
                  "group_size": whole},
    }[command]  # fmt: skip
    return pa.schema({"number": whole, "text": text, **own, "error": text})


def _plain(value: Any) -> Any:
    """A dict as a list of its pairs, wherever it is in a value but for the fields of a span."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [{name: _pairs(one) for name, one in span.items()} for span in value]
    return value


def _pairs(value: Any) -> Any:
    return [{"key": key, "value": one} for key, one in value.items()] if isinstance(value, dict) else value
