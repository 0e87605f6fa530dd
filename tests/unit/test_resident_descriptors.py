"""Descriptors of restores that come to nothing: closed, or known to the guard, which closes them later."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path
from typing import Any, cast

import anyio
import pytest

from lazypages.control.descriptors import NoDescriptorError
from lazypages.control.handover import Connection
from lazypages.engine._uffd import ffi, lib
from lazypages.engine.engine import Engine
from lazypages.engine.guard import Guard
from lazypages.engine.memory import TaskMemory
from lazypages.loop.options import ServeOptions
from lazypages.loop.processes import Process
from lazypages.loop.server import Server
from lazypages.notify import Notifier
from lazypages.resident import service
from lazypages.resident.protocol import Fd, RequestError, Serve
from lazypages.resident.restores import Descriptor
from lazypages.resident.service import Limits, Service
from lazypages.resident.users import User


class Left:
    """As Guard: what was left to it."""

    handle = ffi.NULL

    def __init__(self) -> None:
        self.uffds: list[int] = []

    def leave(self, uffd: int, pid: int = 0, pidfd: int = -1) -> None:
        self.uffds.append(uffd)


def a_uffd() -> int:
    fd = int(lib.syscall(lib.SYS_userfaultfd, ffi.cast("int", os.O_CLOEXEC | os.O_NONBLOCK)))
    assert fd >= 0
    return fd


def test_cancelled_while_no_descriptor_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task has arrived, and the restore is given up before its process is known."""

    def none(*_: object) -> Process:
        raise NoDescriptorError("none is free")

    monkeypatch.setattr(Process, "of_task", none)
    left, ours = Left(), socket.socketpair(socket.AF_UNIX)
    uffd = a_uffd()
    ours[0].sendall(struct.pack("=i", 7))
    socket.send_fds(ours[0], [b"\0"], [uffd])

    async def cancelled() -> None:
        server = Server({}, cast("Any", None), ServeOptions(True), cast("Guard", left), alone=False)
        ours[1].setblocking(False)
        with anyio.move_on_after(0.2):
            await server._receive_tasks(cast("Engine", None), Connection(ours[1], 0))
        server._for_forks.release()
        server._for_emergencies.release()

    anyio.run(cancelled)
    [received] = left.uffds
    assert os.readlink(f"/proc/self/fd/{received}") == "anon_inode:[userfaultfd]"
    for fd in (uffd, received, ours[0].detach(), ours[1].detach()):
        os.close(fd)


def test_memory_that_the_engine_refuses() -> None:
    """VMAs out of order."""

    class NoExtents:
        address = 0

        def __len__(self) -> int:
            return 0

    left, uffd = Left(), a_uffd()
    with Engine(None, cast("Guard", left)) as engine, pytest.raises(OSError, match="Invalid argument"):
        engine.add(uffd, TaskMemory(NoExtents(), [(8192, 12288), (0, 4096)]))
    assert left.uffds == [uffd]
    os.close(uffd)


def test_a_request_that_is_cancelled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The client goes while its directory is looked at."""
    fd = os.open(tmp_path, os.O_PATH)
    asked: list[int] = []

    class Client:
        user = User(0, 0)

        def take_fd(self) -> int:
            asked.append(fd)
            return fd

    async def cancelled() -> None:
        daemon = Service(
            cast("Any", None),
            cast("Any", None),
            Limits(1, 10_000),
            lambda: None,
            notifier=Notifier.take({}),
            exporter=None,
        )
        async with anyio.create_task_group() as group:
            check = service._check_inventory

            def slow(*args: Any) -> None:
                anyio.from_thread.run_sync(group.cancel_scope.cancel)
                check(*args)

            monkeypatch.setattr(service, "_check_inventory", slow)
            (tmp_path / "inventory.img").touch()
            request = Serve(Fd(), None, True, [], None, None, None, None, None)
            await daemon._serve(None, request, cast("Any", Client()))

    anyio.run(cancelled)
    assert asked == [fd]
    with pytest.raises(OSError, match="Bad file descriptor"):
        Descriptor.of(fd)


def test_a_descriptor_that_the_daemon_may_not_ask() -> None:
    """The file system of a user answers nobody else, also not root (fuse(4), without allow_other): EACCES."""
    fd = os.open("/", os.O_PATH)
    fds: list[Descriptor] = []

    class Client:
        user = User(4711, 4711)

        def take_fd(self) -> int:
            return fd

    def refused(_fd: int) -> os.stat_result:
        raise PermissionError(13, "Permission denied")

    request = Serve(Fd(), None, True, [], None, None, None, None, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fstat", refused)
        with pytest.raises(RequestError, match="can't be used: Permission denied"):
            service._asked(request, cast("Any", Client()), fds)
    assert not fds
    assert not os.path.lexists(f"/proc/self/fd/{fd}")


def test_a_directory_that_can_t_be_asked_again_is_closed(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_PATH)
    descriptor = Descriptor.of(fd)

    def refused(_fd: int) -> os.stat_result:
        raise PermissionError(13, "Permission denied")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fstat", refused)
        descriptor.close()
    assert not os.path.lexists(f"/proc/self/fd/{fd}")


def test_a_directory_is_no_page_server(tmp_path: Path) -> None:
    """Its descriptor would have two owners."""
    fd = os.open(tmp_path, os.O_PATH)
    command = Serve(str(tmp_path), None, True, [Fd()], None, None, None, None, None)
    with pytest.raises(RequestError, match="not a socket"):
        service._sources(command, lambda: fd)
    os.close(fd)
