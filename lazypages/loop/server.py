"""The server: owns the services of all restored tasks, and decides what concerns more than one of them."""

from __future__ import annotations

import logging
import signal
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
from anyio import to_thread
from anyio.abc import TaskStatus

from lazypages.control.descriptors import (
    FOR_EMERGENCIES,
    FOR_FORKS,
    NONE_LEFT,
    NoDescriptorError,
    Reserve,
    how_to_raise_now,
)
from lazypages.control.handover import Connection, RestoreFinished, TaskArrived, ZombieArrived, accept
from lazypages.control.listener import ControlError, ControlSocket
from lazypages.engine.engine import Engine
from lazypages.engine.events import TaskEventKind
from lazypages.engine.guard import Guard
from lazypages.engine.memory import PAGE_SIZE
from lazypages.engine.task import ServedTask
from lazypages.engine.tracers import Tracers
from lazypages.errors import LazyPagesError
from lazypages.loop.exit_events import ExitEvents
from lazypages.loop.options import ServeOptions
from lazypages.loop.processes import Exits, Process
from lazypages.loop.service import Identity, TaskService, poison_now
from lazypages.loop.traced import TracedTasks, Tracing
from lazypages.observe.metrics import Milestones, Summary
from lazypages.sources.checkpoint import Expected, Seen
from lazypages.wording import count, size

if TYPE_CHECKING:
    from lazypages.sources.remote import RemotePages

log = logging.getLogger("lazypages")

#: Number of threads of the background transfer.
TRANSFER_THREADS = 2

#: Seconds between two rounds of checks whether tasks without faults still exist, and tasks per round. Exits are
#: reported at once; these checks detect execve and the ends of forked children, at little cost for a thousand tasks.
PROBE_INTERVAL = 1.0
PROBES = 200

#: Seconds to try at the end to reach a page server that waits for CLOSE.
FAREWELL = 10.0

#: Seconds between two messages about too few file descriptors; and between two attempts to get one.
SHORTAGE_REMINDER = 10.0
SHORTAGE_PAUSE = 0.05

#: Seconds between two attempts to start another guard.
GUARD_PAUSE = 0.1


#: Called when a restore can be started, with the problems of page servers that are waited for.
Begin = Callable[[Sequence[str]], None]


class EngineError(LazyPagesError):
    """The engine has failed: faults can't be answered any more."""


class SourcesError(LazyPagesError):
    """No page server can ever be used, as known before a restore has connected."""


