"""`anyorder infill`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from anyorder.cli.blanks import add_blank
from anyorder.cli.model import add_model, load_model
from anyorder.cli.options import (
    add_command,
    add_order,
    add_policy,
    add_sampling,
    drawing_of,
    length,
    policy_of,
    sampling_options,
)
from anyorder.cli.texts import Answer, Result, add_texts, answer_each, read_texts, typed
from anyorder.cli.watching import add_watching, check_watching, trace_of, watching
from anyorder.infill.template import Template

if TYPE_CHECKING:
    from anyorder.decoding.constraints import Constraint
    from anyorder.decoding.policies import Policy


def add(subparsers: Any) -> None:
    """The command's options."""
    parser = add_command(
        subparsers,
        "infill",
        _run,
        "fill the blanks of a text",
        'anyorder infill "The cat ___ on the mat. It was ___." --length 2 3 --json',
    )
    add_texts(parser, "text with blanks")
    add_model(parser)
    add_blank(parser)
    parser.add_argument(
        "--length", type=length, nargs="+", metavar="N",
        help="tokens of every blank, or one for each: a number, a range such as 2-6, or auto; default: auto",
    )  # fmt: skip
    add_order(parser)
    add_policy(parser)
    constraint = parser.add_mutually_exclusive_group()
    constraint.add_argument("--choice", nargs="+", metavar="TEXT", help="every blank is one of these")
    constraint.add_argument(
        "--pattern", metavar="REGEX", help="every blank matches this, in as many tokens as --length"
    )
    parser.add_argument("--special-tokens", action="store_true", help="allow special tokens inside a blank")
    add_sampling(parser)
    add_watching(parser)


def _run(options: argparse.Namespace) -> int:
    policy, constraint, _ = policy_of(options), _constraint(options), drawing_of(options)
    texts = read_texts(options)
    check_watching(options, texts)
    return answer_each(
        options, texts, lambda text: Template.parse(text, options.blank), lambda: _begin(options, policy, constraint)
    )


def _begin(options: argparse.Namespace, policy: Policy | None, constraint: Constraint | None) -> Answer:
    from anyorder.infill.infiller import Infiller

    model, tokenizer = load_model(options)
    infiller = Infiller(model, tokenizer)
    more: dict[str, Any] = {}
    if options.length is not None:
        more["length"] = options.length[0] if len(options.length) == 1 else options.length

    def answer(number: int, text: str) -> Result:
        with watching(options, infiller.pieces) as watch:
            filled = infiller(
                text, blank=options.blank, group_size=options.group_size, order=options.order, policy=policy,
                constraints=constraint, special_tokens=options.special_tokens, watch=watch, **more,
                **sampling_options(options, number),
            )  # fmt: skip
        record = {
            "text": filled.text,
            "spans": [vars(span) for span in filled.spans],
            "log_prob": filled.log_prob,
            "forwards": filled.forwards,
        }
        return Result(filled.text, record, trace_of(options, watch))

    return answer


def _constraint(options: argparse.Namespace) -> Constraint | None:
    if options.choice is None and options.pattern is None:
        return None
    from anyorder.decoding.constraints import Choice, Pattern

    if options.choice is not None:
        return Choice(*(typed(text, "--choice") for text in options.choice))
    return Pattern(typed(options.pattern, "--pattern"))
