"""Tasks that register memory of their own (``uffd_child.c``), and an engine that serves them, without CRIU."""

from __future__ import annotations

import os
import select
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from lazypages.engine._uffd import ffi
from lazypages.engine.engine import Engine
from lazypages.engine.errors import BusyError, TaskGoneError
from lazypages.engine.events import TaskEvent, TaskEventKind
from lazypages.engine.guard import Guard
from lazypages.engine.memory import MappedFile, TaskMemory
from lazypages.engine.task import ServedTask
from lazypages.observe.tracing import Ring
from tests.support.blocked import POLLS, misses_a_page, sleeps_in
from tests.support.compiling import compiled

PAGE = 4096
SOURCE = Path(__file__).with_name("uffd_child.c")

#: What CRIU's restore asks for (docs/criu.md, "Userfaultfds and lazy mappings"): EVENT_FORK, _REMAP, _REMOVE, _UNMAP.
FEATURES = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 6

#: Far from where the kernel maps things by itself.
BASE = 0x1000_0000_0000

MREMAP_MAYMOVE, MREMAP_FIXED, MREMAP_DONTUNMAP = 1, 2, 4
FORWARD, BACKWARD, RANDOM = range(3)
ENOENT, EEXIST, EFAULT, SIGBUS = 2, 17, 14, 7


class ExtentTable:
    """``struct lp_extent`` by hand: (start, nr_pages, offset, source) or (..., lazy)."""

    def __init__(self, extents: Iterable[tuple[int, ...]]) -> None:
        rows = [(*extent, 1)[:5] for extent in extents]
        self._array = ffi.new("struct lp_extent[]", rows)
        self._length = len(rows)

    @property
    def address(self) -> int:
        return int(ffi.cast("uintptr_t", self._array))

    def __len__(self) -> int:
        return self._length


class PagesFile:
    """A mapped pages file; page i of it has the id ``first_id + i``."""

    def __init__(self, pages: int, level: int = 0) -> None:
        self.first_id = (level + 1) << 32
        with tempfile.NamedTemporaryFile() as file:
            file.write(b"".join(struct.pack("<Q", self.first_id + i) * 512 for i in range(pages)))
            file.flush()
            self._fd = os.dup(file.fileno())
            self.map = MappedFile(file.name, pages * PAGE)

    def truncate(self, size: int) -> None:
        """To ``size`` bytes."""
        os.truncate(self._fd, size)

    def forget(self) -> None:
        """The page cache has nothing of it any more, if it is on a disk."""
        os.fdatasync(self._fd)
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def page_bytes(self, page: int, count: int = 1) -> bytes:
        return os.pread(self._fd, count * PAGE, page * PAGE)

    def __del__(self) -> None:
        os.close(self._fd)


