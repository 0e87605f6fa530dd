"""Command-line options that several commands have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import click

from lazypages import logs
from lazypages.errors import LazyPagesError

F = TypeVar("F", bound=Callable[..., Any])

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

#: The keys of lazypages.loop.run.LOOPS, which is imported later. Each is also the name of a Python package.
LOOPS = ("uvloop", "asyncio", "trio")

LOOP_OPTION = click.option(
    "--loop",
    type=click.Choice(LOOPS),
    default="uvloop",
    envvar="LAZYPAGES_LOOP",
    show_default=True,
    help="The event loop.",
)

_VERBOSITY = (
    "0: nothing, 1: errors, 2: warnings, 3: information, 4: debug; each bare -v adds one.  [default: 2]"
)


def verbosity_option(text: str = _VERBOSITY) -> Callable[[F], F]:
    """``-v``, spelled as in ``criu``. The command gets the level (0 to 4, see lazypages.logs) as `verbosity`."""
    return click.option(
        "-v",
        "--verbosity",
        is_flag=False,
        flag_value="v",
        multiple=True,
        metavar="[LEVEL]",
        callback=_level,
        help=text,
    )


def _level(_ctx: click.Context, _param: click.Parameter, values: Sequence[str]) -> int:
    try:
        return logs.verbosity(values)
    except ValueError as error:
        raise click.BadParameter(f"{error} is not a level (0 to 4)") from None


LOG_FORMAT_OPTION = click.option(
    "--log-format",
    type=click.Choice(logs.FORMATS),
    default=logs.FORMATS[0],
    show_default=True,
    help="Lines of text, or one JSON object a line.",
)


def check_loop(loop: str) -> None:
    """Raises LazyPagesError."""
    if find_spec(loop) is None:
        raise LazyPagesError(f"--loop {loop}: not installed; install the Python package {loop}")


def add_options(options: Sequence[Decorator]) -> Decorator:
    """A decorator that adds all `options` to a command, in this order in its help."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def readiness_options(event: str) -> Sequence[Decorator]:
    """``-d``, ``--pidfile`` and ``--status-fd`` of a command that others wait for: until `event`.

    The command gets `daemon`, `pidfile` and `status_fd`; see lazypages.cli.daemonize.
    """
    return [
        click.option("-d", "--daemon", is_flag=True, help=f"Go into the background as soon as {event}."),
        click.option(
            "--pidfile",
            metavar="FILE",
            type=click.Path(path_type=Path),
            help="With -d: write the daemon's pid to FILE, which must not exist.",
        ),
        click.option(
            "--status-fd",
            metavar="FD",
            type=click.IntRange(min=0),
            help=f"Write one 0 byte to file descriptor FD and close it when {event}.",
        ),
    ]
