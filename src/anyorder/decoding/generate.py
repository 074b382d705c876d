"""Filling the predicted positions of a factorization: requests in, ids or a stream of commits out.

The loop itself is `loop`, which positions each step evaluates and commits is a policy's (`policies`). Forced tokens
make the same loop teacher forcing. This module knows token ids only, never text.

Shapes: B batch, T columns, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from anyorder.core.factorization import ABSENT, GIVEN, Factorization
from anyorder.core.rng import Generators, row_generators, uniforms
from anyorder.core.validation import check_ids, check_options, real_tokens
from anyorder.decoding.constraints import BlankConstraints
from anyorder.decoding.draw import NOT_FORCED
from anyorder.decoding.engine import Run, Step, Uniforms
from anyorder.decoding.events import Commit, GenerateOutput, Watcher
from anyorder.decoding.policies import GroupWise, Policy
from anyorder.decoding.sampling import AllowedTokens, Sampler, does_sample
from anyorder.model.base import AnyOrderPreTrainedModel
from anyorder.runtime.compiled import compiled_runner
from anyorder.runtime.runner import EagerRunner


def generate(
    model: AnyOrderPreTrainedModel,
    input_ids: Tensor,
    factorization: Factorization | None = None,
    policy: Policy | None = None,
    *,
    max_new_tokens: int | None = None,
    attention_mask: Tensor | None = None,
    return_dict_in_generate: bool = False,
    pad_token_id: int | None = None,
    watch: Watcher | None = None,
    **options: Any,
) -> Tensor | GenerateOutput:
    """Fill every predicted position.

    Args:
        model: a converted model.
        input_ids: (B, T) int64. With a factorization: T is its length, ids at predicted positions are ignored.
            Without: prompts, continued from left to right; shorter ones are padded (left or right) and masked.
        factorization: which positions are given, and the order of the others.
        policy: which positions each step commits; default `policies.groupwise()`, the factorization's own groups.
        max_new_tokens: without a factorization: tokens to add. Default 20, as in transformers.
        attention_mask: (B, T), without a factorization: 0 marks padding of the prompts.
        return_dict_in_generate: return a `GenerateOutput` instead of the ids alone.
        pad_token_id: default: the model's pad id, else its end id.
        watch: is told of each step, such as a `trace.Recorder`. Prompts stand at its columns from their first token.
        options: see `stream`.

    Returns:
        (B, T) ids, or with prompts (B, T + new tokens), as transformers' generate: padding of the prompts kept,
        behind an end the pad id. Or a `GenerateOutput`.
    """
    request = _request(model, input_ids, factorization, policy, max_new_tokens, attention_mask)
    run, steps = _start(model, request, options)
    if watch is not None:
        watch.begin(run.ids.clone(), run.is_open.clone())
    for step in steps:
        if watch is not None:
            watch.step(list(_commits([step])))
    output = _output(run, _pad_id(model, pad_token_id))
    if factorization is None:
        output = _as_continuations(output, input_ids, request)
    output = output.map(lambda tensor: tensor.to(input_ids.device))
    return output if return_dict_in_generate else output.sequences


def stream(
    model: AnyOrderPreTrainedModel,
    input_ids: Tensor,
    factorization: Factorization | None = None,
    policy: Policy | None = None,
    *,
    max_new_tokens: int | None = None,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> Iterator[Commit]:
    """The same as `generate`, yielding each commit as it is made, in the order of positions within a step.

    Positions count from the first real token of a prompt. A token that was committed behind an end which was
    committed later has been yielded, but is not in the result of `generate`.

    Options, of `generate` alike:
        do_sample: draw; default: if a sampling option or a generator is given.
        temperature, top_k, top_p, min_p, repetition_penalty: as in transformers.
        generator: a torch.Generator, or one a row. A row's result does not depend on its batch mates.
        eos_token_id: an id or several; default: the model's; () for none. An end counts only behind the last given
            token. What lies behind it is dropped, and decoding goes on until everything before it is filled.
        allowed_tokens: `AllowedTokens`, sets of tokens that positions may take.
        blank_constraints: `constraints.BlankConstraints`, patterns that runs of positions must match, filled from left
            to right.
        compile: run steps as compiled code; the first of each shape takes minutes, once a machine (see `compiled`).
        forced_ids: (B, T) int64, tokens to commit instead of drawing; -100 where a token is to be drawn. A forced token
            is never an end.

    With prompts, T of the last two is the longest prompt and max_new_tokens, counted from each prompt's first token.
    """
    request = _request(model, input_ids, factorization, policy, max_new_tokens, attention_mask)
    return _commits(_start(model, request, options)[1])


def _commits(steps: Iterable[Step]) -> Iterator[Commit]:
    for step in steps:
        rows = zip(step.row.tolist(), step.column.tolist(), step.token.tolist(), step.log_prob.tolist(), strict=True)
        for row, column, token, log_prob in rows:
            yield Commit(row, column, token, log_prob, step.step)


@dataclass(frozen=True)
class _Request:
    ids: Tensor
    factorization: Factorization
    policy: Policy
    prompt_lengths: list[int]


def _request(
    model: AnyOrderPreTrainedModel,
    input_ids: Tensor,
    factorization: Factorization | None,
    policy: Policy | None,
    max_new_tokens: int | None,
    attention_mask: Tensor | None,
) -> _Request:
    policy = policy if policy is not None else GroupWise()
    if not isinstance(policy, Policy):
        raise ValueError(f"policy must come from anyorder.policies, got {policy!r}")
    if factorization is not None:
        for name, value in (("max_new_tokens", max_new_tokens), ("attention_mask", attention_mask)):
            if value is not None:
                raise ValueError(f"{name} is for prompts; with a factorization, its length and absent positions say it")
        ids = model.check_input(input_ids, factorization).cpu()
        return _Request(ids, factorization, policy, [])
    new = 20 if max_new_tokens is None else max_new_tokens
    if not isinstance(new, int) or new < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {new!r}")
    real = real_tokens(input_ids, attention_mask)
    prompts = [row[keep] for row, keep in zip(input_ids.cpu(), real, strict=True)]
    lengths = [len(prompt) for prompt in prompts]
    if not all(lengths):
        raise ValueError(
            f"prompt {lengths.index(0)} is empty: generation needs at least one token, usually the start token"
        )
    ids = torch.zeros(len(prompts), max(lengths) + new, dtype=torch.int64)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    parts = [Factorization.left_to_right(length + new, given=length) for length in lengths]
    order = Factorization.stack(parts)
    return _Request(model.check_input(ids, order), order, policy, lengths)


def _start(model: AnyOrderPreTrainedModel, request: _Request, options: dict[str, Any]) -> tuple[Run, Iterator[Step]]:
    check_options(options, _start_checked, "max_new_tokens", "pad_token_id", "watch")
    return _start_checked(model, request, **options)


def _start_checked(
    model: AnyOrderPreTrainedModel,
    request: _Request,
    do_sample: bool | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    generator: Generators = None,
    eos_token_id: int | Sequence[int] | None = None,
    allowed_tokens: AllowedTokens | None = None,
    forced_ids: Tensor | None = None,
    blank_constraints: BlankConstraints | None = None,
    compile: bool = False,
) -> tuple[Run, Iterator[Step]]:
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    do_sample = does_sample(do_sample, generator, settings)
    policy, factorization = request.policy, request.factorization.to("cpu")
    if int(factorization.documents.max()):
        raise ValueError("decoding takes one document a row: unstack the packed factorization first")
    sampler = Sampler(do_sample, temperature, top_k, top_p, min_p, repetition_penalty, allowed_tokens)
    _check_tokens(model, factorization, forced_ids, allowed_tokens)
    ends = (
        _end_ids(model) if eos_token_id is None else torch.as_tensor(eos_token_id, dtype=torch.int64).flatten().tolist()
    )
    numbers = _uniforms(factorization, generator, do_sample or policy.selects_at_random)
    factorization = policy.prepare(factorization)
    if blank_constraints is not None:
        if not policy.keeps_order:
            raise ValueError(f"constrained blanks are filled from left to right, but {policy!r} chooses its own order")
        blank_constraints.check_order(factorization)
    runner = compiled_runner(model) if compile else EagerRunner(model)
    run = Run(runner, request.ids, factorization, sampler, numbers, ends, forced_ids, blank_constraints)
    return run, run.steps_of(policy.scheduler(run))


def _uniforms(factorization: Factorization, generator: Generators, needed: bool) -> Uniforms:
    if not needed:
        zero = torch.zeros(factorization.group_ids.shape, dtype=torch.float64)
        return Uniforms(zero, zero, zero, zero)
    lengths, columns = factorization.lengths.tolist(), factorization.length
    sources = row_generators(generator, len(lengths))
    draw, choice, draft, accept = (uniforms(lengths, columns, sources) for _ in range(4))
    return Uniforms(draw, choice, draft, accept)


def _check_tokens(
    model: AnyOrderPreTrainedModel,
    factorization: Factorization,
    forced_ids: Tensor | None,
    allowed: AllowedTokens | None,
) -> None:
    vocabulary, shape = model.vocabulary_size, factorization.group_ids.shape
    if forced_ids is not None:
        check_ids("forced_ids", forced_ids)
        bad = (forced_ids != NOT_FORCED) & ((forced_ids < 0) | (forced_ids >= vocabulary))
        if bool(bad.any()):
            raise ValueError(f"forced_ids holds {int(forced_ids[bad][0])}: neither {NOT_FORCED} nor a token id")
    if allowed is not None and allowed.masks.shape[1] != vocabulary:
        raise ValueError(f"allowed_tokens has masks over {allowed.masks.shape[1]} tokens, not {vocabulary}")
    for name, tensor in (
        ("forced_ids", forced_ids),
        ("allowed_tokens.index", None if allowed is None else allowed.index),
    ):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the factorization {tuple(shape)}")


def _end_ids(model: AnyOrderPreTrainedModel) -> list[int]:
    """The model's own end ids: none, one or several."""
    config = model.generation_config
    end = None if config is None else config.eos_token_id
    return [] if end is None else [end] if isinstance(end, int) else list(end)


