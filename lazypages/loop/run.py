"""Runs the event loop with the server, and the progress display beside it.

Importing this module imports the event loop, which takes half of the time of a start. So `lazypages serve` imports it
last, after it has signalled readiness: a restore takes some tens of ms before it needs the daemon. With page servers,
whose first connections need the event loop, readiness is signalled when it is known whether they can be used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio

from lazypages.control.listener import ControlSocket
from lazypages.engine.guard import Guard
from lazypages.export.exporter import open_exporter
from lazypages.export.options import ExportOptions
from lazypages.loop.options import ServeOptions
from lazypages.loop.server import Begin, Server
from lazypages.notify import Notifier
from lazypages.observe.metrics import Summary
from lazypages.observe.progress import TerminalWatch, watch_in_log
from lazypages.observe.service_status import Told, restore_status, tell
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
    begin: Begin | None = None,
    running: Callable[[], None],
    notifier: Notifier,
    export: ExportOptions | None,
    images: str,
) -> Summary:
    """Serve one restore. ``running`` is called as soon as the server handles signals.

    ``loop``: a key of LOOPS. ``terminal``: shows progress as bars instead of log lines. ``begin``: see Server.run.
    ``images``: the name of their directory in what is exported.

    Raises EngineError, SourcesError.
    """
    background = options.background
    terminal_watch = TerminalWatch(terminal, background=background) if terminal else None

    async def beside(server: Server) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(tell, notifier, partial(_told, server), partial(_rounds, server))
            if exporter and restore:
                group.start_soon(exporter.run)
                group.start_soon(restore.watch, server)
            await show_progress(server)

    async def show_progress(server: Server) -> None:
        try:
            await (terminal_watch(server) if terminal_watch else watch_in_log(server, background=background))
        except Exception as error:  # a terminal can be closed at any time; that must not end the service
            log.warning("cannot show progress any more: %s", error)

    backend, backend_options = LOOPS[loop]
    server = Server(expected, control, options, guard)
    exporter = open_exporter(export, guard)
    restore = exporter.begin(images, state=lambda: server.state, summary=server.summary) if exporter else None
    result: Summary | None = None
    try:
        result = anyio.run(
            server.run, beside, begin, running, backend=backend, backend_options=backend_options
        )
    finally:
        if exporter and restore:
            restore.end(result, "complete" if result and result.ok else "failed")
            exporter.close()
    return result


def _told(server: Server) -> Told:
    status = restore_status(server.summary(), connected=server.connected, ending=server.draining)
    return Told(status, server.draining)


def _rounds(server: Server) -> Mapping[int, int]:
    nr = server.rounds()
    return {} if nr is None else {0: nr}
