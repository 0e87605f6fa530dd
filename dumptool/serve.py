"""`dump --lazy-pages`: gives the pages that the images lack, straight from the memory of the frozen tree.

The tree stays frozen until a client has all of it. One of ours says so (wire.CloseFlags.COMPLETE). CRIU's says CLOSE at
every end, also when its task was killed half-way (observed with 4.1.1 and 4.2.1); it has all if it has asked for every
page. A client that is merely gone changes nothing, and the next one gets every page anew.

The tasks run here or there, never on both sides. As soon as a client may have started them, they do not go on here by
themselves, whatever ends us: they stay stopped (``FrozenTree.stays``, ``FrozenTree.hold``). One of ours may have from
when it hears which checkpoint is here until it says that no restore has come; another, when it gets a page.
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

from dumptool.dump import Settings
from dumptool.errors import DumpError
from dumptool.freeze import FrozenTree
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

log = logging.getLogger("lazypages")

#: Pids that a message names.
MAX_NAMED = 20

#: Seconds for a client that is too late to hear of it.
LAST_WORDS = 2.0

_WORDS = 3  # of 8 bytes, in a struct lp_pagemap_entry (csrc/images/pagemap.h)


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
        self._asked = self.nothing_asked()
        self._pid = pid
        try:
            self._fd = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DumpError(f"pid {pid}: its memory can't be read: {error.strerror}") from None

    def close(self) -> None:
        """No page can be read any more."""
        os.close(self._fd)

    def nothing_asked(self) -> bytearray:
        """A byte for each page; ``read`` sets it."""
        return bytearray(self.total)

    @property
    def never_asked(self) -> int:
        """Pages that no client has asked for yet."""
        return self._asked.count(0)

    def read(self, address: int, nr_pages: int, asked: bytearray) -> bytes:
        """The first pages of the range, as many as there are without a gap; nothing if the first one is not lazy.

        They end before a page that can't be read. Raises ``UnreadableError`` if that is the first, ``SourceGoneError``
        if the process is no more. ``asked``: of this client.
        """
        found = self._find(address, nr_pages, asked)
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

    def _find(self, address: int, nr_pages: int, asked: bytearray) -> int:
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
            self._asked[number : number + taken] = asked[number : number + taken] = b"\1" * taken
            found += taken
            index, skipped = index + 1, 0
            if index == len(self._starts) or self._starts[index] != address + found * PAGE_SIZE:
                break
        return found


class FrozenPages:
    """The lazy pages of a whole frozen tree, for any number of connections."""

    def __init__(self, memories: dict[int, LazyMemory]) -> None:
        self._memories = memories
        self.total = sum(memory.total for memory in memories.values())

    @property
    def never_asked(self) -> int:
        """Pages that no client has asked for yet."""
        return sum(memory.never_asked for memory in self._memories.values())

    def find(self, pid: int, address: int, nr_pages: int, asked: dict[int, bytearray]) -> Sequence[Copied]:
        """Copies of the first pages of the range. ``asked``: what this client has asked for, by pid. Raises as
        ``LazyMemory.read``."""
        memory = self._memories.get(pid)
        if memory is None:
            return []
        if pid not in asked:
            asked[pid] = memory.nothing_asked()
        data = memory.read(address, nr_pages, asked[pid])
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
        """Serves until a client has everything.

        Raises ``DumpError`` when a signal (SIGINT, SIGTERM) comes first, or a frozen process is killed. The tree
        stays stopped then if a client may have started it.
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
            log.log(MESSAGE, "frozen; %s of memory to be had at %s%s", _size(pages.total), self.name, alone)
            if self.status_fd is not None:
                report_ready(self.status_fd)
            accept_all(self.listener, stop.fileno(), clients.serve, last_words=2 * LAST_WORDS)
            self.listener.close()
            clients.conclude()


