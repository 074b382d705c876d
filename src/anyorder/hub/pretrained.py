"""Plain causal LMs by name: safetensors only, without transformers' progress bars."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from anyorder.hub.reach import check_reachable
from anyorder.hub.resolve import cannot_load, resolve


def load_causal_lm(name_or_path: str | os.PathLike[str], **kwargs: Any) -> PreTrainedModel:
    """The plain causal LM of a name, in evaluation mode.

    Args:
        name_or_path: as `resolve` takes it.
        kwargs: of `AutoModelForCausalLM.from_pretrained`.

    Raises:
        ValueError: if there is none, or only pickled weights, which run code when they are read.
    """
    if kwargs.pop("use_safetensors", True) is not True:
        raise ValueError(
            "use_safetensors=False: pickled weights run code when they are read; only safetensors are read"
        )
    location = resolve(name_or_path)
    check_reachable(name_or_path, location, kwargs)
    try:
        with quiet():
            return AutoModelForCausalLM.from_pretrained(location, use_safetensors=True, **kwargs)
    except OSError as error:
        if "safetensors" in str(error):
            error = OSError(
                "it has no safetensors weights, and pickled ones, which run code when they are read, are not read; "
                "save it with save_pretrained of transformers 5"
            )
        raise cannot_load(name_or_path, error) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without the bars of loading weights; those of downloads stay."""
    loading, downloads = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    logging.disable_progress_bar()
    if downloads:
        enable_progress_bars()
    try:
        yield
    finally:
        if loading:
            logging.enable_progress_bar()
        if not downloads:
            disable_progress_bars()
