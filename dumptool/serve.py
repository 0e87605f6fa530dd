"""`dump --lazy-pages`: gives the pages that the images lack, straight from the memory of the frozen tree.

The tree stays frozen until a client has said that it needs no more (CLOSE); a client that is merely gone
changes nothing, and the next one gets every page anew. So the tasks run here or there, never on both sides: only
a signal to us, which is somebody's decision, lets them go on here after all. If we are killed, they stay stopped
(``FrozenTree.hold``).
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import threading
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, compress

from dumptool.dump import Settings
from dumptool.errors import DumpError
from dumptool.freeze import FrozenTree
from images_spec._pagemap import ffi
from images_spec.flags import PAGE_SIZE, PE_LAZY
from images_spec.images import Kind
from images_spec.pagemap import Pagemap
from lazypages.daemonize import tell_ready
from lazypages.errors import UnreadableError
from lazypages.logs import MESSAGE
from lazypages.pageserver.listen import accept_all, hang_up, prepare, until_signalled
from lazypages.pageserver.peers import StrangerError
from lazypages.pageserver.serve import PageConnection
from lazypages.tls import TlsError, TlsFiles

log = logging.getLogger("lazypages")

_WORDS = 3  # of 8 bytes, in a struct lp_pagemap_entry (csrc/pagemap.h)


class SourceGoneError(DumpError):
    """A frozen process has been killed: what nobody has fetched of its memory is lost."""


@dataclass(frozen=True, slots=True)
class Copied:
    """Bytes of a task's memory; a ``pageserver.serve.Piece``."""

    data: bytes

    @property
    def size(self) -> int:
        return len(self.data)

    def read(self) -> bytes:
        return self.data