class _Clients:
    """All connections, each in a thread of its own, and what they amount to."""

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
        """``ended``: eventfd to be written when it is over. ``over``: whether it is, for whatever reason. ``both``: the
        tree is to go on here in any case, because the user has said so."""
        self.service, self.pages, self.identity, self.over, self.both = service, pages, identity, over, both
        self._tree, self._ended = tree, ended
        self._lock = threading.Lock()
        self._connected = 0
        self._told = 0  # connections that know what is here, and have not said who they are
        self._unknown = False  # a client that can't say that it has not started the tasks may have done so
        self._may_run: set[int] = set()  # the others that may have
        self._winner: _Client | None = None
        self._gone: SourceGoneError | None = None

    def serve(self, sock: socket.socket, name: str) -> None:
        """One connection."""
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
        """As ``FrozenPages.find``; without a process that was killed there is nothing to wait for."""
        try:
            found = self.pages.find(pid, address, nr_pages, asked)
        except SourceGoneError as error:
            self._gone = error
            os.eventfd_write(self._ended, 1)
            raise
        if found and not self._unknown:
            with self._changing():
                self._unknown = True
        return found

    # Who may have started the tasks. All of this comes before the client hears a word.

    @contextmanager
    def _changing(self) -> Iterator[None]:
        with self._lock:
            yield
            self._tree.stays = not self.both and bool(self._unknown or self._told or self._may_run)

    def opened(self) -> None:
        with self._changing():
            self._told += 1

    def refused(self) -> None:
        with self._changing():
            self._told -= 1

    def agreed(self, number: int) -> None:
        with self._changing():
            self._told -= 1
            self._may_run.add(number)

    def unused(self, number: int) -> None:
        with self._changing():
            self._may_run.discard(number)

    def completed(self, client: _Client) -> bool:
        """Whether it is the first that has everything; all others then are too late."""
        with self._lock:
            if self._winner is None:
                self._winner = client
            return self._winner.is_same(client)

    def is_too_late(self, client: _Client) -> bool:
        """Whether another destination has completed."""
        return self._winner is not None and not self._winner.is_same(client)

    def conclude(self) -> None:
        """When all connections have ended. Raises ``DumpError`` unless a client was done."""
        missing = self.pages.never_asked
        if self._winner is not None:
            fetched = self.pages.total - missing
            log.log(
                MESSAGE,
                "the client needs no more: %s fetched, %s never asked for",
                _size(fetched),
                _size(missing),
            )
            return
        why = str(self._gone or f"ended by a signal, {_size(missing)} were never asked for")
        error = SourceGoneError if self._gone else DumpError
        if self._tree.stays:
            raise error(f"{why}; {_ways_out(self._tree)}")
        if self._gone:
            raise self._gone
        raise error(
            f"{why}: the tasks go on here, and whatever was restored from these images elsewhere must not"
        )


class _Client(Gate):
    """One connection; a ``pageserver.serve.Pages`` too."""

    def __init__(self, clients: _Clients, name: str) -> None:
        super().__init__(clients.identity)
        self._clients, self._name = clients, name
        self._asked: dict[int, bytearray] = {}
        self._number: int | None = None
        self._closed = False

    def is_same(self, other: _Client) -> bool:
        """Whether both are of one destination."""
        return other is self or (self._number is not None and other._number == self._number)

    def run(self, sock: socket.socket) -> None:
        """Until it has ended."""
        service = self._clients.service
        try:
            sock = prepare(sock, service.tls, service.address, strangers=service.strangers)
        except (TlsError, StrangerError) as error:
            log.error("%s: %s", self._name, error)
            return
        connection = PageConnection(sock, self, self._name, gate=self)
        clean = False
        try:
            clean = connection.run()
            if self._number is not None and not self._closed and self._clients.is_too_late(self):
                log.warning("%s: too late, another destination has everything", self._name)
                _say_last(sock, wire.completed_message())
        finally:
            hang_up(sock, clean=clean)
            log.info("%s: gone after %s", self._name, _size(connection.pages))

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
                self._clients.completed(self)  # it would not know what else to do with another status
        elif flags & CloseFlags.COMPLETE:
            return 0 if self._clients.completed(self) else wire.ELSEWHERE
        elif flags & CloseFlags.UNUSED:
            self._clients.unused(client)
        return 0

    def _has_all(self) -> bool:
        """Whether it has asked for every page. Enough for a tree that goes on here anyway: for any."""
        pages = self._clients.pages
        got = sum(asked.count(1) for asked in self._asked.values())
        return got == pages.total or (self._clients.both and got > 0)

    def explain(self, never_asked: int, *, last: bool) -> None:
        """It has gone, and changed nothing. ``last``: no other is connected."""
        if self._closed and not self._asked:
            log.warning("%s: has closed without asking for a page; waiting for another client", self._name)
        elif self._closed and self._number is None:
            log.warning(
                "%s: has closed, but not asked for all pages: perhaps its tasks have ended by themselves, perhaps they "
                "were killed, and nothing tells; the tasks stay frozen, waiting for a client (Ctrl-C or SIGTERM ends "
                "the waiting, and says how to end them)",
                self._name,
            )
        elif last:
            log.warning(
                "%s: gone before it was done, %s were never asked for; the tasks stay frozen, waiting for a client "
                "(Ctrl-C or SIGTERM ends the waiting)",
                self._name,
                _size(never_asked),
            )


def _ways_out(tree: FrozenTree) -> str:
    """For a tree that may run elsewhere."""
    pids = [process.pid for process in tree.alive]
    named = " ".join(map(str, pids[:MAX_NAMED])) + (" ..." if len(pids) > MAX_NAMED else "")
    tree_of = f" (all {len(pids)} of the tree under {tree.root.pid})" if len(pids) > MAX_NAMED else ""
    return (
        f"a destination may have started the tasks, so they stay stopped here: `kill -CONT {named}`{tree_of} lets them "
        f"go on here after all, and nothing restored from these images may run then; `kill -KILL {named}` ends them"
    )


def _say_last(sock: socket.socket, data: bytes) -> None:
    """Send that, and wait until it has arrived: to close with unread requests would cut off what is on its way."""
    deadline = time.monotonic() + LAST_WORDS
    with suppress(OSError):
        sock.settimeout(LAST_WORDS)
        sock.sendall(data)
        while _on_its_way(sock) and time.monotonic() < deadline:
            time.sleep(0.01)


def _on_its_way(sock: socket.socket) -> int:
    """Bytes that the other end has not acknowledged (tcp(7), SIOCOUTQ)."""
    return int.from_bytes(fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)), "little")


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
