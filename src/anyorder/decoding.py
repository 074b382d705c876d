"""The decode loop: one forward a step, events out.

Each step forwards the content rows of what was just committed together with the query rows that the policy asks for,
then commits what the policy chooses. Keys and values are stored in generation order and never touched again, so the
log-probabilities equal those of one parallel forward over the finished text (`cached == parallel`). Forced tokens make
the same loop teacher forcing.

This module knows token ids only, never text.

Shapes: B batch, T columns, N evaluated positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from anyorder.cache import KeyValueStore
from anyorder.factorization import ABSENT, GIVEN, Factorization
from anyorder.inputs import check_ids, real_tokens
from anyorder.layout import Arrangement, compact, join
from anyorder.options import check_options
from anyorder.policies import GroupWise, Policy
from anyorder.randomness import Generators, uniforms
from anyorder.sampling import AllowedTokens, Sampler, token_log_probs

if TYPE_CHECKING:
    from anyorder.modeling import AnyOrderForCausalLM

FREE = -100
"""In `forced_ids`: the position is drawn, not forced (the id that Hugging Face ignores in labels)."""


@dataclass(frozen=True)
class Commit:
    """One token that decoding has fixed."""

    row: int
    position: int
    token: int
    log_prob: float
    """log p of the token under the model itself: before temperature, truncation and bans. Nats."""
    step: int


@dataclass(frozen=True)
class GenerateOutput:
    """What `generate` returns with `return_dict_in_generate=True`."""

    sequences: Tensor
    """(B, T) int64: the filled ids; the pad id at absent positions and behind a committed end."""
    log_probs: Tensor
    """(B, T) float32: log p of each generated token under the model itself, in nats; 0 elsewhere."""
    steps: Tensor
    """(B, T) int64: the step at which each position was committed; -1 if given, -2 if absent or behind the end."""
    forwards: int
    """Forwards of the model, the first over the given tokens included."""

    def map(self, function: Callable[[Tensor], Tensor]) -> GenerateOutput:
        """The same with every tensor replaced."""
        return GenerateOutput(function(self.sequences), function(self.log_probs), function(self.steps), self.forwards)


@dataclass(frozen=True)
class _Step:
    """What one step committed; `row`, `column`, `token`, `log_prob` are (N,), on the CPU."""

    row: Tensor
    column: Tensor
    token: Tensor
    log_prob: Tensor
    step: int


class _Run:
    """The state of one decoding run, and the loop over it."""

    def __init__(
        self,
        model: AnyOrderForCausalLM,
        input_ids: Tensor,
        factorization: Factorization,
        policy: Policy,
        sampler: Sampler,
        uniform: Tensor,
        end_ids: Sequence[int],
        forced_ids: Tensor | None,
    ):
        if int(factorization.documents.max()):
            raise ValueError("decoding takes one document a row: unstack the packed factorization first")
        self.model, self.policy, self.sampler, self.uniform = model, policy, sampler, uniform
        self.factorization = policy.prepare(factorization.to("cpu"))
        self._check_tokens(forced_ids, sampler.allowed)
        self.forced = None if forced_ids is None else forced_ids.cpu()
        self.end_ids = torch.tensor(list(end_ids), dtype=torch.int64)
        self.ids = input_ids.masked_fill(self.factorization.is_predicted, 0)
        self.is_open = self.factorization.is_predicted
        self.known = self.factorization.is_given
        self.steps = self.factorization.group_ids.clamp(max=-1).masked_fill(self.is_open, ABSENT)
        self.log_probs = torch.zeros(self.ids.shape)
        self.every = torch.arange(self.ids.shape[1]).expand_as(self.ids)
        self.last_given = (self.every * self.known).amax(dim=1)
        self.end = torch.full_like(self.last_given, self.ids.shape[1])  # column of the earliest committed end
        self.forwards = 0

    def _check_tokens(self, forced_ids: Tensor | None, allowed: AllowedTokens | None) -> None:
        vocabulary, shape = self.model.vocabulary_size, self.factorization.group_ids.shape
        if forced_ids is not None:
            check_ids("forced_ids", forced_ids)
            bad = (forced_ids != FREE) & ((forced_ids < 0) | (forced_ids >= vocabulary))
            if bool(bad.any()):
                raise ValueError(f"forced_ids holds {int(forced_ids[bad][0])}: neither {FREE} nor a token id")
        if allowed is not None and allowed.masks.shape[1] != vocabulary:
            raise ValueError(f"allowed_tokens has masks over {allowed.masks.shape[1]} tokens, not {vocabulary}")
        for name, tensor in (
            ("forced_ids", forced_ids),
            ("allowed_tokens.index", None if allowed is None else allowed.index),
        ):
            if tensor is not None and tensor.shape != shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the factorization {tuple(shape)}")

    @torch.inference_mode()  # a few per cent faster than no_grad; what leaves is made outside of it
    def __iter__(self) -> Iterator[_Step]:
        columns, _, _ = compact(self.known)
        tokens = Arrangement(self.ids, self.factorization, self.model.recipe)
        store = KeyValueStore(self.ids.shape[1])
        first, count = torch.zeros_like(tokens.counts), self.known.sum(dim=1)
        tokens.append(columns, count)
        while bool(self.is_open.any()):
            asked = self.policy.ask(self.factorization, self.is_open)
            hidden, row, column = self._forward(tokens, store, asked, first, count)
            logits = self.model.head(hidden).float()
            chosen = self.policy.choose(logits, row, column)
            if not bool(chosen.all()):
                idle = sorted(set(row.tolist()) - set(row[chosen].tolist()))
                if idle:
                    raise ValueError(
                        f"{self.policy!r} committed nothing in row {idle[0]}: at least one position a step"
                    )
                logits, row, column = logits[chosen.to(logits.device)], row[chosen], column[chosen]
            token, log_prob = self._draw(logits, row, column)
            committed = self._commit(row, column, token, log_prob)
            first = tokens.counts
            count = committed.sum(dim=1)
            tokens.append(compact(committed)[0], count)
            yield _Step(row, column, token, log_prob, self.forwards - 1)

    def _forward(
        self, tokens: Arrangement, store: KeyValueStore, asked: Tensor, first: Tensor, count: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(N, E) hidden states that predict the asked positions, and their rows and columns."""
        visible = tokens.counts[:, None]
        free = asked & tokens.free(self.every, visible.expand_as(asked))
        columns, used, place = compact(asked & ~free)
        content = tokens.content(first, count)
        query = tokens.queries(columns, used, visible.expand_as(columns))
        rows = join(content, query)
        hidden = self.model.hidden_rows(rows, tokens.columns, store)
        self.forwards += 1
        # A free position is predicted by the content row of the last committed token.
        source = torch.where(free, count[:, None] - 1, rows.content_count + place)
        row, column = asked.nonzero(as_tuple=True)
        return hidden[row.to(hidden.device), source[asked].to(hidden.device)], row, column

    def _draw(self, logits: Tensor, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
        some = self.ids.gather(1, self.known.to(torch.int8).argmax(dim=1, keepdim=True))
        visible = torch.where(self.known, self.ids, some)
        processed = self.sampler.process(logits, visible, row, column)
        token = self.sampler.draw(processed, self.uniform[row, column])
        if self.forced is not None:
            forced = self.forced[row, column].to(token.device)
            token = torch.where(forced == FREE, token, forced)
        return token.cpu(), token_log_probs(logits, token).cpu()

    def _commit(self, row: Tensor, column: Tensor, token: Tensor, log_prob: Tensor) -> Tensor:
        """Write the tokens down; what lies behind a new end is no longer open. (B, T) bool: what was committed."""
        committed = torch.zeros_like(self.is_open)
        committed[row, column] = True
        self.ids[row, column] = token
        self.log_probs[row, column] = log_prob
        self.steps[row, column] = self.forwards - 1
        self.known = self.known | committed
        self.is_open = self.is_open & ~committed
        ends = torch.isin(token, self.end_ids) & (column > self.last_given[row])
        if self.forced is not None:
            ends &= self.forced[row, column] == FREE
        if bool(ends.any()):
            self.end.scatter_reduce_(0, row[ends], column[ends], "amin")
            self.is_open &= self.every < self.end[:, None]
        return committed

    def output(self, pad_id: int) -> GenerateOutput:
        keep = self.known & (self.every <= self.end[:, None])
        return GenerateOutput(
            sequences=torch.where(keep, self.ids, pad_id),
            log_probs=torch.where(keep, self.log_probs, 0.0),
            steps=torch.where(keep, self.steps, ABSENT),
            forwards=self.forwards,
        )


def generate(
    model: AnyOrderForCausalLM,
    input_ids: Tensor,
    factorization: Factorization | None = None,
    policy: Policy | None = None,
    *,
    max_new_tokens: int | None = None,
    attention_mask: Tensor | None = None,
    return_dict_in_generate: bool = False,
    pad_token_id: int | None = None,
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
        options: see `stream`.

    Returns:
        (B, T) ids, or with prompts (B, T + new tokens), as transformers' generate: padding of the prompts kept,
        behind an end the pad id. Or a `GenerateOutput`.
    """
    request = _request(model, input_ids, factorization, policy, max_new_tokens, attention_mask)
    run = _start(model, request, options)
    for _ in run:
        pass
    output = run.output(_pad_id(model, pad_token_id))
    if factorization is None:
        output = _as_continuations(output, input_ids, request)
    output = output.map(lambda tensor: tensor.to(input_ids.device))
    return output if return_dict_in_generate else output.sequences


def stream(
    model: AnyOrderForCausalLM,
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
        forced_ids: (B, T) int64, tokens to commit instead of drawing; -100 where a token is to be drawn. A forced token
            is never an end.

    With prompts, T of the last two is the longest prompt and max_new_tokens, counted from each prompt's first token.
    """
    request = _request(model, input_ids, factorization, policy, max_new_tokens, attention_mask)
    return _commits(_start(model, request, options))


def _commits(run: _Run) -> Iterator[Commit]:
    for step in run:
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
    model: AnyOrderForCausalLM,
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


def _start(model: AnyOrderForCausalLM, request: _Request, options: dict[str, Any]) -> _Run:
    check_options(options, _start_checked, "max_new_tokens", "pad_token_id")
    return _start_checked(model, request, **options)


def _start_checked(
    model: AnyOrderForCausalLM,
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
) -> _Run:
    if do_sample is None:
        do_sample = any(value is not None for value in (temperature, top_k, top_p, min_p, generator))
    factorization = request.factorization
    sampler = Sampler(do_sample, temperature, top_k, top_p, min_p, repetition_penalty, allowed_tokens)
    uniform = torch.zeros(request.ids.shape)
    if do_sample:
        uniform = uniforms(factorization.lengths.tolist(), factorization.length, generator)
    ends = (
        _end_ids(model) if eos_token_id is None else torch.as_tensor(eos_token_id, dtype=torch.int64).flatten().tolist()
    )
    return _Run(model, request.ids, factorization, request.policy, sampler, uniform, ends, forced_ids)


def _end_ids(model: AnyOrderForCausalLM) -> list[int]:
    """The model's own end ids: none, one or several."""
    config = model.generation_config
    end = None if config is None else config.eos_token_id
    return [] if end is None else [end] if isinstance(end, int) else list(end)


def _pad_id(model: AnyOrderForCausalLM, pad_token_id: int | None) -> int:
    config = model.generation_config
    own = None if config is None else config.pad_token_id
    return int(next(value for value in (pad_token_id, own, *_end_ids(model), 0) if value is not None))


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