class Server:
    """Serves one restore of one checkpoint: `expected` tasks, arriving on `control`.

    ``alone``: this is the only server of the process. Then it handles the signals, and keeps the guard.
    ``open_tracers``: as in TracedTasks.
    """

    def __init__(
        self,
        expected: Mapping[int, Expected],
        control: ControlSocket,
        options: ServeOptions,
        guard: Guard | None = None,
        *,
        alone: bool = True,
        open_tracers: Callable[[], Tracing] = Tracers,
    ) -> None:
        self._alone = alone
        self._expected = expected
        self._control = control
        self._options = options
        self._guard = guard
        self._awaited = set(expected)
        self._zombies = 0
        self._finished = False
        self._connected = anyio.Event()
        self._draining = False
        self._started = time.monotonic()
        self._services: list[TaskService] = []
        self._by_task: dict[ServedTask, TaskService] = {}
        self._processes: dict[int, Process] = {}
        self._exits = Exits()
        self._events: ExitEvents | None = None
        self._for_forks = Reserve(FOR_FORKS)
        self._for_emergencies = Reserve(FOR_EMERGENCIES)
        self._short_said = -SHORTAGE_REMINDER
        self._forks: Counter[int] = Counter()
        self._one_ended = anyio.Event()
        self._families: dict[
            int, list[TaskService]
        ] = {}  # services of a restored task and its forked children
        self._held: set[int] = set()  # restored tasks with a uffd that must stay open until this process ends
        self._traced = TracedTasks(self._families, self._processes, open_tracers)
        self._remote: RemotePages | None = None
        self._engine: Engine | None = None  # while it runs
        self._failure: OSError | None = None
        self._no_sources = ""
        self._turns = anyio.CapacityLimiter(TRANSFER_THREADS)

    def summary(self) -> Summary:
        """The current numbers."""
        return Summary(
            [service.report() for service in self._services],
            self._zombies,
            self._finished,
            time.monotonic() - self._started,
            self._remote.stats() if self._remote else (),
        )

    async def run(
        self,
        watch: Callable[[Server], Coroutine[Any, Any, None]] | None = None,
        begin: Begin | None = None,
        handling: Callable[[], None] | None = None,
    ) -> Summary:
        """Serve until every task is complete, gone or given up.

        `handling` is called as soon as signals are handled; later `begin`, when a restore can be started: when it is
        known whether the page servers can be used. `watch` runs from then on.
        Failures of the restorer and of tasks raise nothing; they are in the summary. Raises EngineError if
        userfaultfds can't be read any more; SourcesError.
        """
        with Engine(self._options.trace, self._guard) as engine:
            async with AsyncExitStack() as stack:
                stack.callback(self._for_forks.release)
                stack.callback(self._for_emergencies.release)
                if events := ExitEvents.open():
                    self._events = stack.enter_context(events)
                stack.callback(self._close_processes)
                stack.enter_context(self._exits)
                # In any case: children whose fork was not handled yet must not read zeros.
                stack.callback(_poison_leftovers, engine)
                engine_group = await stack.enter_async_context(anyio.create_task_group())
                # Ends the engine's thread before the engine is freed, also after an error.
                stack.callback(self._stop_engine, engine)
                engine_group.start_soon(self._run_engine, engine, engine_group.cancel_scope)
                self._engine = engine
                if self._options.remote_sources:
                    stack.callback(self._end_twins)  # when the servers have said their last word
                    from lazypages.sources.remote import open_remote  # noqa: PLC0415 - slow to import

                    self._remote = await stack.enter_async_context(
                        open_remote(
                            self._options.page_servers,
                            self._pages_lost,
                            self._options.remote,
                            engine=engine,
                            others=self._options.others,
                        )
                    )
                async with anyio.create_task_group() as helpers:
                    self._helpers = helpers.cancel_scope
                    if self._alone:
                        await helpers.start(self._handle_signals)
                        if self._guard:
                            helpers.start_soon(keep_guard, self._guard)
                    if handling:
                        handling()
                    helpers.start_soon(self._dispatch, engine)
                    helpers.start_soon(self._exits.run)
                    helpers.start_soon(self._probe)
                    helpers.start_soon(self._traced.run)
                    if self._remote:
                        helpers.start_soon(self._await_completed, self._remote, helpers.cancel_scope)
                    async with anyio.create_task_group() as tasks:
                        self._tasks = tasks
                        if begin:
                            await self._await_sources(begin, helpers.cancel_scope)
                        if self._remote and not self._remote.hopeless.is_set():
                            helpers.start_soon(self._await_hopeless, self._remote, helpers.cancel_scope)
                        if watch:
                            helpers.start_soon(watch, self)
                        await self._receive(engine)
                        await self._all_ended(engine)
                    if self._remote and self.summary().ok:
                        await self._meet(self._remote)
                    helpers.cancel_scope.cancel()
                if self._remote and not self.connected and not self._control.has_caller():
                    self._remote.unused()
                elif self._remote and not self.summary().ok:
                    # Tell the source that this restore has failed, so that it keeps the tasks.
                    self._remote.abandon()
        if self._no_sources:
            raise SourcesError(self._no_sources)
        if self._failure:
            raise EngineError(
                f"cannot read userfaultfds any more ({self._failure.strerror}): tasks that miss pages are stuck"
            )
        return self.summary()

    async def _run_engine(self, engine: Engine, scope: anyio.CancelScope) -> None:
        """The engine's own thread; Engine.stop ends it, cancellation alone does not."""
        try:
            await to_thread.run_sync(engine.run, limiter=anyio.CapacityLimiter(1))
        except OSError as error:
            self._failure = error
            scope.cancel()  # each service poisons or kills its task when it is cancelled

    def _stop_engine(self, engine: Engine) -> None:
        self._engine = None
        engine.stop()

    def _close_processes(self) -> None:
        """Close pidfds, except of tasks with a uffd that stays open: the guard needs them to kill those tasks."""
        for pid, process in self._processes.items():
            if pid not in self._held:
                process.close()

    def bring_first(self, pid: int, start: int, end: int) -> bool:
        """Begin to copy the missing pages of a task in [start, end), current addresses in bytes, before all others.

        Only once the restore has `finished`. False: no such task is served.
        """
        return any(
            service.bring_first(start, end)
            for service in self._families.get(pid, ())
            if not service.identity.forked
        )

    @property
    def held(self) -> Sequence[Process]:
        """After :meth:`run`: the processes whose pidfds stay open."""
        return [self._processes[pid] for pid in self._held if pid in self._processes]

    @property
    def connected(self) -> bool:
        """Whether a restorer has connected."""
        return self._connected.is_set()

    async def wait_connected(self) -> None:
        """Until a restorer has connected."""
        await self._connected.wait()

    @property
    def state(self) -> str:
        """``waiting`` for a restorer, ``restoring``, or ``serving``: the tasks run."""
        if self._finished:
            return "serving"
        return "restoring" if self.connected else "waiting"

    def milestones(self) -> Milestones:
        """Cheaper than `summary`."""
        stats = [service.stats for service in self._services]
        return Milestones(
            any(task.copies for task in stats), self._finished, sum(task.poisoned for task in stats)
        )

    @property
    def finished(self) -> bool:
        """Whether the restorer has reported the end of the restore."""
        return self._finished

    @property
    def draining(self) -> bool:
        """Whether :meth:`interrupt` has been called once: all tasks are completed, and then it ends."""
        return self._draining

    def rounds(self) -> int | None:
        """As Engine.rounds; None: the engine does not run."""
        return self._engine.rounds() if self._engine else None

    def complete(self) -> None:
        """Copy all missing pages now, also without `background`; before the end of the restore: as soon as it ends."""
        self._options = self._options._replace(background=True)
        if self._finished:
            for service in self._services:
                service.start_background()

    # File descriptors.

    def _short_of_descriptors(self, why: object) -> None:
        """Log a shortage of descriptors. Nothing is lost: the message in question waits, and so does its task."""
        self._for_forks.release()
        now = time.monotonic()
        if now - self._short_said >= SHORTAGE_REMINDER:
            self._short_said = now
            log.error("%s: the task waits until one is free; %s", why, how_to_raise_now())

    # The page servers.

    def _pages_lost(self, pid: int, image: int, nr_pages: int, reason: str) -> None:
        for service in tuple(self._families.get(pid, ())):
            service.pages_lost(image, nr_pages, reason)

    async def _await_completed(self, remote: RemotePages, scope: anyio.CancelScope) -> None:
        """If another destination has completed the dump, end the tasks here: they must not run on two hosts."""
        await remote.wait_completed_elsewhere()
        if self.connected or self._control.has_caller():
            log.error("another destination has completed this dump and runs it: killing the tasks here")
            await self._give_up()
            self._end_twins()
        else:
            log.error("ended before a restore connected: another destination has completed this dump")
            scope.cancel()

    async def _await_sources(self, begin: Begin, scope: anyio.CancelScope) -> None:
        """Call `begin` when it is known whether the page servers can be used, unless that ends everything."""
        problems = await self._remote.first_attempts() if self._remote else ()
        if self._remote and self._remote.is_hopeless:
            self._end_hopeless(self._remote, scope)
        await anyio.lowlevel.checkpoint()  # if everything ends, also because of a signal, it ends here
        begin(problems)

    async def _await_hopeless(self, remote: RemotePages, scope: anyio.CancelScope) -> None:
        """If no page server can ever be used, end before a restore connects: its tasks would wait for ever."""
        await remote.hopeless.wait()
        if remote.is_hopeless:  # no later attempt has succeeded
            self._end_hopeless(remote, scope)

    def _end_hopeless(self, remote: RemotePages, scope: anyio.CancelScope) -> None:
        """Cancel `scope`, unless a restorer has connected."""
        reason = "; ".join(remote.reasons())
        if self.connected or self._control.has_caller():
            log.error("%s; the tasks wait, and the attempts go on", reason)
        else:
            self._no_sources = reason
            scope.cancel()

    def _end_twins(self) -> None:
        """Kill all tasks, also complete ones, with all descendants, if another destination runs them."""
        if self._remote and self._remote.completed_elsewhere:
            for process in self._processes.values():
                process.kill(descendants=True)
            for service in self._services:
                service.ended_as_twin()

    async def _meet(self, remote: RemotePages) -> None:
        """Try to reach a server for CLOSE: without it the server keeps its tasks frozen."""
        with anyio.move_on_after(FAREWELL):
            while not remote.can_be_told:
                await anyio.sleep(0.05)

    # The restorer.

    async def _receive(self, engine: Engine) -> None:
        with await accept(self._control, self._short_of_descriptors) as connection:
            # A daemon serves one restore: with the socket closed a second one fails at once instead of waiting.
            self._connected.set()
            self._started = time.monotonic()
            self._traced.restored_by(connection.peer_pid)
            self._control.close()
            await self._receive_tasks(engine, connection)
        if not self._finished:
            rest = "; its remaining tasks are still served" if self._by_task else ""
            log.error("the restore failed: it closed the connection before it had finished%s", rest)

    async def _receive_tasks(self, engine: Engine, connection: Connection) -> None:
        try:
            async with aclosing(connection.events()) as events:
                async for event in events:
                    match event:
                        case TaskArrived():
                            try:
                                process = await self._process_of(event)
                            except BaseException:  # cancelled
                                self._leave(event.uffd)
                                raise
                            self._task_arrived(engine, event, process)
                        case ZombieArrived(pid):
                            self._expect(pid, zombie=True)
                            self._zombies += 1
                        case RestoreFinished():
                            self._restore_finished()
                            return
        except ControlError as error:
            log.error("%s", error)

    def _expect(self, pid: int, *, zombie: bool) -> Expected:
        expected = self._expected.get(pid)
        if expected is None:
            raise ControlError(f"the restorer sent task {pid}, which is not in the images")
        if pid not in self._awaited:
            raise ControlError(f"the restorer sent task {pid} twice")
        if zombie != (expected.memory is None):
            kind, other = ("dead", "alive") if zombie else ("alive", "dead")
            raise ControlError(f"the restorer sent task {pid} as {kind}, but in the images it is {other}")
        self._awaited.discard(pid)
        return expected

    async def _process_of(self, event: TaskArrived) -> Process | None:
        while True:
            try:
                return Process.of_task(event.real_pid, event.pid, self._for_emergencies, self._events)
            except NoDescriptorError as error:
                self._short_of_descriptors(error)
                await anyio.sleep(SHORTAGE_PAUSE)

    def _task_arrived(self, engine: Engine, event: TaskArrived, process: Process | None) -> None:
        try:
            expected = self._expect(event.pid, zombie=False)
            assert expected.memory is not None
        except ControlError:
            self._leave(event.uffd)
            if process:
                process.kill()
                process.close()
            raise
        try:
            served = engine.add(
                event.uffd,
                expected.memory,
                pid=process.pid if process else 0,
                pidfd=process.fileno() if process else -1,
                tag=event.pid,
            )
        except OSError as error:
            if process:
                process.kill()
                # The uffd stays open, and so does the pidfd, by which the guard can kill the task.
                self._processes[event.pid] = process
                self._held.add(event.pid)
            raise ControlError(f"cannot serve task {event.pid}: {error.strerror}") from error
        identity = Identity(
            f"task {event.pid}", event.pid, False, expected.lazy_pages, expected.sources, expected.program
        )
        log.info(
            "%s: %s", identity.name, count(expected.lazy_pages, "lazy page"), extra={"pid": identity.pid}
        )
        if process:
            self._processes[event.pid] = process
        self._start(served, identity, process, expected.seen)

    def _leave(self, uffd: int) -> None:
        """A task is not served. Its uffd stays open: if it were closed, the task would read zeros."""
        if self._guard:
            self._guard.leave(uffd)

    def _restore_finished(self) -> None:
        if self._awaited:
            log.warning("tasks missing from the restore: %s", ", ".join(map(str, sorted(self._awaited))))
        log.info("restore finished; the tasks run")
        self._finished = True
        if self._options.trace:
            self._options.trace.restore_finished()
        self._traced.restore_finished()
        for service in self._services:
            service.restore_finished()
            if self._options.background or self._draining:
                service.start_background()

    # The tasks.

    async def _all_ended(self, engine: Engine) -> None:
        """Wait for all tasks, also for forked children whose FORK event was not handled yet."""
        while engine.has_tasks:
            self._one_ended = anyio.Event()
            await self._one_ended.wait()

    def _start(
        self,
        served: ServedTask,
        identity: Identity,
        process: Process | None,
        seen: Seen | None = None,
    ) -> None:
        service = TaskService(
            served, identity, process=process, transfer_turns=self._turns, remote=self._remote, seen=seen
        )
        self._services.append(service)
        self._by_task[served] = service
        self._families.setdefault(identity.pid, []).append(service)
        self._traced.started(service)
        if process and not identity.forked:
            self._exits.watch(process, service.process_exited)
        if self._finished:
            service.restore_finished()
            if self._options.background or self._draining:
                service.start_background()
        self._tasks.start_soon(self._serve, service, served)

    async def _serve(self, service: TaskService, served: ServedTask) -> None:
        try:
            await service.run()
        finally:
            if service.holds_uffd:
                self._held.add(service.identity.pid)
            del self._by_task[served]
            self._one_ended.set()
            family = self._families[service.identity.pid]
            family.remove(service)
            self._traced.ended(service)
            if not family and self._remote:
                self._remote.forget(service.identity.pid)
        report = service.report()
        log.info(
            "%s: %s, %d of %s copied",
            report.name,
            report.state,
            report.copied.total,
            count(report.total, "page"),
            extra={"pid": report.pid},
        )

    async def _probe(self) -> None:
        """Check all tasks, PROBES at a time."""
        waiting: list[TaskService] = []
        while True:
            await anyio.sleep(PROBE_INTERVAL)
            if self._events:
                self._events.take()
            self._for_emergencies.refill()
            self._for_forks.refill()
            waiting = waiting or list(self._by_task.values())
            for service in waiting[:PROBES]:
                service.probe()
            waiting = waiting[PROBES:]

    async def _dispatch(self, engine: Engine) -> None:
        while True:
            await anyio.wait_readable(engine.event_fd)
            urgent: list[tuple[int, int, int]] = []
            for event in engine.events():
                if event.kind is TaskEventKind.FORKED:
                    self._forked(event.task)
                elif event.kind is TaskEventKind.FAILED and event.error in NONE_LEFT:
                    self._short_of_descriptors(
                        f"task {event.task.tag}: no file descriptor is free for a forked child"
                    )
                elif service := self._by_task.get(event.task):
                    service.handle(event, urgent)
            if urgent and self._remote:
                self._remote.request(urgent, urgent=True)

    def _forked(self, served: ServedTask) -> None:
        pid = served.tag
        self._forks[pid] += 1
        origin = self._expected[pid]
        name = f"task {pid}, fork {self._forks[pid]}"
        identity = Identity(name, pid, True, served.total, origin.sources, origin.program)
        self._start(served, identity, self._processes.get(pid))

    # Signals.

    async def _handle_signals(self, *, task_status: TaskStatus[None]) -> None:
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            task_status.started()
            async for _signal in signals:
                await self.interrupt()

    async def interrupt(self, *, now: bool = False) -> None:
        """What a signal does: before a restore has connected, end; after that, complete all tasks first.

        The second time, or with `now`: kill tasks that miss pages. Call it once `watch` runs.
        """
        if not self.connected and not self._control.has_caller():
            log.error("ended before a restore connected")
            self._helpers.cancel()
        elif not self._draining and not now:
            self._drain()
        else:
            await self._give_up()

    def _drain(self) -> None:
        self._draining = True
        missing = [service for service in self._services if service.pending]
        pages = sum(service.pending for service in missing)
        if missing:
            log.error(
                "%s still %s %s (%s): completing them first; a second Ctrl-C (SIGINT, SIGTERM) kills the tasks instead",
                count(len(missing), "task"),
                "misses" if len(missing) == 1 else "miss",
                count(pages, "page"),
                size(pages * PAGE_SIZE),
            )
        elif self._finished:
            log.error("no page is missing any more: ending")
        else:
            log.error(
                "the restore would fail now: waiting until it has finished; "
                "a second Ctrl-C (SIGINT, SIGTERM) ends at once"
            )
        if self._finished:
            for service in missing:
                service.start_background()

    async def _give_up(self) -> None:
        async with anyio.create_task_group() as group:
            for service in list(self._by_task.values()):
                group.start_soon(service.give_up)
        # Messages that the restorer may still send are ignored.
        self._tasks.cancel_scope.cancel()


async def keep_guard(guard: Guard) -> None:
    """Start another guard if the guard is killed. Without one, tasks read zeros if the daemon is killed."""
    while True:
        await anyio.wait_readable(guard.pidfd)
        log.error(
            "the guard (pid %d) was killed: without it tasks read zeros if this daemon is killed",
            guard.pid,
        )
        reason = None
        while True:
            try:
                guard.restart()
                break
            except OSError as error:
                if error.strerror != reason:
                    reason = error.strerror
                    log.error("cannot start another guard: %s; trying again", reason)
            await anyio.sleep(GUARD_PAUSE)
        log.error("started another guard (pid %d)", guard.pid)


def _poison_leftovers(engine: Engine) -> None:
    for served in engine.leftovers():
        if served.pending and not poison_now(served):
            missing = count(served.pending, "page")
            log.error("a forked task misses %s, which it will never get: kill it", missing)
