"""Serving one restored task, from the arrival of its uffd until nothing is missing or the task is gone.

Faults are answered by the engine at all times; what is decided here is background transfer, what becomes of
pages that can't be had, and when the uffd may be closed.
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

from lazypages.engine.uffd import BusyError, Notice, NoticeKind, ServedTask, TaskGoneError
from lazypages.loop.processes import Process
from lazypages.observe.metrics import State, TaskReport, measure, signal_name
from lazypages.sources.checkpoint import Seen

if TYPE_CHECKING:
    from lazypages.sources.remote import RemotePages

log = logging.getLogger("lazypages")

#: Bytes that a task's background transfer brings before the next task has its turn.
QUANTUM = 8 << 20

#: The same while no other task waits: between two turns a CPU stands still, for 100 us.
LONG_QUANTUM = 64 << 20

#: Seconds between looks for pages that were claimed for a page server and have been given back.
GIVEN_BACK_PAUSE = 1.0

#: Seconds between looks for pages that somebody has claimed and not brought.
CLAIMED_PAUSE = 0.1

#: Seconds to wait while a layout event of the task is under way; and how often that is done at the very end.
BUSY_PAUSE = 0.001
BUSY_TRIES = 500

#: How often ranges that others look at are tried while a layout event is under way.
SEEN_TRIES = 20

#: How long it is looked how a task ended whose memory is gone; from there to its exit the kernel has little to do.
END_PAUSE = 0.01
END_LOOKS = 1000

#: Seconds between looks whether the memory of a process that has exited is gone, at most; then the server's are enough.
GONE_PAUSE = 0.5


class Identity(NamedTuple):
    """Which task this is. ``pid``: as in the images; of a forked child, that of the task it descends from."""

    name: str
    pid: int
    forked: bool
    total: int
    sources: tuple[str, ...]


class TaskService:
    """One memory under one uffd. ``process``: of the restored task, where known; of a forked child: its ancestor's."""

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
        self._wrong: list[Notice] = []
        self._tending = False
        self._background = False
        self._urgent = False
        self._exited = False
        self._group: TaskGroup | None = None  # while children may be started
        self._ended = anyio.Event()
        self._closed = anyio.Event()
        self._final: TaskReport | None = None
        #: Whether the uffd had to stay open to the end of this process.
        self.holds_uffd = False

    @property
    def pending(self) -> int:
        """Pages that the task still misses."""
        return 0 if self._final else self._served.pending

    def report(self) -> TaskReport:
        """The numbers of this moment or, once it has ended, of its end."""
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
            **measure(self._served),
        )

    # What the server tells.

    def restore_finished(self) -> None:
        """The task is registered and goes on: from now on the uffd may be closed once nothing is missing."""
        self._may_close = True
        self._check_complete()
        if self._group:
            self._group.start_soon(self._bring_seen)

    def start_background(self) -> None:
        """Bring what nobody has touched yet. Only once the restore is finished: before, nothing is registered."""
        if not self._background:
            self._background = True
            if self._group:
                self._bring_rest(self._group)

    async def complete(self) -> None:
        """Bring all that is missing, before what other tasks miss. Returns when the uffd is closed."""
        self.start_background()
        if not self._urgent:
            self._urgent = True
            if self._group:
                self._hurry(self._group)
        await self._closed.wait()

    def process_exited(self) -> None:
        """The process has exited, all its threads included."""
        self._exited = True
        if self.process:
            self.process.exit_status()  # soon nobody may know it any more
        if self._group and self._served.probe():
            self._group.start_soon(self._await_gone)

    def probe(self) -> None:
        """Has the engine find out whether the task still exists: without faults nothing else tells."""
        if not self._final:
            self._served.probe()

    def handle(self, notice: Notice, urgent: list[tuple[int, int, int]]) -> None:
        """A notice of the engine about this task; never blocks. Adds to `urgent` what page servers must give."""
        match notice.kind:
            case NoticeKind.NEED | NoticeKind.HURRY:
                urgent.append((self.identity.pid, notice.image, notice.nr_pages))
            case NoticeKind.COMPLETE:
                self._check_complete()
            case NoticeKind.GONE:
                self._gone = True
                if not self._served.pending:
                    self._end(State.COMPLETE)
                elif self._group:
                    self._group.start_soon(self._learn_end)
            case NoticeKind.LOST if notice.error == errno.ESTALE:
                self._spoilt()
            case NoticeKind.LOST:
                self._wrong.append(notice)
                if self._group:
                    self._tend(self._group)
            case NoticeKind.FAILED:
                log.error("%s: userfaultfd: %s", self.identity.name, os.strerror(notice.error))
            case NoticeKind.BROKEN:
                self._state = State.KILLED
                self._kill(
                    f"it is not known any more what it misses: {os.strerror(notice.error)}", descendants=True
                )
            case NoticeKind.UNSEEN:
                log.warning(
                    "%s: /proc/PID/pagemap can't be read (%s): a guard that it installs (MADV_GUARD_INSTALL) before "
                    "all of its memory is there may be copied over; give the daemon CAP_SYS_PTRACE",
                    self.identity.name,
                    os.strerror(notice.error),
                )
            case NoticeKind.FORKED:
                pass  # the server's

    def _check_complete(self) -> None:
        if self._may_close and not self._final and self._served.pending == 0:
            self._end(State.COMPLETE)

    def _end(self, state: State) -> None:
        if self._state is State.SERVING:
            self._state = state
        self._ended.set()

    # Its life.

    async def run(self) -> None:
        """Returns when the task has all its memory, is gone, or has been given up; the uffd is closed then."""
        try:
            async with anyio.create_task_group() as group:
                # Its children are started when there is something to do: a thousand tasks are a normal number.
                self._group = group
                try:
                    if self._may_close:
                        group.start_soon(self._bring_seen)
                    if self._background:
                        self._bring_rest(group)
                    if self._urgent:
                        self._hurry(group)
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

    def _hurry(self, group: TaskGroup) -> None:
        """Beside those that wait for their turn."""
        threads = int(self._turns.total_tokens)
        turns = anyio.CapacityLimiter(threads)
        for _ in range(threads):
            group.start_soon(self._transfer, turns)

    async def _bring_seen(self) -> None:
        if not self._background:  # which does it
            await to_thread.run_sync(self._bring_seen_now, limiter=self._turns)

    def _bring_seen_now(self) -> None:
        """Blocks; once. What can't be had at the moment comes later, with the rest."""
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
                # The limiter is fair: a task that has had its turn goes to the end of the line.
                brought = await to_thread.run_sync(self._transfer_some, quantum, limiter=turns)
            except BusyError:
                await anyio.sleep(BUSY_PAUSE)
                continue
            except TaskGoneError:
                return
            if not brought:
                if not any(self._served.remaining().levels):
                    return
                await anyio.sleep(CLAIMED_PAUSE)  # others bring what is left; they may give some of it back
            quantum = QUANTUM if turns.statistics().tasks_waiting else LONG_QUANTUM

    async def _fetch(self, remote: RemotePages) -> None:
        """As _transfer, for what page servers have; the engine asks for it and places it, and is told how much."""
        while True:
            if not await remote.bring(self._served, QUANTUM):
                await anyio.sleep(GIVEN_BACK_PAUSE)

    def pages_lost(self, image: int, nr_pages: int, reason: str) -> None:
        """No page server gives these."""
        if not self._final:
            log.error("%s: %d pages, at %#x when dumped: %s", self.identity.name, nr_pages, image, reason)
            self._served.fail_remote(image, nr_pages, lost=True)

    async def _await_gone(self) -> None:
        """Its memory goes last; or stays, when it is another process's, too (CLONE_VM): no end of that is told."""
        pause = BUSY_PAUSE
        while pause < GONE_PAUSE and self._served.probe():
            await anyio.sleep(pause)
            pause *= 2

    async def _learn_end(self) -> None:
        """Its memory is gone, and it missed pages: was that its own doing?"""
        if self._state is not State.SERVING:  # lost pages, or was killed for a reason of ours
            self._ended.set()
            return
        for _ in range(END_LOOKS):
            if (state := self._how_it_ended()) is not State.SERVING:
                self._end(state)
                return
            await anyio.sleep(END_PAUSE)
        self._end(State.ENDED)

    def _how_it_ended(self) -> State:
        """SERVING: that can't be told yet."""
        if self.identity.forked:
            return State.GONE
        if not self.process:
            return State.ENDED
        if not self.process.has_exited:
            # Either it has another memory already (execve), or it is about to exit.
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
        """Pages that can't be had: the task may not read zeros there, and nobody else can bring them."""
        while self._wrong:
            notices, self._wrong = self._wrong, []
            for notice in notices:
                self._explain(notice)
            if self._served.lost:
                if self._state is State.SERVING:
                    self._state = State.LOST
                await self._poison(everything=False)
        self._tending = False

    def _explain(self, notice: Notice) -> None:
        name, where = self.identity.name, f"{notice.nr_pages} pages at {notice.addr:#x}"
        if notice.error == errno.ENOENT:
            if self.process and not self.process.holds_anonymous_memory(notice.addr):
                log.info("%s: %s are not mapped any more", name, where)
                self._served.forget(notice.image, notice.nr_pages)
                return
            log.error("%s: %s have data in the image, but the restorer has not registered them", name, where)
            self._state = State.KILLED
            self._kill("it would read zeros there")
        elif notice.error == errno.ENODATA:
            pass  # pages_lost has said it
        elif notice.error == errno.EADDRNOTAVAIL:
            log.error(
                "%s: %s may have been unmapped or not, which the kernel does not say: neither their data nor zeros"
                " would be right",
                name,
                where,
            )
        elif notice.error:
            log.error("%s: %s can't be read from the image: %s", name, where, os.strerror(notice.error))
        else:
            log.error("%s: %s are lost and a thread waits for one", name, where)

    def _spoilt(self) -> None:
        """A pages file became shorter at the moment when the page was copied that it ends in now."""
        log.error("%s: a page was copied while its image was cut short", self.identity.name)
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
                self._kill(f"its pages can't be poisoned here: {error.strerror}")
                return
            else:
                if pages:
                    log.error("%s: poisoned %d pages: touching one raises SIGBUS", self.identity.name, pages)
                return

    def _kill(self, why: str, *, descendants: bool = False) -> None:
        """Kills the task; its descendants, too, on demand. The process of a forked child is not known: then its
        ancestor and all its descendants."""
        if self.process and self.process.kill(descendants=descendants or self.identity.forked):
            log.error("%s: killed (pid %d): %s", self.identity.name, self.process.pid, why)
        else:
            log.error("%s: %s, and its process is not known: end it", self.identity.name, why)

    async def give_up(self) -> None:
        """Ends the task if it still misses pages: never may it read zeros for them."""
        if self._state is State.SERVING and not self._gone and (pending := self._served.pending):
            self._state = State.KILLED
            await self._poison(everything=True)
            if not self.identity.forked:
                self._kill(f"{pending} pages were still missing")
        self._ended.set()

    def ended_as_twin(self) -> None:
        """Its process was killed, because what it is runs elsewhere."""
        if self._state is State.COMPLETE:
            log.error("%s: killed: another destination has all of this dump", self.identity.name)
            self._state = State.KILLED
            if self._final:
                self._final = self._final._replace(state=State.KILLED)

    def _close(self) -> None:
        if self._served.pending and not self._gone and self._state is not State.KILLED:
            # Only after an error of ours. Until the task is dead its uffd stays open, or it would get zeros.
            self._state = State.KILLED
            if (self.process and not self.identity.forked) or not poison_now(self._served):
                self._kill("the daemon failed")
        if self._gone and self._state is State.SERVING:
            self._end(State.ENDED)
        self._say_end()
        report = self._measure()
        self.holds_uffd = (report.pending > 0 or self._state is State.KILLED) and not self._gone
        if self._served.close():
            self._spoilt()
        self._final = report._replace(state=self._state)
        self._closed.set()

    def _say_end(self) -> None:
        name, pending = self.identity.name, self._served.pending
        if self._state is State.DIED:
            log.error("%s: killed by %s while it missed %d pages", name, signal_name(self._signal), pending)
        elif self._state is State.ENDED:
            log.error("%s: ended while it missed %d pages; how is not known", name, pending)


def poison_now(served: ServedTask) -> bool:
    """Poisons all that is pending, without the event loop.

    False when this kernel can't, or while the task is in the middle of a layout event that nobody reads any more.
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
