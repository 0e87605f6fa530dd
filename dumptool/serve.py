"""`dump --lazy-pages`: serves the pages that the images lack from the memory of the frozen tree.

The tree stays frozen until a client has all of it. `lazypages serve` reports that (wire.CloseFlags.COMPLETE).
`criu lazy-pages` sends CLOSE at every end, also if its task was killed half-way (observed with 4.1.1 and 4.2.1); it has
all if it has requested every page. The loss of a client changes nothing: the next one gets every page again.

The tasks run here or at a destination, never at both. From the moment a client may have started them, they do not go on
here by themselves, even if dumptool is killed: they stay stopped (``FrozenTree.stays``, ``FrozenTree.hold``). A
`lazypages serve` may have started them from when it learns which checkpoint this is until it reports that no restore
has come (CloseFlags.UNUSED); `criu lazy-pages`, from its first page.
"""

from __future__ import annotations

import fcntl
import logging
import os
import select
import signal
import socket
import termios
import threading
import time
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate, compress

from dumptool.errors import DumpError
from dumptool.freeze import FrozenTree
from dumptool.settings import Settings
from images_spec._pagemap import ffi
from images_spec.flags import PAGE_SIZE, PE_LAZY
from images_spec.identity import identify
from images_spec.images import Kind
from images_spec.pagemap import Pagemap
from lazypages.cli.daemonize import report_ready
from lazypages.errors import UnreadableError
from lazypages.logs import MESSAGE
from lazypages.net import wire
from lazypages.net.listen import accept_all, hang_up, prepare, until_signalled
from lazypages.net.page_connection import Gate, PageConnection
from lazypages.net.peers import StrangerError
from lazypages.net.tls import TlsError, TlsFiles
from lazypages.net.wire import CloseFlags
from lazypages.wording import count, size

log = logging.getLogger("lazypages")

#: Pids listed in a message.
MAX_NAMED = 20

#: Seconds to deliver the last message to a client that is too late.
LAST_WORDS = 2.0

_WORDS = 3  # 8-byte words in a struct lp_pagemap_entry (csrc/images/pagemap.h)


class SourceGoneError(DumpError):
    """A frozen process was killed: those of its pages that no client has fetched are lost."""


@dataclass(frozen=True, slots=True)
class Copied:
    """Bytes of a task's memory; a ``lazypages.net.page_connection.Piece``."""

    data: bytes

    @property
    def size(self) -> int:
        return len(self.data)

    def read(self) -> bytes:
        return self.data


