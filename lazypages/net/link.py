"""A connected stream socket for an event loop, plain or TLS, that receives into the caller's memory."""

from __future__ import annotations

import os
import socket
import ssl
from contextlib import suppress
from typing import Final

import anyio
import anyio.lowlevel

from lazypages.errors import LazyPagesError
from lazypages.net.tls import TlsFiles
from lazypages.net.tls_errors import explain, explain_handshake, is_final, is_refusal
from lazypages.net.url import ConnectedSocket, PageServerAddress, TcpServer, UnixServer

# With these the kernel detects a silent dead peer after about 30 s (tcp(7)); times in s.
KEEPALIVE: Final = {socket.TCP_KEEPIDLE: 10, socket.TCP_KEEPINTVL: 5, socket.TCP_KEEPCNT: 4}
#: getaddrinfo(3): the name does not exist. Other errors may be temporary.
NO_SUCH_NAME: Final = {socket.EAI_NONAME, socket.EAI_NODATA}
USER_TIMEOUT: Final = 30_000  # ms that sent bytes may stay unacknowledged


def tune(sock: socket.socket) -> None:
    """Has a TCP socket send small messages at once, and detect a silent dead peer. Raises OSError."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEPALIVE.items():
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


def tune_client(sock: socket.socket) -> None:
    """As `tune`, and also detects a dead peer while sent bytes are not acknowledged. Raises OSError."""
    tune(sock)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT)


class LinkError(LazyPagesError):
    """The connection failed or was lost."""


class ClosedError(LinkError):
    """The other side has closed or reset the connection."""


class HopelessError(LinkError):
    """The same attempt would fail again: the user has to change something first."""


class Link:
    """A connection made by `connect`. send and recv_into never block."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock

    def recv_into(self, room: memoryview) -> int | None:
        """Receives; returns the number of bytes, 0 at the end of the stream, None if nothing is there yet.

        Raises LinkError.
        """
        try:
            return self._sock.recv_into(room)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return None
        except ssl.SSLZeroReturnError:
            return 0
        except OSError as error:
            raise _lost(error) from None

    def send(self, data: bytes | bytearray | memoryview) -> int:
        """Sends a first part of `data`; returns its number of bytes, 0 if the socket is full. Raises LinkError."""
        try:
            return self._sock.send(data)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return 0
        except OSError as error:
            raise _lost(error) from None

    def fileno(self) -> int:
        return self._sock.fileno()

    @property
    def encrypted(self) -> bool:
        """Whether the link is TLS: the bytes of the file descriptor are encrypted."""
        return isinstance(self._sock, ssl.SSLSocket)

    @property
    def pending(self) -> bool:
        """Whether TLS has buffered data: recv_into returns it although the file descriptor may not be readable."""
        return isinstance(self._sock, ssl.SSLSocket) and self._sock.pending() > 0

    @property
    def within_host(self) -> bool:
        """Whether both ends have the same address."""
        try:
            return (
                self._sock.family == socket.AF_UNIX
                or self._sock.getpeername()[0] == self._sock.getsockname()[0]
            )
        except OSError:
            return False  # the peer has closed; the next recv_into reports it

    async def wait_readable(self) -> None:
        """Waits until recv_into has something to return."""
        if self.pending:
            await anyio.lowlevel.checkpoint()
        else:
            await anyio.wait_readable(self._sock)

    async def wait_writable(self) -> None:
        """Waits until send accepts data."""
        await anyio.wait_writable(self._sock)

    def close(self) -> None:
        """Closes the connection; with TLS, sends close_notify first. No caller may be waiting for the link."""
        if isinstance(self._sock, ssl.SSLSocket):
            with suppress(OSError, ValueError):
                self._sock.unwrap()
        self._sock.close()

    def round_trip(self) -> float | None:
        """The kernel's smoothed round trip in seconds, measured since the handshake; None if the link is not TCP."""
        with suppress(OSError):
            info = self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
            return int.from_bytes(info[68:72], "little") / 1e6  # struct tcp_info, tcpi_rtt
        return None


async def connect(address: PageServerAddress, tls: TlsFiles | None) -> Link:
    """Connects to `address`. `tls` is needed for tls:// only. Raises LinkError (for any OSError), TlsError.

    HopelessError: the name does not exist, or the other side refuses the certificate or does not use TLS.

    Tries the addresses of a name one after the other: a server of CRIU's accepts a single connection in its life.
    """
    sock = await _connect(address)
    try:
        if isinstance(address, TcpServer) and address.tls:
            sock = await _start_tls(sock, address.host, tls or TlsFiles())
        return Link(sock)
    except OSError as error:  # such as a reset before the handshake
        sock.close()
        raise _lost(error) from None
    except BaseException:
        sock.close()
        raise


async def _connect(address: PageServerAddress) -> socket.socket:
    match address:
        case UnixServer(path):
            return await _try(socket.AF_UNIX, str(path))
        case ConnectedSocket(fd):
            try:
                sock = socket.socket(fileno=fd)
                sock.getpeername()
            except OSError as error:
                raise HopelessError(f"not a connected socket: {error.strerror}") from None
            return sock
        case TcpServer(host, port):
            try:
                found = await anyio.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            except socket.gaierror as error:
                kind = HopelessError if error.errno in NO_SUCH_NAME else LinkError
                raise kind(f"cannot resolve {host}: {error.strerror}") from None
            except UnicodeError:
                raise HopelessError(f"cannot resolve {host}: not a host name") from None
            except OSError as error:
                raise _lost(error) from None
            failure = LinkError("no address")
            for family, _, _, _, where in found:
                try:
                    return await _try(family, where)
                except LinkError as error:
                    failure = error
            raise failure


async def _try(family: int, where: object) -> socket.socket:
    try:
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    except OSError as error:
        raise _lost(error) from None
    try:
        sock.setblocking(False)
        if family != socket.AF_UNIX:
            tune_client(sock)
        try:
            sock.connect(where)  # type: ignore[arg-type]
        except BlockingIOError:
            await anyio.wait_writable(sock)
            number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if number:
                raise OSError(number, os.strerror(number)) from None
    except OSError as error:
        sock.close()
        raise _lost(error) from None
    except BaseException:
        sock.close()
        raise
    return sock


async def _start_tls(sock: socket.socket, host: str, files: TlsFiles) -> ssl.SSLSocket:
    secure = files.client_context().wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
    try:
        while True:
            try:
                secure.do_handshake()
                break
            except ssl.SSLWantReadError:
                await anyio.wait_readable(secure)
            except ssl.SSLWantWriteError:
                await anyio.wait_writable(secure)
        files.verify_server(secure.getpeercert(), host)
    except OSError as error:
        secure.close()
        kind = HopelessError if is_final(error) else LinkError
        raise kind(explain_handshake(error, "server")) from None
    except BaseException:
        secure.close()
        raise
    return secure


def _lost(error: OSError) -> LinkError:
    """The error for a failed connection."""
    closed = isinstance(error, ConnectionResetError | BrokenPipeError | ssl.SSLEOFError)
    kind = HopelessError if is_refusal(error) else ClosedError if closed else LinkError
    return kind(explain(error, "server"))
