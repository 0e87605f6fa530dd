"""What the service manager is told: addresses, messages, and when it is not there."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from lazypages.notify import Notifier, NotifyError, address_of, message, watchdog_seconds


def test_addresses() -> None:
    assert address_of("/run/systemd/notify") == b"/run/systemd/notify"
    assert address_of("@some name") == b"\0some name"
    assert address_of("/run/\udcff") == b"/run/\xff"
    for wrong in ("relative", "@", "vsock:2:1234"):
        with pytest.raises(NotifyError, match="neither a path nor an abstract unix socket"):
            address_of(wrong)


def test_messages_have_one_line_for_each_field() -> None:
    assert message(READY="1") == b"READY=1"
    assert message(STATUS="two\nlines\x7f", READY="1") == b"STATUS=two lines \nREADY=1"
    assert message(STATUS="\udcff") == b"STATUS= "


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "1500000"}, 1.5),
        ({"WATCHDOG_USEC": "1500000", "WATCHDOG_PID": "7"}, 1.5),
        ({"WATCHDOG_USEC": "1500000", "WATCHDOG_PID": "8"}, None),  # of the process that has started us
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "²"}, None),
    ],
)
def test_watchdog(environ: dict[str, str], seconds: float | None) -> None:
    assert watchdog_seconds(environ, 7) == seconds


def test_the_environment_is_not_for_others() -> None:
    environ = {"NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": "5", "WATCHDOG_PID": str(os.getpid()), "HOME": "/"}
    notifier = Notifier.take(environ)
    assert notifier
    assert notifier.watchdog == 5e-6
    assert environ == {"HOME": "/"}


def test_nobody_listens() -> None:
    notifier = Notifier.take({"WATCHDOG_USEC": "5"})
    assert not notifier
    assert notifier.watchdog is None
    notifier.ready()
    notifier.status("x")
    notifier.stopping()
    notifier.alive()


@pytest.mark.parametrize("abstract", [True, False], ids=["abstract", "path"])
def test_messages_arrive(abstract: bool, tmp_path: Path) -> None:
    address = f"@lazypages-{os.getpid()}-{tmp_path.name}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address_of(address))
        manager.settimeout(10)
        notifier = Notifier(address)
        notifier.ready()
        notifier.status("a")
        notifier.status("a")
        notifier.stopping()
        notifier.stopping()
        notifier.alive()
        assert [manager.recv(100) for _ in range(4)] == [
            b"READY=1",
            b"STATUS=a",
            b"STOPPING=1",
            b"WATCHDOG=1",
        ]


def test_a_manager_that_is_gone_or_busy(tmp_path: Path) -> None:
    """Only readiness must be told. What found no room is said again."""
    notifier = Notifier(str(tmp_path / "notify"))
    with pytest.raises(NotifyError, match="notify: No such file"):
        notifier.ready()
    notifier.status("a")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        sent = 0
        while notifier._try(message(STATUS="filler")):
            sent += 1
        notifier.status("a")
        notifier.stopping()
        for _ in range(sent):
            manager.recv(100)
        notifier.status("a")
        notifier.stopping()
        manager.settimeout(10)
        assert [manager.recv(100) for _ in range(2)] == [b"STATUS=a", b"STOPPING=1"]
