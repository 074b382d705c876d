"""`anyorder show`: an order and its two streams, drawn. Loads no model: each word stands for one token."""

from __future__ import annotations

import argparse
from typing import Any

from anyorder.cli.blanks import add_blank, has_blank
from anyorder.cli.options import add_command, add_order, positive, print_json
from anyorder.infill.template import Template


def add(subparsers: Any) -> None:
    """The command's options."""
    parser = add_command(
        subparsers,
        "show",
        _run,
        "draw an order of prediction and its two streams",
        'anyorder show "The cat ___ ___ on the mat ." --order random --group-size 2',
    )
    parser.add_argument("text", help="words; each stands for one token. With blanks (___), only those are predicted")
    add_blank(parser)
    add_order(parser)
    parser.add_argument("--given", type=positive, metavar="N", help="leading words given, without blanks; default: 1")
    parser.add_argument("--recipe", choices=("exact", "paper"), default="exact", help="default: exact")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random order; default: 0")


def _run(options: argparse.Namespace) -> None:
    words, blank = _words(options.text, options.blank)
    if not words:
        raise ValueError("the text is empty: give at least one word")
    if any(blank) and options.given is not None:
        raise ValueError("--given is for a text without blanks: with blanks, all words are given")
    import torch

    from anyorder.core.factorization import Factorization
    from anyorder.core.layout import describe, lay_out

    generator = torch.Generator().manual_seed(options.seed)
    if any(blank):
        order = Factorization.infill(torch.tensor(blank), options.group_size, options.order, generator)
    else:
        order = Factorization.left_to_right(len(words), given=1 if options.given is None else options.given)
        order = order.regroup(options.group_size, options.order, generator)
    layout = lay_out(torch.zeros(1, len(words), dtype=torch.int64), order, options.recipe)
    if options.json:
        rows = {name: getattr(layout.rows, name)[0].tolist() for name in ("positions", "lo", "hi")}
        print_json({"group_ids": order.group_ids[0].tolist(), "content_rows": layout.rows.content_count, **rows})
    else:
        print(order.describe([words]), describe(layout, [words]), sep="\n\n")


def _words(text: str, mark: str) -> tuple[list[str], list[bool]]:
    """The words, a name for each blank among them, and which of them are blanks."""
    if not has_blank(text, mark):
        return text.split(), [False] * len(text.split())
    words: list[str] = []
    blank: list[bool] = []
    for number, piece in enumerate(Template.parse(text, mark).pieces):
        if number:
            words.append(f"?{len(words)}")
            blank.append(True)
        words += piece.split()
        blank += [False] * len(piece.split())
    return words, blank
