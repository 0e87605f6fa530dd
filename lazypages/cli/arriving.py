"""Waits for the images of a checkpoint that are still being written or copied: ``serve --wait``."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Final

from images_spec import images
from images_spec.errors import ImageError
from images_spec.images import Kind
from lazypages.errors import LazyPagesError

#: Seconds between two looks.
PAUSE: Final = 0.005


def wait_for_images(directory: Path) -> None:
    """Return when the inventory is there, the last image that ``criu`` and ``dumptool`` write.

    SIGINT and SIGTERM must be blocked. Raises LazyPagesError if one of them comes.
    """
    while not _is_there(directory / Kind.INVENTORY.file_name()):
        if signal.sigtimedwait({signal.SIGINT, signal.SIGTERM}, PAUSE):
            raise LazyPagesError("ended before the images were there")


def _is_there(inventory: Path) -> bool:
    """Whether all of the inventory can be read: a part of it, or an empty file, is still being written."""
    try:
        images.read_one(inventory, Kind.INVENTORY)
    except ImageError:
        return False
    return True