class LazyMemory:
    """The pages of one frozen process that its pagemap has as LAZY and nothing else.

    ``total``: how many. They are read through /proc/<pid>/mem, kept open: unlike a pid, it can never mean
    another process, and it reads PROT_NONE mappings as well (proc_pid_mem(5)).
    """

    def __init__(self, pid: int, pagemap: Pagemap) -> None:
        """Raises ``DumpError``."""
        size = len(pagemap) * _WORDS * 8
        words = memoryview(ffi.buffer(pagemap.entries_pointer, size) if size else b"").cast("B").cast("Q")
        lazy = [flags & 0xFFFFFFFF == PE_LAZY for flags in words[2::_WORDS]]
        self._starts = array("Q", compress(words[0::_WORDS], lazy))
        self._counts = array("Q", compress(words[1::_WORDS], lazy))
        self._numbers = array("Q", accumulate(self._counts, initial=0))  # of the first page of each run
        self.total = self._numbers[-1]
        self._asked = bytearray(self.total)
        self._pid = pid
        try:
            self._fd = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DumpError(f"pid {pid}: its memory can't be read: {error.strerror}") from None

    def close(self) -> None:
        """No page can be read any more."""
        os.close(self._fd)

    @property
    def never_asked(self) -> int:
        """Pages that no client has asked for yet."""
        return self._asked.count(0)

    def read(self, address: int, nr_pages: int) -> bytes:
        """The first pages of the range, as many as there are without a gap; nothing if the first one is not lazy.

        They end before a page that can't be read. Raises ``UnreadableError`` if that is the first, ``SourceGoneError``
        if the process is no more.
        """
        found = self._find(address, nr_pages)
        if not found:
            return b""
        try:  # what was read before an error is returned (mem_rw() in the kernel's fs/proc/base.c)
            data = os.pread(self._fd, found * PAGE_SIZE, address)
        except OSError as error:
            raise UnreadableError(f"pid {self._pid}: {error.strerror}") from None
        if not data:
            raise SourceGoneError(f"pid {self._pid} was killed while its pages were being served")
        if len(data) < PAGE_SIZE:
            raise UnreadableError(f"pid {self._pid}: only a part of it")
        return data[: len(data) // PAGE_SIZE * PAGE_SIZE]

    def _find(self, address: int, nr_pages: int) -> int:
        """How many of the pages are here; they count as asked for."""
        index = bisect_right(self._starts, address) - 1
        if index < 0 or address % PAGE_SIZE:
            return 0
        skipped, found = (address - self._starts[index]) // PAGE_SIZE, 0
        while found < nr_pages and skipped < self._counts[index]:
            number, taken = (
                self._numbers[index] + skipped,
                min(nr_pages - found, self._counts[index] - skipped),
            )
            self._asked[number : number + taken] = b"\1" * taken
            found += taken
            index, skipped = index + 1, 0
            if index == len(self._starts) or self._starts[index] != address + found * PAGE_SIZE:
                break
        return found


class FrozenPages:
    """The lazy pages of a whole frozen tree, for any number of connections; a ``pageserver.serve.Pages``."""

    def __init__(self, memories: dict[int, LazyMemory]) -> None:
        self._memories = memories
        self.total = sum(memory.total for memory in memories.values())

    @property
    def never_asked(self) -> int:
        """Pages that no client has asked for yet."""
        return sum(memory.never_asked for memory in self._memories.values())

    def find(self, pid: int, address: int, nr_pages: int) -> Sequence[Copied]:
        """Copies of the first pages of the range. Raises as ``LazyMemory.read``."""
        memory = self._memories.get(pid)
        data = memory.read(address, nr_pages) if memory else b""
        return [Copied(data)] if data else []


@contextmanager
def frozen_pages(tree: FrozenTree, settings: Settings) -> Iterator[FrozenPages]:
    """What the images just written leave to us. Raises ``DumpError``, ``ImageError``."""
    memories: dict[int, LazyMemory] = {}
    try:
        for process in tree.alive:
            pagemap = Pagemap.load(settings.images / Kind.PAGEMAP.file_name(process.pid))
            memories[process.pid] = LazyMemory(process.pid, pagemap)
        yield FrozenPages(memories)
    finally:
        for memory in memories.values():
            memory.close()


@dataclass(frozen=True, slots=True)
class PageService:
    """Where clients find us; its call is a ``dumptool.dump.Serve``.

    ``name``: of the listening socket, for people. ``address``: as given with --address. ``status_fd``: gets a
    0 byte once clients are served. ``strangers``: other users of this host may connect, too.
    """

    listener: socket.socket
    name: str
    address: str | None = None
    tls: TlsFiles | None = None
    status_fd: int | None = None
    strangers: bool = False

    def __call__(self, tree: FrozenTree, settings: Settings) -> None:
        """Serves until a client has said that it needs no more.

        Raises ``DumpError`` when a signal (SIGINT, SIGTERM) comes first, or a frozen process is killed.
        """
        with (
            frozen_pages(tree, settings) as pages,
            _no_hangup(),
            until_signalled() as signalled,
            _event() as ended,
            select.epoll() as stop,
        ):
            stop.register(signalled, select.EPOLLIN)
            stop.register(ended, select.EPOLLIN)
            clients = _Clients(self, pages, ended, over=lambda: bool(stop.poll(0)))
            alone = "" if self.address is not None else " (this machine only; --address for others)"
            log.log(MESSAGE, "frozen; %s of memory to be had at %s%s", _size(pages.total), self.name, alone)
            if self.status_fd is not None:
                tell_ready(self.status_fd)
            accept_all(self.listener, stop.fileno(), clients.serve)
            self.listener.close()
            clients.conclude()


class _Clients:
    """All connections, each in a thread of its own, and what they amount to."""

    def __init__(
        self, service: PageService, pages: FrozenPages, ended: int, over: Callable[[], bool]
    ) -> None:
        """``ended``: eventfd to be written when it is over. ``over``: whether it is, for whatever reason."""
        self._service, self._pages, self._ended, self._over = service, pages, ended, over
        self._lock = threading.Lock()
        self._connected = 0
        self._given = 0  # answers with pages, since there was no connection at all
        self._done = False
        self._gone: SourceGoneError | None = None

    def serve(self, sock: socket.socket, name: str) -> None:
        """One connection."""
        with self._lock:
            self._connected += 1
        log.info("%s: connected", name)
        closed = False
        try:
            closed = self._give(sock, name)
        finally:
            with self._lock:
                self._connected -= 1
                if not self._done:
                    self._left(name, closed=closed)
                if not self._connected:
                    self._given = 0

    def _give(self, sock: socket.socket, name: str) -> bool:
        """Whether the client has said that it needs no more."""
        try:
            service = self._service
            sock = prepare(sock, service.tls, service.address, strangers=service.strangers)
        except (TlsError, StrangerError) as error:
            log.error("%s: %s", name, error)
            return False
        connection = PageConnection(sock, self, name)
        clean = False
        try:
            clean = connection.run()
        finally:
            hang_up(sock, clean=clean)
            log.info("%s: gone after %s", name, _size(connection.pages))
        return connection.closed

    def find(self, pid: int, address: int, nr_pages: int) -> Sequence[Copied]:
        """As ``FrozenPages.find``; without a process that was killed there is nothing to wait for."""
        try:
            found = self._pages.find(pid, address, nr_pages)
        except SourceGoneError as error:
            self._gone = error
            os.eventfd_write(self._ended, 1)
            raise
        with self._lock:
            self._given += len(found)
        return found

    def _left(self, name: str, *, closed: bool) -> None:
        if closed and (self._given or not self._pages.total):
            self._done = True
            os.eventfd_write(self._ended, 1)
        elif self._over():
            pass  # cut off by us
        elif closed:
            log.warning("%s: has closed without asking for a page; waiting for another client", name)
        elif not self._connected:
            log.warning(
                "%s: gone before it was done, %s were never asked for; the tasks stay frozen, waiting for a client "
                "(Ctrl-C or SIGTERM lets them go on here)",
                name,
                _size(self._pages.never_asked),
            )

    def conclude(self) -> None:
        """When all connections have ended. Raises ``DumpError`` unless a client was done."""
        missing = self._pages.never_asked
        if self._done:
            fetched = self._pages.total - missing
            log.log(
                MESSAGE,
                "the client needs no more: %s fetched, %s never asked for",
                _size(fetched),
                _size(missing),
            )
        elif self._gone is not None:
            raise self._gone
        else:
            raise DumpError(
                f"ended by a signal, {_size(missing)} were never asked for: the tasks go on here, "
                "and whatever was restored from these images elsewhere must not"
            )


def _size(pages: int) -> str:
    return f"{pages} pages ({pages * PAGE_SIZE / (1 << 20):.1f} MiB)"


@contextmanager
def _no_hangup() -> Iterator[None]:
    """A terminal that goes away decides nothing."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


@contextmanager
def _event() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        yield fd
    finally:
        os.close(fd)
