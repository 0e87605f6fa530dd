"""Log lines of restores: named in the daemon's log, and sent to the clients that want them."""

from __future__ import annotations

import logging
from typing import Any

from lazypages.logs import LEVELS
from lazypages.resident import protocol
from lazypages.resident.connection import Outbox
from lazypages.resident.restores import CURRENT

log = logging.getLogger("lazypages")

_NAMES = {number: name for name, number in LEVELS.items()}


class Follower:
    """Sends the log lines of one restore to a client, from `level` on."""

    def __init__(self, outbox: Outbox, number: Any, level: str) -> None:
        self._outbox = outbox
        self._number = number
        self._level = LEVELS[level]

    def __call__(self, record: logging.LogRecord) -> None:
        if record.levelno >= self._level:
            level = _NAMES.get(record.levelno, "error")
            self._outbox.put(protocol.log_line(self._number, level, record.getMessage()), droppable=True)


class _ToClients(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        restore = CURRENT.get()
        if restore is not None and restore.say is not None and getattr(record, "to_client", True):
            restore.say(record)


def _name(record: logging.LogRecord) -> bool:
    restore = CURRENT.get()
    record.restore = restore.number if restore is not None else None
    return True


def name_restores() -> None:
    """After lazypages.logs.start: each line of a restore names it, and goes to its client at the client's level."""
    for handler in log.handlers:
        handler.setLevel(log.level)
        handler.addFilter(_name)
    log.addHandler(_ToClients())
    log.setLevel(logging.DEBUG)
