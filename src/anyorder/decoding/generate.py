"""Filling the predicted positions of a factorization: requests in, ids or a stream of commits out.

The loop itself is `engine`, which positions each step evaluates and commits is a policy's (`policies`), what users may
ask for is `request`'s. Forced tokens make the same loop teacher forcing. This module knows token ids only, never text.

Shapes: B batch, T columns, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from anyorder.core.factorization import ABSENT, GIVEN, Factorization
from anyorder.decoding.engine import Run, Step
from anyorder.decoding.events import Commit, GenerateOutput, Watcher
from anyorder.decoding.policies import Policy
from anyorder.decoding.request import Request, check_left_to_right, collect, end_ids, request, start
from anyorder.decoding.streamers import StreamerFeed
from anyorder.model.base import AnyOrderPreTrainedModel
from anyorder.model.kv_cache import KeyValueStore

_OF_GENERATE = (
    "return_dict_in_generate", "pad_token_id", "output_scores", "output_logits", "watch", "streamer", "inputs",
)  # fmt: skip
"""Options of `generate` alone; a generation config may hold the first four, too."""


def generate(
    model: AnyOrderPreTrainedModel,
    input_ids: Tensor | None = None,
    factorization: Factorization | None = None,
    policy: Policy | None = None,
    *,
    inputs: Tensor | None = None,
    watch: Watcher | None = None,
    streamer: BaseStreamer | None = None,
    **options: Any,
) -> Tensor | GenerateOutput:
    """Fill every predicted position.

    Args:
        model: a converted model.
        input_ids: (B, T) int64. With a factorization: T is its length, ids at predicted positions are ignored.
            Without: prompts, continued from left to right; shorter ones are padded (left or right) and masked. None:
            the start token, if the model has one.
        factorization: which positions are given, and the order of the others.
        policy: which positions each step commits; default `policies.groupwise()`, the factorization's own groups.
        inputs: transformers' other name of input_ids.
        watch: is told of each step, such as a `trace.Recorder`. Prompts stand at its columns from their first token.
        streamer: transformers', for prompts: gets them, then (B,) tokens for each column that is settled in every row;
            the policy must keep the order.
        options: those of `stream`, and
            return_dict_in_generate: return a `GenerateOutput` instead of the ids alone.
            pad_token_id: default: the model's pad id, else its end id.
            output_scores, output_logits: keep the logits that tokens were drawn from in the `GenerateOutput`, with or
            without what sampling options made of them: B x T x V float32 each.

    Returns:
        (B, T) ids, or with prompts (B, T + new tokens), as transformers' generate: padding of the prompts kept,
        behind an end the pad id. Or a `GenerateOutput`. B counts each row num_return_sequences times.

    Raises:
        ValueError: naming the option, its value and the way out, before anything runs.
    """
    ids = _either(input_ids, inputs)
    return generate_from(model, None, ids, factorization, policy, watch=watch, streamer=streamer, **options)


def generate_from(
    model: AnyOrderPreTrainedModel,
    encoded: Sequence[KeyValueStore | None] | None,
    input_ids: Tensor | None,
    factorization: Factorization | None,
    policy: Policy | None = None,
    *,
    watch: Watcher | None = None,
    streamer: BaseStreamer | None = None,
    **options: Any,
) -> Tensor | GenerateOutput:
    """`generate`, for callers in this package that have encoded given tokens themselves: see `engine.Run`."""
    taken, output_options = collect(model, options, factorization is None, *_OF_GENERATE)
    asked = request(model, input_ids, factorization, policy, taken)
    kept = [name for name in ("output_scores", "output_logits") if output_options.get(name)]
    if kept and not output_options.get("return_dict_in_generate"):
        raise ValueError(f"{kept[0]} is part of the whole result: add return_dict_in_generate=True")
    pad_id = next((i for i in (output_options.get("pad_token_id"), *end_ids(model)) if i is not None), 0)
    run, steps = start(model, asked, bool(kept), encoded)
    feed = None if streamer is None else _feed(streamer, run, asked, int(pad_id))
    if watch is not None:
        run.drawer.told = watch.offered
        watch.begin(run.ids.clone(), run.is_open.clone())
    for step in steps:
        if watch is not None:
            watch.step(list(_commits([step])))
        if feed is not None:
            feed.step()
    if feed is not None:
        feed.end()
    output = _output(run, int(pad_id), kept)
    if factorization is None:
        output = _as_continuations(output, asked)
    output = output.map(lambda tensor: tensor.to(asked.prompts.device))
    return output if output_options.get("return_dict_in_generate") else output.sequences


def stream(
    model: AnyOrderPreTrainedModel,
    input_ids: Tensor | None = None,
    factorization: Factorization | None = None,
    policy: Policy | None = None,
    *,
    inputs: Tensor | None = None,
    **options: Any,
) -> Iterator[Commit]:
    """The same as `generate`, yielding each commit as it is made, in the order of positions within a step.

    Positions count from the first real token of a prompt. A token that was committed behind an end which was
    committed later has been yielded, but is not in the result of `generate`.

    Options, of `generate` alike; None is as if not given:
        max_new_tokens, or max_length with the (padded) prompts: for prompts, default 20 new ones. 0 is none.
        min_new_tokens, or min_length: for prompts, no end before so many.
        attention_mask: (B, T), for prompts: 0 marks padding.
        num_return_sequences: rows of the result for each given row, each drawn with numbers of its own.
        do_sample: draw; default: if a sampling option, a generator or a seed is given, or a generation config says so.
        temperature, top_k, top_p, min_p, repetition_penalty: as in transformers, but that top_k is 50 there if nothing
            is said, and off here. temperature=0 is the most likely token.
        suppress_tokens: ids that are not drawn.
        generator, or seed: a torch.Generator, or one a row. A row's result does not depend on its batch mates.
        generation_config: transformers', for all of these that are not given themselves. For prompts the model's own
            saved one is the next to be asked; with a factorization its end and padding ids are.
        eos_token_id: an id or several; default: the model's; () for none. An end counts only behind the last given
            token. What lies behind it is dropped, and decoding goes on until everything before it is filled.
        stop_strings, with tokenizer; max_time, in seconds; stopping_criteria: transformers', for text that grows from
            left to right. Criteria get each row by itself, without padding, and no scores.
        logits_processor: transformers', for text that grows from left to right, one token after the other; called as
            criteria are.
        allowed_tokens: `AllowedTokens`, sets of tokens that positions may take.
        blank_constraints: `constraints.BlankConstraints`, patterns that runs of positions must match, filled from left
            to right.
        forced_ids: (B, T) int64, tokens to commit instead of drawing; -100 where a token is to be drawn. A forced token
            is never an end.
        compile: what engine="openvino", or on CUDA "cuda_graphs", was called; warns.
        runner: a `runtime.runner.ModelRunner` of this model, which executes the forwards; default: eager PyTorch.
        engine, weights: what runs steps: "eager" PyTorch, "openvino" with weights in int8, bfloat16 or float32, or
            "cuda_graphs"; default "auto" (see `runtime.engines`).
        use_cache and others of transformers' names that change no result there: no effect (`conventions`).

    With prompts, T of allowed_tokens, blank_constraints and forced_ids is the longest prompt and the new tokens,
    counted from each prompt's first token.

    Raises:
        ValueError: naming the option, its value and the way out, before anything runs.
    """
    for name in options:
        if name in _OF_GENERATE:
            raise ValueError(f"{name} is for generate: a stream yields each commit and has no result of its own")
    taken, _ = collect(model, options, factorization is None)
    return _commits(start(model, request(model, _either(input_ids, inputs), factorization, policy, taken))[1])


def _either(input_ids: Tensor | None, inputs: Tensor | None) -> Tensor | None:
    if input_ids is not None and inputs is not None:
        raise ValueError("inputs and input_ids are two names of one thing: give one of them")
    return inputs if input_ids is None else input_ids


def _commits(steps: Iterable[Step]) -> Iterator[Commit]:
    for step in steps:
        rows = zip(step.row.tolist(), step.column.tolist(), step.token.tolist(), step.log_prob.tolist(), strict=True)
        for row, column, token, log_prob in rows:
            yield Commit(row, column, token, log_prob, step.step)


def _feed(streamer: BaseStreamer, run: Run, asked: Request, pad_id: int) -> StreamerFeed:
    if not asked.prompt_lengths:
        raise ValueError("streamer is for prompts; with a factorization, stream() tells of tokens in any order")
    check_left_to_right("streamer", run.factorization, asked.policy)
    feed = StreamerFeed(streamer, run, asked.prompt_lengths, pad_id)
    feed.begin(asked.prompts)
    return feed


def _output(run: Run, pad_id: int, kept: list[str]) -> GenerateOutput:
    keep = run.known & (run.every <= run.end[:, None])
    logits = {"output_scores": run.drawer.scores, "output_logits": run.drawer.logits}
    by_column = {name: None if name not in kept or of is None else tuple(of.unbind(1)) for name, of in logits.items()}
    return GenerateOutput(
        sequences=torch.where(keep, run.ids, pad_id),
        log_probs=torch.where(keep, run.log_probs, 0.0),
        steps=torch.where(keep, run.steps, ABSENT),
        forwards=run.forwards + run.common_forwards,
        scores=by_column["output_scores"],
        logits=by_column["output_logits"],
    )


def _as_continuations(output: GenerateOutput, asked: Request) -> GenerateOutput:
    """Put each row back behind its own prompt, padding included, and cut columns that no row reached."""
    lengths = torch.tensor(asked.prompt_lengths)
    new = lengths[:, None] + torch.arange(asked.ids.shape[1] - int(lengths.max()))
    prompt = asked.prompts.cpu()
    reached = int((output.steps.gather(1, new) != ABSENT).any(dim=0).sum())
    before = (prompt, torch.zeros(prompt.shape), torch.full_like(prompt, GIVEN))
    after = (tensor.gather(1, new[:, :reached]) for tensor in (output.sequences, output.log_probs, output.steps))
    sequences, log_probs, steps = (torch.cat(pair, dim=1) for pair in zip(before, after, strict=True))
    scores, logits = (
        None if of is None else tuple(torch.stack([of[c][b] for b, c in enumerate(column)]) for column in columns)
        for of, columns in ((part, new[:, :reached].T.tolist()) for part in (output.scores, output.logits))
    )
    return GenerateOutput(sequences, log_probs, steps, output.forwards, scores, logits)


class GenerationMixin:
    """Generation as methods of a model."""

    def generate(
        self,
        input_ids: Tensor | None = None,
        factorization: Factorization | None = None,
        policy: Policy | None = None,
        **options: Any,
    ) -> Tensor | GenerateOutput:
        """Fill the predicted positions: see `decoding.generate`."""
        return generate(cast(AnyOrderPreTrainedModel, self), input_ids, factorization, policy, **options)

    def stream(
        self,
        input_ids: Tensor | None = None,
        factorization: Factorization | None = None,
        policy: Policy | None = None,
        **options: Any,
    ) -> Iterator[Commit]:
        """The same, commit by commit: see `decoding.generate.stream`."""
        return stream(cast(AnyOrderPreTrainedModel, self), input_ids, factorization, policy, **options)
