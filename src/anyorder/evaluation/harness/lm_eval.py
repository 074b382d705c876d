"""The backend for stock lm-evaluation-harness: `lm_eval --model anyorder --model_args pretrained=...`.

The harness finds it by an entry point of the group `lm_eval.models` (pyproject.toml), which releases up to 0.4.13 do
not look for; `python -m anyorder.evaluation.harness` is the same command for any release. The harness's part is
requests, caches and progress; what is said about a text is `likelihoods`' and `continuations`' business.

Importing this module needs lm-eval: the extra `eval`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import lm_eval.models  # noqa: F401 - a registry that is not empty is taken to hold the harness's own models
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, CacheHook
from lm_eval.api.registry import model_registry, register_model
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from anyorder.evaluation.harness.continuations import Continuer
from anyorder.evaluation.harness.encoding import Encoded, TextEncoder
from anyorder.evaluation.harness.likelihoods import Score, Scorer
from anyorder.evaluation.harness.settings import Loading, read
from anyorder.loading import load
from anyorder.model.compatibility import context_length
from anyorder.modeling import AnyOrderForCausalLM
from anyorder.runtime.engines import prefer

_LOGGER = logging.getLogger(__name__)
_CONTEXT = 2048
"""Of a model that does not say how much it can read; the harness's own default."""
_OWNER = "anyorder"
"""Where a response cache says what made it."""
T = TypeVar("T")


class AnyOrderLM(LM):
    """A converted model as the harness asks for it.

    Args:
        model_args: those of `settings.Loading` and `settings.Settings`.

    Raises:
        ValueError: for an argument that is unknown or cannot be meant, and for a model that cannot be loaded.
    """

    def __init__(self, **model_args: Any):
        super().__init__()
        loading, self.settings = read(model_args)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("the anyorder backend runs in one process: start it without accelerate launch or torchrun")
        self.model, self.tokenizer = _load(loading)
        self._device = self.model.query_embedding.device
        self._name = loading.pretrained if isinstance(loading.pretrained, str) else self.model.config.name_or_path
        self._dtype = str(self.model.query_embedding.dtype).removeprefix("torch.")
        self._template: str | None = None
        own = context_length(self.model.causal_lm.config)
        wanted = self.settings.max_length
        if own is not None and wanted is not None and wanted > own:
            raise ValueError(f"max_length={wanted} is more than the {own} tokens that the model can read")
        self.max_length = wanted or own or _CONTEXT
        self.encoder = TextEncoder(self.tokenizer, self.settings.add_bos_token, self.settings.prefix_token_id)
        self._scorer = Scorer(self.model, self.settings, self.max_length)
        self._continuer = Continuer(self.model, self.encoder, self.settings, self.max_length)

    # ------------------------------------------------------------------ requests

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation behind its context, and whether greedy decoding gives it; with
        scored=context of each context in front of its continuation."""
        asked = [request.args for request in requests]
        encode = self.encoder.context_of if self.settings.scored == "context" else self.encoder.pair
        texts = [encode(*args) for args in self._watched(asked, "Tokenizing", len(asked), disable_tqdm)]
        found: dict[int, tuple[float, bool]] = {}
        for number, score in self._scores(texts, "loglikelihood", disable_tqdm):
            found[number] = score.log_likelihood, score.is_greedy
            self.cache_hook.add_partial("loglikelihood", asked[number], found[number])
        return [found[number] for number in range(len(asked))]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text behind the start token, in as many windows as it needs."""
        asked = [request.args for request in requests]
        texts = [self.encoder.document(*args) for args in self._watched(asked, "Tokenizing", len(asked), disable_tqdm)]
        found: dict[int, float] = {}
        for number, score in self._scores(texts, "loglikelihood_rolling", disable_tqdm):
            found[number] = score.log_likelihood
            self.cache_hook.add_partial("loglikelihood_rolling", asked[number], found[number])
        return [found[number] for number in range(len(asked))]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """What follows each prompt, up to a stop."""
        asked = [request.args for request in requests]
        found: dict[int, str] = {}
        pairs = self._continuer(asked)
        for number, text in self._watched(pairs, "Running generate_until requests", len(asked), disable_tqdm):
            found[number] = text
            self.cache_hook.add_partial("generate_until", asked[number], text)
        return [found[number] for number in range(len(asked))]

    def _scores(self, texts: Sequence[Encoded], kind: str, disable_tqdm: bool) -> Iterable[tuple[int, Score]]:
        return self._watched(self._scorer(texts), f"Running {kind} requests", len(texts), disable_tqdm)

    def _watched(self, items: Iterable[T], what: str, total: int, disable: bool) -> Iterable[T]:
        return tqdm(items, desc=what, total=total, disable=disable or self.rank != 0)

    # ------------------------------------------------------------------ chat

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the text that stands in front of an answer, special tokens included.

        A template that takes no system message gets the conversation without it, as in the stock backend.

        Raises:
            ValueError: if the tokenizer has no template, or its template does not take these messages.
        """
        if not self.tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template: leave out --apply_chat_template")
        try:
            return self._templated(chat_history, add_generation_prompt)
        except Exception as error:  # whatever a template raises
            bare = [message for message in chat_history if message["role"] != "system"]
            if len(bare) == len(chat_history):
                raise ValueError(f"the chat template does not take these messages: {error}") from error
            _LOGGER.warning("the chat template takes no system message, which is left out: %s", error)
            return self.apply_chat_template(bare, add_generation_prompt)

    def _templated(self, chat_history: list[dict[str, str]], add_generation_prompt: bool) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template that conversations get from now on; a name chooses one of several.

        Raises:
            ValueError: if the tokenizer has no template, or none of that name.
        """
        if not chat_template:
            return None
        if not self.tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template: leave out --apply_chat_template")
        self._template = self.tokenizer.get_chat_template(chat_template if isinstance(chat_template, str) else None)
        return self._template

    @property
    def tokenizer_name(self) -> str:
        """Names built requests in the harness's cache, so it tells apart what builds them: the template, too."""
        template = str(self._template or self.tokenizer.chat_template)
        name = str(self.tokenizer.name_or_path or self._name).replace("/", "__")
        return f"{name}-{hashlib.sha256(template.encode()).hexdigest()[:8]}"

    # ------------------------------------------------------------------ caches and reports

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Answer from a cache of responses, and fill it.

        The harness looks answers up by request alone, so that a cache says here what made it.

        Raises:
            ValueError: if another model made it, or other settings.
        """
        super().set_cache_hook(cache_hook)
        if cache_hook.dbdict is None:
            return
        own = {"weights": _digest(self.model), "dtype": self._dtype, "recipe": self.model.recipe}
        own |= self.settings.of_results()
        kept = cache_hook.dbdict.get(_OWNER)
        if kept is None and len(cache_hook.dbdict):
            raise ValueError("--use_cache: another backend made this cache of responses: name another file")
        if kept is not None and kept != own:
            names = [name for name in {**own, **kept} if own.get(name) != kept.get(name)]
            other = ", ".join(f"{name}={kept.get(name)!r} (now {own.get(name)!r})" for name in names)
            raise ValueError(f"--use_cache: the responses in this cache were made with {other}: name another file")
        cache_hook.dbdict[_OWNER] = own

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside the results."""
        return {
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": self._dtype,
            "model_recipe": self.model.recipe,
            "anyorder_version": importlib.metadata.version("anyorder"),
            "anyorder_settings": self.settings.of_results(),
        }


