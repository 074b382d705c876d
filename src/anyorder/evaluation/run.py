"""`anyorder eval`: tasks, records, items, results."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

_DESCRIBING = (
    "model", "dtype", "device", "group_size", "policy", "uncoupled", "orders", "seed", "temperature", "judge",
    "engine", "weights",
    "execute_code", "limit", "batch_size",
)  # fmt: skip
"""Options that are written down beside the results."""


def add_options(parser: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    """Options of the command."""
    parser.add_argument("tasks", nargs="*", metavar="TASK", help="see --list")
    parser.add_argument("--list", action="store_true", help="the tasks, and where their records come from")
    parser.add_argument("--out", type=Path, metavar="DIR", help="directory for settings, items and reports; the same "
                        "command goes on with what is there")  # fmt: skip
    parser.add_argument("--data-dir", type=Path, metavar="DIR",
                        help="of local records, named as --list says, .jsonl, .json or .csv, also as .gz; default: "
                             "data sets of the hub")  # fmt: skip
    parser.add_argument("--data", nargs="+", default=[], metavar="TASK=SOURCE",
                        help="records of single tasks: a file, or owner/name[:config[:split]]")  # fmt: skip
    parser.add_argument("--limit", type=positive, metavar="N", help="items of each task, from the first; default: all")
    parser.add_argument("--group-size", type=positive, default=1, metavar="N",
                        help="of what is scored, from left to right; default: 1")  # fmt: skip
    parser.add_argument("--policy", metavar="NAME[:OPTION=VALUE,...]", default="groupwise:size=1",
                        help="of what is generated; default: groupwise:size=1")  # fmt: skip
    parser.add_argument("--orders", type=partial(_at_least_two, positive), default=8, metavar="K",
                        help="random orders that a document is predicted in; default: 8")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of random orders and draws; default: 0")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T",
                        help="of text that is judged (continuations, fills); 0 takes the most likely tokens; "
                             "default: 1")  # fmt: skip
    parser.add_argument("--judge", metavar="NAME",
                        help="the model that judges text: a directory, GGUF file or hub id of any causal LM; default: "
                             "the one that --model is made of")  # fmt: skip
    parser.add_argument("--uncoupled", action="store_true",
                        help="without the model's coupling: tokens of a group do not know each other")  # fmt: skip
    parser.add_argument("--batch-size", type=positive, default=16, metavar="N",
                        help="items between two writes to disk; no result depends on it; default: 16")  # fmt: skip
    parser.add_argument(
        "--execute-code",
        action="store_true",
        help="run programs that the model writes, in processes with limits and without a network: pass_at_1",
    )
    parser.add_argument(
        "--compare", type=Path, nargs=2, metavar="DIR", help="two runs, item by item, instead of a new one"
    )


def _at_least_two(positive: Callable[[str], int], text: str) -> int:
    if (value := positive(text)) < 2:
        raise argparse.ArgumentTypeError(f"{text!r}: a spread needs at least 2 orders")
    return value


Load = Callable[..., tuple[Any, Any]]


def run(options: argparse.Namespace, load: Load, load_judge: Load) -> None:
    """Evaluate, or compare, and print a table.

    Args:
        options: parsed from `add_options`.
        load: loads the converted model that the options name, and its tokenizer; takes a class that it is of, too.
        load_judge: the same of the judge, if they name one.

    Raises:
        ValueError: for what cannot be meant, before a model is loaded.
    """
    import json

    from anyorder.decoding import policies
    from anyorder.decoding.sampling import Sampler
    from anyorder.evaluation import results
    from anyorder.evaluation.tasks import TASKS, task_of

    metrics = {name: task.metrics for name, task in TASKS.items()}
    if options.list:
        width = max(map(len, TASKS))
        for name, task in TASKS.items():
            source = task.source or "not on the hub: --data-dir or --data"
            print(f"{name:{width}} {task.about} [{task.file}; {source}]")
        return
    if options.compare is not None:
        first, second = options.compare
        rows = results.compare(first, second, metrics)
        print(json.dumps(rows) if options.json else results.differences(rows, str(first), str(second)))
        return
    if not options.tasks or options.out is None:
        raise ValueError("name a task and --out DIR; `anyorder eval --list` shows the tasks")
    policy = policies.parse(options.policy)  # a mistake leaves no directory behind
    Sampler(True, temperature=options.temperature)
    tasks = [task_of(name) for name in dict.fromkeys(options.tasks)]
    for one in tasks:
        one.check(policy)
    read = {task.name: _read(task, options) for task in tasks}
    items = {task.name: [task.item(record) for record in read[task.name][0]] for task in tasks}
    own = _control(options, tasks, policy)
    settings = _settings(options, {name: fingerprint for name, (_, fingerprint) in read.items()})
    written = results.Results(options.out, settings)
    judge = None if options.judge is None else partial(load_judge, options)
    _evaluate(options, tasks, items, written, partial(_subject, options, policy, load, judge, own))
    report = written.report({task.name: task.metrics for task in tasks})
    print(json.dumps(report) if options.json else results.table(report))


def _read(task: Any, options: argparse.Namespace) -> tuple[list[dict[str, Any]], str]:
    from anyorder.evaluation.sources import KINDS, read_records

    own = {}
    for pair in options.data:
        name, equals, source = pair.partition("=")
        if not equals:
            raise ValueError(f"--data takes TASK=SOURCE, got {pair!r}")
        if name not in options.tasks:
            raise ValueError(f"--data {pair}: {name} is none of the tasks {', '.join(options.tasks)}")
        own[name] = source
    source = own.get(task.name)
    if source is None and options.data_dir is not None:
        names = [f"{task.file}{kind}{packed}" for kind in KINDS for packed in ("", ".gz")]
        found = [options.data_dir / name for name in names if (options.data_dir / name).is_file()]
        if not found:
            raise ValueError(f"{options.data_dir} has no records of {task.name}: none of {', '.join(names)}")
        source = str(found[0])
    source = source or task.source
    if source is None:
        raise ValueError(f"the records of {task.name} are not on the hub: name them with --data-dir or --data")
    records, fingerprint = read_records(source)
    return records[: options.limit], fingerprint


def _settings(options: argparse.Namespace, data: dict[str, str]) -> dict[str, Any]:
    import platform
    from importlib.metadata import version

    import torch
    import transformers

    settings = {"command": options.as_typed} | {name: getattr(options, name) for name in _DESCRIBING}
    settings["versions"] = {
        "anyorder": version("anyorder"), "torch": torch.__version__, "transformers": transformers.__version__,
        "python": platform.python_version(),
    }  # fmt: skip
    return settings | {"data": data}


def _control(options: argparse.Namespace, tasks: list[Any], policy: Any) -> dict[str, Any]:
    """How a model that is a control is loaded; ValueError for what it cannot be asked."""
    from anyorder.evaluation.baselines import diffusion_questions
    from anyorder.evaluation.baselines.masked_diffusion import MaskedDiffusionLM
    from anyorder.loading import saved_type

    if saved_type(options.model) != MaskedDiffusionLM.config_class.model_type:
        return {}
    diffusion_questions.check(tasks, policy, options.engine)
    return {"model_class": MaskedDiffusionLM}


def _subject(options: argparse.Namespace, policy: Any, load: Load, judge: Any, own: dict[str, Any]) -> Any:
    from anyorder.evaluation.task import Subject

    model, tokenizer = load(options, **own)
    if options.uncoupled:
        if model.coupling is None:
            raise ValueError(f"--uncoupled takes a coupling away, and {options.model} has none: leave it out")
        model = model.uncoupled()
    names = ("group_size", "execute_code", "orders", "seed", "temperature")
    return Subject(model, tokenizer, policy, load_judge=judge, **{name: getattr(options, name) for name in names})


def _evaluate(
    options: argparse.Namespace,
    tasks: list[Any],
    items: dict[str, list[Any]],
    written: Any,
    subject_of: Callable[[], Any],
) -> None:
    from tqdm import tqdm

    done = {task.name: written.done(task.name) for task in tasks}
    if all(done[name] == len(items[name]) for name in done):
        return
    subject = subject_of()
    for task in tasks:
        every, first = items[task.name], done[task.name]
        with tqdm(total=len(every), initial=first, desc=task.name, unit="item", disable=not sys.stderr.isatty()) as bar:
            while first < len(every):
                some = every[first : first + options.batch_size]
                written.append(task.name, task.evaluate(subject, some))
                first += len(some)
                bar.update(len(some))
