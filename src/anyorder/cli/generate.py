"""`anyorder generate`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from anyorder.cli.model import add_model, load_model
from anyorder.cli.options import (
    add_command,
    add_policy,
    add_sampling,
    drawing_of,
    policy_of,
    positive,
    sampling_options,
    whole,
)
from anyorder.cli.texts import Answer, Result, add_texts, answer_each, read_texts
from anyorder.cli.watching import add_watching, check_watching, trace_of, watching

if TYPE_CHECKING:
    from anyorder.decoding.policies import Policy


def add(subparsers: Any) -> None:
    """The command's options."""
    parser = add_command(
        subparsers,
        "generate",
        _run,
        "continue a text",
        'anyorder generate "Once upon a time" --max-new-tokens 40 --temperature 0.8 --seed 1',
    )
    add_texts(parser, "text to continue (an empty one starts from the start token)")
    add_model(parser)
    parser.add_argument("--max-new-tokens", type=whole, default=64, metavar="N", help="default: 64")
    parser.add_argument("--group-size", type=positive, default=1, metavar="N", help="tokens a forward; default: 1")
    add_policy(parser)
    add_sampling(parser)
    add_watching(parser)


def _run(options: argparse.Namespace) -> int:
    policy, _ = policy_of(options), drawing_of(options)
    texts = read_texts(options)
    check_watching(options, texts)
    return answer_each(options, texts, lambda text: None, lambda: _begin(options, policy))


def _begin(options: argparse.Namespace, policy: Policy | None) -> Answer:
    import torch

    from anyorder.decoding import policies
    from anyorder.infill.pieces import Pieces

    model, tokenizer = load_model(options)
    pieces = Pieces(tokenizer)

    def answer(number: int, text: str) -> Result:
        ids = tokenizer.encode(text) or [pieces.start_token()]
        with watching(options, pieces) as watch:
            output = model.generate(
                torch.tensor([ids]),
                max_new_tokens=options.max_new_tokens,
                policy=policy or policies.groupwise(options.group_size),
                return_dict_in_generate=True,
                watch=watch,
                **sampling_options(options, number),
            )
        assert not isinstance(output, torch.Tensor)
        new = [token for token in output.sequences[0, len(ids) :].tolist() if token not in tokenizer.all_special_ids]
        continuation = pieces.decode(new, at_start=not text)
        record = {
            "text": text + continuation,
            "continuation": continuation,
            "log_prob": float(output.log_probs.sum()),
            "tokens": output.sequences.shape[1] - len(ids),
            "forwards": output.forwards,
        }
        return Result(text + continuation, record, trace_of(options, watch))

    return answer