class Task:
    """A process that does what it is told (``uffd_child.c``). Replies that are not "ok" fail the test."""

    def __init__(
        self, control: socket.socket, pid: int, process: subprocess.Popen[bytes] | None = None
    ) -> None:
        self._control = control
        self.pid = pid
        self.process = process
        self.uffd = -1
        """The one that it has handed over last; not its owner."""
        self.engine: threading.Thread | None = None
        """The thread that serves it, or will, if that is one of ours."""

    @classmethod
    def start(cls) -> Task:
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [compiled(SOURCE, "-O1"), str(theirs.fileno())], pass_fds=[theirs.fileno()]
            )
        return cls(ours, process.pid, process)

    def tell(self, command: str, *args: int) -> None:
        """Starts a command; :meth:`reply` waits for its end."""
        self._control.sendall(" ".join([command, *(str(int(arg)) for arg in args)]).encode() + b"\n")

    def reply(self, timeout: float = 60) -> str:
        self._control.settimeout(timeout)
        line = b""
        while not line.endswith(b"\n"):
            try:
                byte = self._control.recv(1)  # no further: a file descriptor may follow
            except TimeoutError:
                pytest.fail(f"task {self.pid}: no reply in {timeout:g} s")
            if not byte:
                pytest.fail(f"task {self.pid} ended")
            line += byte
        text = line.decode().rstrip()
        assert text.split()[0] == "ok", text
        return text[3:]

    def do(self, command: str, *args: int, timeout: float = 60) -> str:
        self.tell(command, *args)
        return self.reply(timeout)

    def replied(self) -> bool:
        """Whether there is something to be read for :meth:`reply`."""
        return bool(select.select([self._control], [], [], 0)[0])

    def busy(self) -> bool:
        """Whether the command can't go on: a thread sleeps in its userfaultfd, and the engine has nothing to do.

        False: it has replied. Fails when neither becomes true.
        """

        def both_sleep() -> bool:
            engine = self.engine and self.engine.native_id
            return misses_a_page(self.pid) and (
                not engine or sleeps_in(Path(f"/proc/self/task/{engine}"), POLLS)
            )

        # Twice: between the looks at task and engine, the engine may have answered, and the task faulted again.
        until(
            "a reply, or a fault without an answer", lambda: self.replied() or (both_sleep() and both_sleep())
        )
        return not self.replied()

    def _receive_fd(self) -> int:
        self._control.settimeout(60)
        _, (fd,), *_ = socket.recv_fds(self._control, 1, 1)
        return fd

    def open_uffd(self, features: int = FEATURES, *, blocking: bool = False) -> int:
        self.tell("uffd", features, blocking)
        return self.received_uffd()

    def received_uffd(self) -> int:
        """The answer to "uffd"."""
        self.reply()
        self.uffd = self._receive_fd()
        return self.uffd

    def fork(self, *, orphan: bool = False) -> Task:
        """A child, which ends with it unless it may become an orphan."""
        self.tell("fork", orphan)
        return self.forked()

    def forked(self) -> Task:
        """The answer to "fork"."""
        pid = int(self.reply())
        return Task(socket.socket(fileno=self._receive_fd()), pid)

    def leave(self) -> None:
        """Its process ends; all of its memory, and its place here, is another's from then on (CLONE_VM)."""
        pid = int(self.do("leave"))
        assert self.process
        self.process.wait()
        self.pid, self.process = pid, None

    def map(self, *ranges: tuple[int, int], register: bool = True) -> None:
        """Maps ranges of (address, pages) and registers them."""
        for start, pages in ranges:
            assert self.do("map", start, pages) == "0"
            if register:
                assert self.do("register", start, pages) == "0"

    def tell_check(
        self,
        at: int,
        pages: int,
        first_id: int,
        *,
        order: int = FORWARD,
        threads: int = 1,
        writes: bool = False,
        together: bool = False,
    ) -> None:
        """Starts to check every byte of pages, whose ids follow `first_id` (0: that they are zero)."""
        self.tell("check", at, pages, first_id, order, threads, writes, together)

    def check(self, at: int, pages: int, first_id: int, **options: Any) -> None:
        """Checks every byte of pages (see :meth:`tell_check`)."""
        self.tell_check(at, pages, first_id, **options)
        self.reply()

    def mremap(
        self, at: int, pages: int, to: int | None, new_pages: int | None = None, flags: int = 0
    ) -> int:
        if to is not None:
            flags |= MREMAP_FIXED | MREMAP_MAYMOVE
        return int(self.do("mremap", at, pages, new_pages or pages, flags, to or 0))

    def close(self) -> None:
        self._control.close()
        if self.process:
            self.process.kill()
            self.process.wait()


class Transfer(threading.Thread):
    """Background transfer of a task, some pages at a time, until told to stop."""

    def __init__(self, task: ServedTask, chunk: int = 64 << 10, pause: float = 0.0) -> None:
        super().__init__(daemon=True)
        self._task, self._chunk, self._pause = task, chunk, pause
        self._over = threading.Event()
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            while not self._over.is_set():
                try:
                    brought = self._task.transfer(self._chunk)
                except BusyError:
                    brought = 0
                except TaskGoneError:
                    return
                time.sleep(self._pause if brought else 0.001)
        except BaseException as error:
            self.error = error
            raise

    def stop(self) -> None:
        self._over.set()
        self.join()


