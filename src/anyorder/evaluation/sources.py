"""Records to evaluate on: local files, or data sets of the hub, as lists of dictionaries with a fingerprint.

This module knows files and columns; what is asked of a record is the tasks' business.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

KINDS = (".jsonl", ".csv", ".json")


def read_records(source: str) -> tuple[list[dict[str, Any]], str]:
    """All records of a source, and the SHA-256 of its bytes (of its records, for a data set of the hub).

    Args:
        source: path of a .jsonl, .json or .csv file, also as .gz; or `owner/name[:config[:split]]` on the hub.

    Raises:
        ValueError: naming the source, and the line, that cannot be read.
    """
    file = Path(source)
    kind = Path(file.name.removesuffix(".gz")).suffix
    if kind not in KINDS:
        return _from_hub(source)
    if not file.is_file():
        raise ValueError(f"no such file: {source}")
    data = file.read_bytes()
    try:
        text = (gzip.decompress(data) if file.suffix == ".gz" else data).decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{source} cannot be read: {error}") from error
    records = list(_parsed(source, kind, text))
    if not records:
        raise ValueError(f"{source} holds no record")
    return records, hashlib.sha256(data).hexdigest()


def _parsed(source: str, kind: str, text: str) -> Iterable[dict[str, Any]]:
    if kind == ".csv":
        yield from csv.DictReader(io.StringIO(text))
        return
    if kind == ".json":
        lines: Iterable[tuple[int, str]] = enumerate(map(json.dumps, json.loads(text)), start=1)
    else:
        lines = enumerate(text.splitlines(), start=1)
    for number, line in lines:
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{source}, line {number}: no JSON: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{source}, line {number}: a record must be an object, got {type(record).__name__}")
        yield record


def _from_hub(source: str) -> tuple[list[dict[str, Any]], str]:
    try:
        import datasets
    except ImportError as error:
        raise ValueError("data sets of the hub need datasets: pip install 'anyorder[eval]'") from error
    name, _, rest = source.partition(":")
    config, _, split = rest.partition(":")
    try:
        found = datasets.load_dataset(name, config or None, split=split or "validation")
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{source} is neither a {', '.join(KINDS)} file nor a data set that can be read "
            f"(owner/name[:config[:split]]): {reason}"
        ) from error
    records = [dict(record) for record in found]
    return records, hashlib.sha256(json.dumps(records, sort_keys=True, default=str).encode()).hexdigest()


def columns(record: dict[str, Any], names: Iterable[str], task: str) -> list[Any]:
    """The values of some columns of a record.

    Raises:
        ValueError: naming those that are missing, and those that are there.
    """
    missing = [name for name in names if record.get(name) is None]
    if missing:
        raise ValueError(
            f"task {task} needs the columns {', '.join(names)}; {', '.join(missing)} is missing in a record with "
            f"{', '.join(map(str, record))}"
        )
    return [record[name] for name in names]
