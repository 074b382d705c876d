"""Where this package keeps files between processes.

Environment: ANYORDER_CACHE, the cache directory (default: `anyorder` under XDG_CACHE_HOME or ~/.cache).
"""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """Where dequantised models and prepared graphs are kept."""
    own = os.environ.get("ANYORDER_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "anyorder"
