"""The option of commands that concern a resident daemon: where its socket is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from lazypages.resident.protocol import SOCKET


def socket_option(text: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """``--socket``, the parameter ``path``. ``text``: its help."""
    return click.option(
        "--socket",
        "path",
        metavar="PATH",
        type=click.Path(path_type=Path),
        default=SOCKET,
        show_default=True,
        help=text,
    )
