"""GGUF files as directories that transformers loads.

Dequantising takes half a minute, so its result is kept as a safetensors directory in the cache.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from anyorder.hub.cache_dir import cache_directory

logger = logging.getLogger(__name__)


def dequantised(path: Path) -> Path:
    """The float32 safetensors directory of a GGUF file, made on first use.

    It is written beside its place and renamed, so that an interrupted run leaves nothing half made.
    """
    stat = path.stat()
    key = hashlib.sha256(json.dumps([path.name, stat.st_size, stat.st_mtime_ns]).encode()).hexdigest()[:12]
    target = cache_directory() / f"{path.stem}-{key}"
    if (target / "config.json").is_file():
        return target
    missing = [package for package in ("gguf", "accelerate") if importlib.util.find_spec(package) is None]
    if missing:
        raise ValueError(f"reading {path.name} needs: pip install {' '.join(missing)}")
    logger.info("dequantising %s once, to %s", path.name, target)
    folder, file = str(path.parent), path.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    quantised = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    model = _without_quantisation(quantised)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{target.name}."))
    try:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        part.rename(target)
    except OSError:
        if not (target / "config.json").is_file():  # another process may have been faster
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


def _without_quantisation(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a model that does not remember a quantiser, and so can be saved."""
    config = type(model.config).from_dict(
        {
            key: value
            for key, value in model.config.to_dict().items()
            if key not in ("quantization_config", "_name_or_path")
        }
    )
    plain = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return plain
