"""Connections that fail in the middle: always LinkError."""

from __future__ import annotations

import errno
import socket
import ssl
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import anyio
import pytest

from lazypages.net.link import HopelessError, LinkError, connect
from lazypages.net.url import TcpServer, UnixServer
from tests.support.certificates import Authority


def test_no_descriptor_for_a_socket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = socket.socket

    def short(family: int = -1, *args: Any, **options: Any) -> socket.socket:
        if family == socket.AF_UNIX:
            raise OSError(errno.EMFILE, "Too many open files")
        return real(family, *args, **options)

    async def main() -> None:
        with monkeypatch.context() as patch:
            patch.setattr("lazypages.net.link.socket.socket", short)
            with pytest.raises(LinkError, match="Too many open files"):
                await connect(UnixServer(tmp_path / "none"), None)

    anyio.run(main)


def test_reset_before_the_handshake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Python's ssl asks for the peer's name, and finds out."""
    authority = Authority(tmp_path)
    files = authority.files(authority.issue("both"))

    def reset(*_: object, **__: object) -> NoReturn:
        raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")

    monkeypatch.setattr(ssl.SSLContext, "wrap_socket", reset)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = TcpServer("127.0.0.1", listener.getsockname()[1], tls=True)
        with pytest.raises(LinkError, match="reset"):
            anyio.run(partial(connect, address, files))
        accepted, _ = listener.accept()
        with accepted:
            accepted.settimeout(30)
            assert accepted.recv(1) == b""  # it was closed


@pytest.mark.parametrize(
    ("error", "hopeless"),
    [
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), True),
        (socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"), False),
        (UnicodeError("label too long"), True),
    ],
)
def test_names_that_cannot_be_resolved(
    error: Exception, hopeless: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name server that is away may come back; a name that does not exist stays away."""

    async def fail(*_: object, **__: object) -> NoReturn:
        raise error

    monkeypatch.setattr("lazypages.net.link.anyio.getaddrinfo", fail)
    with pytest.raises(LinkError, match="cannot resolve node: ") as raised:
        anyio.run(connect, TcpServer("node", 1), None)
    assert isinstance(raised.value, HopelessError) is hopeless
