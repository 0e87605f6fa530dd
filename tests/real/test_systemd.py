"""A service manager starts the daemon: its messages, its watchdog, and a socket that it passes (docs/systemd.md).

tests/kernels/test_systemd.py has the real one.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import pytest

from lazypages.notify import address_of
from lazypages.resident.client import Client
from tests.support.blocked import sleeps_in, threads
from tests.support.fake import Restored, served_tasks
from tests.support.guard_processes import KILLED, wait_for_their_end
from tests.support.processes import Server, nothing_left, wait_for
from tests.support.resident import LAZYPAGES, Daemon, connect, restored

UNITS = Path(__file__).parents[2] / "packaging" / "systemd"

EPOLL = ("ep_poll", "do_epoll_wait")
PTRACE_DETACH, PTRACE_SEIZE, PTRACE_INTERRUPT, WALL = 17, 0x4206, 0x4207, 0x40000000


class Manager:
    """Listens as systemd does. Has all messages in `told`."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.told: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address_of(address))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def listen(self) -> list[str]:
        while True:
            try:
                self.told.append(self._socket.recv(4096, socket.MSG_DONTWAIT).decode())
            except BlockingIOError:
                return self.told

    def wait_for(self, text: str, times: int = 1) -> None:
        wait_for(f"{times} times {text}", lambda: self.listen().count(text) >= times)


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    """Of all daemons that are started here."""
    with Manager(f"@lazypages-{os.getpid()}-{tmp_path.name}") as found:
        monkeypatch.setenv("NOTIFY_SOCKET", found.address)
        yield found


def check(tasks: Restored) -> None:
    tasks.say("check")
    assert set(tasks.statuses()) == {0}


@contextmanager
def started(folder: Path) -> Iterator[Daemon]:
    with nothing_left(), Daemon(folder) as resident:
        resident.wait_ready()
        yield resident


def test_daemon(manager: Manager, restored_program: Path, tmp_path: Path) -> None:
    """Readiness, what is missing, the beginning of the end."""
    with started(tmp_path) as resident:
        manager.wait_for("READY=1")
        manager.wait_for("STATUS=no restore")
        with restored(tmp_path / "images", restored_program, 2, 50) as tasks:
            resident.serve(tmp_path / "images", background=False)
            connect(tasks, tmp_path / "images")
            manager.wait_for("STATUS=1 restore, 2 tasks: 100 pages (400.0 KiB) to go")
            assert "STOPPING=1" not in manager.told
            resident.signal(signal.SIGTERM)
            check(tasks)
        assert resident.wait() == 0
        assert "STOPPING=1" in manager.listen()
        assert manager.told[0] == "READY=1"


@pytest.mark.slow
def test_serve(manager: Manager, restored_program: Path, tmp_path: Path) -> None:
    with served_tasks(restored_program, tmp_path, 1, 64, "--no-background") as (tasks, server):
        manager.wait_for("READY=1")
        manager.wait_for("STATUS=serving 1 task: 64 pages (256.0 KiB) to go")
        assert "STOPPING=1" not in manager.told
        check(tasks)
        assert server.wait() == 0
        manager.wait_for("STOPPING=1")


@pytest.mark.slow
def test_who_else_is_ready(manager: Manager, restored_program: Path, tmp_path: Path) -> None:
    """The client of the daemon is, when a restore can be started; the service of CRIU's caller is not."""
    images = tmp_path / "images"
    with started(tmp_path) as resident, restored(images, restored_program, 1, 50):
        manager.wait_for("READY=1")
        via = [*LAZYPAGES, "serve", "--via", str(resident.socket), "-D", str(images)]
        with Server(via, output=tmp_path / "via.out") as client:
            client.wait_ready()
            manager.wait_for("READY=1", 2)
            client.signal(signal.SIGTERM)
            client.wait()
        shim = [sys.executable, "-m", "lazypages.cli.shim", "lazy-pages", "", "0", "/bin/false", "lazy-pages"]
        with Server([*shim, "-D", str(images)], output=tmp_path / "shim.out") as called:
            called.wait_ready()
            called.signal(signal.SIGTERM)
            called.wait()
        assert manager.listen().count("READY=1") == 2


@contextmanager
def stopped(thread: int) -> Iterator[None]:
    """A thread that makes no progress."""
    libc = ctypes.CDLL(None, use_errno=True)
    for request in (PTRACE_SEIZE, PTRACE_INTERRUPT):
        assert not libc.ptrace(request, thread, None, None), os.strerror(ctypes.get_errno())
    os.waitpid(thread, WALL)
    try:
        yield
    finally:
        libc.ptrace(PTRACE_DETACH, thread, None, None)


