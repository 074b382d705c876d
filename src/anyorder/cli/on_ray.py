"""`generate`, `infill` and `score` with `--ray`: files of texts to files of results, by the workers of a Ray cluster.

A command's own code answers each text, with the number of its row, so a result is the one without `--ray`. What is
there already is left; so a run that was stopped goes on, and a block that is done twice is written twice the same.

This module knows Ray; files are the business of `tables`, what a text is answered of the command's.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from anyorder import __version__
from anyorder.cli import tables
from anyorder.cli.options import print_json
from anyorder.core.options import check_options, parse_options

if TYPE_CHECKING:
    from anyorder.cli.work import Result, Work

_NOT_OF_RESULTS = {"run", "debug", "json", "file", "lines", "out", "ray", "as_typed", "text", "trace", "watch"}
"""Options that results do not depend on."""
_COLUMNS_OF_RAY = 10_000
"""Blocks that Ray Data handles as such; of more, several are one of its own."""


@dataclasses.dataclass(frozen=True)
class Workers:
    """What `--ray OPTION=VALUE,...` says.

    Attributes:
        count: workers, each a process with a model; 0: as many as the cluster has room for now.
        cpus: of each; without a GPU its forwards have as many threads.
        slots: texts at work at once in each, whose forwards are one.
        context: tokens of a text at most, where slots are more than 1.
        rows: texts in a block, and in a file of results.
        column: with the texts.
    """

    count: int = 0
    cpus: int = 1
    slots: int = 1
    context: int = 2048
    rows: int = 256
    column: str = "text"

    def __post_init__(self) -> None:
        for name, least in (("count", 0), ("cpus", 1), ("slots", 1), ("context", 1), ("rows", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"--ray {name}={value}: it is a whole number from {least} up")

    @classmethod
    def parse(cls, text: str) -> Workers:
        """Of the command line.

        Raises:
            ValueError: naming an option that is none, or cannot be meant.
        """
        options = parse_options(text, "--ray")
        check_options(options, cls)
        if "column" in options:
            options["column"] = str(options["column"])
        return cls(**options)


def answer_files(options: argparse.Namespace, check: Callable[[str], object], begin: Callable[[], Work]) -> int:
    """Results of the texts of `--file` in `--out`; arguments and exit code as of `texts.answer_each`.

    Raises:
        ValueError: naming an option, or if `--out` has results of something else.
    """
    workers = _checked(options)
    settings = settings_of(options)
    saved = json.dumps(settings, sort_keys=True)
    files = tables.files_of(options.file)
    blocks = {one.name(saved): one for one in tables.blocks(files, workers.column, workers.rows)}
    there = tables.results_in(options.out)
    if strangers := sorted(there - blocks.keys()):
        raise ValueError(_other(options.out, strangers, settings))
    todo = {name: block for name, block in blocks.items() if name not in there}
    errors = sum(tables.about(options.out, name)["errors"] for name in there)
    if todo:
        job = Job(options.command, settings, options.out, workers, check, begin)
        errors += sum(_progress(_done(job, todo, options), len(todo)))
    tables.remove_unfinished(options.out)
    texts = sum(block.count for block in blocks.values())
    if options.json:
        print_json({"directory": options.out, "texts": texts, "errors": errors, "files": len(blocks), "new": len(todo)})
    else:
        print(f"{options.out}: {texts} texts in {len(blocks)} files, {len(todo)} of them new; {errors} errors")
    return 2 if errors else 0


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """All that results depend on, beside texts and the model's own files; as JSON has it."""
    own = {name: value for name, value in vars(options).items() if name not in _NOT_OF_RESULTS}
    plain = {name: str(value) if isinstance(value, PurePath) else value for name, value in own.items()}
    said: dict[str, Any] = json.loads(json.dumps({"anyorder": __version__, **plain}))
    return said


def _checked(options: argparse.Namespace) -> Workers:
    if options.out is None or options.file is None:
        raise ValueError("--ray takes texts from --file and writes results to --out: name both")
    for name in ("text", "lines", "watch", "trace"):
        if getattr(options, name, None):
            raise ValueError(f"--ray goes with neither texts in the arguments nor --{name}: texts are rows of --file")
    for name in ("ray", "pyarrow"):
        if importlib.util.find_spec(name) is None:
            raise ValueError("--ray needs Ray: pip install 'anyorder[ray]'")
    workers = Workers.parse(options.ray)
    if workers.slots > 1 and (getattr(options, "compile", False) or getattr(options, "engine", "") == "cuda_graphs"):
        raise ValueError(
            f"--ray slots={workers.slots} goes with neither --compile nor --engine cuda_graphs: texts come and go, and "
            "compiled steps are of one batch; leave them out"
        )
    return workers


def _other(directory: str, strangers: list[str], settings: dict[str, Any]) -> str:
    """What is wrong with results that are not this job's."""
    theirs = tables.about(directory, strangers[0]).get("settings", {})
    differing = [
        f"{name} was {theirs.get(name)!r} and is {settings.get(name)!r}"
        for name in sorted(theirs.keys() | settings.keys())
        if theirs.get(name) != settings.get(name)
    ]
    why = "; ".join(differing) or "other texts, or blocks of other sizes"
    return f"--out {directory} holds {len(strangers)} files of another job ({why}): choose another directory"


