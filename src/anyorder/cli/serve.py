"""`anyorder serve`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from anyorder.cli.model import add_model, load_ready
from anyorder.cli.options import add_command, add_engine, positive


def add(subparsers: Any) -> None:
    """The command's options."""
    parser = add_command(
        subparsers,
        "serve",
        _run,
        "serve OpenAI's API, blanks, likelihoods, editors and a page to watch",
        "anyorder serve --port 8012",
        "anyorder serve --model my-model --dtype bfloat16 --host 0.0.0.0 --api-keys keys.txt",
    )
    add_model(parser)
    add_engine(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; default: this machine alone")
    parser.add_argument("--port", type=_port, default=8012, metavar="N", help="default: 8012, where editors look")
    parser.add_argument(
        "--api-keys", type=Path, metavar="FILE", help="keys, one a line; also from the variable ANYORDER_API_KEYS"
    )
    parser.add_argument("--slots", type=positive, default=8, metavar="N", help="requests at work at once; default: 8")
    parser.add_argument(
        "--context", type=positive, default=2048, metavar="N", help="tokens of a request; default: 2048"
    )
    parser.add_argument(
        "--waiting", type=positive, default=256, metavar="N", help="requests that may wait; default: 256"
    )
    parser.add_argument(
        "--timeout", type=float, default=300, metavar="S", help="seconds that a request may take; default: 300"
    )
    parser.add_argument(
        "--patience", type=float, default=30, metavar="S",
        help="seconds that requests may still take when the server is told to stop; default: 30",
    )  # fmt: skip


def _port(text: str) -> int:
    if not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: 0..65535, 0 for any that is free")
    return int(text)


def _run(options: argparse.Namespace) -> int:
    try:
        from anyorder.serving import server
    except ImportError as error:
        raise ValueError(f"serving needs more packages ({error.name}): pip install 'anyorder[serve]'") from error
    from anyorder.runtime.engines import runner_for
    from anyorder.serving.api import create_app
    from anyorder.serving.engine import Engine
    from anyorder.serving.service import Service

    if options.engine == "cuda_graphs":
        raise ValueError("--engine cuda_graphs: requests come and go, and graphs are of one batch; choose eager")
    keys = server.read_keys(options.api_keys)
    bound = server.listen(options.host, options.port)
    model, tokenizer = load_ready(options)
    engine = Engine(model, options.slots, options.context, options.waiting, runner=runner_for(model))
    app = create_app(Service(model, tokenizer, options.model), engine, keys, options.timeout)
    (address,) = server.addresses([bound])
    print(f"{options.model} at {address} (the page), {address}/v1 (OpenAI), {address}/infill (editors)", flush=True)
    server.serve(app, engine, bound, options.patience)
    return 0
