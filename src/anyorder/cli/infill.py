"""`anyorder infill`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from anyorder.cli.blanks import add_blank
from anyorder.cli.model import add_model, load_ready
from anyorder.cli.options import (
    add_answer_to,
    add_command,
    add_order,
    add_policy,
    add_sampling,
    drawing_of,
    length,
    messages_of,
    policy_of,
    positive,
    sampling_options,
    typed,
)
from anyorder.cli.texts import add_texts, answer_each
from anyorder.cli.watching import add_watching, check_watching, trace_of, watching
from anyorder.cli.work import Result, Work
from anyorder.infill.template import Template

if TYPE_CHECKING:
    from anyorder.decoding.constraints import Constraint
    from anyorder.decoding.policies import Policy
    from anyorder.runtime.runner import ModelRunner


def add(subparsers: Any) -> None:
    """The command's options."""
    parser = add_command(
        subparsers,
        "infill",
        _run,
        "fill the blanks of a text",
        'anyorder infill "The cat ___ on the mat. It was ___." --length 2 auto --json',
        'anyorder infill --chat "What is the capital of France?" "The capital of France is ___."',
    )
    add_texts(parser, "text with blanks")
    add_model(parser)
    add_blank(parser)
    add_answer_to(parser)
    parser.add_argument(
        "--length", type=length, nargs="+", metavar="N",
        help="tokens of every blank, or one for each: a number, a range such as 2-6, or auto; default: auto",
    )  # fmt: skip
    parser.add_argument(
        "--tries", type=positive, default=1, metavar="N",
        help="fill at this many of the likeliest lengths and keep the likeliest text, read from the left; default: 1",
    )  # fmt: skip
    add_order(parser)
    add_policy(parser)
    constraint = parser.add_mutually_exclusive_group()
    constraint.add_argument("--choice", nargs="+", metavar="TEXT", help="every blank is one of these")
    constraint.add_argument(
        "--pattern", metavar="REGEX", help="every blank matches this, in as many tokens as --length says"
    )
    parser.add_argument(
        "--single-line", action=argparse.BooleanOptionalAction,
        help="whether blanks hold no line end; default: if the text has none and there is no --pattern",
    )  # fmt: skip
    parser.add_argument("--special-tokens", action="store_true", help="allow special tokens inside a blank")
    add_sampling(parser)
    add_watching(parser)


def _run(options: argparse.Namespace) -> int:
    policy, constraint, messages = policy_of(options), _constraint(options), messages_of(options)
    drawing_of(options)
    if options.pattern is not None and policy is not None and not policy.keeps_order:
        raise ValueError(f"--pattern is filled from left to right, --policy {options.policy} chooses its own order")
    return answer_each(
        options,
        lambda text: _check(text, options),
        lambda: _begin(options, policy, constraint, messages),
        check_watching,
    )


def _check(text: str, options: argparse.Namespace) -> None:
    template = Template.parse(text, options.blank)
    if options.length is not None and len(options.length) > 1:
        from anyorder.infill.lengths import candidates

        candidates(options.length, template.blanks)


def _constraint(options: argparse.Namespace) -> Constraint | None:
    if options.choice is None and options.pattern is None:
        return None
    from anyorder.decoding.constraints import Choice, Pattern

    if options.choice is not None:
        return Choice(*(typed(text, "--choice") for text in options.choice))
    return Pattern(typed(options.pattern, "--pattern"))


def _begin(
    options: argparse.Namespace,
    policy: Policy | None,
    constraint: Constraint | None,
    messages: list[dict[str, str]] | None,
) -> Work:
    from anyorder.infill.infiller import Infiller

    model, tokenizer = load_ready(options)
    infiller = Infiller(model, tokenizer, messages=messages)
    more = (
        {} if options.length is None else {"length": options.length[0] if len(options.length) == 1 else options.length}
    )

    def answer(number: int, text: str, runner: ModelRunner | None = None) -> Result:
        with watching(options, infiller.pieces) as watch:
            filled = infiller(
                text, blank=options.blank, group_size=options.group_size, order=options.order, policy=policy,
                constraints=constraint, special_tokens=options.special_tokens, single_line=options.single_line,
                tries=options.tries, watch=watch, **more, **sampling_options(options, number, runner),
            )  # fmt: skip
        record = {
            "text": filled.text,
            "spans": [vars(span) for span in filled.spans],
            "log_prob": filled.log_prob,
            "forwards": filled.forwards,
        }
        return Result(filled.text, record, trace_of(options, watch))

    return Work(answer, model)
