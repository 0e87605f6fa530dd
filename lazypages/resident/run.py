"""Runs the event loop with the resident daemon. Slow to import; see lazypages.loop.run."""

from __future__ import annotations

import socket
from collections.abc import Callable

import anyio

from lazypages.engine.guard import Guard
from lazypages.export.exporter import open_exporter
from lazypages.export.options import ExportOptions
from lazypages.loop.run import LOOPS
from lazypages.notify import Notifier
from lazypages.resident.log_lines import name_restores
from lazypages.resident.service import Limits, Service


def run(
    loop: str,
    listener: socket.socket,
    guard: Guard,
    limits: Limits,
    *,
    ready: Callable[[], None],
    notifier: Notifier,
    export: ExportOptions | None,
) -> None:
    """Serve restores until the daemon is told to end. ``loop``: a key of LOOPS. ``ready``: as in Service."""
    name_restores()
    backend, backend_options = LOOPS[loop]
    exporter = open_exporter(export, guard)
    service = Service(listener, guard, limits, ready, notifier=notifier, exporter=exporter)
    try:
        anyio.run(service.run, backend=backend, backend_options=backend_options)
    finally:
        if exporter:
            exporter.close()
