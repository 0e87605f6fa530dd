"""What tells one dump from another."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from images_spec import images
from images_spec.errors import ImageError
from images_spec.identity import SIZE, identify, new_run_id
from images_spec.images import Kind
from images_spec.messages import CoreEntry, InventoryEntry, PstreeEntry, TaskCoreEntry, TaskState

CRIU_ID = "3f2a1f5e-6a0b-4c57-9d0e-2f1f8f1f0a01"


def write(directory: Path, run_id: str = "", *, uptime: int = 7, comm: str = "a") -> Path:
    directory.mkdir()
    entry = InventoryEntry(img_version=2, dump_uptime=uptime, dump_criu_run_id=run_id or None)
    images.write(directory / Kind.INVENTORY.file_name(), Kind.INVENTORY, [entry])
    tree = [PstreeEntry(pid=9, ppid=0, pgid=9, sid=9, threads=[9])]
    images.write(directory / Kind.PSTREE.file_name(), Kind.PSTREE, tree)
    task = TaskCoreEntry(
        task_state=TaskState.TASK_ALIVE,
        exit_code=0,
        personality=0,
        flags=0,
        blk_sigset=0,
        comm=comm.encode(),
    )
    core = CoreEntry(mtype=1, tc=task)
    images.write(directory / Kind.CORE.file_name(9), Kind.CORE, [core])
    return directory


def test_run_ids(tmp_path: Path) -> None:
    """Each dump has its own; they tell who has made it."""
    first, second = new_run_id(), new_run_id()
    mine = identify(write(tmp_path / "mine", first))
    assert mine.by_dumptool
    assert len(mine.digest) == SIZE
    assert identify(write(tmp_path / "copy", first, comm="b")) == mine
    assert identify(write(tmp_path / "other", second)).digest != mine.digest
    criu = identify(write(tmp_path / "criu", CRIU_ID))
    assert not criu.by_dumptool
    assert criu.digest != mine.digest
    assert not identify(write(tmp_path / "odd", "no uuid")).by_dumptool


def test_without_a_run_id(tmp_path: Path) -> None:
    """As CRIU before 4.1: what there is has to do, and all of it must be there."""
    one = write(tmp_path / "one")
    shutil.copytree(one, tmp_path / "copy")
    assert identify(tmp_path / "copy") == identify(one)
    assert not identify(one).by_dumptool
    assert identify(write(tmp_path / "later", uptime=8)) != identify(one)
    assert identify(write(tmp_path / "elsewhere", comm="b")) != identify(one)
    (one / Kind.CORE.file_name(9)).unlink()
    with pytest.raises(ImageError, match=r"core-9\.img: no such image"):
        identify(one)


def test_no_inventory(tmp_path: Path) -> None:
    with pytest.raises(ImageError):
        identify(tmp_path)
