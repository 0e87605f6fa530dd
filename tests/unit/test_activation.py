"""The socket that systemd passes: which descriptors, and of which kind."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from lazypages.cli.activation import ActivationError, Passed, listener_of, name_of, take_passed


@pytest.mark.parametrize(
    ("environ", "passed"),
    [
        ({}, []),
        ({"LISTEN_FDS": "1"}, []),  # for whom?
        ({"LISTEN_PID": "8", "LISTEN_FDS": "1"}, []),  # for the process that has started us
        ({"LISTEN_PID": "7"}, []),
        ({"LISTEN_PID": "7", "LISTEN_FDS": "0"}, []),
        ({"LISTEN_PID": "7", "LISTEN_FDS": "1"}, [(3, "unknown")]),
        ({"LISTEN_PID": "7", "LISTEN_FDS": "1", "LISTEN_FDNAMES": "x.socket"}, [(3, "x.socket")]),
        ({"LISTEN_PID": "7", "LISTEN_FDS": "2", "LISTEN_FDNAMES": "a:b"}, [(3, "a"), (4, "b")]),
        ({"LISTEN_PID": "7", "LISTEN_FDS": "2", "LISTEN_FDNAMES": "a"}, [(3, "a"), (4, "unknown")]),
    ],
)
def test_environment(environ: dict[str, str], passed: list[tuple[int, str]]) -> None:
    environ["HOME"] = "/"
    assert list(take_passed(environ, 7)) == passed
    assert environ == {"HOME": "/"}


def test_environment_that_is_wrong() -> None:
    with pytest.raises(ActivationError, match="LISTEN_FDS=x: not a number"):
        take_passed({"LISTEN_PID": "7", "LISTEN_FDS": "x"}, 7)


def test_the_right_kind(tmp_path: Path) -> None:
    for address, name in (
        (str(tmp_path / "s"), str(tmp_path / "s")),
        (f"\0lazypages-{os.getpid()}", f"@lazypages-{os.getpid()}"),
    ):
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address)
            listener.listen()
            os.set_inheritable(listener.fileno(), True)
            with listener_of([Passed(listener.detach(), "x")]) or pytest.fail("none") as taken:
                assert name_of(taken) == name
                assert not taken.get_inheritable()
    assert listener_of([]) is None


def test_wrong_kinds(tmp_path: Path) -> None:
    def refused(fd: int) -> str:
        with pytest.raises(ActivationError) as caught:
            listener_of([Passed(fd, "x.socket")])
        assert "x.socket" in str(caught.value)
        return str(caught.value)

    assert "is not a unix socket" in refused(socket.socket(socket.AF_INET).detach())
    assert "is not a stream socket" in refused(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).detach())
    assert "does not listen: its .socket unit needs ListenStream= with a path, and Accept=no" in refused(
        socket.socket(socket.AF_UNIX).detach()
    )
    file = os.open(tmp_path, os.O_RDONLY)
    try:
        assert "is not a socket" in refused(file)
    finally:
        os.close(file)
    assert "Bad file descriptor" in refused(file)
    with pytest.raises(ActivationError, match=r"2 descriptors \(a, b\): one ListenStream= is needed"):
        listener_of([Passed(3, "a"), Passed(4, "b")])
