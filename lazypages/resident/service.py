"""The resident daemon: accepts clients, admits restores, and outlives them (docs/daemon.md)."""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import stat
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import anyio
import anyio.lowlevel
from anyio import to_thread
from anyio.abc import TaskGroup, TaskStatus

from lazypages import __version__
from lazypages.control import descriptors
from lazypages.control.descriptors import NONE_LEFT
from lazypages.control.listener import SOCKET_NAME, close_unread, discard, left_open
from lazypages.engine.guard import Guard
from lazypages.engine.memory import PAGE_SIZE
from lazypages.errors import LazyPagesError
from lazypages.export.exporter import Exporter
from lazypages.export.options import MAX_SCRAPERS
from lazypages.logs import MESSAGE
from lazypages.loop.options import ServeOptions
from lazypages.loop.processes import Process
from lazypages.loop.server import keep_guard
from lazypages.net.names import PROTOCOLS
from lazypages.notify import Notifier
from lazypages.observe.service_status import Told, restores_status, tell
from lazypages.resident import protocol
from lazypages.resident.connection import Connection
from lazypages.resident.log_lines import Follower
from lazypages.resident.protocol import Fd, Place, Request, RequestError
from lazypages.resident.restores import Asked, Descriptor, Needs, Restore
from lazypages.resident.tracers import SharedTracers
from lazypages.resident.users import User, open_as
from lazypages.wording import count, size

if TYPE_CHECKING:
    from lazypages.net.url import PageServerAddress
    from lazypages.sources.page_server import RemoteOptions

log = logging.getLogger("lazypages")

#: Clients at once. Each takes two descriptors.
MAX_CLIENTS = 64

#: Restores whose result is kept after their end; fewer if they have more tasks than this together.
MAX_ENDED = 100
MAX_ENDED_TASKS = 2000

#: Seconds between two checks whether the memory of tasks is gone whose uffds had to stay open.
SWEEP_PAUSE = 0.5

#: Seconds between two attempts to accept a client while no descriptor is free.
ACCEPT_PAUSE = 0.2

#: Seconds at the end for clients to read their last answers.
FAREWELL = 5.0


#: How a source begins that needs no connection (lazypages.net.names).
LOCAL_PREFIX = "local:"

#: A user who is neither root nor the daemon's may use one of so many parts of each limit.
USER_PARTS = 4


class Limits(NamedTuple):
    """``descriptors``: RLIMIT_NOFILE of this process. ``memory``: bytes for tables; None: any number.

    ``all_users``: users other than root and the daemon's may connect, too.
    """

    restores: int
    descriptors: int
    memory: int | None = None
    all_users: bool = False


