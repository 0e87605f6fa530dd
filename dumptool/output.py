"""The images directory of one run. Images are on the disk before the inventory, which makes them a dump."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from google.protobuf.message import Message

from dumptool.errors import DumpError
from images_spec import images
from images_spec.images import Kind
from images_spec.messages import InventoryEntry

M = TypeVar("M", bound=Message)

MOST_OPEN = 256
"""Files kept open until their fsync: far below any limit of descriptors."""
AT_ONCE = 8
"""fsync calls in parallel: a journal commits many files at once."""
DRAFT = ".inventory.img.new"

Keep = Callable[[Path, int], None]
"""Receives the path of a file that has been written, and its descriptor, which is about to be closed."""


class Output:
    """Writes images. A directory without an inventory is not a dump: ``publish`` writes it last.

    ``durable``: with fsync. Files stay open until then, because the kernel reports a write error only through
    descriptors that were open when it happened, and may forget it later (fsync(2)).
    """

    def __init__(self, directory: Path, *, durable: bool = True) -> None:
        self.directory, self._durable = directory, durable
        self._open: list[tuple[Path, int]] = []

    @property
    def keep(self) -> Keep | None:
        """For files written by other code; None if not ``durable``."""
        return self._keep if self._durable else None

    def make_directory(self) -> None:
        """Creates the directory if it is missing, and its parents. Raises ``DumpError``."""
        missing = [one for one in (self.directory, *self.directory.parents) if not os.path.lexists(one)]
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DumpError(f"{self.directory} can't be created: {error.strerror}") from None
        for one in reversed(
            missing
        ):  # a new directory has its name on the disk once the one above it is synced
            Output(one.parent, durable=self._durable).sync_directory()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other run of dumptool uses the directory in the block. Raises ``DumpError`` if one does.

        It would remove our inventory, the only sign that a tree that is killed is in the images.
        """
        try:
            fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise DumpError(f"{self.directory}: {error.strerror}") from None
        try:
            with suppress(OSError):  # not all network file systems can lock a directory
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise DumpError(
                        f"{self.directory}: another dumptool writes there: wait for it to end"
                    ) from None
            yield
        finally:
            os.close(fd)

    def write(self, name: str, kind: Kind[M], messages: Iterable[M]) -> None:
        """Writes an image of messages. Raises ``ImageError``, ``DumpError``."""
        images.write(self.directory / name, kind, messages, self.keep)

    def write_with_data(self, name: str, kind: Kind[M], items: Iterable[tuple[M, bytes]]) -> None:
        """Writes an image of messages, each followed by bytes. Raises as ``write``."""
        images.write_with_data(self.directory / name, kind, items, self.keep)

    def publish(self, inventory: InventoryEntry) -> None:
        """Writes the inventory. Afterwards the directory is a dump, even after a power failure (if ``durable``).

        Raises ``ImageError``, ``DumpError``; then there is no inventory.
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
        """Removes the inventory if possible: the directory is not a dump any more. Raises nothing."""
        with suppress(OSError, DumpError):
            (self.directory / Kind.INVENTORY.file_name()).unlink(missing_ok=True)
            self.sync_directory()

    def sync(self) -> None:
        """On return all files, and their names, are on the disk. Raises ``DumpError``."""
        self._sync_files()
        self.sync_directory()

    def sync_directory(self) -> None:
        """On return created and removed names are on the disk. Raises ``DumpError``."""
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
        """Closes files without fsync."""
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
        if error.errno != errno.EINVAL:  # not a regular file: there is nothing to sync (fsync(2))
            raise _unwritten(path, error) from None


def _unwritten(path: Path, error: OSError) -> DumpError:
    return DumpError(f"{path}: can't be written to the disk: {error.strerror}")
