"""`anyorder score`."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING, Any

from anyorder.cli.blanks import add_blank, has_blank
from anyorder.cli.model import add_model, load_model
from anyorder.cli.options import add_answer_to, add_command, add_order, messages_of
from anyorder.cli.texts import add_texts, answer_each
from anyorder.cli.work import Result, Work

if TYPE_CHECKING:
    from anyorder.runtime.runner import ModelRunner


def add(subparsers: Any) -> None:
    """The command's options."""
    parser = add_command(
        subparsers,
        "score",
        _run,
        "exact log-likelihood of a text, in any order",
        'anyorder score "The cat sat on the mat." --order random --group-size 2 --seed 1',
    )
    add_texts(parser, "text to score")
    add_model(parser)
    add_blank(parser)
    add_answer_to(parser)
    add_order(parser)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random order; default: 0")


def _run(options: argparse.Namespace) -> int:
    messages = messages_of(options)
    return answer_each(options, lambda text: _check(text, options.blank), lambda: _begin(options, messages))


def _check(text: str, mark: str) -> None:
    if not text:
        raise ValueError("the text is empty: nothing to score")
    if has_blank(text, mark):
        raise ValueError(
            f"the text has a blank ({mark}), which has no likelihood: anyorder infill --json fills it and says how "
            "likely the filling is; for a text where it is no blank, name another mark with --blank"
        )


def _begin(options: argparse.Namespace, messages: list[dict[str, str]] | None) -> Work:
    import torch

    from anyorder.core.factorization import Factorization
    from anyorder.infill.chat import chat_prefix
    from anyorder.infill.pieces import Pieces

    model, tokenizer = load_model(options)
    pieces = Pieces(tokenizer)
    given = [pieces.start_token()] if messages is None else chat_prefix(tokenizer, messages)

    def answer(number: int, text: str, runner: ModelRunner | None = None) -> Result:
        ids = torch.tensor([[*given, *pieces.encode(text, at_start=messages is None)]])
        generator = torch.Generator().manual_seed(options.seed)
        order = Factorization.left_to_right(ids.shape[1], given=len(given))
        order = order.regroup(options.group_size, options.order, generator)
        log_prob = float(model.log_likelihood(ids, order).sum())
        tokens, size = ids.shape[1] - len(given), len(text.encode())
        nats, bits = -log_prob / tokens, -log_prob / size / math.log(2)
        report = {"text": text, "log_prob": log_prob, "tokens": tokens, "nats_per_token": nats, "bits_per_byte": bits,
                  "order": options.order, "group_size": options.group_size}  # fmt: skip
        shown = f"{log_prob:.3f} nats, {tokens} tokens, {nats:.3f} nats a token, {bits:.3f} bits a byte"
        return Result(shown, report)

    return Work(answer)
