"""Texts from local files or from the hub -> documents of token ids, through `datasets`.

A source is the path of a file, or a data set `owner/name[:config[:split]]` of the hub (or a directory of that form).
Its records have a column 'text', and may have one 'blanks': for each text the characters that may be left out, as
[[first, behind the last], ...]. A text longer than a document may be is cut into several, at sentence ends where it
can; nothing is thrown away. Documents lie in Arrow files that are mapped into memory, or come from a stream.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from anyorder.infill.pieces import Pieces
from anyorder.training.curriculum import MIN_LENGTH, Document
from anyorder.training.cutting import cut, cut_around

FORMATS = {".jsonl": "json", ".json": "json", ".txt": "text", ".parquet": "parquet"}
COLUMNS = ("text", "blanks")
_HUB = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[^:]*))?(:(?P<split>[^:]+))?")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:|$)")


def open_texts(source: str | Path, streaming: bool = False) -> Any:
    """The columns 'text' and, where there is one, 'blanks' of a source: a `datasets.Dataset`, or an `IterableDataset`
    of a stream.

    Raises:
        ValueError: naming the source that is missing, unreadable, of an unknown kind or without texts.
    """
    import datasets

    file = Path(source)
    kind = FORMATS.get(Path(file.name.removesuffix(".gz")).suffix)
    if kind is not None:
        if not file.is_file():
            raise ValueError(f"no such file: {source}")
        what = {"path": kind, "data_files": str(file), "split": "train"}
        what |= {"sample_by": "document"} if kind == "text" else {}
    elif file.is_file() or (file.suffix and not file.is_dir() and not _HUB_ID.match(str(source))):
        raise ValueError(f"{source}: unknown kind of file; known: {', '.join(FORMATS)}, each also as .gz")
    else:
        what = _data_set(str(source))
    try:
        found = datasets.load_dataset(**what, streaming=streaming)
        columns = found.column_names or list(next(iter(found)))
    except StopIteration:
        raise ValueError(f"{source} holds no text") from None
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{source} cannot be read as {kind or 'a data set'}: {reason}") from error
    if "text" not in columns:
        raise ValueError(f"{source} has no column 'text' but {', '.join(columns)}")
    return found.select_columns([name for name in COLUMNS if name in columns])


def _data_set(source: str) -> dict[str, Any]:
    name, config, split = source, None, None
    if not Path(source).is_dir():
        match = _HUB.fullmatch(source)
        if match is None:
            raise ValueError(f"{source!r} is neither a file nor a data set of the form owner/name[:config[:split]]")
        name, config, split = match["name"], match["config"] or None, match["split"]
    return {"path": name, "name": config, "split": split or "train"}


def read_texts(sources: Sequence[str | Path]) -> list[str]:
    """All texts of some sources, as a list; see `open_texts`."""
    return [text for text, _ in read_records(sources)]


def read_records(sources: Sequence[str | Path]) -> list[tuple[str, list[list[int]]]]:
    """All texts of some sources with the blanks that each names; see `open_texts`."""
    records: list[tuple[str, list[list[int]]]] = []
    for source in sources:
        table = open_texts(source)
        blanks = table["blanks"] if "blanks" in table.column_names else itertools.repeat(None)
        pairs = zip(table["text"], blanks, strict=False)
        found = [(text, own or []) for text, own in pairs if isinstance(text, str) and text.strip()]
        if not found:
            raise ValueError(f"{source} holds no text")
        records += found
    return records


@dataclass(frozen=True)
class TokenDocument:
    """Ids of one document, its start token included, and where its sentences start and its blanks are."""

    ids: Tensor
    shape: Document

    @classmethod
    def of(cls, record: dict[str, Any]) -> TokenDocument:
        """From a record of `tokenized`."""
        blanks = tuple((first, end) for first, end in record["blanks"])
        return cls(torch.tensor(record["ids"]), Document(len(record["ids"]), tuple(record["sentence_starts"]), blanks))


class Documents(Sequence[TokenDocument]):
    """Documents in a `datasets.Dataset` made by `tokenized`: read when they are asked for.

    Attributes:
        lengths: tokens of each.
    """

    def __init__(self, table: Any):
        self.table = table
        self.lengths: list[int] = list(table["length"])

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> TokenDocument: ...

    @overload
    def __getitem__(self, index: slice) -> list[TokenDocument]: ...

    def __getitem__(self, index: int | slice) -> TokenDocument | list[TokenDocument]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return TokenDocument.of(self.table[index])


def tokenized(texts: Any, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Any:
    """A data set of texts as one of documents: columns ids, sentence_starts, blanks, length."""
    import datasets

    if max_length < MIN_LENGTH:
        raise ValueError(f"documents need at least {MIN_LENGTH} tokens, got a length of {max_length}")
    records = functools.partial(_records, tokenizer=tokenizer, max_length=max_length)
    whole = datasets.Value("int64")
    features = {"ids": [whole], "sentence_starts": [whole], "blanks": [[whole]], "length": whole}
    columns = texts.column_names or list(COLUMNS)
    return texts.map(records, batched=True, remove_columns=columns, features=datasets.Features(features))


def tokenize(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Documents:
    """Documents of at most `max_length` tokens, start token included, in memory."""
    import datasets

    return Documents(tokenized(datasets.Dataset.from_dict({"text": list(texts)}), tokenizer, max_length))


def _records(batch: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, list[Any]]:
    pieces = Pieces(tokenizer)
    start = pieces.start_token()
    blanks = batch.get("blanks") or [None] * len(batch["text"])
    texts = [(text, own) for text, own in zip(batch["text"], blanks, strict=True) if isinstance(text, str)]
    found = list(cut([text for text, own in texts if not own], tokenizer, max_length, start))
    for text, own in texts:
        if own:
            found += cut_around(text, own, pieces, max_length, start)
    return {
        "ids": [document.ids for document in found],
        "sentence_starts": [document.sentence_starts for document in found],
        "blanks": [document.blanks for document in found],
        "length": [len(document.ids) for document in found],
    }
