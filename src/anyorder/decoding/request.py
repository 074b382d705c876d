"""What users ask of `generate`, checked before anything runs, and the run that it asks for.

This module knows token ids only, never text; which names of transformers count is `conventions`' business.

Shapes: B batch, T columns, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList
from transformers.generation.stopping_criteria import (
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from anyorder.core.factorization import Factorization
from anyorder.core.options import check_options
from anyorder.core.rng import Generators, row_generators, uniforms
from anyorder.core.validation import check_ids, real_tokens
from anyorder.decoding import conventions
from anyorder.decoding.constraints import BlankConstraints
from anyorder.decoding.draw import NOT_FORCED, Drawer
from anyorder.decoding.engine import Run, Step, Uniforms
from anyorder.decoding.policies import GroupWise, Policy
from anyorder.decoding.sampling import AllowedTokens, Sampler, check_number
from anyorder.decoding.stopping import EndRule
from anyorder.model.base import AnyOrderPreTrainedModel
from anyorder.model.compatibility import context_length
from anyorder.model.kv_cache import KeyValueStore
from anyorder.runtime.engines import check_engine, compiled_engine, runner_for
from anyorder.runtime.runner import ModelRunner

logger = logging.getLogger(__name__)

DEFAULT_NEW_TOKENS = 20


@dataclass(frozen=True)
class Options:
    """What `generate` and `stream` take beside ids, order and policy: see `generate.stream`."""

    attention_mask: Tensor | None = None
    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int | None = None
    min_length: int | None = None
    num_return_sequences: int = 1
    do_sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    suppress_tokens: Sequence[int] | None = None
    generator: Generators = None
    seed: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | Sequence[int] | None = None
    stop_strings: str | Sequence[str] | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    max_time: float | None = None
    stopping_criteria: Sequence[StoppingCriteria] | None = None
    logits_processor: Sequence[LogitsProcessor] | None = None
    allowed_tokens: AllowedTokens | None = None
    blank_constraints: BlankConstraints | None = None
    forced_ids: Tensor | None = None
    compile: bool = False
    runner: ModelRunner | None = None
    engine: str = "auto"
    weights: str | None = None

    def __post_init__(self) -> None:
        check_engine(self.engine, self.weights)
        if self.runner is not None and (self.compile or self.engine != "auto" or self.weights is not None):
            raise ValueError("runner, compile and engine all say what runs steps: give one of them")
        if self.compile and self.engine != "auto":
            raise ValueError(f"compile=True and engine={self.engine!r} both say what runs steps: give one of them")
        for name, least in (
            ("max_new_tokens", 0), ("max_length", 1), ("min_new_tokens", 0), ("min_length", 0),
            ("num_return_sequences", 1), ("seed", 0),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and (not isinstance(value, Integral) or isinstance(value, bool) or value < least):
                raise ValueError(f"{name} must be a whole number, at least {least}, got {value!r}")
        check_number("max_time", self.max_time)
        for one, other in (("max_new_tokens", "max_length"), ("min_new_tokens", "min_length"), ("generator", "seed")):
            if getattr(self, one) is not None and getattr(self, other) is not None:
                raise ValueError(f"{one} and {other} say the same thing: give one of them")

    @property
    def generators(self) -> Generators:
        """The generator, or that of the seed."""
        return self.generator if self.seed is None else torch.Generator().manual_seed(int(self.seed))


NAMES = tuple(field.name for field in fields(Options))


@dataclass(frozen=True)
class Request:
    """A checked request."""

    prompts: Tensor
    """(B, T) int64: what the user gave, each row as often as sequences are wanted of it."""
    ids: Tensor
    """(B, T) int64 on the CPU, with room for new tokens."""
    factorization: Factorization
    """As the user gave it, or made for the prompts."""
    policy: Policy
    prompt_lengths: list[int]
    """Real tokens of each prompt; empty with a factorization."""
    options: Options


def collect(
    model: AnyOrderPreTrainedModel, given: dict[str, Any], prompts: bool, *more: str
) -> tuple[Options, dict[str, Any]]:
    """The options that count of what a call gives, and those of them in `more`, which the caller knows.

    Raises:
        ValueError: for a name that is unknown, cannot be served, or has a value that cannot be meant.
    """
    others = {*conventions.REFUSED, *conventions.WITHOUT_EFFECT}
    check_options((name for name in given if name not in others), Options, "generation_config", *more)
    if not prompts:
        for name in conventions.FOR_PROMPTS:
            if given.get(name) is not None:
                raise ValueError(f"{name} is for prompts; with a factorization, its length and absent positions say it")
    config: GenerationConfig | None = given.pop("generation_config", None)
    options = conventions.settled(given, config, model.generation_config, {*NAMES, *more}, prompts)
    if "eos_token_id" not in options:
        options["eos_token_id"] = end_ids(model)
    if prompts and given.get("max_length") is None and "max_length" in options:  # a config's: as far as it goes
        limit = context_length(model.causal_lm.config)
        options["max_length"] = options["max_length"] if limit is None else min(options["max_length"], limit)
    own = {name: options.pop(name) for name in more if name in options}
    return Options(**options), own


def request(
    model: AnyOrderPreTrainedModel,
    input_ids: Tensor | None,
    factorization: Factorization | None,
    policy: Policy | None,
    options: Options,
) -> Request:
    """Check ids, order and policy, and make room for new tokens."""
    policy = policy if policy is not None else GroupWise()
    if not isinstance(policy, Policy):
        raise ValueError(f"policy must come from anyorder.policies, got {policy!r}")
    if input_ids is None:
        if options.bos_token_id is None:
            raise ValueError("generation needs at least one token: pass input_ids (the model has no start token)")
        input_ids = torch.tensor([[options.bos_token_id]])
    times = options.num_return_sequences
    if times > 1:
        check_ids("input_ids", input_ids)
        if options.blank_constraints is not None:
            raise ValueError("blank_constraints are of single rows: repeat the rows instead of num_return_sequences")
        input_ids = input_ids.repeat_interleave(times, dim=0)
    if factorization is not None:
        if times > 1 and isinstance(factorization, Factorization):
            factorization = Factorization(
                factorization.group_ids.repeat_interleave(times, dim=0),
                factorization.documents.repeat_interleave(times, dim=0),
            )
        ids = model.check_input(input_ids, factorization).cpu()
        return Request(input_ids, ids, factorization, policy, [], options)
    mask = options.attention_mask
    real = real_tokens(input_ids, mask if mask is None else mask.repeat_interleave(times, dim=0))
    prompts = [row[keep] for row, keep in zip(input_ids.cpu(), real, strict=True)]
    lengths = [len(prompt) for prompt in prompts]
    if not all(lengths):
        raise ValueError(
            f"prompt {lengths.index(0)} is empty: generation needs at least one token, usually the start token"
        )
    new = _new_tokens(options, input_ids.shape[1])
    ids = torch.zeros(len(prompts), max(lengths) + new, dtype=torch.int64)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    parts = [Factorization.left_to_right(length + new, given=length) for length in lengths]
    order = Factorization.stack(parts)
    return Request(input_ids, model.check_input(ids, order), order, policy, lengths, options)


def start(
    model: AnyOrderPreTrainedModel,
    request: Request,
    records: bool = False,
    encoded: Sequence[KeyValueStore | None] | None = None,
) -> tuple[Run, Iterator[Step]]:
    """The run that is asked for, and its steps; none is made before the first is taken.

    Args:
        model: a converted model.
        request: what is asked for.
        records: keep the logits of every position.
        encoded: keys and values to begin with: see `engine.Run`.
    """
    options, policy = request.options, request.policy
    factorization = request.factorization.to("cpu")
    if int(factorization.documents.max()):
        raise ValueError("decoding takes one document a row: unstack the packed factorization first")
    allowed, forced = _allowed_and_forced(model, request, factorization)
    sampling = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    sampler = Sampler(options.do_sample, **sampling, repetition_penalty=options.repetition_penalty, allowed=allowed)
    if options.num_return_sequences > 1 and not (sampler.do_sample or policy.selects_at_random):
        raise ValueError(
            f"num_return_sequences={options.num_return_sequences} of the most likely tokens are all the same: "
            "add do_sample=True"
        )
    numbers = _uniforms(factorization, options.generators, sampler.do_sample or policy.selects_at_random)
    factorization = policy.prepare(factorization)
    must_match = options.blank_constraints
    if must_match is not None:
        if not policy.keeps_order:
            raise ValueError(f"constrained blanks are filled from left to right, but {policy!r} chooses its own order")
        must_match.check_order(factorization)
        must_match = must_match.within(allowed)
    processors = _processors(options, factorization, policy)
    drawer = Drawer(sampler, must_match, forced, processors, records)
    rule = _end_rule(options, factorization, policy, model.vocabulary_size)
    runner = _runner(model, options) if options.runner is None else options.runner
    if not runner.takes_over or model.recipe != "exact":  # elsewhere keys of what is given have read all of it
        encoded = None
    run = Run(runner, request.ids, factorization, drawer, numbers, rule, encoded)
    return run, run.steps_of(policy.scheduler(run))


def _runner(model: AnyOrderPreTrainedModel, options: Options) -> ModelRunner:
    """What runs steps, by name."""
    if not options.compile:
        return runner_for(model, options.engine, options.weights)
    engine = compiled_engine(model)
    logger.warning("compile=True is now engine=%r, and will go", engine)
    return runner_for(model, engine, options.weights)


def end_ids(model: AnyOrderPreTrainedModel) -> list[int]:
    """The model's own end ids: none, one or several."""
    config = model.generation_config
    end = None if config is None else config.eos_token_id
    return [] if end is None else [end] if isinstance(end, int) else list(end)


