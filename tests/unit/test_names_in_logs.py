"""Names that a user has chosen: they make no lines of their own in a log, and nothing that a terminal carries out."""

from __future__ import annotations

import logging

from rich.console import Console

from lazypages.cli.ctl import _line
from lazypages.cli.top import _table, cells, restore_rows
from lazypages.logs import Text

NAME = "/tmp/[/bold]\n2026-11-30 12:00:00,000 ERROR all is lost\x1b[2J"
SHOWN = r"/tmp/[/bold]\x0a2026-11-30 12:00:00,000 ERROR all is lost\x1b[2J"


def test_a_log_line() -> None:
    record = logging.LogRecord("lazypages", logging.ERROR, __file__, 1, "%s: no", (NAME,), None)
    line = Text().format(record)
    assert line.endswith(f"ERROR {SHOWN}: no")
    assert "\n" not in line


def test_a_restore_in_ctl() -> None:
    status = {
        "restore": 1,
        "state": "serving",
        "exit": None,
        "error": None,
        "tasks": {"served": 1},
        "pages": {"pending": 0},
        "seconds": 1.0,
        "images": NAME,
    }
    assert _line(status).endswith(f"1.0 s, {SHOWN}")


def test_a_restore_in_top() -> None:
    status = {
        "restore": 1,
        "state": "serving",
        "exit": None,
        "tasks": {"served": 1},
        "faults": 0,
        "pages": {"pending": 0},
        "images": NAME,
    }
    [row] = restore_rows(status, None)
    assert cells(row)[-1] == SHOWN
    console = Console(width=400)
    with console.capture() as captured:
        console.print(_table("title", [row]))
    assert SHOWN in captured.get()
