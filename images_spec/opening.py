"""How image files are opened for reading. A program that reads images for another user has them opened as that user."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextvars import ContextVar


def _open(path: str | os.PathLike[str]) -> int:
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # opening a FIFO must not block


#: Returns a descriptor, which the caller owns. Raises OSError.
OPEN: ContextVar[Callable[[str | os.PathLike[str]], int]] = ContextVar("open", default=_open)


def open_image(path: str | os.PathLike[str]) -> int:
    """Open a file for reading, without waiting. The caller owns the descriptor. Raises OSError."""
    return OPEN.get()(path)