if "anyorder" not in model_registry:  # else the entry point is there, and this is what it names
    register_model("anyorder")(AnyOrderLM)


def _load(loading: Loading) -> tuple[AnyOrderForCausalLM, PreTrainedTokenizerBase]:
    given = loading.pretrained
    if isinstance(given, AnyOrderForCausalLM):
        if loading.tokenizer is None:
            raise ValueError("a model that is loaded already needs its tokenizer: pass tokenizer=")
        return given.eval(), loading.tokenizer
    options: Mapping[str, Any] = {
        name: getattr(loading, name)
        for name in ("recipe", "base_model", "revision", "attn_implementation", "dtype")
        if getattr(loading, name) not in (None, "auto")
    }
    device = _device(loading.device)
    model, tokenizer = load(given, **options)
    model.to(device)
    prefer(model, loading.engine, loading.weights)
    return model, tokenizer


def _digest(model: AnyOrderForCausalLM, samples: int = 16) -> str:
    """Tells models apart by some of every parameter's values."""
    digest = hashlib.blake2b(digest_size=8)
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        some = flat[:: max(1, len(flat) // samples)].float().tolist()
        digest.update(f"{name}{some}".encode())
    return digest.hexdigest()


def _device(wanted: str | None) -> torch.device:
    """The device of a name, default: CUDA if there is any, else the CPU.

    Raises:
        ValueError: if there is none of that name. "cuda:0" is what the harness's command says if nobody says anything,
            so without CUDA it is the CPU, and a warning is logged.
    """
    name = wanted or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda:0" and not torch.cuda.is_available():
        _LOGGER.warning("there is no CUDA device: the model runs on the CPU")
        name = "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)  # a device that torch knows may not be there
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device={name!r} cannot be used: {error}") from error
    return device