class LazyMemory:
    """The pages of one frozen process that are LAZY and not PRESENT in its pagemap.

    ``total``: their number. They are read through /proc/<pid>/mem, which is kept open: unlike a pid, it can't come to
    refer to another process, and it reads PROT_NONE mappings, too (proc_pid_mem(5)).
    """

    def __init__(self, pid: int, pagemap: Pagemap) -> None:
        """Raises ``DumpError``."""
        size = len(pagemap) * _WORDS * 8
        words = memoryview(ffi.buffer(pagemap.entries_pointer, size) if size else b"").cast("B").cast("Q")
        lazy = [flags & 0xFFFFFFFF == PE_LAZY for flags in words[2::_WORDS]]
        self._starts = array("Q", compress(words[0::_WORDS], lazy))
        self._counts = array("Q", compress(words[1::_WORDS], lazy))
        self._numbers = array("Q", accumulate(self._counts, initial=0))  # index of each run's first page
        self.total = self._numbers[-1]
        self._asked = self.nothing_asked()
        self._pid = pid
        try:
            self._fd = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DumpError(f"pid {pid}: its memory can't be read: {error.strerror}") from None

    def close(self) -> None:
        """Ends all reading."""
        os.close(self._fd)

    def nothing_asked(self) -> bytearray:
        """Flags, one byte per page, that ``read`` sets."""
        return bytearray(self.total)

    @property
    def never_asked(self) -> int:
        """Number of pages that no client has requested yet."""
        return self._asked.count(0)

    def read(self, address: int, nr_pages: int, asked: bytearray) -> bytes:
        """The first pages of the range, up to the first gap; empty if the first page is not lazy.

        Stops before a page that can't be read. Raises ``UnreadableError`` if that is the first one,
        ``SourceGoneError`` if the process was killed. ``asked``: flags of this client.
        """
        found = self._find(address, nr_pages, asked)
        if not found:
            return b""
        try:  # bytes read before an error are returned (mem_rw() in fs/proc/base.c of Linux)
            data = os.pread(self._fd, found * PAGE_SIZE, address)
        except OSError as error:
            raise UnreadableError(f"pid {self._pid}: {error.strerror}") from None
        if not data:
            raise SourceGoneError(f"pid {self._pid} was killed while its pages were being served")
        if len(data) < PAGE_SIZE:
            raise UnreadableError(f"pid {self._pid}: a page can be read only in part")
        return data[: len(data) // PAGE_SIZE * PAGE_SIZE]

    def _find(self, address: int, nr_pages: int, asked: bytearray) -> int:
        """The number of pages here, starting at ``address``. Sets their flags."""
        index = bisect_right(self._starts, address) - 1
        if index < 0 or address % PAGE_SIZE:
            return 0
        skipped, found = (address - self._starts[index]) // PAGE_SIZE, 0
        while found < nr_pages and skipped < self._counts[index]:
            number, taken = (
                self._numbers[index] + skipped,
                min(nr_pages - found, self._counts[index] - skipped),
            )
            self._asked[number : number + taken] = asked[number : number + taken] = b"\1" * taken
            found += taken
            index, skipped = index + 1, 0
            if index == len(self._starts) or self._starts[index] != address + found * PAGE_SIZE:
                break
        return found


class FrozenPages:
    """The lazy pages of a frozen tree, for any number of connections."""

    def __init__(self, memories: dict[int, LazyMemory]) -> None:
        self._memories = memories
        self.total = sum(memory.total for memory in memories.values())

    @property
    def never_asked(self) -> int:
        """Number of pages that no client has requested yet."""
        return sum(memory.never_asked for memory in self._memories.values())

    def find(self, pid: int, address: int, nr_pages: int, asked: dict[int, bytearray]) -> Sequence[Copied]:
        """Copies of the first pages of the range. ``asked``: flags of this client, by pid.

        Raises as ``LazyMemory.read``.
        """
        memory = self._memories.get(pid)
        if memory is None:
            return []
        if pid not in asked:
            asked[pid] = memory.nothing_asked()
        data = memory.read(address, nr_pages, asked[pid])
        return [Copied(data)] if data else []


@contextmanager
def frozen_pages(tree: FrozenTree, settings: Settings) -> Iterator[FrozenPages]:
    """Opens the pages that the images just written lack. Raises ``DumpError``, ``ImageError``."""
    memories: dict[int, LazyMemory] = {}
    try:
        for process in tree.alive:
            pid = tree.image_pid(process.pid)
            pagemap = Pagemap.load(settings.images / Kind.PAGEMAP.file_name(pid))
            memories[pid] = LazyMemory(process.pid, pagemap)
        yield FrozenPages(memories)
    finally:
        for memory in memories.values():
            memory.close()


@dataclass(frozen=True, slots=True)
class PageService:
    """The listening page server; its call is a ``dumptool.settings.Serve``.

    ``name``: of the listening socket, for messages. ``address``: of the option --address. ``status_fd``: receives a
    0 byte once clients are served. ``strangers``: other users of this host may connect, too.
    """

    listener: socket.socket
    name: str
    address: str | None = None
    tls: TlsFiles | None = None
    status_fd: int | None = None
    strangers: bool = False

    def __call__(self, tree: FrozenTree, settings: Settings) -> float | None:
        """Serves until a client has everything. Returns when the first page was requested.

        Raises ``DumpError`` on SIGINT or SIGTERM, and if a frozen process is killed. If a client may have started the
        tasks, the tree then stays stopped.
        """
        identity = identify(settings.images).digest
        with (
            frozen_pages(tree, settings) as pages,
            _no_hangup(),
            until_signalled() as signalled,
            _event() as ended,
            select.epoll() as stop,
        ):
            stop.register(signalled, select.EPOLLIN)
            stop.register(ended, select.EPOLLIN)
            clients = _Clients(
                self,
                tree,
                pages,
                identity,
                ended,
                over=lambda: bool(stop.poll(0)),
                both=settings.leave_running,
            )
            alone = "" if self.address is not None else " (this machine only; --address for others)"
            log.log(MESSAGE, "frozen; serving %s of memory at %s%s", _size(pages.total), self.name, alone)
            if self.status_fd is not None:
                report_ready(self.status_fd)
            accept_all(self.listener, stop.fileno(), clients.serve, last_words=2 * LAST_WORDS)
            self.listener.close()
            clients.conclude()
            return clients.first_request


class _Clients:
    """All connections, each in a thread of its own, and the conclusion from them: which tasks may run elsewhere."""

    def __init__(
        self,
        service: PageService,
        tree: FrozenTree,
        pages: FrozenPages,
        identity: bytes,
        ended: int,
        *,
        over: Callable[[], bool],
        both: bool,
    ) -> None:
        """``ended``: an eventfd, written when a client has everything or a process was killed. ``over``: returns
        whether serving has ended for any reason. ``both``: the user wants the tree to go on here in any case."""
        self.service, self.pages, self.identity, self.over, self.both = service, pages, identity, over, both
        self._tree, self._ended = tree, ended
        self._lock = threading.Lock()
        self._connected = 0
        self._undecided = 0  # clients that know which checkpoint this is, and have not yet sent their number
        # A `criu lazy-pages`, which can't report whether it has started the tasks, has received pages.
        self._unknown = False
        self._may_run: set[int] = set()  # numbers of other clients that may have started the tasks
        self._winner: _Client | None = None
        self.first_request: float | None = None
        self._gone: SourceGoneError | None = None

    def serve(self, sock: socket.socket, name: str) -> None:
        """Serves one connection."""
        with self._lock:
            self._connected += 1
        log.info("%s: connected", name)
        client = _Client(self, name)
        try:
            client.run(sock)
        finally:
            with self._lock:
                self._connected -= 1
                last = not self._connected
            if self._winner is client:
                os.eventfd_write(self._ended, 1)
            elif self._winner is None and not self.over():
                client.explain(self.pages.never_asked, last=last)

    def find(self, pid: int, address: int, nr_pages: int, asked: dict[int, bytearray]) -> Sequence[Copied]:
        """As ``FrozenPages.find``. Ends the service if a process was killed: its pages can't be served any more."""
        try:
            found = self.pages.find(pid, address, nr_pages, asked)
        except SourceGoneError as error:
            self._gone = error
            os.eventfd_write(self._ended, 1)
            raise
        if found and self.first_request is None:
            self.first_request = time.monotonic()
        if found and not self._unknown:
            with self._changing():
                self._unknown = True
        return found

    # What follows records which clients may have started the tasks; always before the client receives the answer.

    @contextmanager
    def _changing(self) -> Iterator[None]:
        with self._lock:
            yield
            self._tree.stays = not self.both and bool(self._unknown or self._undecided or self._may_run)

    def opened(self) -> None:
        with self._changing():
            self._undecided += 1

    def refused(self) -> None:
        with self._changing():
            self._undecided -= 1

    def agreed(self, number: int) -> None:
        with self._changing():
            self._undecided -= 1
            self._may_run.add(number)

    def unused(self, number: int) -> None:
        with self._changing():
            self._may_run.discard(number)

    def completed(self, client: _Client) -> bool:
        """Whether this client is the first that has everything. All others are too late from then on."""
        with self._lock:
            if self._winner is None:
                self._winner = client
            return self._winner.is_same(client)

    def is_too_late(self, client: _Client) -> bool:
        """Whether another destination has completed."""
        return self._winner is not None and not self._winner.is_same(client)

    def conclude(self) -> None:
        """Call when all connections have ended. Raises ``DumpError`` unless a client has everything."""
        missing = self.pages.never_asked
        if self._winner is not None:
            fetched = self.pages.total - missing
            log.log(
                MESSAGE,
                "the client has finished: %s fetched, %s never requested",
                _size(fetched),
                _size(missing),
            )
            return
        why = str(self._gone or f"ended by a signal, never requested: {_size(missing)}")
        error = SourceGoneError if self._gone else DumpError
        if self._tree.stays:
            raise error(f"{why}; {_ways_out(self._tree)}")
        if self._gone:
            raise self._gone
        raise error(f"{why}: the tasks go on here; do not run what was restored from these images elsewhere")


class _Client(Gate):
    """One connection; also a ``lazypages.net.page_connection.Pages``."""

    def __init__(self, clients: _Clients, name: str) -> None:
        super().__init__(clients.identity)
        self._clients, self._name = clients, name
        self._asked: dict[int, bytearray] = {}
        self._number: int | None = None
        self._closed = False

    def is_same(self, other: _Client) -> bool:
        """Whether both connections belong to the same destination."""
        return other is self or (self._number is not None and other._number == self._number)

    def run(self, sock: socket.socket) -> None:
        """Serves the connection until it ends."""
        service = self._clients.service
        try:
            sock = prepare(sock, service.tls, service.address, strangers=service.strangers)
        except (TlsError, StrangerError) as error:
            log.error("%s: %s", self._name, error)
            return
        connection = PageConnection(sock, self, self._name, gate=self, tls=service.tls)
        clean = False
        try:
            clean = connection.run()
            if self._number is not None and not self._closed and self._clients.is_too_late(self):
                log.warning("%s: too late: another destination has all pages", self._name)
                _send_last(sock, wire.completed_message())
        finally:
            hang_up(sock, clean=clean)
            log.info("%s: disconnected after %s", self._name, _size(connection.pages))

    def find(self, pid: int, address: int, nr_pages: int) -> Sequence[Copied]:
        return self._clients.find(pid, address, nr_pages, self._asked)

    def opened(self) -> None:
        self._clients.opened()

    def refused(self) -> None:
        self._clients.refused()

    def agreed(self, client: int) -> None:
        self._number = client
        self._clients.agreed(client)

    def closing(self, client: int | None, flags: CloseFlags) -> int:
        self._closed = True
        if client is None:
            if self._has_all():
                self._clients.completed(self)  # no other status: CRIU's client can't handle one
        elif flags & CloseFlags.COMPLETE:
            return 0 if self._clients.completed(self) else wire.ELSEWHERE
        elif flags & CloseFlags.UNUSED:
            self._clients.unused(client)
        return 0

    def _has_all(self) -> bool:
        """Whether it has requested every page; with ``both``, any page."""
        pages = self._clients.pages
        got = sum(asked.count(1) for asked in self._asked.values())
        return got == pages.total or (self._clients.both and got > 0)

    def explain(self, never_asked: int, *, last: bool) -> None:
        """Logs that a client has left without everything. ``last``: no other client is connected."""
        if self._closed and not self._asked:
            log.warning("%s: closed without requesting a page; waiting for another client", self._name)
        elif self._closed and self._number is None:
            log.warning(
                "%s: closed without requesting all pages: its tasks have exited or were killed, which can't be told "
                "apart; the tasks here stay frozen, waiting for a client (Ctrl-C or SIGTERM ends the waiting, and "
                "prints how to end them)",
                self._name,
            )
        elif last:
            log.warning(
                "%s: disconnected before it had everything, never requested: %s; the tasks stay frozen, waiting "
                "for a client (Ctrl-C or SIGTERM ends the waiting)",
                self._name,
                _size(never_asked),
            )


def _ways_out(tree: FrozenTree) -> str:
    """What the user can do with a tree that may be running elsewhere."""
    pids = [process.pid for process in tree.alive]
    named = " ".join(map(str, pids[:MAX_NAMED])) + (" ..." if len(pids) > MAX_NAMED else "")
    tree_of = f" (all {len(pids)} of the tree under {tree.root.pid})" if len(pids) > MAX_NAMED else ""
    return (
        f"a destination may have started the tasks, so they stay stopped here: `kill -CONT {named}`{tree_of} lets them "
        f"go on here, and then nothing restored from these images may run; `kill -KILL {named}` ends them"
    )


def _send_last(sock: socket.socket, data: bytes) -> None:
    """Sends data and waits until it is acknowledged: closing with unread requests would discard it (RST)."""
    deadline = time.monotonic() + LAST_WORDS
    with suppress(OSError):
        sock.settimeout(LAST_WORDS)
        sock.sendall(data)
        while _unacknowledged(sock) and time.monotonic() < deadline:
            time.sleep(0.01)


def _unacknowledged(sock: socket.socket) -> int:
    """Bytes that the peer has not acknowledged (tcp(7), SIOCOUTQ)."""
    return int.from_bytes(fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)), "little")


def _size(pages: int) -> str:
    return f"{count(pages, 'page')} ({size(pages * PAGE_SIZE)})"


@contextmanager
def _no_hangup() -> Iterator[None]:
    """Ignores SIGHUP: the loss of the terminal must not decide where the tasks run."""
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
