"""Whether the hub answers, by one question: transformers itself would ask for half a minute before it gives up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError

from anyorder.hub.resolve import cannot_load, names_that_are_built_in

SECONDS = 5.0


def check_reachable(name: Any, location: str, options: dict[str, Any]) -> None:
    """Raise ValueError if a model is neither on this machine nor within reach.

    Args:
        name: what the user gave.
        location: what `resolve` made of it: a directory or a hub id.
        options: of `from_pretrained`.
    """
    where = {key: options.get(key) for key in ("revision", "cache_dir")}
    if Path(location).is_dir() or options.get("local_files_only"):
        return
    if isinstance(try_to_load_from_cache(location, "config.json", **where), str):
        return
    url = hf_hub_url(location, "config.json", subfolder=options.get("subfolder"), revision=options.get("revision"))
    try:
        get_hf_file_metadata(url, token=options.get("token"), timeout=SECONDS)
    except HfHubHTTPError:  # it answers; transformers says what is wrong
        return
    except Exception as error:
        reason = f"it is not on this machine, and the hub does not answer; {names_that_are_built_in()}"
        raise cannot_load(name, OSError(reason)) from error