class Service:
    """Serves restores until it is told to end. ``ready`` is called when it handles signals and accepts clients."""

    def __init__(
        self,
        listener: socket.socket,
        guard: Guard,
        limits: Limits,
        ready: Callable[[], None],
        *,
        notifier: Notifier,
        exporter: Exporter | None,
    ) -> None:
        self._listener = listener
        self._guard = guard
        self._tracers = SharedTracers()
        self._limits = limits
        self._ready = ready
        self._notifier = notifier
        self._exporter = exporter
        self._active: dict[int, Restore] = {}
        self._ended: dict[int, Restore] = {}
        self._connections: set[Connection] = set()
        self._held: list[Process] = []
        self._next = 1
        self._closing = False
        self._drained = anyio.Event()
        self._admitting = threading.Lock()
        self._to_sweep = anyio.Event()
        self._own = len(os.listdir("/proc/self/fd")) + descriptors.DAEMON + 2 * MAX_CLIENTS
        if exporter:
            self._own += MAX_SCRAPERS

    async def run(self) -> None:
        """Until all restores have ended after a signal or `shutdown`."""
        self._listener.setblocking(False)
        async with anyio.create_task_group() as group:
            self._group: TaskGroup = group
            await group.start(self._handle_signals)
            group.start_soon(keep_guard, self._guard)
            group.start_soon(self._sweep)
            await group.start(self._tracers.run)
            if self._exporter:
                group.start_soon(self._exporter.run)
            group.start_soon(self._accept)
            self._ready()
            group.start_soon(tell, self._notifier, self._told, self._rounds)
            await self._drained.wait()
            with anyio.move_on_after(FAREWELL):
                async with anyio.create_task_group() as farewell:
                    for connection in self._connections:
                        farewell.start_soon(connection.finish)
            group.cancel_scope.cancel()

    # The service manager.

    def _told(self) -> Told:
        restores = list(self._active.values())
        numbers = [found for restore in restores if (found := restore.summary())]
        status = restores_status([restore.state for restore in restores], numbers, ending=self._closing)
        return Told(status, self._closing)

    def _rounds(self) -> Mapping[int, int]:
        found = {number: restore.rounds() for number, restore in self._active.items()}
        return {number: rounds for number, rounds in found.items() if rounds is not None}

    # Clients.

    async def _accept(self) -> None:
        while True:
            await anyio.wait_readable(self._listener)
            try:
                peer, _ = self._listener.accept()
            except (BlockingIOError, ConnectionError):
                continue
            except OSError as error:
                log.error("cannot accept a client: %s", error.strerror)
                if error.errno not in NONE_LEFT:
                    raise
                await anyio.sleep(ACCEPT_PAUSE)
                continue
            peer.setblocking(False)
            try:
                user = User.of(peer)
                if refusal := self._refusal(user):
                    log.warning("refused a client: %s", refusal)
                    with suppress(OSError):
                        peer.send(protocol.encode(protocol.refusal(None, refusal)), socket.MSG_NOSIGNAL)
                    peer.close()
                    continue
                connection = Connection(peer, user, self._execute)
            except OSError as error:
                peer.close()
                log.error("cannot accept a client: %s", error.strerror)
                continue
            self._connections.add(connection)
            self._group.start_soon(self._serve_client, connection)

    def _refusal(self, user: User) -> RequestError | None:
        if not user.is_privileged and not self._limits.all_users:
            return RequestError(
                "refused",
                f"user {user.uid} may not use this daemon: only root and its own user ({os.geteuid()}) may; "
                "`lazypages daemon --all-users` admits others",
            )
        theirs = sum(connection.user.uid == user.uid for connection in self._connections)
        if not user.is_privileged and theirs >= MAX_CLIENTS // USER_PARTS:
            return RequestError(
                "limit", f"user {user.uid} has {theirs} clients connected already: try again later"
            )
        if len(self._connections) >= MAX_CLIENTS:
            return RequestError("limit", f"{MAX_CLIENTS} clients are connected already: try again later")
        return None

    async def _serve_client(self, connection: Connection) -> None:
        try:
            await connection.run()
        except Exception:
            log.exception("the connection of a client has failed")
        finally:
            self._connections.discard(connection)
            self._to_sweep.set()  # it may have left descriptors that it has sent

    async def _execute(self, request: Request, connection: Connection) -> dict[str, Any]:
        restore_of = partial(self._restore, connection.user)
        match request.command:
            case protocol.Serve() as command:
                return await self._serve(request.id, command, connection)
            case protocol.Status(number):
                return self._status(connection.user) if number is None else _result(restore_of(number))
            case protocol.Complete(number):
                restore_of(number).complete()
                return {}
            case protocol.First(number, pid, start, end):
                restore = restore_of(number)
                try:
                    restore.bring_first(pid, start, end)
                except LazyPagesError as error:
                    raise RequestError("failed", str(error)) from None
                return {}
            case protocol.Stop(number, now):
                await restore_of(number).stop(now=now)
                return {}
            case protocol.Wait(number):
                restore = restore_of(number)
                await restore.ended.wait()
                return _result(restore)
            case protocol.Shutdown(now):
                if not connection.user.is_privileged:
                    raise RequestError("refused", "only root and the daemon's own user may end it")
                nr = len(self._active)
                self._group.start_soon(partial(self._end, now=now))
                return {"restores": nr}

    def _status(self, user: User) -> dict[str, Any]:
        memory = sum(restore.needs.memory for restore in self._active.values())
        return {
            "protocol": protocol.VERSION,
            "version": __version__,
            "pid": os.getpid(),
            "closing": self._closing,
            "limits": {
                "restores": {"used": len(self._active), "max": self._limits.restores},
                "descriptors": {"used": self._descriptors(), "max": self._limits.descriptors},
                "memory": {"used": memory, "max": self._limits.memory},
            },
            "restores": [
                restore.status()
                for restore in (*self._ended.values(), *self._active.values())
                if _may_see(user, restore)
            ],
        }

    def _restore(self, user: User, number: int) -> Restore:
        restore = self._active.get(number) or self._ended.get(number)
        if restore is None or not _may_see(user, restore):
            raise RequestError(
                "not-found",
                f"there is no restore {number}; of those that have ended, the last {MAX_ENDED} are known",
            )
        return restore

    # Restores.

    def _descriptors(self) -> int:
        return self._own + sum(restore.needs.descriptors for restore in self._active.values())

    def _admit(self, restore: Restore, needs: Needs) -> None:
        """Raises RequestError. In a thread: another restore may be admitted at the same time."""
        with self._admitting:
            used = self._descriptors()
            memory = sum(other.needs.memory for other in self._active.values())
            if used + needs.descriptors > self._limits.descriptors:
                raise RequestError(
                    "limit",
                    f"too few file descriptors: this restore needs up to {needs.descriptors}, {used} of "
                    f"{self._limits.descriptors} are taken: try again when other restores have ended, or start the "
                    "daemon with a higher --max-descriptors",
                )
            if self._limits.memory is not None and memory + needs.memory > self._limits.memory:
                raise RequestError(
                    "limit",
                    f"too little memory for tables: this restore needs {size(needs.memory)}, {size(memory)} of "
                    f"{size(self._limits.memory)} are taken: try again when other restores have ended, or start the "
                    "daemon with a higher --max-memory",
                )
            self._admit_user(restore.asked.user, needs)
            restore.needs = needs

    def _admit_user(self, user: User, needs: Needs) -> None:
        """Raises RequestError if one who is not privileged would have too large a part."""
        if user.is_privileged:
            return
        theirs = [other.needs for other in self._active.values() if other.asked.user.uid == user.uid]
        for what, used, most in (
            ("file descriptors", sum(one.descriptors for one in (*theirs, needs)), self._limits.descriptors),
            ("bytes for tables", sum(one.memory for one in (*theirs, needs)), self._limits.memory),
        ):
            if most is not None and used > most // USER_PARTS:
                raise RequestError(
                    "limit",
                    f"user {user.uid} would have {used:,} {what}, and may have {most // USER_PARTS:,}: try again when "
                    "another restore of this user has ended",
                )

    def _check_admission(self, user: User) -> None:
        """Raises RequestError if no other restore can be served now."""
        if self._closing:
            raise RequestError("closing", "the daemon completes its restores and ends: start another one")
        if len(self._active) >= self._limits.restores:
            raise RequestError(
                "limit",
                f"{len(self._active)} restores are served, which is the limit: try again when one has ended, or start "
                "the daemon with a higher --max-restores",
            )
        theirs = sum(restore.asked.user.uid == user.uid for restore in self._active.values())
        if not user.is_privileged and theirs >= max(1, self._limits.restores // USER_PARTS):
            raise RequestError(
                "limit", f"user {user.uid} has {theirs} restores: try again when one of them has ended"
            )

    async def _serve(self, number: Any, command: protocol.Serve, connection: Connection) -> dict[str, Any]:
        self._check_admission(connection.user)
        # in a thread, because a file system may hang
        fds: list[Descriptor] = []
        try:
            asked = await to_thread.run_sync(
                _asked, command, connection, fds, limiter=anyio.CapacityLimiter(1)
            )
            await anyio.lowlevel.checkpoint()  # the client may have gone
            self._check_admission(connection.user)
        except BaseException:
            for descriptor in fds:
                descriptor.close()
            raise
        say = Follower(connection.outbox, number, command.log) if command.log else None
        restore = Restore(
            self._next, asked, guard=self._guard, tracers=self._tracers, admit=self._admit, say=say
        )
        if self._exporter:
            restore.export_to(self._exporter)
        self._next += 1
        self._active[restore.number] = restore
        self._group.start_soon(self._run, restore)
        await restore.started.wait()
        if not restore.admitted:
            self._ended.pop(restore.number, None)
            raise RequestError(restore.code, restore.error or "the daemon has been told to end")
        return {
            "restore": restore.number,
            "socket": f"{asked.names[1]}/{SOCKET_NAME}",
            "message": restore.invitation,
            "problems": list(restore.problems),
        }

    async def _run(self, restore: Restore) -> None:
        try:
            await restore.run()
        finally:
            del self._active[restore.number]
            self._held += restore.held
            self._ended[restore.number] = restore
            self._forget_oldest()
            self._to_sweep.set()
            if self._closing and not self._active:
                self._drained.set()

    def _forget_oldest(self) -> None:
        tasks = sum(restore.tasks for restore in self._ended.values())
        while len(self._ended) > MAX_ENDED or (tasks > MAX_ENDED_TASKS and len(self._ended) > 1):
            tasks -= self._ended.pop(next(iter(self._ended))).tasks

    async def _sweep(self) -> None:
        """After restores: close uffds of tasks that were killed, as soon as their memory is gone, and free memory."""
        while True:
            await self._to_sweep.wait()
            self._to_sweep = anyio.Event()
            gc.collect()  # images stay open and mapped as long as their objects live
            while True:
                close_unread()
                while left_open:
                    self._guard.leave(left_open.popleft())
                left = self._guard.close_gone()
                for process in [held for held in self._held if not self._guard.needs(held.fileno())]:
                    self._held.remove(process)
                    process.close()
                if not left or self._to_sweep.is_set():
                    break
                await anyio.sleep(SWEEP_PAUSE)

    # The end.

    async def _handle_signals(self, *, task_status: TaskStatus[None]) -> None:
        """The first one completes, also if `shutdown` has begun that already; any other one kills."""
        now = False
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            task_status.started()
            async for _signal in signals:
                self._group.start_soon(partial(self._end, now=now))
                now = True

    async def _end(self, *, now: bool) -> None:
        """Admit no restore, complete those that there are (`now`: kill tasks that miss pages); then `run` returns."""
        self._say_ending(now=now)
        self._closing = True
        if not self._active:
            self._drained.set()
        async with anyio.create_task_group() as group:
            for restore in self._active.values():
                group.start_soon(partial(restore.stop, now=now))

    def _say_ending(self, *, now: bool) -> None:
        pages = sum(task.pending for restore in self._active.values() for task in restore.task_reports())
        if now:
            log.error("ending at once: killing the tasks that miss pages")
        elif self._closing:
            log.error(
                "ending already: waiting for %s with %s (%s) to go; a second Ctrl-C (SIGINT, SIGTERM) kills the "
                "tasks instead",
                count(len(self._active), "restore"),
                count(pages, "page"),
                size(pages * PAGE_SIZE),
            )
        else:
            log.log(MESSAGE, "ending; restores that are served: %d", len(self._active))


def _result(restore: Restore) -> dict[str, Any]:
    numbers = restore.summary()
    return {**restore.status(), "summary": None if numbers is None else numbers.as_dict()}


def _asked(command: protocol.Serve, connection: Connection, fds: list[Descriptor]) -> Asked:
    """What a request asks for. Adds the descriptors that it names to `fds`, also on failure. Raises RequestError."""

    def take() -> int:
        fd = connection.take_fd()
        try:
            fds.append(Descriptor.of(fd))
        except OSError as error:  # a file system of a user may refuse it to the daemon (fuse(4))
            discard([fd])
            raise RequestError("failed", f"a descriptor can't be used: {error.strerror}") from None
        return fd

    user = connection.user
    if not user.is_privileged:
        _check_allowed(command)
    images, images_name = _directory("images", command.images, user, take, fds)
    _check_inventory(images, images_name, user, fds)
    work, work_name = (
        (images, images_name) if command.work is None else _directory("work", command.work, user, take, fds)
    )
    options, directories = _sources(command, take)
    return Asked(
        user,
        images,
        work,
        (images_name, work_name),
        options,
        directories,
        Path(command.trace) if command.trace is not None else None,
        fds,
    )


def _check_allowed(command: protocol.Serve) -> None:
    """What the daemon would do with its own rights is not for other users. Raises RequestError."""
    addresses = [
        place for place in command.sources if isinstance(place, str) and not place.startswith(LOCAL_PREFIX)
    ]
    if addresses or command.tls:
        raise RequestError(
            "refused",
            "the daemon connects to no page server for this user: connect to it, and send the socket "
            '(--ps-socket; in "sources": {"fd": true})',
        )
    if command.trace is not None:
        raise RequestError("refused", "the daemon writes no trace for this user: use lazypages serve --trace")


def _directory(
    what: str, place: Place, user: User, take: Callable[[], int], fds: list[Descriptor]
) -> tuple[Path, str]:
    """A directory, and its name for messages."""
    if isinstance(place, Fd):
        fd = take()
        path = Path(f"/proc/self/fd/{fd}")
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            raise RequestError("bad-request", f'serve: the descriptor for "{what}" is not a directory')
        return path, os.readlink(path)
    if not user.is_privileged:
        try:
            fd = open_as(user, place, flags=os.O_PATH | os.O_DIRECTORY)
        except OSError as error:
            raise RequestError(
                "failed", f"{place}: user {user.uid} can't open it: {error.strerror}"
            ) from None
        fds.append(Descriptor.of(fd))
        return Path(f"/proc/self/fd/{fd}"), place
    path = Path(place)
    if not path.is_dir():
        why = "is not a directory" if path.exists() else "does not exist"
        raise RequestError("failed", f"{place} {why}")
    return path, place


def _check_inventory(images: Path, name: str, user: User, fds: Sequence[Descriptor]) -> None:
    inventory = images / "inventory.img"
    if not user.is_privileged:
        try:
            os.close(open_as(user, inventory, {descriptor.fd for descriptor in fds}))
        except OSError as error:
            raise RequestError(
                "failed", f"{name}/inventory.img: user {user.uid} can't read it: {error.strerror}"
            ) from None
    elif not inventory.exists():
        raise RequestError("failed", f"{name} is not a checkpoint: inventory.img not found")


def _may_see(user: User, restore: Restore) -> bool:
    return user.is_privileged or user.uid == restore.asked.user.uid


def _sources(command: protocol.Serve, take: Callable[[], int]) -> tuple[ServeOptions, Sequence[Path]]:
    if not command.sources:
        return ServeOptions(command.background), ()
    from lazypages.net.tls import TlsFiles  # noqa: PLC0415 - slow to import, and only needed here
    from lazypages.net.url import ConnectedSocket, LocalSource, SourceError, parse_source  # noqa: PLC0415
    from lazypages.net.wire import Layout  # noqa: PLC0415
    from lazypages.sources.page_server import RemoteOptions  # noqa: PLC0415

    if command.protocol is not None and command.protocol not in PROTOCOLS:
        raise RequestError("bad-request", f'serve: "protocol" must be one of: {", ".join(PROTOCOLS)}')
    directories: list[Path] = []
    servers: list[PageServerAddress] = []
    for place in command.sources:
        if isinstance(place, Fd):
            fd = take()
            if not stat.S_ISSOCK(os.fstat(fd).st_mode):
                raise RequestError("bad-request", "serve: the descriptor of a page server is not a socket")
            servers.append(ConnectedSocket(fd))
            continue
        try:
            source = parse_source(place)
        except SourceError as error:
            raise RequestError("bad-request", f"serve: {error}") from None
        match source:
            case ConnectedSocket():
                raise RequestError("bad-request", 'serve: send the socket of a page server as {"fd": true}')
            case LocalSource(directory):
                if not directory.is_absolute():
                    raise RequestError("bad-request", f"serve: {place!r} must have an absolute path")
                directories.append(directory)
            case _:
                servers.append(source)
    remote: RemoteOptions | None = None
    if servers:
        remote = RemoteOptions(
            layout=None if command.protocol is None else Layout(command.protocol),
            deadline=command.source_deadline,
            tls=command.tls and TlsFiles(**{k: _path(v) for k, v in command.tls._asdict().items()}),
        )
    return ServeOptions(command.background, tuple(servers), remote), directories


def _path(value: Any) -> Any:
    return Path(value) if isinstance(value, str) else value
