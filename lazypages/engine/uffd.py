"""The typed face of the C engine: tasks under userfaultfd, served with the GIL released.

An :class:`Engine` is driven by one thread (:meth:`Engine.run`); everything else may be called from any thread. What
needs a decision arrives as :class:`Notice`. See ``csrc/serve/engine.h`` for how faults, layout events and copies are
kept in order.
"""

from __future__ import annotations

import enum
import errno
import os
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from lazypages.engine._uffd import ffi, lib
from lazypages.errors import LazyPagesError

if TYPE_CHECKING:
    from lazypages.engine.trace import Ring

PAGE_SIZE = 4096

MAP_FAILED: Any = ffi.cast("void *", -1)

#: Pages that a fault may bring beside its own when faults run on in one direction.
MAX_READAHEAD = 128


class TaskGoneError(LazyPagesError):
    """The task's memory does not exist any more: it exited, was killed, or called execve. Routine."""


class BusyError(LazyPagesError):
    """A layout event of the task (fork, mremap, munmap, madvise) is under way; try again in a moment."""


class NoticeKind(enum.IntEnum):
    """Why the engine asks for a decision (``enum lp_notice_kind``)."""

    FORKED = 1
    NEED = 2
    HURRY = 3
    LOST = 4
    COMPLETE = 5
    GONE = 6
    FAILED = 7
    BROKEN = 8
    UNSEEN = 9


class Notice(NamedTuple):
    """Something about `task` that the engine does not decide. For FORKED, `task` is the child.

    ``image``, ``addr``, ``nr_pages``: the pages it is about, by address at dump time and by address now.
    ``error``: an errno or 0; LOST with ESTALE: the pages may have come as zeros. ``since``: CLOCK_MONOTONIC in ns of
    the fault that waits, or 0.
    """

    kind: NoticeKind
    task: ServedTask
    error: int
    image: int
    addr: int
    nr_pages: int
    since: int


class ExtentArray(Protocol):
    """A C array of ``struct lp_extent`` that somebody keeps alive (images_spec.placement.ExtentTable)."""

    @property
    def address(self) -> int: ...

    def __len__(self) -> int: ...


class Stats(NamedTuple):
    """Counters of one task (``struct lp_stats``); ``service_max`` in ns."""

    faults: int = 0
    faults_zero: int = 0
    faults_served: int = 0
    retried: int = 0
    zero_pages: int = 0
    present: int = 0
    copies: int = 0
    reads: int = 0
    wakes: int = 0
    poisoned: int = 0
    forks: int = 0
    remaps: int = 0
    removes: int = 0
    unmaps: int = 0
    service_max: int = 0


class SourcePages(NamedTuple):
    """Pages by where they come from: one count a level of the image chain, then remote, then lost."""

    levels: tuple[int, ...]
    remote: int
    lost: int

    @property
    def total(self) -> int:
        return sum(self.levels) + self.remote + self.lost

    @classmethod
    def of(cls, counts: Any, nr_levels: int) -> SourcePages:
        values = ffi.unpack(counts, nr_levels + 2)
        return cls(tuple(values[:nr_levels]), values[nr_levels], values[nr_levels + 1])


class MappedFile:
    """The first ``size`` bytes of a pages file, mapped; and the file, open: the engine asks how long it still is."""

    def __init__(self, path: str | os.PathLike[str], size: int) -> None:
        """Raises OSError."""
        self.size = size
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._closer = weakref.finalize(self, os.close, self.fd)
        address = lib.mmap(ffi.NULL, size, lib.PROT_READ, lib.MAP_SHARED, self.fd, 0)
        if address == MAP_FAILED:
            raise OSError(ffi.errno, os.strerror(ffi.errno))
        self.address = ffi.gc(address, lambda mapped: lib.munmap(mapped, size))


class TaskMemory(NamedTuple):
    """What a task's memory is made of, as the engine wants it.

    ``vmas``: lazy-capable VMAs as (start, end), sorted. ``wiped``: ranges that a forked child finds zeroed.
    ``levels``: the pages file of each level of the chain (None: it has none); they must outlive the engine.
    """

    extents: ExtentArray
    vmas: Sequence[tuple[int, int]]
    wiped: Sequence[tuple[int, int]] = ()
    levels: Sequence[MappedFile | None] = ()
    max_readahead: int = MAX_READAHEAD


