"""The identity of a checkpoint: distinguishes it from other dumps of the same processes.

CRIU from 4.1 on writes a random id into the inventory of each dump (``dump_criu_run_id``), and so does dumptool: a
UUID of version 8, whereas CRIU's are made by libuuid (version 4 or 1). Without an id, the state of the processes
and the time of the dump identify it (``dump_uptime`` in the inventory, registers in the cores).
"""

from __future__ import annotations

import os
import uuid
from hashlib import blake2b
from pathlib import Path
from typing import Final, NamedTuple

from images_spec import images
from images_spec._files import read_file
from images_spec.checkpoint import open_checkpoint
from images_spec.images import Kind

SIZE: Final = 16
_OUR_VERSION: Final = 8  # RFC 9562: for custom use


class Identity(NamedTuple):
    """``digest``: SIZE bytes, equal for all copies of the images. ``by_dumptool``: dumptool wrote the images."""

    digest: bytes
    by_dumptool: bool


def new_run_id() -> str:
    """A new id for the inventory of a dump."""
    number = int.from_bytes(os.urandom(16), "big")
    number &= ~(0xF << 76 | 0x3 << 62)
    return str(uuid.UUID(int=number | _OUR_VERSION << 76 | 0x2 << 62))


def identify(directory: Path) -> Identity:
    """The identity of the checkpoint in ``directory``. Raises ``ImageError``."""
    path = directory / Kind.INVENTORY.file_name()
    run_id = images.read_one(path, Kind.INVENTORY).dump_criu_run_id
    if run_id:
        return Identity(blake2b(run_id.encode(), digest_size=SIZE).digest(), _is_ours(run_id))
    digest = blake2b(digest_size=SIZE)
    names = [Kind.CORE.file_name(task.pid) for task in open_checkpoint(directory).tasks]
    for name in (path.name, Kind.PSTREE.file_name(), *names):
        content = read_file(directory / name)
        digest.update(len(content).to_bytes(8, "little") + content)
    return Identity(digest.digest(), False)


def _is_ours(run_id: str) -> bool:
    try:
        return uuid.UUID(run_id).version == _OUR_VERSION
    except ValueError:
        return False
