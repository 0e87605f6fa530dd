"""Packed checkpoints of victims, and where they are restored."""

from __future__ import annotations

from pathlib import Path

from images_spec.packing import pack
from tests.support.chain import split
from tests.support.criu import RELEASES, Criu
from tests.support.restore import Checkpoint, our_daemon

NEWEST = Criu(RELEASES[-1])
BY_FAULTS = our_daemon("--no-background")


def packed(checkpoint: Checkpoint, folder: Path, depth: int = 0) -> Path:
    """The checkpoint in a file, with so many parents before."""
    images = split(checkpoint.images, folder / "chain", depth).top if depth else checkpoint.images
    pack(images, folder / "pack")
    return folder / "pack"


def work_in(folder: Path) -> Path:
    (work := folder / "work").mkdir()
    return work
