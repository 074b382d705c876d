"""What each engine costs beside time a step: seconds to prepare and to load, memory, disk, prompts, likelihood.

    python benchmarks/engine_costs.py --text wikitext2_valid.txt --output docs/engine_costs.md

Every engine runs in a process of its own, with a cache of its own that holds nothing prepared, so peaks are its own.
The likelihood is that of the first tokens of the text from left to right, window by window, through the prompt path,
whose speed, without the head, is the median over windows.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from anyorder.runtime.processor import describe

ENGINES = ("eager", "openvino:float32", "openvino:bfloat16", "openvino:int8", "openvino:int4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-anyorder")
    parser.add_argument("--engines", nargs="+", default=list(ENGINES))
    parser.add_argument("--text", type=Path, help="whose likelihood is measured")
    parser.add_argument("--tokens", type=int, default=20000)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(_measured(options)))
        return
    lines = [f"    {shlex.join(['python', *sys.argv])}", "", describe(), ""]
    lines += [
        "| engine | prepare, s | its peak, MB | load, s | peak of use, MB | weights, MB | disk, MB | "
        "prompt tokens/s | nats a token |"
    ]
    lines += ["|---" * 9 + "|"]
    for engine in options.engines:
        with tempfile.TemporaryDirectory() as cache:
            shown = [_in_a_process(options, engine, step, cache) for step in ("prepare", "use")]
        made, used = shown
        cells = [
            made["seconds"],
            made["peak"],
            used["seconds"],
            used["peak"],
            used["weights"],
            made["disk"],
            used["speed"],
        ]
        lines.append(f"| {engine} | " + " | ".join(f"{cell:.0f}" if cell > 20 else f"{cell:.1f}" for cell in cells)
                     + f" | {used['nats']:.4f} |")  # fmt: skip
        print(lines[-1], flush=True)
    print("\n".join(lines))
    if options.output is not None:
        options.output.write_text("\n".join(lines) + "\n")


def _in_a_process(options: argparse.Namespace, engine: str, step: str, cache: str) -> dict[str, float]:
    """What `_measured` finds in a new process."""
    command = [sys.executable, __file__, "--model", options.model, "--measure", f"{step} {engine} {cache}",
               "--tokens", str(options.tokens), "--window", str(options.window)]  # fmt: skip
    if options.text is not None:
        command += ["--text", str(options.text)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise SystemExit(f"{step} {engine}: {ran.stderr.strip().splitlines()[-1]}")
    found: dict[str, float] = json.loads(ran.stdout.splitlines()[-1])
    return found


def _measured(options: argparse.Namespace) -> dict[str, float]:
    """Seconds, megabytes and nats of one step of one engine; the model itself is loaded before the clock starts."""
    import torch

    from anyorder import load
    from anyorder.runtime import engines

    step, engine, cache = options.measure.split()
    name, _, weights = engine.partition(":")
    model, tokenizer = load(options.model, dtype=torch.float32)
    os.environ["ANYORDER_CACHE"] = cache
    started = time.perf_counter()
    if step == "prepare" and name == "openvino":
        from anyorder.runtime.openvino.prepare import prepare

        prepare(model, weights)  # and loads nothing of it
    else:
        runner = engines.runner_for(model, name, weights or None)
    found: dict[str, Any] = {
        "seconds": time.perf_counter() - started,
        "disk": _megabytes(Path(cache)),
        "nats": 0.0,
        "speed": 0.0,
    }
    size = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    found["weights"] = size * {"": 4, "float32": 4, "bfloat16": 2, "int8": 1, "int4": 0.5}[weights] / 1e6
    if step == "use":
        nothing = float("nan"), float("nan")
        found["nats"], found["speed"] = _read(runner, tokenizer, options) if options.text is not None else nothing
    found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return found


def _read(runner: Any, tokenizer: Any, options: argparse.Namespace) -> tuple[float, float]:
    """Nats a token of the first tokens of a text, window by window, each from its second token on; and how many tokens
    a second."""
    import torch

    from anyorder import Factorization
    from anyorder.core.layout import lay_out
    from anyorder.model.kv_cache import KeyValueStore

    ids = torch.tensor(tokenizer.encode(options.text.read_text()[: 8 * options.tokens])[: options.tokens])
    total, count, speeds = 0.0, 0, []
    with torch.inference_mode():
        for window in ids.split(options.window):
            T = len(window)
            layout = lay_out(window[None], Factorization.left_to_right(T, given=1), runner.model.recipe)
            store = KeyValueStore(runner.capacity(T))
            started = time.perf_counter()
            hidden = runner.hidden(layout.rows, layout.key_positions, store)[0, layout.logit_rows[0, 1:]]
            speeds.append(T / (time.perf_counter() - started))
            log_probs = torch.cat([runner.logits(part).float().log_softmax(-1) for part in hidden.split(128)])
            total -= float(log_probs.gather(1, window[1:, None]).sum())
            count += T - 1
    return total / count, statistics.median(speeds)


def _megabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


if __name__ == "__main__":
    main()
