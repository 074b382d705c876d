"""The commands: their options, and what they do."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from anyorder.bench import run as bench
from anyorder.cli.options import (
    add_command,
    add_device,
    add_model,
    add_order,
    add_policy,
    add_sampling,
    add_texts,
    add_watching,
    length,
    load_model,
    positive,
    print_json,
    progress,
    read_texts,
    sampling_options,
    watching,
)
from anyorder.training import adapt

CHECKED_TEXT = "A language model predicts the next word. This one predicts any word, and still knows what it knew."

# ---------------------------------------------------------------------- convert


def add_convert(subparsers: Any) -> None:
    """`anyorder convert`."""
    parser = add_command(
        subparsers,
        "convert",
        _convert,
        "convert a pretrained model and save it",
        "anyorder convert smollm2-135m my-model",
    )
    parser.add_argument("source", help="built-in name, directory, GGUF file or hub id of a left-to-right model")
    parser.add_argument("output", type=Path, help="directory to write")
    parser.add_argument("--recipe", choices=("exact", "paper"), help="default: exact, or what it has")
    add_device(parser)
    parser.add_argument("--overwrite", action="store_true", help="write into a directory that is not empty")


def _convert(options: argparse.Namespace) -> None:
    import torch

    from anyorder.model.conversion import left_to_right_difference

    output: Path = options.output
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; choose a directory")
    if output.exists() and any(output.iterdir()) and not options.overwrite:
        raise ValueError(f"{output} exists and is not empty; choose another directory, or add --overwrite")
    options.model = options.source
    model, tokenizer = load_model(options)
    error = None
    if model.recipe == "exact":
        ids = torch.tensor([tokenizer.encode(CHECKED_TEXT, add_special_tokens=False)[:32]])
        error = left_to_right_difference(model, ids.to(model.device))
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    report = {"output": str(output), "recipe": model.recipe, "parameters": sum(p.numel() for p in model.parameters())}
    if error is not None:
        report["greatest_logit_difference"] = error
    if options.json:
        print_json(report)
        return
    print(f"{options.source} -> {output}: {report['parameters']:,} parameters, recipe {model.recipe}")
    if error is not None:
        print(f"greatest difference of its left-to-right logits from the base model's: {error:.2g}")


# ---------------------------------------------------------------------- adapt


def add_adapt(subparsers: Any) -> None:
    """`anyorder adapt`."""
    example = "anyorder adapt smollm2-135m my-run --train-file stories.jsonl.gz --tokens 500000"
    parser = add_command(
        subparsers, "adapt", _adapt, "train a model on any order; Ctrl-C saves, --resume goes on", example
    )
    adapt.add_options(parser, positive)
    add_device(parser)
    parser.set_defaults(dtype="bfloat16")


def _adapt(options: argparse.Namespace) -> None:
    adapt.run(options, load_model)


# ---------------------------------------------------------------------- bench


def add_bench(subparsers: Any) -> None:
    """`anyorder bench`."""
    example = "anyorder bench my-figures --dtype bfloat16 --policies groupwise:size=4 speculative --batch-size 1 8"
    parser = add_command(
        subparsers, "bench", _bench, "time decoders against the base model's own, quality beside speed", example
    )
    bench.add_options(parser, positive)
    add_model(parser)


def _bench(options: argparse.Namespace) -> None:
    bench.run(options, load_model)


# ---------------------------------------------------------------------- generate


def add_generate(subparsers: Any) -> None:
    """`anyorder generate`."""
    example = 'anyorder generate "Once upon a time" --max-new-tokens 40 --temperature 0.8 --seed 1'
    parser = add_command(subparsers, "generate", _generate, "continue a text", example)
    add_texts(parser, "text to continue (an empty one starts from the start token)")
    add_model(parser)
    parser.add_argument("--max-new-tokens", type=positive, default=64, metavar="N", help="default: 64")
    parser.add_argument("--group-size", type=positive, default=1, metavar="N", help="tokens a forward; default: 1")
    add_policy(parser)
    add_sampling(parser)
    add_watching(parser)


def _generate(options: argparse.Namespace) -> None:
    import torch

    from anyorder.decoding import policies
    from anyorder.infill.pieces import Pieces

    if options.policy is not None and options.group_size != 1:
        raise ValueError(f"--group-size {options.group_size} and --policy both say what a step commits: choose one")
    texts = read_texts(options)
    model, tokenizer = load_model(options)
    pieces = Pieces(tokenizer)
    for number, text in enumerate(progress(texts)):
        ids = tokenizer.encode(text) or [pieces.start_token()]
        with watching(options, tokenizer, len(texts)) as watch:
            output = model.generate(
                torch.tensor([ids]),
                max_new_tokens=options.max_new_tokens,
                policy=options.policy or policies.groupwise(options.group_size),
                return_dict_in_generate=True,
                watch=watch,
                **sampling_options(options, number),
            )
        assert not isinstance(output, torch.Tensor)
        new = [token for token in output.sequences[0, len(ids) :].tolist() if token not in tokenizer.all_special_ids]
        continuation = pieces.decode(new, at_start=not text)
        if options.json:
            log_prob = float(output.log_probs.sum())
            print_json({"text": text + continuation, "continuation": continuation, "log_prob": log_prob,
                         "tokens": output.sequences.shape[1] - len(ids), "forwards": output.forwards})  # fmt: skip
        else:
            print(text + continuation)


# ---------------------------------------------------------------------- infill


def add_infill(subparsers: Any) -> None:
    """`anyorder infill`."""
    example = 'anyorder infill "The cat ___ on the mat. It was ___." --length 2 3 --json'
    parser = add_command(subparsers, "infill", _infill, "fill the blanks of a text", example)
    add_texts(parser, "text with blanks")
    add_model(parser)
    parser.add_argument("--blank", default="___", metavar="MARK", help="what marks a blank; default: ___")
    parser.add_argument(
        "--length", type=length, nargs="+", default=[8], metavar="N",
        help="tokens of every blank, or one for each: a number, a range such as 2-6, or auto; default: 8",
    )  # fmt: skip
    add_order(parser)
    add_policy(parser)
    constraint = parser.add_mutually_exclusive_group()
    constraint.add_argument("--choice", nargs="+", metavar="TEXT", help="every blank is one of these")
    constraint.add_argument("--pattern", metavar="REGEX", help="every blank matches this, in exactly --length tokens")
    parser.add_argument("--special-tokens", action="store_true", help="allow special tokens inside a blank")
    add_sampling(parser)
    add_watching(parser)


def _infill(options: argparse.Namespace) -> None:
    from anyorder.infill.template import Template

    texts = read_texts(options)
    for number, text in enumerate(texts, 1):  # a mistake is told before the model is loaded
        try:
            Template.parse(text, options.blank)
        except ValueError as error:
            raise ValueError(f"{error} (text {number} of {len(texts)})" if len(texts) > 1 else error) from error
    from anyorder.decoding.constraints import Choice, Pattern
    from anyorder.infill.infiller import Infiller

    constraint = Choice(*options.choice) if options.choice else Pattern(options.pattern) if options.pattern else None
    model, tokenizer = load_model(options)
    infiller = Infiller(model, tokenizer)
    lengths = options.length[0] if len(options.length) == 1 else options.length
    for number, text in enumerate(progress(texts)):
        with watching(options, tokenizer, len(texts)) as watch:
            filled = infiller(
                text, blank=options.blank, length=lengths, group_size=options.group_size, order=options.order,
                policy=options.policy, constraints=constraint, special_tokens=options.special_tokens, watch=watch,
                **sampling_options(options, number),
            )  # fmt: skip
        if options.json:
            spans = [vars(span) for span in filled.spans]
            print_json({"text": filled.text, "spans": spans, "log_prob": filled.log_prob, "forwards": filled.forwards})
        else:
            print(filled.text)


# ---------------------------------------------------------------------- score


def add_score(subparsers: Any) -> None:
    """`anyorder score`."""
    example = 'anyorder score "The cat sat on the mat." --order random --group-size 2 --seed 1'
    parser = add_command(subparsers, "score", _score, "exact log-likelihood of a text, in any order", example)
    add_texts(parser, "text to score")
    add_model(parser)
    add_order(parser)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random order; default: 0")


def _score(options: argparse.Namespace) -> None:
    import torch

    from anyorder.core.factorization import Factorization
    from anyorder.infill.pieces import Pieces

    texts = read_texts(options)
    model, tokenizer = load_model(options)
    pieces = Pieces(tokenizer)
    for text in progress(texts):
        ids = torch.tensor([[pieces.start_token(), *pieces.encode(text, at_start=True)]])
        if ids.shape[1] == 1:
            raise ValueError("the text is empty: nothing to score")
        generator = torch.Generator().manual_seed(options.seed)
        order = Factorization.left_to_right(ids.shape[1]).regroup(options.group_size, options.order, generator)
        log_prob = float(model.log_likelihood(ids, order).sum())
        tokens, size = ids.shape[1] - 1, len(text.encode())
        report = {"log_prob": log_prob, "tokens": tokens, "nats_per_token": -log_prob / tokens,
                  "bits_per_byte": -log_prob / size / math.log(2), "order": options.order,
                  "group_size": options.group_size}  # fmt: skip
        if options.json:
            print_json({"text": text, **report})
        else:
            print(f"{log_prob:.3f} nats, {tokens} tokens, {report['nats_per_token']:.3f} nats a token, "
                  f"{report['bits_per_byte']:.3f} bits a byte")  # fmt: skip


# ---------------------------------------------------------------------- show


def add_show(subparsers: Any) -> None:
    """`anyorder show`."""
    example = 'anyorder show "The cat ___ ___ the mat" --group-size 2'
    parser = add_command(
        subparsers, "show", _show, "draw a factorization and which rows read what; loads no model", example
    )
    parser.add_argument("text", help="words; each stands for one token. With blanks (___), only those are predicted")
    add_order(parser)
    parser.add_argument("--given", type=positive, default=1, metavar="N", help="leading words given, without blanks")
    parser.add_argument("--recipe", choices=("exact", "paper"), default="exact", help="default: exact")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random order; default: 0")


def _show(options: argparse.Namespace) -> None:
    import torch

    from anyorder.core.factorization import Factorization
    from anyorder.core.layout import describe, lay_out

    words = options.text.split()
    if not words:
        raise ValueError("the text is empty: give at least one word")
    blank = torch.tensor([word == "___" for word in words])
    generator = torch.Generator().manual_seed(options.seed)
    if blank.any():
        order = Factorization.infill(blank, options.group_size, options.order, generator)
        names = [
            f"?{i}" if is_blank else word for i, (word, is_blank) in enumerate(zip(words, blank.tolist(), strict=True))
        ]
    else:
        order = Factorization.left_to_right(len(words), given=options.given)
        order, names = order.regroup(options.group_size, options.order, generator), words
    layout = lay_out(torch.zeros(1, len(words), dtype=torch.int64), order, options.recipe)
    if options.json:
        rows = {name: getattr(layout.rows, name)[0].tolist() for name in ("positions", "lo", "hi")}
        print_json({"group_ids": order.group_ids[0].tolist(), "content_rows": layout.rows.content_count, **rows})
    else:
        print(order.describe([names]), describe(layout, [names]), sep="\n\n")


# ---------------------------------------------------------------------- plot


def add_plot(subparsers: Any) -> None:
    """`anyorder plot`."""
    parser = add_command(
        subparsers, "plot", _plot, "draw in which order a text was filled", "anyorder plot trace.json order.html"
    )
    parser.add_argument("trace", type=Path, help="a file that --trace of generate or infill wrote")
    parser.add_argument("output", type=Path, help="a file ending in .html (to play and scrub), .png or .gif")


def _plot(options: argparse.Namespace) -> None:
    from anyorder.trace.record import Trace
    from anyorder.trace.render import draw

    trace = Trace.load(options.trace)
    draw(trace, options.output)
    if options.json:
        print_json({"output": str(options.output), "steps": trace.steps, "tokens": len(trace.filled)})
    else:
        print(f"{options.output}: {len(trace.filled)} tokens in {trace.steps} steps")