class Service:
    """An engine in a thread of its own. Ends tasks, transfers and engine in the right order on the way out."""

    #: Of all engines of the process; None: without one.
    guard: Guard | None = None

    def __init__(self, trace: Ring | None = None) -> None:
        self.engine = Engine(trace, self.guard)
        self.events: list[TaskEvent] = []
        self._taken = 0
        self._tasks: list[Task] = []
        self._transfers: list[Transfer] = []
        self._thread = threading.Thread(target=self.engine.run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.close()
        for transfer in self._transfers:
            transfer.stop()
        self.engine.stop()
        self._thread.join(60)
        assert not self._thread.is_alive()
        self.engine.__exit__(kind, error, trace)

    @property
    def thread_id(self) -> int:
        """The engine's thread."""
        assert self._thread.native_id
        return self._thread.native_id

    def task(self) -> Task:
        """A task that is ended with the service."""
        return self.adopt(Task.start())

    def adopt(self, task: Task) -> Task:
        """Ends a task that was forked, or is served elsewhere first, with the service."""
        task.engine = self._thread
        self._tasks.append(task)
        return task

    def serve(
        self,
        uffd: int,
        extents: Iterable[tuple[int, ...]],
        vmas: Sequence[tuple[int, int]],
        *levels: PagesFile,
        wiped: Sequence[tuple[int, int]] = (),
        max_readahead: int = 16,
        pid: int = 0,
        pidfd: int = -1,
        tag: int = 0,
    ) -> ServedTask:
        """Adds a task; extents as for :class:`ExtentTable`, VMAs and wiped ranges as (address, pages)."""
        return self.engine.add(
            uffd,
            TaskMemory(
                ExtentTable(extents),
                [(start, start + pages * PAGE) for start, pages in vmas],
                [(start, start + pages * PAGE) for start, pages in wiped],
                [level.map for level in levels],
                max_readahead,
            ),
            pid=pid,
            pidfd=pidfd,
            tag=tag,
        )

    def mapped(
        self, file: PagesFile, *places: tuple[int, int], known: bool = False, **options: Any
    ) -> tuple[Task, ServedTask]:
        """A task that has registered these places, (address, pages), and is served: one after the other from the file.

        ``known``: by its pid as well. ``options``: of :meth:`serve`.
        """
        task = self.task()
        uffd = task.open_uffd()
        task.map(*places)
        extents, offset = [], 0
        for start, pages in places:
            extents.append((start, pages, offset, 0))
            offset += pages * PAGE
        pid = task.pid if known else 0
        return task, self.serve(uffd, extents, places, file, pid=pid, **options)

    def transfer(self, task: ServedTask, chunk: int = 64 << 10, pause: float = 0.0) -> Transfer:
        transfer = Transfer(task, chunk, pause)
        self._transfers.append(transfer)
        return transfer

    def look(self) -> list[TaskEvent]:
        """All events so far."""
        self.events += self.engine.events()
        return self.events

    def wait(self, kind: TaskEventKind, task: ServedTask | None = None, *, timeout: float = 60) -> TaskEvent:
        """The next event of this kind (about this task) that was not waited for yet."""
        deadline = time.monotonic() + timeout
        while True:
            for place, event in enumerate(self.look()):
                if event.kind is kind and task in (None, event.task):
                    return self.events.pop(place)
            if time.monotonic() > deadline:
                pytest.fail(f"no {kind.name} in {timeout:g} s, but {self.events}")
            select.select([self.engine.event_fd], [], [], 1)


def needs_while_it_churns(
    service: Service, task: Task, served: ServedTask, file: PagesFile, pages: int
) -> Iterator[list[TaskEvent]]:
    """The layout of a task in turmoil, all of whose pages are remote; until it has found every byte right.

    Each turn yields what is needed since the last one. Nothing may be lost.
    """
    task.tell("churn", BASE, pages, file.first_id, 5, 400, 100, 3)
    deadline = time.monotonic() + 60
    while not task.replied():
        assert time.monotonic() < deadline
        events = list(service.look())
        service.events.clear()
        assert {event.kind for event in events} <= {
            TaskEventKind.NEED,
            TaskEventKind.ESCALATE,
            TaskEventKind.COMPLETE,
        }
        yield [event for event in events if event.kind is TaskEventKind.NEED]
    task.reply()
    assert served.lost == 0


def until(what: str, ready: Callable[[], object], timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not ready():
        if time.monotonic() > deadline:
            pytest.fail(f"waited {timeout:g} s for {what}")
        time.sleep(0.001)
