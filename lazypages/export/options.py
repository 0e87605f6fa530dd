"""What is exported, and where to. Separate from the exporter, which is slow to import."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import NamedTuple

#: Connections for metrics at once. More wait in the backlog of the socket.
MAX_SCRAPERS = 8


class ExportOptions(NamedTuple):
    """``listener``: answers HTTP requests with metrics. ``textfile``: gets them from time to time, and at the end.

    ``spans``: an OpenTelemetry span is sent for each restore.
    """

    listener: socket.socket | None
    textfile: Path | None
    spans: bool
