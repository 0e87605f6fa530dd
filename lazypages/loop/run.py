"""Runs the event loop: what starts it, and what runs beside the service.

To import this is to import the event loop, half of what a start takes. So `lazypages serve` does it last, when it has
said that a restore may be started, which has work of its own before it needs anybody.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import anyio

from lazypages.control.listener import ControlSocket
from lazypages.engine.guard import Guard
from lazypages.loop.options import ServeOptions
from lazypages.loop.server import Server
from lazypages.observe.metrics import Summary
from lazypages.observe.progress import TerminalWatch, watch_in_log
from lazypages.sources.checkpoint import Expected

if TYPE_CHECKING:
    from rich.console import Console

log = logging.getLogger("lazypages")

LOOPS: dict[str, tuple[str, dict[str, Any]]] = {
    "uvloop": ("asyncio", {"use_uvloop": True}),
    "asyncio": ("asyncio", {"use_uvloop": False}),
    "trio": ("trio", {}),
}


def run(
    loop: str,
    expected: Mapping[int, Expected],
    control: ControlSocket,
    options: ServeOptions,
    guard: Guard,
    *,
    terminal: Console | None,
    running: Callable[[], None],
) -> Summary:
    """Serves one restore; returns when that is over. ``running`` is called when signals are handled.

    ``loop`` is one of LOOPS, ``terminal`` gets bars instead of log lines.
    """
    watch = TerminalWatch(terminal) if terminal else watch_in_log

    async def beside(server: Server) -> None:
        running()
        try:
            await watch(server)
        except Exception as error:  # a terminal may go away at any time: that must not end the service
            log.warning("progress is not shown any more: %s", error)

    backend, backend_options = LOOPS[loop]
    server = Server(expected, control, options, guard)
    return anyio.run(server.run, beside, backend=backend, backend_options=backend_options)
