"""Log levels and log handlers of the commands.

Verbosity levels are those of ``criu`` (observed with CRIU 4.2.1): 0 nothing, 1 errors, 2 warnings (the default),
3 information, 4 debug. ``-vN`` sets the level, each bare ``-v`` adds one. *Messages* (ready, progress, summary)
are printed at every level from 1 on.

A log is text, or one JSON object a line (docs/metrics.md).
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from lazypages import extras
from lazypages.outputs import STDOUT, cannot_write, check_output

if TYPE_CHECKING:
    from rich.console import Console

#: Logging level of messages: above ERROR, so that only verbosity 0 suppresses them.
MESSAGE = 45

DEFAULT_VERBOSITY = 2

#: `extra` of a record that the terminal shows in another form (a progress bar, a table).
NOT_ON_TERMINAL = {"terminal": False}
#: `extra` of a record that the command prints on standard error itself.
PRINTED = {"terminal": False, "stderr": False}

#: The names of levels in JSON: of log lines, and in the messages of the resident daemon (docs/daemon.md).
LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "message": MESSAGE,
}

_LEVEL_NAMES = {number: name for name, number in LEVELS.items()}

#: Of log files; the first one is the default.
FORMATS = ("text", "json")

_THRESHOLDS = (logging.CRITICAL + 1, logging.ERROR, logging.WARNING, logging.INFO, logging.DEBUG)
_NAMES = {MESSAGE: "", logging.ERROR: "error: ", logging.WARNING: "warning: "}
_STYLES = {logging.ERROR: "bold red", logging.WARNING: "yellow", logging.DEBUG: "dim"}

log = logging.getLogger("lazypages")


def verbosity(given: Sequence[str]) -> int:
    """The level (0 to 4) from the values of all ``-v`` options: digits set it, each ``v`` adds one.

    Raises ValueError for any other value.
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
    """Create or truncate a log file with mode 0600, as ``criu -o`` does; ``-`` is standard output.

    Raises LazyPagesError.
    """
    if path == STDOUT:
        return sys.stdout
    check_output("-o", path)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise cannot_write("-o", path, error, exists=True) from None
    return os.fdopen(fd, "w", encoding="utf-8", errors="backslashreplace")


def on_terminal() -> Console | None:
    """Standard error as a terminal for progress and tables; None if it is not one, or without rich."""
    if not sys.stderr.isatty() or not extras.have("rich"):
        return None
    from rich.console import Console  # noqa: PLC0415 - slow to import, and only needed on terminals

    return Console(stderr=True, highlight=False)


def start(
    level: int, stream: TextIO | None, terminal: Console | None, *, log_format: str = FORMATS[0]
) -> None:
    """Log to `stream` and to `terminal` at verbosity `level`. With both, the terminal gets errors and messages only.

    ``log_format``: of the stream; one of FORMATS.
    """
    logging.addLevelName(MESSAGE, "MESSAGE")
    logging.raiseExceptions = False  # no traceback if the log can't be written
    log.handlers.clear()
    log.propagate = False
    log.setLevel(_THRESHOLDS[level])
    if stream is not None:
        handler = logging.StreamHandler(stream)
        handler.setFormatter(JsonLines() if log_format == "json" else Text())
        if stream is sys.stderr:
            handler.addFilter(lambda record: getattr(record, "stderr", True))
        log.addHandler(handler)
    if terminal is not None:
        console = _TerminalHandler(terminal)
        console.setLevel(logging.ERROR if stream is not None else logging.NOTSET)
        log.addHandler(console)


def is_json() -> bool:
    """Whether the log has JSON lines, after :func:`start`."""
    return any(isinstance(handler.formatter, JsonLines) for handler in log.handlers)


#: Control characters, as escapes: names of directories and programs may have some, and must not look like other lines.
_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) != "\t"}


def printable(text: str) -> str:
    """One line, without what a terminal would carry out."""
    return text.translate(_ESCAPES)


class Text(logging.Formatter):
    """2026-11-30 12:00:00,000 ERROR restore 3: ...; the restore if there are several."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        number = getattr(record, "restore", None)
        restore = "" if number is None else f"restore {number}: "
        return f"{self.formatTime(record)} {record.levelname} {restore}{printable(record.message)}"


class JsonLines(logging.Formatter):
    """One JSON object a line. A record's `restore` and `pid` become fields, if it has them."""

    def format(self, record: logging.LogRecord) -> str:
        import json  # noqa: PLC0415 - keeps the start short
        from datetime import UTC, datetime  # noqa: PLC0415

        fields: dict[str, str | int] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds"),
            "level": _LEVEL_NAMES.get(record.levelno, "error"),
            "message": record.getMessage(),
        }
        for name in ("restore", "pid"):
            if (value := getattr(record, name, None)) is not None:
                fields[name] = value
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields)


class _TerminalHandler(logging.Handler):
    """Prints lines above the progress bars of the terminal."""

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