def check_left_to_right(name: str, factorization: Factorization, policy: Policy) -> None:
    """Raise ValueError unless text grows from left to right.

    Args:
        name: of the option that needs it.
        factorization: what `prepare` made.
        policy: that works on it.
    """
    if not policy.keeps_order:
        raise ValueError(f"{name} needs text that grows from left to right, but {policy!r} chooses its own order")
    ids, present = factorization.group_ids, factorization.is_present
    in_front = present == (torch.arange(factorization.length) < present.sum(dim=1, keepdim=True))
    rises = ids.diff(dim=1).where(present[:, 1:], 1)
    if not bool(in_front.all()) or bool((rises < 0).any()):
        raise ValueError(f"{name} needs text that grows from left to right; this factorization has another order")


def _new_tokens(options: Options, columns: int) -> int:
    if options.max_length is not None:
        if options.max_length < columns:
            raise ValueError(f"max_length={options.max_length} is less than the prompts' {columns} tokens")
        return int(options.max_length) - columns
    return DEFAULT_NEW_TOKENS if options.max_new_tokens is None else int(options.max_new_tokens)


def _uniforms(factorization: Factorization, generator: Generators, needed: bool) -> Uniforms:
    if not needed:
        zero = torch.zeros(factorization.group_ids.shape, dtype=torch.float64)
        return Uniforms(zero, zero, zero, zero)
    lengths, columns = factorization.lengths.tolist(), factorization.length
    sources = row_generators(generator, len(lengths))
    draw, choice, draft, accept = (uniforms(lengths, columns, sources) for _ in range(4))
    return Uniforms(draw, choice, draft, accept)


