"""``python -m lazypages``, and the installed command."""

import sys

from lazypages.cli.imports import importing


def main() -> None:
    """Exit status 0 for success, 1 for failure, 2 for a wrong command line."""
    with importing():
        from lazypages.cli.main import cli  # noqa: PLC0415 - see `importing`

    sys.exit(cli(prog_name="lazypages"))


if __name__ == "__main__":
    main()
