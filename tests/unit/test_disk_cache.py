"""The cache of frames on the disk: bounded, for any number of processes, and gone when the disk is full."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from lazypages.errors import LazyPagesError
from lazypages.sources.disk_cache import STEP, DiskCache

MIB = 1 << 20


def size(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.iterdir())


def names(folder: Path) -> set[bytes]:
    return {bytes.fromhex(path.stem) for path in folder.iterdir()}


def fill(folder: Path, identity: bytes, mib: int, limit: int = 100 * MIB) -> None:
    cache = DiskCache(folder, identity, limit)
    for at in range(mib):
        cache.write(at * MIB, os.urandom(MIB))
    cache.close()


def test_what_is_written_is_there_for_the_next_one(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "new" / "cache", b"one", MIB)
    cache.write(1 << 30, b"frame")
    other = DiskCache(tmp_path / "new" / "cache", b"one", MIB)
    assert other.read(1 << 30, 5) == b"frame"
    assert other.read(1000, 5) == bytes(5)
    assert size(tmp_path / "new" / "cache") < MIB
    cache.close()
    other.close()


def test_the_oldest_go_first(tmp_path: Path) -> None:
    for number, identity in enumerate((b"a", b"b", b"c")):
        fill(tmp_path, identity, 4)
        path = tmp_path / f"{identity.hex()}.frames"
        os.utime(path, (number, number))
    DiskCache(tmp_path, b"a", 9 * MIB).close()  # in use again
    assert names(tmp_path) == {b"a", b"c"}


def test_a_pack_that_is_too_large_is_kept_in_part(tmp_path: Path) -> None:
    fill(tmp_path, b"large", 60, limit=20 * MIB)
    assert 20 * MIB < size(tmp_path) <= 20 * MIB + STEP


def test_another_process_has_removed_it(tmp_path: Path) -> None:
    """What is written to a file without a name would be counted by nobody."""
    cache = DiskCache(tmp_path, b"mine", 100 * MIB)
    cache.write(0, b"frame")
    next(tmp_path.iterdir()).unlink()
    for at in range(40):
        cache.write(at * MIB, os.urandom(MIB))
    assert cache.read(30 * MIB, MIB) == b""
    assert cache.read(0, 5) != b""
    cache.close()


def test_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = DiskCache(tmp_path, b"mine", 100 * MIB)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    for at in range(3):
        cache.write(at, b"frame")
    assert [record.getMessage() for record in caplog.records] == [
        f"--pack-cache {tmp_path}: No space left on device; keeping no more in it"
    ]
    cache.close()


def test_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LazyPagesError, match=r"--pack-cache .*/file: File exists"):
        DiskCache(tmp_path / "file", b"mine", MIB)
    (tmp_path / f"{b'link'.hex()}.frames").symlink_to(tmp_path / "file")
    with pytest.raises(LazyPagesError, match="symbolic links"):
        DiskCache(tmp_path, b"link", MIB)
