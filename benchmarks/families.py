"""Model families side by side: is the converted model still its base, what does it know, what lines does it fill in?

Each model is `anyorder eval` in folders of its own under --work, which goes on where it was cut: questions from left to
right, and a missing line of a program by each way there is. Its figures go into --results as a small file, and the
tables in the page beside that folder are written anew from the files alone.

    python benchmarks/families.py --data-dir my-data --work families-runs --dtype bfloat16 --execute-code \\
        smollm2-135m-anyorder gemma-3-270m.gguf qwen2.5-coder-0.5b-instruct.gguf
    python benchmarks/families.py --report-only
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from eval_tables import DOCS, cell, evaluated, keep, put_into, settings_of

from anyorder import Factorization, load
from anyorder.bench.others import base_of_its_own
from anyorder.evaluation.code_tasks import FIM

QUESTIONS = ("lambada", "hellaswag")
WAYS = {
    "humaneval_infilling": "any order, its true length",
    "humaneval_infilling_auto": "any order, a length that it finds",
    "humaneval_infilling_indented": "the same behind its indentation",
    "humaneval_infilling_tries": "there, the likeliest of sixteen lengths",
    "humaneval_infilling_fim": "the base's own fill-in-the-middle tokens",
    "humaneval_infilling_prefix": "the program before it alone",
    "humaneval_infilling_reordered": "the program behind it first",
}
METRICS = {"pass_at_1": "passes", "exact_match": "the very line", "edit_similarity": "edit similarity",
           "nats_per_token": "nats a token"}  # fmt: skip
TEXTS = ("Once upon a time there was a little girl who lived with her mother in a small house near the forest.",
         "def mean(values):\n    total = sum(values)\n    return total / len(values)\n",
         "In 1969 two men walked on the Moon for the first time; the third stayed in orbit above them.")  # fmt: skip
"""On whose first TOKENS tokens a converted model is compared with its base."""
TOKENS = 48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="as --model of `anyorder eval`")
    parser.add_argument("--data-dir", type=Path, help="records, named as `anyorder eval --list` says")
    parser.add_argument("--work", type=Path, help="folder for the evaluations")
    parser.add_argument("--limit", type=int, default=300, help="items of questions; default: 300")
    parser.add_argument("--lines", type=int, default=100, help="missing lines; default: 100")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--execute-code", action="store_true", help="see `anyorder eval`")
    parser.add_argument("--results", type=Path, default=DOCS / "families", help="default: docs/families")
    parser.add_argument("--report-only", action="store_true", help="write the tables from the results that are there")
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    if not options.report_only and not (options.models and options.data_dir and options.work):
        parser.error("tables need models, --data-dir and --work (or --report-only)")
    for model in options.models:
        measure(options, model)
        write_page(options.results)
    write_page(options.results)


def measure(options: argparse.Namespace, name: str) -> None:
    """Ask one model everything, and keep what came of it."""
    title = Path(name).stem
    parameters, apart, has_fim = compared(name)
    tasks: dict[str, Any] = {}
    kept: dict[str, Any] = {}
    lines = [task for task in WAYS if has_fim or not task.endswith("_fim")]
    for asked, limit in ((list(QUESTIONS), options.limit), (lines, options.lines)):
        more = ["--data-dir", str(options.data_dir), "--limit", str(limit), "--dtype", options.dtype]
        more += ["--execute-code"] if options.execute_code and asked is lines else []
        report = evaluated(asked, name, options.work / title / asked[0], more)
        tasks |= report["tasks"]
        kept[asked[0]] = settings_of(report)
    record = {"parameters": parameters, "apart": apart, "settings": kept, "tasks": tasks}
    keep(options.results / f"{title}.json", **record)


def compared(name: str) -> tuple[int, float, bool]:
    """Parameters of the base, how far the converted model's logits are from the base's on `TEXTS` at most, from left to
    right in float32, and whether the base has tokens of its own to fill in with."""
    model, tokenizer = load(name, dtype=torch.float32)
    base, apart = base_of_its_own(model), 0.0
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text)["input_ids"][:TOKENS]])
        with torch.no_grad():
            own = model(ids, Factorization.left_to_right(ids.shape[1])).logits[:, 1:]
            apart = max(apart, float((own - base(input_ids=ids).logits[:, :-1]).abs().max()))
    known = tokenizer.get_vocab()
    return sum(part.numel() for part in base.parameters()), apart, all(token in known for token in FIM)


# ---------------------------------------------------------------------- the page


def write_page(results: Path) -> None:
    """Put the tables into the page beside the folder of results."""
    found = {file.stem: json.loads(file.read_text()) for file in sorted(results.glob("*.json"))}
    lines = ["| | parameters | logits from the base's, at most | LAMBADA | HellaSwag |", "|---|---|---|---|---|"]
    for name, record in found.items():
        asked = " | ".join(cell(record["tasks"], task, "accuracy") for task in QUESTIONS)
        lines.append(f"| {name} | {record['parameters'] / 1e6:,.0f} M | {record['apart']:.1e} | {asked} |")
    lines += ["", "A line of a program missing, in percent but for nats; 95% intervals in brackets:", ""]
    lines += [f"| | | {' | '.join(METRICS.values())} |", "|---" * (len(METRICS) + 2) + "|"]
    for name, record in found.items():
        for task, way in WAYS.items():
            if task in record["tasks"]:
                own = record["tasks"][task]
                cells = [cell(record["tasks"], task, metric) if metric in own else "" for metric in METRICS]
                lines.append(f"| {name} | {way} | {' | '.join(cells)} |")
    put_into(results.parent / f"{results.name}.md", lines)


if __name__ == "__main__":
    main()
