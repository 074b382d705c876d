"""The command line as the tests run it."""

from __future__ import annotations

import pytest

from anyorder.cli import main


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    errors = "\n".join(line for line in captured.err.splitlines() if "it/s]" not in line and "?it" not in line)
    return code, captured.out, errors
