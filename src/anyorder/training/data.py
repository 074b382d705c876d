"""Documents -> packed training sequences with their factorizations.

Every training sequence is a function of its number: which documents, in which order, under which factorization. So a
run can be cut and resumed anywhere, on any number of workers, and draws what it would have drawn. Of a stream the
documents come in its own (shuffled) order; the factorizations are functions of the sequence's number all the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from anyorder.core.factorization import Factorization
from anyorder.training.curriculum import MIN_LENGTH, Curriculum, seeded
from anyorder.training.texts import Documents, TokenDocument

T = TypeVar("T")


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
            sources, weights = [_joined(sources)], [1.0]
        if len(weights) != len(sources) or min(weights) < 0 or sum(weights) <= 0:
            raise ValueError(f"{len(sources)} sources need as many weights of at least 0, not all 0; got {weights}")
        self.sources = sources
        self.rows = [self._pack(number) for number in range(len(self.sources))]
        shares = torch.tensor(weights, dtype=torch.float64)
        self._source = torch.multinomial(shares, max(1, count), True, generator=seeded([seed, "mixture"]))
        self._place = torch.zeros_like(self._source)
        for number in range(len(self.sources)):
            of_it = self._source == number
            self._place[of_it] = torch.arange(int(of_it.sum()))
        self._orders: dict[int, tuple[int, Tensor]] = {}

    def _pack(self, source: int) -> list[list[int]]:
        """Documents of a source in a shuffled order, filled into rows one after the other."""
        documents = self.sources[source]
        lengths = documents.lengths if isinstance(documents, Documents) else [d.shape.length for d in documents]
        order = torch.randperm(len(lengths), generator=seeded([self.seed, "pack", source])).tolist()
        return list(packed(((index, lengths[index]) for index in order), self.length))

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
        """See `sequence`."""
        return sequence(self._chosen(i), self.curriculum, i, self.count, self.seed)


class Stream(IterableDataset[dict[str, Tensor]]):
    """The same out of a stream of documents, which starts again, shuffled anew, when it ends.

    Args:
        documents: a `datasets.IterableDataset` of `texts.tokenized`, shuffled or not.
        length, curriculum, count, seed: as for `Sequences`.

    Raises:
        ValueError: where it is read in a worker process of a DataLoader.
    """

    def __init__(self, documents: Any, length: int, curriculum: Curriculum, count: int, seed: int = 0):
        self.documents, self.length, self.curriculum, self.count, self.seed = documents, length, curriculum, count, seed

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = get_worker_info()
        check_workers(worker.num_workers if worker is not None else 0)
        for i, chosen in enumerate(itertools.islice(self._rows(), self.count)):
            yield sequence(chosen, self.curriculum, i, self.count, self.seed)

    def _rows(self) -> Iterator[list[TokenDocument]]:
        for epoch in itertools.count():
            self.documents.set_epoch(epoch)
            sized = ((document, document.shape.length) for document in map(TokenDocument.of, self.documents))
            yield from packed(sized, self.length)


def check_workers(count: int) -> None:
    """ValueError if worker processes would read a stream: each would get some of its files, in an order of its own."""
    if count:
        raise ValueError(
            f"a stream is read in its order, by the training process itself: dataloader_num_workers={count} must be 0, "
            "or tokenize first, without streaming"
        )


def packed(sized: Iterable[tuple[T, int]], length: int) -> Iterator[list[T]]:
    """Things and their sizes, filled into rows of at most `length` one after the other; the last row may be short.

    Raises:
        ValueError: if one is longer than a row, or none has two tokens or more.
    """
    row: list[T] = []
    room = length
    for thing, size in sized:
        if size < MIN_LENGTH:
            continue
        if size > length:
            raise ValueError(f"a document has {size} tokens, a row {length}: tokenize with max_length={length}")
        if size > room:
            yield row
            row, room = [], length
        row.append(thing)
        room -= size
    if not row:
        raise ValueError("no document has two tokens or more: there is nothing to train on")
    yield row


def sequence(
    chosen: Sequence[TokenDocument], curriculum: Curriculum, i: int, count: int, seed: int
) -> dict[str, Tensor]:
    """Training sequence number i of `count`.

    Returns:
        input_ids, group_ids, document_ids and regime_ids (numbers in `curriculum.names`), each (length,) int64.
    """
    progress = i / max(1, count)
    drawn = [curriculum.draw(document.shape, progress, [seed, i, d]) for d, document in enumerate(chosen)]
    order = Factorization.pack([own for own, _ in drawn])
    regimes = [torch.full((own.length,), curriculum.names.index(name)) for own, name in drawn]
    return {
        "input_ids": torch.cat([document.ids for document in chosen]),
        "group_ids": order.group_ids[0],
        "document_ids": order.documents[0],
        "regime_ids": torch.cat(regimes),
    }


def _joined(sources: Sequence[Sequence[TokenDocument]]) -> Sequence[TokenDocument]:
    tables = [source.table for source in sources if isinstance(source, Documents)]
    if len(tables) == len(sources):
        import datasets

        return Documents(datasets.concatenate_datasets(tables))
    return [document for source in sources for document in source]


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
