"""Waits while the machine has no file descriptor, thread or memory for a part of a connection.

The connection is kept meanwhile: CRIU's server accepts a single one.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from typing import Final, TypeVar

import anyio

from lazypages.net.link import LinkError

log = logging.getLogger("lazypages")

T = TypeVar("T")

SHORTAGE: Final = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN}
SHORTAGE_PAUSE: Final = 0.05  # s between two attempts


async def made(make: Callable[[], T], what: str, server: str, waiting: Callable[[], None]) -> T:
    """Calls `make` until it raises no OSError of a shortage; `waiting` before each pause.

    Raises LinkError for another OSError.
    """
    logged = False
    while True:
        try:
            return make()
        except OSError as error:
            if error.errno not in SHORTAGE:
                raise LinkError(f"cannot make {what}: {error.strerror}") from None
            if not logged:
                log.warning("%s: cannot make %s: %s; trying again", server, what, error.strerror)
                logged = True
        waiting()
        await anyio.sleep(SHORTAGE_PAUSE)