def _allowed_and_forced(
    model: AnyOrderPreTrainedModel, request: Request, factorization: Factorization
) -> tuple[AllowedTokens | None, Tensor | None]:
    """Which tokens each position may take, and which it must, for all rows."""
    options, vocabulary, shape = request.options, model.vocabulary_size, factorization.group_ids.shape
    allowed, forced, times = options.allowed_tokens, options.forced_ids, options.num_return_sequences
    if forced is not None:
        check_ids("forced_ids", forced)
        bad = (forced != NOT_FORCED) & ((forced < 0) | (forced >= vocabulary))
        if bool(bad.any()):
            raise ValueError(f"forced_ids holds {int(forced[bad][0])}: neither {NOT_FORCED} nor a token id")
        forced = forced.repeat_interleave(times, dim=0)
    if allowed is not None:
        if allowed.masks.shape[1] != vocabulary:
            raise ValueError(f"allowed_tokens has masks over {allowed.masks.shape[1]} tokens, not {vocabulary}")
        allowed = allowed.repeated(times)
    index = None if allowed is None else allowed.index
    for name, tensor in (("forced_ids", forced), ("allowed_tokens.index", index)):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the factorization {tuple(shape)}")
    suppressed = _token_ids("suppress_tokens", options.suppress_tokens, vocabulary)
    if suppressed:
        allowed = AllowedTokens.all(vocabulary, shape) if allowed is None else allowed
        allowed = allowed.without(suppressed, factorization.is_predicted)
    ends = _token_ids("eos_token_id", options.eos_token_id, vocabulary)
    least = torch.tensor(request.prompt_lengths, dtype=torch.int64) + int(options.min_new_tokens or 0)
    if options.min_length is not None:
        least = least + max(0, int(options.min_length) - request.prompts.shape[1])
    early = factorization.is_predicted & (torch.arange(shape[1]) < least[:, None]) if len(least) else None
    if ends and early is not None and bool(early.any()):
        allowed = AllowedTokens.all(vocabulary, shape) if allowed is None else allowed
        allowed = allowed.without(ends, early)
    return allowed, forced