def _check(rc: int) -> int:
    if rc >= 0:
        return rc
    if rc == -errno.ESRCH:
        raise TaskGoneError("the task is gone")
    if rc == -errno.EAGAIN:
        raise BusyError("a layout event of the task is under way")
    raise OSError(-rc, os.strerror(-rc))


def _check_errno(rc: int) -> None:
    if rc < 0:
        raise OSError(-rc, os.strerror(-rc))


def _ranges(ranges: Sequence[tuple[int, int]]) -> Any:
    return ffi.new("struct lp_range[]", [(start, end) for start, end in ranges])


class PreparedMemory:
    """The memory of one task, ready to be served: made before the task comes, so that it need not wait for that."""

    def __init__(self, memory: TaskMemory) -> None:
        """Raises OSError: EINVAL when extents, VMAs and pages files do not fit together."""
        self.max_readahead = memory.max_readahead
        #: The levels; they must outlive the engine.
        self.files = [file for file in memory.levels if file]
        levels = ffi.new("struct lp_level[]", max(1, len(memory.levels)))
        for index, file in enumerate(memory.levels):
            if file:
                lib.lp_level_of_file(ffi.addressof(levels, index), file.address, file.size, file.fd)
        handle = lib.lp_memory_new(
            ffi.cast("struct lp_extent *", memory.extents.address),
            len(memory.extents),
            _ranges(memory.vmas),
            len(memory.vmas),
            _ranges(memory.wiped),
            len(memory.wiped),
            levels,
            len(memory.levels),
        )
        if handle == ffi.NULL:
            raise OSError(ffi.errno, os.strerror(ffi.errno))
        self._handle = ffi.gc(handle, lib.lp_memory_free)

    def take(self) -> Any:
        """The C object, which is the caller's from here on. Only once."""
        handle, self._handle = self._handle, None
        if handle is None:
            raise ValueError("the memory is in service already")
        ffi.gc(handle, None)
        return handle


