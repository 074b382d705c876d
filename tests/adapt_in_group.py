"""The command line as one process of several; it fails if threads of the process group outlive the command.

Such a thread may let go of a tensor while the interpreter ends, and then the process aborts.
"""

from __future__ import annotations

import sys
from pathlib import Path

from anyorder.cli import main

if __name__ == "__main__":
    try:
        code = main(sys.argv[1:])
    finally:
        names = [comm.read_text().strip() for comm in Path("/proc/self/task").glob("*/comm")]  # Linux only
        left = [name for name in names if "gloo" in name]
        assert not left, f"threads that outlive the command: {left}"
    sys.exit(code)