def _token_ids(name: str, value: object, vocabulary: int) -> list[int]:
    """One or several token ids, or none, as a list."""
    try:
        ids = torch.as_tensor([] if value is None else value).flatten().tolist()
    except (TypeError, ValueError, RuntimeError):  # what makes no tensor
        ids = [value]
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool):
            raise ValueError(f"{name} must be one or several token ids, got {value!r}")
        if name != "eos_token_id" and not 0 <= token < vocabulary:
            raise ValueError(f"{name} holds {token}, which is outside the vocabulary 0..{vocabulary - 1}")
    return [token for token in ids if 0 <= token < vocabulary]  # -1 as an end id: none


def _processors(options: Options, factorization: Factorization, policy: Policy) -> LogitsProcessorList | None:
    if not options.logits_processor:
        return None
    if not isinstance(options.logits_processor, Sequence):
        raise ValueError(f"logits_processor must be a list of processors, got {options.logits_processor!r}")
    check_left_to_right("logits_processor", factorization, policy)
    return LogitsProcessorList(options.logits_processor)


def _end_rule(options: Options, factorization: Factorization, policy: Policy, vocabulary: int) -> EndRule:
    criteria = StoppingCriteriaList(options.stopping_criteria or [])
    if options.stop_strings:
        if options.tokenizer is None:
            raise ValueError("stop_strings are found in text: pass tokenizer=, too")
        strings = options.stop_strings if isinstance(options.stop_strings, str) else list(options.stop_strings)
        criteria.append(StopStringCriteria(options.tokenizer, strings))
    if options.max_time is not None:
        criteria.append(MaxTimeCriteria(options.max_time))
    for name in ("stop_strings", "max_time", "stopping_criteria"):
        if getattr(options, name):
            check_left_to_right(name, factorization, policy)
    return EndRule(_token_ids("eos_token_id", options.eos_token_id, vocabulary), criteria)
