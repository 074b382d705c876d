"""Text files -> packed rows of documents with their factorizations.

Every training sequence is a function of its number: which documents, in which order, under which factorization. So a
run can be cut and resumed anywhere, on any number of workers, and draws what it would have drawn.

A text longer than a document may be is cut into several at sentence ends where it can; nothing is thrown away.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from anyorder.factorization import Factorization
from anyorder.pieces import Pieces
from anyorder.training.curriculum import MIN_LENGTH, Curriculum, Document, seeded

FORMATS = {".jsonl": "json", ".json": "json", ".txt": "text", ".parquet": "parquet"}
_SENTENCE = re.compile(r"(?<=[.!?])[\"'”’)\]]*\s+(?=[\"'“‘(\[]?[A-Z0-9])")


def read_texts(files: Sequence[str | Path]) -> list[str]:
    """The texts of local files: `{"text": ...}` records in .jsonl, .json or .parquet (.gz too), or whole .txt files.

    Raises:
        ValueError: naming the file that is missing, empty, unreadable or of an unknown kind.
    """
    import datasets

    texts: list[str] = []
    for file in map(Path, files):
        kind = FORMATS.get(Path(file.name.removesuffix(".gz")).suffix)
        if kind is None:
            raise ValueError(f"{file}: unknown kind of file; known: {', '.join(FORMATS)}, each also as .gz")
        if not file.is_file():
            raise ValueError(f"no such file: {file}")
        options = {"sample_by": "document"} if kind == "text" else {}
        try:
            table = datasets.load_dataset(kind, data_files=str(file), split="train", **options)
        except Exception as error:
            raise ValueError(f"{file} cannot be read as {kind}: {str(error).splitlines()[0]}") from error
        if "text" not in table.column_names:
            raise ValueError(f"{file} has no column 'text' but {', '.join(table.column_names)}")
        found = [text for text in table["text"] if isinstance(text, str) and text.strip()]
        if not found:
            raise ValueError(f"{file} holds no text")
        texts += found
    return texts


@dataclass(frozen=True)
class TokenDocument:
    """Ids of one document, its start token included, and where its sentences start."""

    ids: Tensor
    shape: Document


def tokenize(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[TokenDocument]:
    """Documents of at most `max_length` tokens, start token included."""
    if max_length < MIN_LENGTH:
        raise ValueError(f"documents need at least {MIN_LENGTH} tokens, got a length of {max_length}")
    start = Pieces(tokenizer).start_token()
    documents = []
    for text in texts:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], [begin for begin, _ in encoded["offset_mapping"]]
        marks = [0] + [match.end() for match in _SENTENCE.finditer(text)]
        starts = sorted({_first_token(offsets, mark, text) for mark in marks} - {len(ids)})
        begin = 0
        while begin < len(ids):
            end = min(begin + max_length - 1, len(ids))
            inside = [s for s in starts if begin < s <= end]
            if end < len(ids) and inside:
                end = inside[-1]
            sentences = tuple(s - begin + 1 for s in starts if begin <= s < end)
            shape = Document(end - begin + 1, sentences)
            documents.append(TokenDocument(torch.tensor([start, *ids[begin:end]]), shape))
            begin = end
    return documents


def _first_token(offsets: list[int], mark: int, text: str) -> int:
    """The number of the token that brings the character at `mark`, with the space in front of it."""
    index = bisect.bisect_left(offsets, mark)
    before = index > 0 and index <= len(offsets) and offsets[index - 1] == mark - 1 and text[mark - 1].isspace()
    return index - 1 if before else index


class Sequences(Dataset[dict[str, Tensor]]):
    """Training sequence number i, for i in 0..count-1: documents side by side, none of which reads another.

    Args:
        sources: documents from `tokenize`, source by source.
        length: tokens of a sequence at most.
        curriculum: draws a factorization for each document.
        count: sequences in the whole run; progress through the curriculum is i / count.
        seed: of packing, order, mixture and factorizations.
        weights: one for each source: how often a sequence is drawn from it, whatever its size. A source that is used
            up starts again in a new order. None: each as often as it has sequences.

    Raises:
        ValueError: if there is nothing to train on, a document does not fit, or the weights do not fit the sources.
    """

    def __init__(
        self,
        sources: Sequence[Sequence[TokenDocument]],
        length: int,
        curriculum: Curriculum,
        count: int,
        seed: int = 0,
        weights: Sequence[float] | None = None,
    ):
        self.length, self.curriculum, self.count, self.seed = length, curriculum, count, seed
        if weights is None:
            sources, weights = [[document for source in sources for document in source]], [1.0]
        if len(weights) != len(sources) or min(weights) < 0 or sum(weights) <= 0:
            raise ValueError(f"{len(sources)} sources need as many weights of at least 0, not all 0; got {weights}")
        self.sources = [self._usable(source, length) for source in sources]
        self.rows = [self._pack(number) for number in range(len(self.sources))]
        shares = torch.tensor(weights, dtype=torch.float64)
        self._source = torch.multinomial(shares, max(1, count), True, generator=seeded([seed, "mixture"]))
        self._place = torch.zeros_like(self._source)
        for number in range(len(self.sources)):
            of_it = self._source == number
            self._place[of_it] = torch.arange(int(of_it.sum()))
        self._orders: dict[int, tuple[int, Tensor]] = {}

    @staticmethod
    def _usable(documents: Sequence[TokenDocument], length: int) -> list[TokenDocument]:
        usable = [document for document in documents if document.shape.length >= MIN_LENGTH]
        if not usable:
            raise ValueError("no document has two tokens or more: there is nothing to train on")
        longest = max(document.shape.length for document in usable)
        if longest > length:
            raise ValueError(f"a document has {longest} tokens, a row {length}: tokenize with max_length={length}")
        return usable

    def _pack(self, source: int) -> list[list[int]]:
        """Documents of a source in a shuffled order, filled into rows one after the other."""
        rows: list[list[int]] = [[]]
        room, documents = self.length, self.sources[source]
        for index in torch.randperm(len(documents), generator=seeded([self.seed, "pack", source])).tolist():
            size = documents[index].shape.length
            if size > room:
                rows.append([])
                room = self.length
            rows[-1].append(index)
            room -= size
        return rows

    def __len__(self) -> int:
        return self.count

    def _chosen(self, i: int) -> list[TokenDocument]:
        source = int(self._source[i])
        epoch, place = divmod(int(self._place[i]), len(self.rows[source]))
        if self._orders.get(source, (-1,))[0] != epoch:  # one shuffle an epoch, not one a sequence
            generator = seeded([self.seed, "epoch", source, epoch])
            self._orders[source] = epoch, torch.randperm(len(self.rows[source]), generator=generator)
        row = int(self._orders[source][1][place])
        return [self.sources[source][index] for index in self.rows[source][row]]

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        """input_ids, group_ids, document_ids and regime_ids (numbers in `curriculum.names`), each (length,) int64."""
        chosen, progress = self._chosen(i), i / max(1, self.count)
        drawn = [self.curriculum.draw(document.shape, progress, [self.seed, i, d]) for d, document in enumerate(chosen)]
        packed = Factorization.pack([order for order, _ in drawn])
        regimes = [torch.full((order.length,), self.curriculum.names.index(name)) for order, name in drawn]
        return {
            "input_ids": torch.cat([document.ids for document in chosen]),
            "group_ids": packed.group_ids[0],
            "document_ids": packed.documents[0],
            "regime_ids": torch.cat(regimes),
        }


def collate(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """One row of all the documents of some sequences, without padding: every entry (1, tokens) int64.

    `labels` are the ids at predicted positions and -100 elsewhere: what Trainer counts to weigh forwards and processes.
    """
    batch = {name: torch.cat([item[name] for item in items])[None] for name in items[0]}
    documents, first = [], 0
    for item in items:
        documents.append(item["document_ids"] + first)
        first = int(documents[-1].max()) + 1
    batch["document_ids"] = torch.cat(documents)[None]
    batch["labels"] = torch.where(batch["group_ids"] >= 0, batch["input_ids"], -100)
    return batch
