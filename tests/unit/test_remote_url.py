"""Sources as text, and the names in a certificate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lazypages.net.tls import TlsError, TlsFiles
from lazypages.net.url import (
    ConnectedSocket,
    LocalSource,
    Source,
    SourceError,
    TcpServer,
    UnixServer,
    parse_source,
)


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("local:/var/ckpt", LocalSource(Path("/var/ckpt"))),
        ("tcp://127.0.0.1:27000", TcpServer("127.0.0.1", 27000)),
        ("tcp://[::1]:27000", TcpServer("::1", 27000)),
        ("tls://host.example:1", TcpServer("host.example", 1, tls=True)),
        ("unix:/run/pages", UnixServer(Path("/run/pages"))),
        ("fd:7", ConnectedSocket(7)),
    ],
)
def test_sources(text: str, source: Source) -> None:
    assert parse_source(text) == source
    assert str(source) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "tcp:",
        "tcp://",
        "tcp://host",
        "tcp://:5",
        "tcp://host:0",
        "tcp://host:70000",
        "tcp://host:x",
        "tcp://host:5/path",
        "tcp://me@host:5",
        "tcp:host:5",
        "tcp://[::1:5",
        "http://host:5",
        "fd:x",
        "fd:-1",
        "local:",
        "/var/ckpt",
    ],
)
def test_no_sources(text: str) -> None:
    with pytest.raises(SourceError, match="is not a source"):
        parse_source(text)


def certificate(*alternatives: tuple[str, str], common: str = "node") -> dict[str, Any]:
    return {"subject": ((("commonName", common),),), "subjectAltName": alternatives}


@pytest.mark.parametrize(
    ("shown", "address"),
    [
        (certificate(("DNS", "node.example")), "node.example"),
        (certificate(("DNS", "node.example")), "NODE.example."),
        (certificate(("DNS", "*.example.org")), "node.example.org"),
        (certificate(("DNS", "a"), ("IP Address", "10.0.0.1")), "10.0.0.1"),
        (certificate(("IP Address", "0:0:0:0:0:0:0:1")), "::1"),
        (certificate(common="10.0.0.1"), "10.0.0.1"),
        (certificate(common="node"), "node"),
    ],
)
def test_certificate_names_the_address(shown: dict[str, Any], address: str) -> None:
    TlsFiles().verify_server(shown, address)


@pytest.mark.parametrize(
    ("shown", "address"),
    [
        (None, "node"),
        ({}, "node"),
        (certificate(("DNS", "other"), common="node"), "node"),  # a better name rules the common one out
        (certificate(("DNS", "*.example.org")), "example.org"),
        (certificate(("DNS", "*.example.org")), "a.b.example.org"),
        (certificate(("DNS", "*.org")), "example.org"),
        (certificate(("DNS", "*")), "node"),
        (certificate(("IP Address", "10.0.0.1")), "10.0.0.2"),
        (certificate(("IP Address", "10.0.0.1")), "node"),
        (certificate(("DNS", "*.0.0.1")), "10.0.0.1"),
    ],
)
def test_certificate_for_somebody_else(shown: dict[str, Any] | None, address: str) -> None:
    with pytest.raises(TlsError, match="not for"):
        TlsFiles().verify_server(shown, address)
    TlsFiles(check_name=False).verify_server(shown, address)


def test_which_clients_need_a_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A certificate of our own authority needs none; one of the system's authorities must name the server's address."""
    other = certificate(("DNS", "other"))
    TlsFiles(cacert=Path("ca")).verify_client(other, "10.0.0.1")
    monkeypatch.setattr("lazypages.net.tls.DEFAULT_CACERT", tmp_path / "cacert.pem")
    with pytest.raises(TlsError, match=r"is for other, not for 10\.0\.0\.1, and an authority of the system"):
        TlsFiles().verify_client(other, "10.0.0.1")
    TlsFiles().verify_client(certificate(("IP Address", "10.0.0.1")), "10.0.0.1")
    TlsFiles().verify_client(other, None)
    TlsFiles(check_name=False).verify_client(other, "10.0.0.1")
    (tmp_path / "cacert.pem").touch()  # CRIU's default file is our own authority, too
    TlsFiles().verify_client(other, "10.0.0.1")