class ServedTask:
    """One memory (mm) under one uffd, which it owns until :meth:`close`."""

    def __init__(self, engine: Engine, handle: Any) -> None:
        self._engine = engine
        self._handle = handle
        #: What Engine.add was given, for this task and all that it forks.
        self.tag = int(lib.lp_task_tag(handle))
        self.nr_levels = int(lib.lp_task_nr_levels(handle))
        #: Pages pending at the start.
        self.total = int(lib.lp_task_total(handle))

    def __repr__(self) -> str:
        return f"<ServedTask {int(ffi.cast('uintptr_t', self._handle)):#x}>"

    @property
    def pending(self) -> int:
        """Pages that the task waits for or may come to wait for, the lost ones among them."""
        return int(lib.lp_task_pending(self._handle))

    @property
    def lost(self) -> int:
        """Pages pending that no source could give."""
        return int(lib.lp_task_lost(self._handle))

    def transfer(self, max_bytes: int) -> int:
        """Brings pages in the background, about max_bytes; blocks. Returns bytes; 0: nothing is left to bring.

        Raises TaskGoneError, BusyError.
        """
        return _check(int(lib.lp_task_transfer(self._handle, max_bytes)))

    def bring(self, start: int, end: int) -> None:
        """Brings what waits in this range of the task at once; of what page servers must give NEED tells.

        Raises TaskGoneError, BusyError.
        """
        _check(int(lib.lp_task_bring(self._handle, start, end)))

    def claim_remote(self, cursor: int, max_pages: int) -> tuple[int, int, int]:
        """Claims the next run that a remote source must give, from task address `cursor` on.

        Returns (address at dump time, pages, next cursor); 0 pages when there is none.
        """
        image, following = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        nr_pages = lib.lp_task_claim_remote(self._handle, cursor, max_pages, image, following)
        return int(image[0]), int(nr_pages), int(following[0])

    def deliver(self, image: int, data: Any) -> int:
        """Places pages that have come from a remote source: `data` (a buffer) was at `image` when dumped.

        Returns pages placed: those that the task waits for. Raises BusyError (call again with the same),
        TaskGoneError.
        """
        buffer = ffi.from_buffer(data)
        return _check(int(lib.lp_task_deliver(self._handle, image, len(buffer) // PAGE_SIZE, buffer)))

    def fail_remote(self, image: int, nr_pages: int, *, lost: bool) -> None:
        """Gives claims back: the pages are wanted again or, if `lost`, can't be had."""
        lib.lp_task_fail_remote(self._handle, image, nr_pages, lost)

    def regain(self) -> None:
        """A source has come back: lost pages are wanted again."""
        lib.lp_task_regain(self._handle)

    def poison(self, *, everything: bool) -> int:
        """Makes touches of lost pages (or of all that are pending) raise SIGBUS. Returns pages poisoned.

        Raises BusyError, TaskGoneError, OSError (EINVAL: the kernel has no UFFDIO_POISON; it came with Linux 6.6).
        """
        return _check(int(lib.lp_task_poison(self._handle, everything)))

    def forget(self, image: int, nr_pages: int) -> None:
        """Those of the pages, by address at dump time, that are lost are known not to be in the task any more."""
        lib.lp_task_forget(self._handle, image, nr_pages)

    def probe(self) -> bool:
        """Whether the task still has its memory; True too when that can't be told at the moment."""
        return int(lib.lp_task_probe(self._handle)) != -errno.ESRCH

    def stats(self) -> Stats:
        stats = ffi.new("struct lp_stats *")
        lib.lp_task_stats(self._handle, stats)
        return Stats(**{name: int(getattr(stats, name)) for name in Stats._fields})

    def sources(self) -> tuple[SourcePages, SourcePages, SourcePages]:
        """Pages copied, pages dropped by layout events, faults answered with data: each by source."""
        counts = [ffi.new("uint64_t[]", self.nr_levels + 2) for _ in range(3)]
        lib.lp_task_sources(self._handle, *counts)
        copied, dropped, faults = (SourcePages.of(count, self.nr_levels) for count in counts)
        return copied, dropped, faults

    def remaining(self) -> SourcePages:
        """Pages pending by source. Walks all extents."""
        counts = ffi.new("uint64_t[]", self.nr_levels + 2)
        lib.lp_task_remaining(self._handle, counts)
        return SourcePages.of(counts, self.nr_levels)

    def histogram(self) -> list[int]:
        """Answers per bucket of service time; :func:`histogram_bound` says what a bucket holds."""
        buckets = ffi.new("uint64_t[]", lib.LP_HISTOGRAM_BUCKETS)
        lib.lp_task_histogram(self._handle, buckets)
        return list(ffi.unpack(buckets, lib.LP_HISTOGRAM_BUCKETS))

    def close(self) -> bool:
        """Ends service. Closes the uffd if nothing is pending, or if the task is gone.

        Else it stays open to the end of this process: closed, it would let the task read zeros where pages are missing.
        True if a page may have come with zeros, which no notice has told yet (LOST with ESTALE).
        """
        self._engine._forget(self._handle)
        return bool(lib.lp_task_close(self._handle))


def histogram_bound(bucket: int) -> int:
    """The longest service time that a bucket of :meth:`ServedTask.histogram` counts, ns."""
    return int(lib.lp_histogram_bound(bucket))


class Guard:
    """A second process that holds this one's file descriptors, and so the uffds, when this one is killed.

    Tasks that miss pages would read zeros where they are missing then; it kills them first, and says so on
    `log_fd`. Forked tasks, whose processes are not known, it keeps waiting. It is begun while there is one thread
    only, and shares the table of file descriptors from then on (see csrc/serve/guard.h). It ends with the context
    unless tasks that miss pages are left then: with these it deals as soon as this process has ended. Raises OSError.
    """

    #: It looks after descriptors below this number only: see to it that there are no others (RLIMIT_NOFILE).
    MAX_FDS = int(lib.LP_GUARD_FDS)

    def __init__(self, log_fd: int) -> None:
        self.handle = lib.lp_guard_start(log_fd)
        if self.handle == ffi.NULL:
            raise OSError(ffi.errno, os.strerror(ffi.errno))

    @property
    def pid(self) -> int:
        return int(lib.lp_guard_pid(self.handle))

    @property
    def pidfd(self) -> int:
        """Readable when that process has ended, though it should not; -1: there is none."""
        return int(lib.lp_guard_pidfd(self.handle))

    def restart(self) -> None:
        """If it has ended, begins another one, which knows what it knew. Raises OSError: there is none then."""
        _check_errno(int(lib.lp_guard_restart(self.handle)))

    def __enter__(self) -> Guard:
        return self

    def __exit__(self, *exc: object) -> None:
        lib.lp_guard_end(self.handle)


class ChannelEventKind(enum.IntEnum):
    """What a channel has to tell (``enum lp_channel_event_kind``, csrc/serve/channel.h)."""

    ARRIVED = 1
    REFUSED = 2
    HEARD = 3
    QUIET = 4
    TURN_OVER = 5
    CLOSED = 6
    ENDED = 7


class ChannelEvent(NamedTuple):
    """``struct lp_channel_event`` of csrc/serve/channel.h: what each kind means, and what of the rest it has."""

    kind: ChannelEventKind
    status: int
    at_boundary: bool
    told: bool
    tag: int
    image: int
    nr_pages: int
    since: int


class ChannelRequest(NamedTuple):
    """Pages of a task, by tag and address at dump time; ``since``: ns, 0 if no thread waits."""

    tag: int
    image: int
    nr_pages: int
    since: int
    urgent: bool
    told: bool


class ChannelState(NamedTuple):
    """``struct lp_channel_state``: requests, bytes, ns."""

    outstanding: int
    urgent: int
    background: int
    limit: int
    heard: int
    oldest: int
    requests: int
    pages: int
    bytes: int
    round_trip: int


class Channel:
    """A connected socket to a page server on which the engine itself asks for pages; see csrc/serve/channel.h.

    For the event loop's thread, until :meth:`close`.
    """

    _BATCH = 64
    #: The library that has the channels.
    _ffi: Any = ffi
    _lib: Any = lib

    def __init__(
        self,
        channels: Any,
        fd: int,
        *,
        header_size: int,
        max_pages: int,
        zeros: bool,
        background: bool,
        floor: int,
        compress: bool,
    ) -> None:
        options = self._ffi.new(
            "struct lp_channel_options *", (header_size, max_pages, floor, zeros, background, compress)
        )
        self._handle = self._lib.lp_channel_new(channels, fd, options)
        if self._handle == self._ffi.NULL:
            raise OSError(self._ffi.errno, os.strerror(self._ffi.errno))
        self._events = self._ffi.new("struct lp_channel_event[]", self._BATCH)
        self._state = self._ffi.new("struct lp_channel_state *")

    @property
    def event_fd(self) -> int:
        """Readable when :meth:`events` has something to say. The channel owns it."""
        return int(self._lib.lp_channel_event_fd(self._handle))

    def events(self) -> list[ChannelEvent]:
        """Takes what has happened since the last call, in order; does not block."""
        nr = self._lib.lp_channel_events(self._handle, self._events, self._BATCH)
        return [
            ChannelEvent(
                ChannelEventKind(raw.kind),
                raw.status,
                raw.at_boundary,
                raw.told,
                raw.tag,
                raw.image,
                raw.nr_pages,
                raw.since,
            )
            for raw in self._events[0:nr]
        ]

    def ask(self, tag: int, image: int, nr_pages: int, *, urgent: bool) -> None:
        """Asks for pages; ARRIVED tells of them."""
        self._lib.lp_channel_ask(self._handle, tag, image, nr_pages, urgent)

    def hold(self, *, held: bool) -> None:
        """While it is held, the channel sends nothing of its own accord."""
        self._lib.lp_channel_hold(self._handle, held)

    def turn(self, task: ServedTask, max_bytes: int) -> None:
        """Brings pages of `task` in the background, until TURN_OVER; one task at a time."""
        self._lib.lp_channel_turn(self._handle, task._handle, max_bytes)

    def finish(self, *, force: bool, flags: int = 0) -> None:
        """Tells the server that this is the end, with wire.CloseFlags; CLOSED is its answer."""
        self._lib.lp_channel_finish(self._handle, force, flags)

    def outstanding(self) -> list[ChannelRequest]:
        """What has not come yet, the oldest first; from now on its arrival is told."""
        room = 64
        while True:
            requests = self._ffi.new("struct lp_request[]", room)
            nr = self._lib.lp_channel_outstanding(self._handle, requests, room)
            if nr <= room:
                return [
                    ChannelRequest(raw.tag, raw.image, raw.nr_pages, raw.since, raw.urgent, raw.told)
                    for raw in requests[0:nr]
                ]
            room = nr + 64

    def state(self) -> ChannelState:
        self._lib.lp_channel_state(self._handle, self._state)
        return ChannelState(*(int(getattr(self._state, name)) for name in ChannelState._fields))

    def close(self) -> None:
        """Hangs up. What is outstanding does not come any more."""
        self._lib.lp_channel_close(self._handle)


class Engine:
    """Watches the uffds of many tasks. Use as a context manager; :meth:`run` must have returned before it ends.

    ``trace``: gets a record of everything; it must outlive the engine.
    """

    _BATCH = 256

    def __init__(self, trace: Ring | None = None, guard: Guard | None = None) -> None:
        self._handle = lib.lp_engine_new(guard.handle if guard else ffi.NULL)
        if self._handle == ffi.NULL:
            raise OSError(ffi.errno, os.strerror(ffi.errno))
        if trace:
            lib.lp_engine_trace(self._handle, trace.handle)
        self._tasks: dict[Any, ServedTask] = {}
        self._keep: list[MappedFile] = []
        self._notices = ffi.new("struct lp_notice[]", self._BATCH)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        lib.lp_engine_free(self._handle)
        self._handle = None
        self._tasks.clear()
        self._keep.clear()

    @property
    def notice_fd(self) -> int:
        """Readable when :meth:`notices` has something to say. The engine owns it."""
        return int(lib.lp_engine_notice_fd(self._handle))

    def run(self) -> None:
        """Serves until :meth:`stop`; for one thread of its own. Raises OSError if epoll fails."""
        _check(int(lib.lp_engine_run(self._handle)))

    def stop(self) -> None:
        lib.lp_engine_stop(self._handle)

    def add(
        self,
        uffd: int,
        memory: TaskMemory | PreparedMemory,
        *,
        pid: int = 0,
        pidfd: int = -1,
        tag: int = 0,
    ) -> ServedTask:
        """Serves a task from now on. Owns uffd from here, also if it fails.

        ``pid``, ``pidfd``: the process, where known; pidfd stays the caller's, and open as long as the task is.

        Raises OSError, as PreparedMemory does; and when the uffd can't be watched. Then it stays open to the end, for
        closed it would let the task run on zeros.
        """
        if isinstance(memory, TaskMemory):
            memory = PreparedMemory(memory)
        self._keep += memory.files
        handle = lib.lp_task_new(self._handle, uffd, memory.take(), memory.max_readahead, pid, pidfd, tag)
        if handle == ffi.NULL:
            raise OSError(ffi.errno, os.strerror(ffi.errno))
        return self._adopt(handle)

    def channel(
        self,
        fd: int,
        *,
        header_size: int,
        max_pages: int,
        zeros: bool,
        background: bool,
        floor: int = 0,
        compress: bool = False,
    ) -> Channel:
        """A channel on the connected stream socket `fd`, which it duplicates.

        The options are those of ``struct lp_channel_options``.

        Raises OSError.
        """
        return Channel(
            lib.lp_engine_channels(self._handle),
            fd,
            header_size=header_size,
            max_pages=max_pages,
            zeros=zeros,
            background=background,
            floor=floor,
            compress=compress,
        )

    @property
    def has_tasks(self) -> bool:
        """Whether any task is not closed, those that no notice has told of yet among them."""
        return bool(lib.lp_engine_has_tasks(self._handle))

    def leftovers(self) -> list[ServedTask]:
        """All tasks that are not closed. Takes the notices that there are."""
        while self.notices():
            pass
        return list(self._tasks.values())

    def notices(self) -> list[Notice]:
        """Takes what has happened since the last call, in order; does not block. Never about a closed task."""
        nr = lib.lp_engine_notices(self._handle, self._notices, self._BATCH)
        result = []
        for raw in self._notices[0:nr]:
            kind = NoticeKind(raw.kind)
            if kind is NoticeKind.FORKED:
                self._adopt(raw.task)
            elif raw.task not in self._tasks:
                continue  # closed since
            result.append(
                Notice(
                    kind,
                    self._tasks[raw.task],
                    raw.error,
                    raw.image,
                    raw.addr,
                    raw.nr_pages,
                    raw.since,
                )
            )
        return result

    def _adopt(self, handle: Any) -> ServedTask:
        task = self._tasks[handle] = ServedTask(self, handle)
        return task

    def _forget(self, handle: Any) -> None:
        self._tasks.pop(handle, None)