# ---------------------------------------------------------------------- the cluster


def _done(job: Job, todo: dict[str, tables.Block], options: argparse.Namespace) -> Iterator[int]:
    """Errors in each block, as it is done."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers of each cluster
    import ray
    import ray.data

    begun = not ray.is_initialized()
    if begun:  # RAY_ADDRESS says where a cluster is; else one of this machine's own begins
        ray.init(log_to_driver=options.debug, logging_level="INFO" if options.debug else "ERROR")
    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        rows = [{"name": name, "block": json.dumps(dataclasses.asdict(block))} for name, block in todo.items()]
        data = ray.data.from_items(rows, override_num_blocks=min(len(rows), _COLUMNS_OF_RAY))
        gpus = 1 if options.device.startswith("cuda") else 0
        data = data.map_batches(
            Worker, fn_constructor_args=(job,), batch_size=1, num_cpus=job.workers.cpus, num_gpus=gpus,
            compute=ray.data.ActorPoolStrategy(size=_count(job.workers, gpus, len(rows))),
        )  # fmt: skip
        for row in data.iter_rows():
            yield int(row["errors"])
    finally:
        if begun:
            ray.shutdown()


def _count(workers: Workers, gpus: int, blocks: int) -> int:
    import ray

    have = ray.cluster_resources()
    room = int(have.get("GPU", 0)) if gpus else int(have.get("CPU", 0)) // workers.cpus
    if not workers.count and not room:
        kind = "GPU" if gpus else f"node with {workers.cpus} CPUs"
        raise ValueError(f"the Ray cluster has no {kind} now: where it will have, say how many workers, --ray count=N")
    return max(min(workers.count or room, blocks), 1)


def _progress(done: Iterator[int], count: int) -> Iterator[int]:
    from tqdm import tqdm

    yield from tqdm(done, total=count, unit="file", file=sys.stderr, disable=not sys.stderr.isatty())


# ---------------------------------------------------------------------- a worker


@dataclasses.dataclass(frozen=True)
class Job:
    """What a worker is to do with blocks."""

    command: str
    settings: dict[str, Any]
    out: str
    workers: Workers
    check: Callable[[str], object]
    begin: Callable[[], Work]


class Worker:
    """A process that answers blocks of texts. Its main thread loads the model and executes forwards.

    Args:
        job: what is to be done.
    """

    def __init__(self, job: Job):
        import torch

        torch.set_num_threads(job.workers.cpus)
        self.job = job
        self.work = job.begin()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Answer blocks, as Ray Data hands them over: {"name": [...], "block": [...]} to {"errors": [...]}."""
        pairs = zip(batch["name"], batch["block"], strict=True)
        return {"errors": [self._answer(str(name), tables.Block(**json.loads(block))) for name, block in pairs]}

    def _answer(self, name: str, block: tables.Block) -> int:
        texts = tables.texts_of(block, self.job.workers.column)
        numbered = list(enumerate(texts, block.first))
        asked = [(number, text) for number, text in numbered if isinstance(text, str) and text]
        several = self.work.model is not None and self.job.workers.slots > 1
        found = self._together(asked) if several else self._alone(asked)
        rows = []
        for number, text in numbered:
            row = {"number": number, "text": text if isinstance(text, str) else None}
            result = found.get(number, text if isinstance(text, ValueError) else None)
            if isinstance(result, ValueError):
                row["error"] = " ".join(str(result).split())
            elif result is not None:
                row |= result.record
            rows.append(row)
        errors = sum("error" in row for row in rows)
        about = {"settings": self.job.settings, "file": block.file, "errors": errors}
        tables.write(self.job.out, name, self.job.command, rows, about)
        return errors

    def _one(self, number: int, text: str, runner: Any = None) -> Result | ValueError:
        try:
            self.job.check(text)
            return self.work.answer(number, text, runner)
        except ValueError as error:
            return error

    def _alone(self, asked: list[tuple[int, str]]) -> dict[int, Result | ValueError]:
        return {number: self._one(number, text) for number, text in asked}

    def _together(self, asked: list[tuple[int, str]]) -> dict[int, Result | ValueError]:
        """As `_alone`; the forwards of texts that are at work at the same time are one."""
        from anyorder.runtime.engines import runner_for
        from anyorder.serving.engine import Engine

        assert self.work.model is not None
        if not asked:
            return {}
        options, workers = self.job.settings, self.job.workers
        runner = runner_for(self.work.model, options["engine"], options["weights"])
        engine = Engine(self.work.model, workers.slots, workers.context, len(asked), runner=runner)
        futures = {number: engine.submit(partial(self._one, number, text)).future for number, text in asked}
        ending = threading.Thread(target=engine.drain, args=(threading.TIMEOUT_MAX,))
        ending.start()
        engine.run()  # until all have ended
        ending.join()
        return {number: future.result() for number, future in futures.items()}
