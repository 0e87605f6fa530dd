"""The control socket, over real sockets, on every event loop."""

from __future__ import annotations

import fcntl
import os
import resource
import socket
import stat
import struct
import subprocess
import sys
import termios
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio import to_thread

from lazypages.control import listener as control_socket
from lazypages.control.descriptors import NoDescriptorError
from lazypages.control.handover import (
    FINISH,
    Connection,
    Event,
    RestoreFinished,
    TaskArrived,
    ZombieArrived,
    accept,
)
from lazypages.control.listener import SOCKET_NAME, ControlError, ControlSocket
from lazypages.engine._uffd import ffi, lib
from lazypages.loop.run import LOOPS

Run = Callable[..., Any]


@pytest.fixture(params=list(LOOPS))
def run(request: pytest.FixtureRequest) -> Run:
    """Runs a coroutine function on one of the event loops, with a time-out."""
    backend, options = LOOPS[request.param]

    def run(function: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        async def limited() -> Any:
            with anyio.fail_after(30):
                return await function(*args)

        return anyio.run(limited, backend=backend, backend_options=options)

    return run


@pytest.fixture
def control(tmp_path: Path) -> Iterator[ControlSocket]:
    with ControlSocket(tmp_path) as control:
        yield control


@pytest.fixture
def peer(control: ControlSocket) -> Iterator[socket.socket]:
    """A restorer, connected."""
    with connect(control.path) as peer:
        yield peer


def connect(path: Path) -> socket.socket:
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    peer.connect(str(path))
    return peer


def word(value: int) -> bytes:
    return struct.pack("=i", value)


def send_fds(peer: socket.socket, *fds: int) -> None:
    socket.send_fds(peer, [b"\0"], fds)


async def receive(control: ControlSocket) -> list[Event]:
    """All that the first connection has to say, until its end."""
    with await accept(control) as connection:
        return [event async for event in connection.events()]


async def fail(control: ControlSocket) -> tuple[list[Event], str]:
    """The events before the error, and what that says."""
    events: list[Event] = []
    with await accept(control) as connection:
        try:
            async for event in connection.events():
                events.append(event)  # noqa: PERF401 - what came before the error counts
        except ControlError as error:
            return events, str(error)
    pytest.fail(f"no error after {events}")


def open_fds() -> set[str]:
    """What fds of ours are, as links: compares before and after."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")
        except FileNotFoundError:  # the one of the listing
            continue
    return found


# The protocol.


def test_a_whole_restore(run: Run, control: ControlSocket, peer: socket.socket) -> None:
    reader, writer = os.pipe()
    peer.sendall(word(77))
    send_fds(peer, writer)
    peer.sendall(word(-78) + word(79))
    send_fds(peer, writer)
    peer.sendall(struct.pack("=I", FINISH))
    peer.close()
    os.close(writer)
    first, zombie, second, finished = run(receive, control)
    assert zombie == ZombieArrived(78)
    assert finished == RestoreFinished()
    for event, pid in ((first, 77), (second, 79)):
        assert isinstance(event, TaskArrived)
        assert (event.pid, event.real_pid) == (pid, os.getpid())
        assert not os.get_inheritable(event.uffd)
        os.write(event.uffd, b"x")  # it is what was sent
        os.close(event.uffd)
    assert os.read(reader, 8) == b"xx"
    assert os.read(reader, 8) == b""  # nobody holds another copy
    os.close(reader)


def test_the_finish_message_has_these_bytes() -> None:
    """docs/criu.md, "Control socket": on x86, 46 54 53 52."""
    assert struct.pack("=I", FINISH) == bytes.fromhex("46 54 53 52")


def unread(end: socket.socket) -> int:
    """How much of what was sent the other end has not received (unix(7), SIOCOUTQ)."""
    return int.from_bytes(fcntl.ioctl(end, termios.TIOCOUTQ, bytes(4)), sys.byteorder)


def test_messages_may_come_in_pieces(run: Run, control: ControlSocket, peer: socket.socket) -> None:
    """Byte by byte, each when the one before has been read: what follows a pid is never read with it."""
    reader, writer = os.pipe()

    async def send(data: bytes) -> None:
        for byte in data:
            peer.sendall(bytes([byte]))
            while unread(peer):
                await anyio.sleep(0.001)

    async def speak() -> None:
        await send(word(5))
        send_fds(peer, writer)
        await send(word(-6) + word(FINISH))
        peer.close()

    async def both() -> list[Event]:
        events: list[Event] = []
        async with anyio.create_task_group() as group:
            group.start_soon(speak)
            events += await receive(control)
        return events

    task, *others = run(both)
    assert isinstance(task, TaskArrived)
    assert task.pid == 5
    assert others == [ZombieArrived(6), RestoreFinished()]
    for fd in (task.uffd, reader, writer):
        os.close(fd)


def test_service_may_start_with_the_first_task(run: Run, control: ControlSocket, peer: socket.socket) -> None:
    """A task is told as soon as its uffd is there, while the restorer still holds the rest back."""
    reader, writer = os.pipe()

    async def first() -> Event:
        with await accept(control) as connection:
            async with aclosing(connection.events()) as events:
                return await anext(events)

    peer.sendall(word(5))
    send_fds(peer, writer)
    event = run(first)
    assert isinstance(event, TaskArrived)
    for fd in (event.uffd, reader, writer):
        os.close(fd)


def test_closed_without_a_word(run: Run, control: ControlSocket, peer: socket.socket) -> None:
    peer.close()
    assert run(receive, control) == []


def test_closed_before_the_finish(run: Run, control: ControlSocket, peer: socket.socket) -> None:
    """It is for the server to judge that the finish is missing."""
    peer.sendall(word(-5))
    peer.close()
    assert run(receive, control) == [ZombieArrived(5)]


def test_reset_by_a_killed_restorer(run: Run, control: ControlSocket) -> None:
    """A peer that goes away with unread data on its side resets the connection; that is an end as well."""

    async def receive_then_reset() -> list[Event]:
        caller = control.take()
        assert caller is not None
        caller[0].send(b"never read")
        peer.close()
        with Connection(*caller) as connection:
            return [event async for event in connection.events()]

    peer = connect(control.path)
    assert run(receive_then_reset) == []


@pytest.mark.parametrize(
    ("message", "what"),
    [
        (b"\x01\x00", "in the middle of a pid"),
        (word(0), "pid 0"),
        (word(5), "0 file descriptors for task 5"),
        (word(5) + b"\0", "0 file descriptors for task 5"),
    ],
    ids=["half a pid", "pid 0", "no fd, closed", "no fd, a byte"],
)
def test_broken_protocol(
    run: Run, control: ControlSocket, peer: socket.socket, message: bytes, what: str
) -> None:
    peer.sendall(word(-4) + message)
    peer.close()
    events, error = run(fail, control)
    assert events == [ZombieArrived(4)]
    assert what in error


def test_an_fd_where_a_pid_belongs(run: Run, control: ControlSocket, peer: socket.socket) -> None:
    before = open_fds()
    reader, writer = os.pipe()
    send_fds(peer, writer)
    peer.sendall(word(5))
    events, error = run(fail, control)
    assert events == []
    assert "where a pid belongs" in error
    os.close(writer)
    assert os.read(reader, 1) == b""  # the daemon has not kept it
    os.close(reader)
    assert len(open_fds() - before) == 0


def test_too_many_fds(run: Run, control: ControlSocket, peer: socket.socket) -> None:
    reader, writer = os.pipe()
    peer.sendall(word(5))
    send_fds(peer, writer, writer, writer)
    events, error = run(fail, control)
    assert events == []
    assert "3 file descriptors" in error
    os.close(writer)
    assert os.read(reader, 1) == b""
    os.close(reader)


def test_no_descriptor_is_free(control: ControlSocket, peer: socket.socket) -> None:
    """What has been sent stays where it is, for later."""
    reader, writer = os.pipe()
    peer.sendall(word(5))
    send_fds(peer, writer)
    peer.sendall(word(-6))
    os.close(writer)
    caller = control.take()
    assert caller
    with caller[0] as connection:
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        free = os.dup(reader)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, before[1]))
        try:
            for _ in range(2):
                with pytest.raises(NoDescriptorError):
                    control_socket.receive(connection, 5)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        first = control_socket.receive(connection, 4)
        assert (first.data, first.fds) == (word(5), [])
        data, (received,), sender = control_socket.receive(connection, 1)
        assert (data, sender) == (b"\0", os.getpid())
        os.write(received, b"x")
        os.close(received)
        assert control_socket.receive(connection, 4) == (word(-6), [], os.getpid())
    assert os.read(reader, 8) == b"x"
    assert os.read(reader, 8) == b""  # no other copy is left
    os.close(reader)


def test_a_probe_that_sends_nothing_hinders_nobody(run: Run, control: ControlSocket) -> None:
    """Somebody who looks whether the socket is alive, and goes, is not a restorer."""
    connect(control.path).close()
    with connect(control.path) as peer:
        peer.sendall(word(-5))

        async def both() -> list[list[Event]]:
            peer.shutdown(socket.SHUT_WR)
            return [await receive(control), await receive(control)]

        assert run(both) == [[], [ZombieArrived(5)]]


# Who may connect.


def test_who_has_called_and_was_not_heard_yet(control: ControlSocket) -> None:
    assert not control.has_caller()
    assert control.take() is None
    with connect(control.path):
        assert control.has_caller()
        caller = control.take()
        assert caller is not None
        connection, pid = caller
        assert pid == os.getpid()
        assert not control.has_caller()
        connection.close()


def test_only_its_owner_and_root_reach_it(control: ControlSocket) -> None:
    mode = control.path.stat().st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o600


def test_other_users_are_turned_away(run: Run, control: ControlSocket) -> None:
    """Even where permissions would let them in; the next one is served."""
    control.path.chmod(0o666)
    script = (
        "import os, socket, sys\n"
        "peer = socket.socket(socket.AF_UNIX)\n"
        "fd = os.open(sys.argv[1], os.O_PATH)\n"
        "os.setgid(65534), os.setuid(65534)\n"
        "peer.connect(f'/proc/self/fd/{fd}')\n"
        "try:\n"
        "    peer.sendall(bytes([251, 255, 255, 255]))\n"
        "    sys.exit(2 if peer.recv(1) else 0)\n"
        "except (BrokenPipeError, ConnectionResetError):\n"
        "    sys.exit(0)\n"
    )
    stranger = subprocess.Popen([sys.executable, "-c", script, str(control.path)])
    with stranger:

        async def serve() -> list[Event]:
            async with anyio.create_task_group() as group:
                group.start_soon(befriend)
                return await receive(control)

        async def befriend() -> None:
            await to_thread.run_sync(stranger.wait)
            peer = connect(control.path)
            peer.sendall(word(-7))
            peer.close()

        assert run(serve) == [ZombieArrived(7)]
    assert stranger.returncode == 0


def test_sender_and_connector_may_be_two_processes(
    run: Run, control: ControlSocket, peer: socket.socket
) -> None:
    """CRIU's restore connects in its main process, then each task sends its own uffd over that connection."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        peer.sendall(word(5))
        send_fds(peer, writer)
        os._exit(0)
    os.waitpid(child, 0)
    peer.close()
    (task,) = run(receive, control)
    assert isinstance(task, TaskArrived)
    assert task.real_pid in {0, child}  # 0: it is gone already
    for fd in (task.uffd, reader, writer):
        os.close(fd)


# The socket file.


def test_a_live_socket_is_respected(control: ControlSocket, tmp_path: Path) -> None:
    with pytest.raises(ControlError, match="another daemon"):
        ControlSocket(tmp_path)
    connect(control.path).close()  # the first one is still there


def test_asking_takes_no_connection_from_a_live_daemon(tmp_path: Path) -> None:
    """CRIU's daemon accepts one connection only: whoever asks whether it lives must not be that one."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / SOCKET_NAME))
        listener.listen(1)
        with pytest.raises(ControlError, match="another daemon"):
            ControlSocket(tmp_path)
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / SOCKET_NAME))
    with ControlSocket(tmp_path) as control:
        connect(control.path).close()
    assert not (tmp_path / SOCKET_NAME).exists()


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_what_is_no_socket_is_left_alone(tmp_path: Path, kind: str) -> None:
    path = tmp_path / SOCKET_NAME
    if kind == "file":
        path.write_text("precious")
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("/dev/null")
    before = path.lstat()
    with pytest.raises(ControlError, match="not a socket"):
        ControlSocket(tmp_path)
    assert path.lstat().st_ino == before.st_ino


def test_a_successor_s_socket_is_not_removed(tmp_path: Path) -> None:
    """Whoever has taken the name meanwhile keeps it."""
    with ControlSocket(tmp_path) as first:
        first.path.unlink()
        second = ControlSocket(tmp_path)
    assert (tmp_path / SOCKET_NAME).exists()
    second.close()
    assert not (tmp_path / SOCKET_NAME).exists()


def test_a_long_path_is_no_problem(tmp_path: Path) -> None:
    """sun_path holds 107 bytes; CRIU binds a relative name."""
    folder = tmp_path / ("deep" * 30) / ("deeper" * 20)
    folder.mkdir(parents=True)
    with ControlSocket(folder) as control:
        assert control.path.is_socket()
    assert not control.path.exists()


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ControlError, match="nowhere"):
        ControlSocket(tmp_path / "nowhere")


def open_numbers() -> set[int]:
    return {fd for fd in map(int, os.listdir("/proc/self/fd")) if os.path.lexists(f"/proc/self/fd/{fd}")}


@pytest.mark.parametrize("taken", [False, True])
def test_a_uffd_that_nobody_has_read_stays_open(tmp_path: Path, taken: bool) -> None:
    """Closed with the connection, or with the socket, it would let its task run on zeros. What else there is goes."""
    uffd = int(lib.syscall(lib.SYS_userfaultfd, ffi.cast("int", os.O_CLOEXEC | os.O_NONBLOCK)))
    assert uffd >= 0, os.strerror(ffi.errno)
    reader, writer = os.pipe()
    with ControlSocket(tmp_path) as control, connect(control.path) as peer:
        peer.sendall(word(5))
        send_fds(peer, uffd, writer)
        before = open_numbers()
        if taken:
            caller = control.take()
            assert caller
            with Connection(*caller):
                pass
        control.close()
        (held,) = open_numbers() - before
        assert os.readlink(f"/proc/self/fd/{held}") == "anon_inode:[userfaultfd]"
        for fd in (held, uffd, writer):
            os.close(fd)
    assert os.read(reader, 1) == b""
    os.close(reader)


@pytest.mark.parametrize("taken", [False, True])
def test_closed_as_soon_as_a_descriptor_is_free(tmp_path: Path, taken: bool) -> None:
    """While no number is free for a uffd in its queue, a connection stays open, and so does the socket."""
    uffd = int(lib.syscall(lib.SYS_userfaultfd, ffi.cast("int", os.O_CLOEXEC | os.O_NONBLOCK)))
    before, left = open_fds(), len(control_socket.left_open)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ControlSocket(tmp_path) as control, connect(control.path) as peer:
        peer.sendall(word(5))
        send_fds(peer, uffd)
        caller = control.take() if taken else None
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        try:
            if caller:
                control_socket.hang_up(caller[0])
            control.close()
            control_socket.close_unread()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert len(control_socket.left_open) == left
        control_socket.close_unread()
        assert len(control_socket.left_open) == left + 1
        os.close(control_socket.left_open.pop())
    assert open_fds() == before
    os.close(uffd)


def test_nothing_stays_open(tmp_path: Path) -> None:
    before = open_fds()
    with ControlSocket(tmp_path), pytest.raises(ControlError):
        ControlSocket(tmp_path)
    assert open_fds() == before
