"""`python -m anyorder`: the command line."""

from anyorder.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
