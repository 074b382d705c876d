"""`python -m anyorder.evaluation.harness`: the harness's own command line, with this package's backend registered.

The same as `lm_eval` where that finds plug-ins by itself.
"""

from __future__ import annotations


def main() -> None:
    """Run the command.

    Raises:
        ValueError: if lm-eval is not installed.
    """
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        raise ValueError("evaluation needs lm-eval: pip install 'anyorder[eval]'") from error
    import anyorder.evaluation.harness.lm_eval  # noqa: F401 - registers the backend

    cli_evaluate()


if __name__ == "__main__":
    main()
