"""``python -m dumptool``, and the installed command."""

import sys

from lazypages.cli.imports import importing_command


def main() -> None:
    """Exit status 0: success; 1: failure; 2: wrong command line."""
    with importing_command():
        from dumptool.cli import cli  # noqa: PLC0415 - see `importing_command`

    sys.exit(cli(prog_name="dumptool"))


if __name__ == "__main__":
    main()