def _pad_id(model: AnyOrderPreTrainedModel, pad_token_id: int | None) -> int:
    config = model.generation_config
    own = None if config is None else config.pad_token_id
    return int(next(value for value in (pad_token_id, own, *_end_ids(model), 0) if value is not None))


def _output(run: Run, pad_id: int) -> GenerateOutput:
    keep = run.known & (run.every <= run.end[:, None])
    return GenerateOutput(
        sequences=torch.where(keep, run.ids, pad_id),
        log_probs=torch.where(keep, run.log_probs, 0.0),
        steps=torch.where(keep, run.steps, ABSENT),
        forwards=run.forwards + run.common_forwards,
    )


def _as_continuations(output: GenerateOutput, input_ids: Tensor, request: _Request) -> GenerateOutput:
    """Put each row back behind its own prompt, padding included, and cut columns that no row reached."""
    lengths = torch.tensor(request.prompt_lengths)
    new = lengths[:, None] + torch.arange(request.ids.shape[1] - int(lengths.max()))
    prompt = input_ids.cpu()
    reached = int((output.steps.gather(1, new) != ABSENT).any(dim=0).sum())
    before = (prompt, torch.zeros(prompt.shape), torch.full_like(prompt, GIVEN))
    after = (tensor.gather(1, new[:, :reached]) for tensor in (output.sequences, output.log_probs, output.steps))
    sequences, log_probs, steps = (torch.cat(pair, dim=1) for pair in zip(before, after, strict=True))
    return GenerateOutput(sequences, log_probs, steps, output.forwards)


class GenerationMixin:
    """Generation as methods of a model."""

    def generate(
        self,
        input_ids: Tensor,
        factorization: Factorization | None = None,
        policy: Policy | None = None,
        **options: Any,
    ) -> Tensor | GenerateOutput:
        """Fill the predicted positions: see `decoding.generate`."""
        return generate(cast(AnyOrderPreTrainedModel, self), input_ids, factorization, policy, **options)

    def stream(
        self,
        input_ids: Tensor,
        factorization: Factorization | None = None,
        policy: Policy | None = None,
        **options: Any,
    ) -> Iterator[Commit]:
        """The same, commit by commit: see `decoding.generate.stream`."""
        return stream(cast(AnyOrderPreTrainedModel, self), input_ids, factorization, policy, **options)
