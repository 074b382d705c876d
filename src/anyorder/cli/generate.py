"""`anyorder generate`."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from anyorder.cli.model import add_model, load_ready
from anyorder.cli.options import (
    add_command,
    add_policy,
    add_sampling,
    asked,
    drawing_of,
    policy_of,
    positive,
    sampling_options,
    whole,
)
from anyorder.cli.texts import add_texts, answer_each
from anyorder.cli.watching import add_watching, check_watching, trace_of, watching
from anyorder.cli.work import Result, Work

if TYPE_CHECKING:
    from anyorder.decoding.policies import Policy
    from anyorder.runtime.runner import ModelRunner


def add(subparsers: Any) -> None:
    """The command's options."""
    parser = add_command(
        subparsers,
        "generate",
        _run,
        "continue a text, or answer a message",
        'anyorder generate "Once upon a time" --max-new-tokens 40 --temperature 0.8 --seed 1',
        'anyorder generate --chat "What is the capital of France?"',
    )
    add_texts(parser, "text to continue (an empty one starts from the start token)")
    add_model(parser)
    parser.add_argument(
        "--chat", action="store_true",
        help="each text is a message of the user's, by the tokenizer's chat template; prints the answer alone",
    )  # fmt: skip
    parser.add_argument("--max-new-tokens", type=whole, default=64, metavar="N", help="default: 64")
    parser.add_argument("--group-size", type=positive, default=1, metavar="N", help="tokens a forward; default: 1")
    add_policy(parser)
    add_sampling(parser)
    add_watching(parser)


def _run(options: argparse.Namespace) -> int:
    policy, _ = policy_of(options), drawing_of(options)
    check = asked if options.chat else lambda text: None
    return answer_each(options, check, lambda: _begin(options, policy), check_watching)


def _begin(options: argparse.Namespace, policy: Policy | None) -> Work:
    import torch

    from anyorder.decoding import policies
    from anyorder.infill.chat import chat_prefix
    from anyorder.infill.pieces import Pieces
    from anyorder.infill.prompt import Prompt
    from anyorder.infill.token_bytes import TokenBytes

    model, tokenizer = load_ready(options)
    pieces = Pieces(tokenizer)
    token_bytes, special = TokenBytes(pieces, model.vocabulary_size), set(tokenizer.all_special_ids)

    def answer(number: int, text: str, runner: ModelRunner | None = None) -> Result:
        if options.chat:
            prompt = Prompt("", chat_prefix(tokenizer, asked(text)), False, pieces)
        else:
            prompt = Prompt.of(pieces, text)
        with watching(options, pieces) as watch:
            output = model.generate(
                torch.tensor([prompt.ids]),
                max_new_tokens=options.max_new_tokens,
                policy=policy or policies.groupwise(options.group_size),
                allowed_tokens=prompt.allowed_tokens(token_bytes, options.max_new_tokens),
                return_dict_in_generate=True,
                watch=watch,
                **sampling_options(options, number, runner),
            )
        assert not isinstance(output, torch.Tensor)
        new = output.sequences[0, len(prompt.ids) :].tolist()
        continuation = prompt.continuation([token for token in new if token not in special])
        if new and all(token in special for token in new):
            _tell_of_an_end(options, bool(tokenizer.chat_template))
        record = {
            "text": prompt.text + continuation,
            "continuation": continuation,
            "log_prob": float(output.log_probs.sum()),
            "tokens": len(new),
            "forwards": output.forwards,
        }
        return Result(prompt.text + continuation, record, trace_of(options, watch))

    return Work(answer, model)


def _tell_of_an_end(options: argparse.Namespace, knows_chat: bool) -> None:
    """No text came: to a user that looks as if nothing had been done."""
    way_out = "; it was trained to answer messages: --chat asks it so" if knows_chat and not options.chat else ""
    print(f"anyorder generate: the model ended at once{way_out}", file=sys.stderr)
