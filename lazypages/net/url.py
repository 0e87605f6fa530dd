"""Sources as text: ``local:DIR``, ``tcp://HOST:PORT``, ``tls://HOST:PORT``, ``unix:PATH``, ``fd:N``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from lazypages.errors import LazyPagesError
from lazypages.net.names import FORMS


class SourceError(LazyPagesError):
    """The text is not a source."""


@dataclass(frozen=True, slots=True)
class LocalSource:
    """An image directory on this machine."""

    directory: Path

    def __str__(self) -> str:
        return f"local:{self.directory}"


@dataclass(frozen=True, slots=True)
class TcpServer:
    """A page server at `host` (a name, an IPv4 or an IPv6 address without brackets) and `port`."""

    host: str
    port: int
    tls: bool = False

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'tls' if self.tls else 'tcp'}://{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class UnixServer:
    """A page server at a unix stream socket."""

    path: Path

    def __str__(self) -> str:
        return f"unix:{self.path}"


@dataclass(frozen=True, slots=True)
class ConnectedSocket:
    """An inherited stream socket that is connected to a page server (`--ps-socket`). It can't be reconnected."""

    fd: int

    def __str__(self) -> str:
        return f"fd:{self.fd}"


PageServerAddress = TcpServer | UnixServer | ConnectedSocket
Source = LocalSource | PageServerAddress


def parse_source(text: str) -> Source:
    """The source that `text` names. Raises SourceError."""
    scheme, colon, rest = text.partition(":")
    if colon and rest:
        if scheme == "local":
            return LocalSource(Path(rest))
        if scheme == "unix":
            return UnixServer(Path(rest))
        if scheme == "fd" and rest.isascii() and rest.isdigit():
            return ConnectedSocket(int(rest))
        if scheme in {"tcp", "tls"} and rest.startswith("//"):
            return _tcp(text, tls=scheme == "tls")
    raise SourceError(f"{text!r} is not a source: {FORMS}")


def _tcp(text: str, *, tls: bool) -> TcpServer:
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise SourceError(f"{text!r} is not a source: {error}") from None
    if not host or not port or parts.path or parts.query or parts.fragment or parts.username is not None:
        raise SourceError(f"{text!r} is not a source: expected {parts.scheme}://HOST:PORT")
    return TcpServer(host, port, tls)
