"""llama.cpp's server (package xllamacpp, which no extra installs), run as a script in a process of its own.

    python llama_cpp_process.py '{"file": "model.gguf", "slots": 4, "context": 2048, "threads": 2}'

prints the address of a port on loopback and serves until its standard input ends, as it does when the process that
started it ends. Nothing else may be imported here: beside PyTorch in one process llama.cpp decodes at a quarter of its
speed (32 of 125 tokens a second, SmolLM2 in Q4_1 on two cores with AVX-512), as both want OpenMP's threads.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

ADDRESS = "address: "


def main() -> None:
    """Serve until standard input ends."""
    import xllamacpp

    asked: dict[str, Any] = json.loads(sys.argv[1])
    common = xllamacpp.CommonParams()
    common.model.path = asked["file"]
    common.n_parallel, common.n_ctx, common.verbosity = asked["slots"], asked["context"] * asked["slots"], -1
    common.cpuparams.n_threads = common.cpuparams_batch.n_threads = asked["threads"]
    server = xllamacpp.Server(common)
    print(f"{ADDRESS}{server.listening_address}", flush=True)
    sys.stdin.read()
    os._exit(0)  # its destructor waits for requests that nobody waits for


if __name__ == "__main__":
    main()
