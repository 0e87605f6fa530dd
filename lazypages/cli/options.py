"""Command-line options that several commands have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from lazypages import logs

F = TypeVar("F", bound=Callable[..., Any])

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
