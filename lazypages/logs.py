"""What is said while serving, to whom, and how much of it.

Verbosity counts as with ``criu`` (observed with CRIU 4.2.1): 0 nothing, 1 errors, 2 warnings as well (the
default), 3 information, 4 all. ``-vN`` sets it, each bare ``-v`` adds one. *Messages* come from 1 on: the few
lines that a person wants to see in any case (ready, progress, summary).
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from lazypages.errors import LazyPagesError

if TYPE_CHECKING:
    from rich.console import Console

#: Level of messages: above errors, so that only silence hides them.
MESSAGE = 45

DEFAULT_VERBOSITY = 2

#: As a log file: standard output.
STDOUT = Path("-")

#: `extra` of a record that the terminal shows in a better way, and of one that standard error gets anyhow.
NOT_ON_TERMINAL = {"terminal": False}
SAID = {"terminal": False, "stderr": False}

_THRESHOLDS = (logging.CRITICAL + 1, logging.ERROR, logging.WARNING, logging.INFO, logging.DEBUG)
_NAMES = {MESSAGE: "", logging.ERROR: "error: ", logging.WARNING: "warning: "}
_STYLES = {logging.ERROR: "bold red", logging.WARNING: "yellow", logging.DEBUG: "dim"}

log = logging.getLogger("lazypages")


def verbosity(given: Sequence[str]) -> int:
    """The level that the values of all ``-v`` add up to: digits set it, ``v`` and its repetitions add.

    Raises ValueError for anything else.
    """
    level = DEFAULT_VERBOSITY
    for value in given:
        if value.isdecimal():
            level = int(value)
        elif value and not value.strip("v"):
            level += len(value)
        else:
            raise ValueError(value)
    return min(level, len(_THRESHOLDS) - 1)


def open_log(path: Path) -> TextIO:
    """A fresh log, for its owner only, as ``criu -o`` makes it; ``-`` is standard output.

    Raises LazyPagesError.
    """
    if path == STDOUT:
        return sys.stdout
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise LazyPagesError(f"can't log to {path}: {error.strerror}") from error
    return os.fdopen(fd, "w", encoding="utf-8", errors="backslashreplace")


def start(level: int, stream: TextIO | None, terminal: Console | None) -> None:
    """Logs to `stream` by verbosity `level`, and on a terminal; with both, that gets only what matters."""
    logging.addLevelName(MESSAGE, "MESSAGE")
    logging.raiseExceptions = False  # a log that can't be written is no reason for a traceback
    log.handlers.clear()
    log.propagate = False
    log.setLevel(_THRESHOLDS[level])
    if stream is not None:
        handler = logging.StreamHandler(stream)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        if stream is sys.stderr:
            handler.addFilter(lambda record: getattr(record, "stderr", True))
        log.addHandler(handler)
    if terminal is not None:
        console = _TerminalHandler(terminal)
        console.setLevel(logging.ERROR if stream is not None else logging.NOTSET)
        log.addHandler(console)


class _TerminalHandler(logging.Handler):
    """Lines above whatever is live on the terminal."""

    def __init__(self, terminal: Console) -> None:
        super().__init__()
        self._terminal = terminal

    def emit(self, record: logging.LogRecord) -> None:
        if not getattr(record, "terminal", True):
            return
        try:
            text = _NAMES.get(record.levelno, "") + record.getMessage()
            self._terminal.print(
                text, style=_STYLES.get(record.levelno), markup=False, highlight=False, soft_wrap=True
            )
        except Exception:
            self.handleError(record)