@pytest.mark.slow
def test_watchdog(
    manager: Manager, restored_program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is said while an engine's thread is stuck, though the event loop answers clients."""
    monkeypatch.setenv("WATCHDOG_USEC", "600000")
    with started(tmp_path) as resident:
        manager.wait_for("WATCHDOG=1", 3)  # without any restore
        with restored(tmp_path / "images", restored_program, 1, 50) as tasks:
            resident.serve(tmp_path / "images", background=False)
            connect(tasks, tmp_path / "images")
            wait_for("the restore's end", lambda: resident.status()[1]["state"] == "serving")
            manager.wait_for("WATCHDOG=1", manager.listen().count("WATCHDOG=1") + 3)
            others = [thread for thread in threads(resident.pid) if thread.name != str(resident.pid)]
            wait_for("the engine to wait", lambda: any(sleeps_in(thread, EPOLL) for thread in others))
            [engine] = [int(thread.name) for thread in others if sleeps_in(thread, EPOLL)]
            with stopped(engine):
                heard = manager.listen().count("WATCHDOG=1")
                for _ in range(20):
                    resident.status()
                    time.sleep(0.1)
                # the next look may still find its last round
                assert manager.listen().count("WATCHDOG=1") <= heard + 1
            manager.wait_for("WATCHDOG=1", heard + 3)
            check(tasks)


def activated(listener: socket.socket, output: Path, *options: str) -> Server:
    """The daemon as systemd starts it: with `listener` as descriptor 3, and its pid in the environment."""
    number = listener.fileno()
    start = f'LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=lazypages.socket exec "$@" 3<&{number} {number}<&-'
    command = ["bash", "-c", start, "bash", *LAZYPAGES, "daemon", *options]
    return Server(command, output=output, pass_fds=[number])


@contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    """systemd's end."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        yield listener


def test_socket_of_systemd_outlives_the_daemon(restored_program: Path, tmp_path: Path) -> None:
    """However the daemon ends: the next one serves a client that came between the two."""
    path = tmp_path / "systemd.socket"
    with nothing_left(), listening(path) as listener:
        with activated(listener, tmp_path / "1.out") as first:
            first.wait_ready()
            with restored(tmp_path / "images", restored_program, 2, 50) as tasks:
                with Client(path) as client:
                    client.request("serve", images=str(tmp_path / "images"), background=False)
                    connect(tasks, tmp_path / "images")
                    wait_for(
                        "the restore's end",
                        lambda: client.request("status")["restores"][0]["state"] == "serving",
                    )
                first.process.kill()
                assert tasks.statuses() == [KILLED] * 2
        wait_for_their_end()
        with Client(path) as between:
            between.send("status")
            with activated(listener, tmp_path / "2.out") as second:
                second.wait_ready()
                assert between.request("status")["pid"] == second.pid
                second.signal(signal.SIGTERM)
                assert second.wait() == 0
        assert path.is_socket()
        with activated(listener, tmp_path / "3.out") as third:
            third.wait_ready()
            with Client(path) as client:
                assert client.request("shutdown")["restores"] == 0
            assert third.wait() == 0
        assert path.is_socket()


@pytest.mark.slow
def test_what_systemd_passes_can_be_wrong(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams:
        datagrams.bind(str(tmp_path / "datagrams"))
        with activated(datagrams, tmp_path / "1.out") as server:
            assert server.wait() == 1
        assert (
            "lazypages: the socket that systemd has passed (lazypages.socket) is not a stream"
            in (tmp_path / "1.out").read_text()
        )
    with listening(tmp_path / "socket") as listener:
        with activated(listener, tmp_path / "2.out", "--socket", "/elsewhere") as server:
            assert server.wait() == 1
        assert "--socket /elsewhere: systemd has passed a socket already" in (tmp_path / "2.out").read_text()


def test_units_are_clean() -> None:
    """`systemd-analyze verify` has nothing to say about them, also not that there is no command."""
    command = Path(sys.executable).with_name("lazypages")
    script = (
        'mount -t tmpfs bin /usr/local/bin && ln -s "$0" /usr/local/bin/lazypages && '
        'exec systemd-analyze verify --man=no "$@"'
    )
    done = subprocess.run(
        [
            "unshare",
            "--mount",
            "sh",
            "-c",
            script,
            command,
            *UNITS.glob("*.service"),
            *UNITS.glob("*.socket"),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
