"""The service of one restored task, from the arrival of its uffd until no page is missing or the task is gone.

The engine answers faults by itself. Decided here: background transfer, the handling of lost pages, and when the uffd
may be closed.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from typing import TYPE_CHECKING, NamedTuple

import anyio
import anyio.lowlevel
from anyio import to_thread
from anyio.abc import TaskGroup

from lazypages.engine.errors import BusyError, TaskGoneError
from lazypages.engine.events import TaskEvent, TaskEventKind
from lazypages.engine.stats import Stats
from lazypages.engine.task import ServedTask
from lazypages.loop.processes import Process
from lazypages.observe.metrics import State, TaskReport, measure, signal_name
from lazypages.sources.checkpoint import Seen
from lazypages.wording import count

if TYPE_CHECKING:
    from lazypages.sources.remote import RemotePages

log = logging.getLogger("lazypages")

#: Bytes that the background transfer of a task copies before the next task has its turn.
QUANTUM = 8 << 20

#: The same while no other task waits. Longer, because a CPU is idle for 100 us between two turns.
LONG_QUANTUM = 64 << 20

#: Bytes that are brought at once for a request: no fault of the task is read meanwhile.
PIECE = 2 << 20

#: Seconds between two searches for pages that were claimed for a page server and have been given back.
GIVEN_BACK_PAUSE = 1.0

#: Seconds between two searches for pages that another thread has claimed and may give back.
CLAIMED_PAUSE = 0.1

#: Seconds to wait while a layout event of the task is under way; and number of attempts of `poison_now`.
BUSY_PAUSE = 0.001
BUSY_TRIES = 500

#: Number of attempts to bring ranges that observers read (Seen) while a layout event is under way.
SEEN_TRIES = 20

#: Seconds between two checks how a task ended whose memory is gone, and their number. It exits shortly after that.
END_PAUSE = 0.01
END_LOOKS = 1000

#: Longest pause in seconds between two checks whether the memory of an exited process is gone; then the server probes.
GONE_PAUSE = 0.5


class Identity(NamedTuple):
    """Identifies a task. ``pid``: as in the images; for a forked child, the pid of the restored task it descends from.

    ``total``: lazy pages at the start. ``sources``: names of the levels of its images. ``program``: its name when it
    was dumped.
    """

    name: str
    pid: int
    forked: bool
    total: int
    sources: tuple[str, ...]
    program: str = ""


class TaskService:
    """The service of one address space with one uffd.

    ``process``: of the restored task, if known; for a forked child, that of its ancestor.
    """

    def __init__(
        self,
        served: ServedTask,
        identity: Identity,
        *,
        process: Process | None,
        transfer_turns: anyio.CapacityLimiter,
        remote: RemotePages | None,
        seen: Seen | None = None,
    ) -> None:
        self.identity = identity
        self._log = logging.LoggerAdapter(log, {"pid": identity.pid})
        self._served = served
        self._seen = seen
        self.process = process
        self._turns = transfer_turns
        self._remote = remote
        self._started = time.monotonic()
        self._may_close = False
        self._gone = False
        self._state = State.SERVING
        self._signal = 0
        self._wrong: list[TaskEvent] = []
        self._tending = False
        self._background = False
        self._urgent = False
        self._exited = False
        self._group: TaskGroup | None = None  # not None while run() can start tasks in it
        self._ended = anyio.Event()
        self._closed = anyio.Event()
        self._final: TaskReport | None = None
        #: Whether the uffd must stay open until this process ends.
        self.holds_uffd = False

    @property
    def pending(self) -> int:
        """Number of pages that the task still misses."""
        return 0 if self._final else self._served.pending

    @property
    def stats(self) -> Stats:
        """The engine's counters, now or at the end."""
        return self._final.stats if self._final else self._served.stats()

    def report(self) -> TaskReport:
        """The current numbers; once the service has ended, those of its end."""
        return self._final or self._measure()

    def _measure(self) -> TaskReport:
        identity = self.identity
        return TaskReport(
            name=identity.name,
            pid=identity.pid,
            forked=identity.forked,
            state=self._state,
            signal=self._signal,
            total=identity.total,
            seconds=time.monotonic() - self._started,
            sources=identity.sources,
            program=identity.program,
            **measure(self._served),
        )

    # Called by the server.

    def restore_finished(self) -> None:
        """The task has registered its memory and runs: the uffd may be closed when no page is missing."""
        self._may_close = True
        self._check_complete()
        if self._group:
            self._group.start_soon(self._bring_seen)

    def start_background(self) -> None:
        """Start to copy untouched pages. Only after the end of the restore: nothing is registered before."""
        if not self._background:
            self._background = True
            if self._group:
                self._bring_rest(self._group)

    async def complete(self) -> None:
        """Bring all missing pages, before those of other tasks. Returns when the uffd is closed."""
        self.start_background()
        if not self._urgent:
            self._urgent = True
            if self._group:
                self._prioritise(self._group)
        await self._closed.wait()

    def bring_first(self, start: int, end: int) -> bool:
        """Begin to bring the missing pages in [start, end), current addresses in bytes, before others; those of page
        servers are requested. Only after the end of the restore. False: the task is not served."""
        if self._group:
            self._group.start_soon(self._bring_range, start, end)
        return self._group is not None

    async def _bring_range(self, start: int, end: int) -> None:
        limiter = anyio.CapacityLimiter(1)
        while start < end:
            piece = min(end, start + PIECE)
            try:
                await to_thread.run_sync(self._served.bring, start, piece, limiter=limiter)
            except BusyError:
                await anyio.sleep(BUSY_PAUSE)
            except TaskGoneError:
                return
            else:
                start = piece

    def process_exited(self) -> None:
        """The process has exited, all its threads included."""
        self._exited = True
        if self.process:
            self.process.exit_status()  # it is lost when the parent waits for the process
        if self._group and self._served.probe():
            self._group.start_soon(self._await_gone)

    def probe(self) -> None:
        """Let the engine check whether the task still exists; without faults nothing else detects its end."""
        if not self._final:
            self._served.probe()

    def handle(self, event: TaskEvent, urgent: list[tuple[int, int, int]]) -> None:
        """Handle an event of the engine about this task. Does not block. Adds pages for page servers to `urgent`."""
        match event.kind:
            case TaskEventKind.NEED | TaskEventKind.ESCALATE:
                urgent.append((self.identity.pid, event.dump_addr, event.nr_pages))
            case TaskEventKind.COMPLETE:
                self._check_complete()
            case TaskEventKind.GONE:
                self._gone = True
                if not self._served.pending:
                    self._end(State.COMPLETE)
                elif self._group:
                    self._group.start_soon(self._learn_end)
            case TaskEventKind.LOST if event.error == errno.ESTALE:
                self._spoilt()
            case TaskEventKind.LOST:
                self._wrong.append(event)
                if self._group:
                    self._tend(self._group)
            case TaskEventKind.FAILED:
                self._log.error("%s: userfaultfd: %s", self.identity.name, os.strerror(event.error))
            case TaskEventKind.BROKEN:
                self._state = State.KILLED
                self._kill(
                    f"cannot keep track of its missing pages: {os.strerror(event.error)}", descendants=True
                )
            case TaskEventKind.UNSEEN:
                self._log.warning(
                    "%s: cannot read /proc/PID/pagemap (%s): guards that it installs (MADV_GUARD_INSTALL) before "
                    "all its memory has arrived may be overwritten; give the daemon CAP_SYS_PTRACE",
                    self.identity.name,
                    os.strerror(event.error),
                )
            case TaskEventKind.FORKED:
                pass  # handled by the server

    def _check_complete(self) -> None:
        if self._may_close and not self._final and self._served.complete:
            self._end(State.COMPLETE)

    def _end(self, state: State) -> None:
        if self._state is State.SERVING:
            self._state = state
        self._ended.set()

    # The service.

    async def run(self) -> None:
        """Serve until the task has all its memory, is gone, or has been given up; then close the uffd."""
        try:
            async with anyio.create_task_group() as group:
                # Tasks in this group are started only when needed, since a restore may have a thousand services.
                self._group = group
                try:
                    if self._may_close:
                        group.start_soon(self._bring_seen)
                    if self._background:
                        self._bring_rest(group)
                    if self._urgent:
                        self._prioritise(group)
                    if self._exited:
                        group.start_soon(self._await_gone)
                    if self._gone:
                        group.start_soon(self._learn_end)
                    self._tend(group)
                    await self._ended.wait()
                finally:
                    self._group = None
                group.cancel_scope.cancel()
        finally:
            self._close()

    def _bring_rest(self, group: TaskGroup) -> None:
        for _ in range(int(self._turns.total_tokens)):
            group.start_soon(self._transfer, self._turns)
        if self._remote:
            for _ in self._remote.stats():
                group.start_soon(self._fetch, self._remote)

    def _prioritise(self, group: TaskGroup) -> None:
        """Transfer without waiting for a turn."""
        threads = int(self._turns.total_tokens)
        turns = anyio.CapacityLimiter(threads)
        for _ in range(threads):
            group.start_soon(self._transfer, turns)

    async def _bring_seen(self) -> None:
        if not self._background:  # else _transfer_some() does it
            await to_thread.run_sync(self._bring_seen_now, limiter=self._turns)

    def _bring_seen_now(self) -> None:
        """Bring the ranges that observers read, once. Blocks. Failed ranges are left to the background."""
        seen, self._seen = self._seen, None
        for start, end in seen() if seen else ():
            for _ in range(SEEN_TRIES):
                try:
                    self._served.bring(start, end)
                    break
                except BusyError:
                    time.sleep(BUSY_PAUSE)
                except TaskGoneError:
                    return

    def _transfer_some(self, quantum: int) -> int:
        self._bring_seen_now()
        return self._served.transfer(quantum)

    async def _transfer(self, turns: anyio.CapacityLimiter) -> None:
        quantum = QUANTUM
        while True:
            try:
                # The limiter is fair: after its turn a task waits behind all others.
                brought = await to_thread.run_sync(self._transfer_some, quantum, limiter=turns)
            except BusyError:
                await anyio.sleep(BUSY_PAUSE)
                continue
            except TaskGoneError:
                return
            if not brought:
                if not any(self._served.remaining().levels):
                    return
                await anyio.sleep(
                    CLAIMED_PAUSE
                )  # other threads have claimed the rest, and may give some of it back
            quantum = QUANTUM if turns.statistics().tasks_waiting else LONG_QUANTUM

    async def _fetch(self, remote: RemotePages) -> None:
        """As _transfer, for what page servers have; the engine asks for it and places it, and is told how much."""
        while True:
            if not await remote.bring(self._served, QUANTUM):
                await anyio.sleep(GIVEN_BACK_PAUSE)

    def pages_lost(self, image: int, nr_pages: int, reason: str) -> None:
        """No page server gives these."""
        if not self._final:
            name, pages = self.identity.name, count(nr_pages, "page")
            self._log.error("%s: %s, at %#x when dumped: %s", name, pages, image, reason)
            self._served.fail_remote(image, nr_pages, lost=True)

    async def _await_gone(self) -> None:
        """Wait until the memory of an exited process is gone. It stays if another process shares it (CLONE_VM)."""
        pause = BUSY_PAUSE
        while pause < GONE_PAUSE and self._served.probe():
            await anyio.sleep(pause)
            pause *= 2

    async def _learn_end(self) -> None:
        """Find out how a task ended whose memory is gone while it missed pages."""
        if self._state is not State.SERVING:  # it lost pages, or the daemon killed it
            self._ended.set()
            return
        for _ in range(END_LOOKS):
            if (state := self._how_it_ended()) is not State.SERVING:
                self._end(state)
                return
            await anyio.sleep(END_PAUSE)
        self._end(State.ENDED)

    def _how_it_ended(self) -> State:
        """The state for the end of the process; SERVING: not known yet."""
        if self.identity.forked:
            return State.GONE
        if not self.process:
            return State.ENDED
        if not self.process.has_exited:
            # Either it has a new address space (execve), or it is about to exit.
            return State.GONE if self.process.has_memory and not self.process.has_exited else State.SERVING
        status = self.process.exit_status()
        if status is None:
            return State.ENDED
        if os.WIFSIGNALED(status):
            self._signal = os.WTERMSIG(status)
            return State.DIED
        return State.GONE

    def _tend(self, group: TaskGroup) -> None:
        if self._wrong and not self._tending:
            self._tending = True
            group.start_soon(self._tend_wrong)

    async def _tend_wrong(self) -> None:
        """Poison lost pages, so that the task does not read zeros there."""
        while self._wrong:
            events, self._wrong = self._wrong, []
            for event in events:
                self._explain(event)
            if self._served.lost:
                if self._state is State.SERVING:
                    self._state = State.LOST
                await self._poison(everything=False)
        self._tending = False

    def _explain(self, event: TaskEvent) -> None:
        name, where = self.identity.name, f"{count(event.nr_pages, 'page')} at {event.addr:#x}"
        if event.error == errno.ENOENT:
            if self.process and not self.process.holds_anonymous_memory(event.addr):
                self._log.info("%s: not mapped any more: %s", name, where)
                self._served.forget(event.dump_addr, event.nr_pages)
                return
            self._log.error(
                "%s: %s have data in the image, but the restorer has not registered them", name, where
            )
            self._state = State.KILLED
            self._kill("it would read zeros there")
        elif event.error == errno.ENODATA:
            pass  # pages_lost() has logged it
        elif event.error == errno.EADDRNOTAVAIL:
            self._log.error(
                "%s: %s may have been unmapped, which the kernel does not report: neither their data nor zeros are"
                " certain to be right",
                name,
                where,
            )
        elif event.error:
            self._log.error("%s: %s can't be read from the image: %s", name, where, os.strerror(event.error))
        else:
            self._log.error("%s: lost, and a thread waits for it: %s", name, where)

    def _spoilt(self) -> None:
        """A pages file was truncated within a page while that page was being copied."""
        self._log.error("%s: a page was copied while its image was cut short", self.identity.name)
        self._state = State.KILLED
        self._kill("it may have zeros there")

    async def _poison(self, *, everything: bool) -> None:
        while not self._final:
            try:
                pages = self._served.poison(everything=everything)
            except BusyError:
                await anyio.sleep(BUSY_PAUSE)
            except TaskGoneError:
                return
            except OSError as error:
                self._state = State.KILLED
                self._kill(f"its pages cannot be poisoned: {error.strerror}")
                return
            else:
                if pages:
                    poisoned = count(pages, "page")
                    self._log.error("%s: poisoned %s: a touch raises SIGBUS", self.identity.name, poisoned)
                return

    def _kill(self, why: str, *, descendants: bool = False) -> None:
        """Kill the task, with `descendants` also all its descendants.

        The process of a forked child is unknown: then its ancestor is killed with all descendants.
        """
        if self.process and self.process.kill(descendants=descendants or self.identity.forked):
            whom = "its ancestor and all descendants of that" if self.identity.forked else "it"
            self._log.error("%s: %s; killed %s (pid %d)", self.identity.name, why, whom, self.process.pid)
        else:
            self._log.error("%s: %s; its process is unknown: kill it", self.identity.name, why)

    async def give_up(self) -> None:
        """Poison the missing pages of the task and kill it, so that it does not read zeros."""
        if self._state is State.SERVING and not self._gone and not self._served.complete:
            pending = self._served.pending
            self._state = State.KILLED
            await self._poison(everything=True)
            if not self.identity.forked:
                self._kill(f"it still missed {count(pending, 'page')}")
        self._ended.set()

    def ended_as_twin(self) -> None:
        """The server has killed the process, because another destination runs this task."""
        if self._state is State.COMPLETE:
            self._log.error("%s: killed: another destination has completed this dump", self.identity.name)
            self._state = State.KILLED
            if self._final:
                self._final = self._final._replace(state=State.KILLED)

    def _close(self) -> None:
        if not self._served.complete and not self._gone and self._state is not State.KILLED:
            # Only after an error of the daemon. The uffd stays open until the task is dead, or it would read zeros.
            self._state = State.KILLED
            if (self.process and not self.identity.forked) or not poison_now(self._served):
                self._kill("the daemon failed")
        if self._gone and self._state is State.SERVING:
            self._end(State.ENDED)
        self._log_end()
        self._served.end_service()
        self.holds_uffd = self._served.left_open
        report = self._measure()
        if self._served.close():
            self._spoilt()
        self._final = report._replace(state=self._state)
        self._closed.set()

    def _log_end(self) -> None:
        name, pending = self.identity.name, count(self._served.pending, "page")
        if self._state is State.DIED:
            self._log.error("%s: killed by %s while it missed %s", name, signal_name(self._signal), pending)
        elif self._state is State.ENDED:
            self._log.error("%s: ended while it missed %s, cause unknown", name, pending)


def poison_now(served: ServedTask) -> bool:
    """Poison all missing pages, without the event loop. Blocks for up to BUSY_TRIES * BUSY_PAUSE seconds.

    False if the kernel has no UFFDIO_POISON (before 6.6), or if a layout event is under way all that time.
    """
    for _ in range(BUSY_TRIES):
        try:
            served.poison(everything=True)
        except BusyError:
            time.sleep(BUSY_PAUSE)
        except TaskGoneError:
            return True
        except OSError:
            return False
        else:
            return True
    return False
