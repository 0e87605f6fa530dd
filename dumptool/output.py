"""The images directory of one run, and when what is in it counts: on the disk first, the inventory last."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from google.protobuf.message import Message

from dumptool.errors import DumpError
from images_spec import images
from images_spec.images import Kind
from images_spec.messages import InventoryEntry

M = TypeVar("M", bound=Message)

MOST_OPEN = 256
"""Files kept open for their fsync: far from any limit of descriptors."""
AT_ONCE = 8
"""fsyncs under way: journals write many in one go."""
DRAFT = ".inventory.img.new"

Keep = Callable[[Path, int], None]
"""Told of a file that has been written, and a descriptor of it that is about to be closed."""


class Output:
    """Writes images. A directory without an inventory is no dump: ``publish`` writes it when all else is on the disk.

    ``durable``: with fsync. The files are kept open until then: an error of the disk is told to those who have a file
    open when it comes, and may be forgotten after that (fsync(2)).
    """

    def __init__(self, directory: Path, *, durable: bool = True) -> None:
        self.directory, self._durable = directory, durable
        self._open: list[tuple[Path, int]] = []

    @property
    def keep(self) -> Keep | None:
        """For who writes a file without us."""
        return self._keep if self._durable else None

    def write(self, name: str, kind: Kind[M], messages: Iterable[M]) -> None:
        """An image of messages. Raises ``ImageError``, ``DumpError``."""
        images.write(self.directory / name, kind, messages, self.keep)

    def write_with_data(self, name: str, kind: Kind[M], items: Iterable[tuple[M, bytes]]) -> None:
        """An image of messages that bytes follow. Raises as ``write``."""
        images.write_with_data(self.directory / name, kind, items, self.keep)

    def publish(self, inventory: InventoryEntry) -> None:
        """The inventory: afterwards the directory is a dump, also if the machine fails.

        Raises ``ImageError``, ``DumpError``; it is none then.
        """
        self.sync()
        draft, path = self.directory / DRAFT, self.directory / Kind.INVENTORY.file_name()
        try:
            self.write(DRAFT, Kind.INVENTORY, [inventory])
            self._sync_files()
            try:
                draft.replace(path)
            except OSError as error:
                raise DumpError(f"{path}: can't be written: {error.strerror}") from None
            self.sync_directory()
        except BaseException:
            for stale in (draft, path):
                with suppress(OSError):
                    stale.unlink(missing_ok=True)
            raise

    def withdraw(self) -> None:
        """Without the inventory, as well as that can be done: the directory is no dump."""
        with suppress(OSError, DumpError):
            (self.directory / Kind.INVENTORY.file_name()).unlink(missing_ok=True)
            self.sync_directory()

    def sync(self) -> None:
        """Everything written so far, and its names, is on the disk. Raises ``DumpError``."""
        self._sync_files()
        self.sync_directory()

    def sync_directory(self) -> None:
        """Names that have come and gone are so on the disk. Raises ``DumpError``."""
        if not self._durable:
            return
        try:
            fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise _unwritten(self.directory, error) from None
        try:
            _sync((self.directory, fd))
        finally:
            os.close(fd)

    def close(self) -> None:
        """Of what has not been synced nothing is known."""
        while self._open:
            os.close(self._open.pop()[1])

    def _keep(self, path: Path, fd: int) -> None:
        if len(self._open) >= MOST_OPEN:
            self._sync_files()
        try:
            self._open.append((path, os.dup(fd)))
        except OSError as error:
            raise _unwritten(path, error) from None

    def _sync_files(self) -> None:
        try:
            if len(self._open) == 1:
                _sync(self._open[0])
            elif self._open:
                with ThreadPoolExecutor(min(AT_ONCE, len(self._open))) as pool:
                    for _ in pool.map(_sync, self._open):
                        pass
        finally:
            self.close()


def _sync(file: tuple[Path, int]) -> None:
    path, fd = file
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a device or a pipe, which has nothing to be synced (fsync(2))
            raise _unwritten(path, error) from None


def _unwritten(path: Path, error: OSError) -> DumpError:
    return DumpError(f"{path}: can't be written to the disk: {error.strerror}")
