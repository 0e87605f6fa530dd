"""Listening sockets of page servers: creating them, accepting clients, and the TLS handshake."""

from __future__ import annotations

import errno
import ipaddress
import logging
import os
import select
import selectors
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Self

from lazypages.errors import LazyPagesError
from lazypages.net.link import tune
from lazypages.net.peers import StrangerError, check_peer, get_ready
from lazypages.net.tls import TlsError, TlsFiles
from lazypages.net.tls_errors import NO_TLS, NO_TLS_ALERT, explain_handshake, reason_of

log = logging.getLogger("lazypages")

LOOPBACK: Final = "127.0.0.1"
UNIX_PREFIX: Final = "unix:"
HANDSHAKE_TIMEOUT: float = 30.0  # s
BACKLOG: Final = 64
REFUSAL_TIMEOUT: Final = 1.0  # s for a refused client to close its end
RETRY: Final = 0.5  # s until accepting is tried again after a failure


class ListenError(LazyPagesError):
    """The server can't listen at this address, or must not."""


def listen(address: str | None, port: int, *, insecure: bool, tls: bool) -> tuple[socket.socket, str]:
    """Listen at a host name, an IPv4 or IPv6 address, or unix:PATH; return the socket and its name for messages.

    `address` None: loopback. `port` 0: the kernel chooses one. Raises ListenError, also for an address that other hosts
    can reach, unless `tls` or `insecure` is given; `insecure` logs a warning.
    """
    if address is not None and address.startswith(UNIX_PREFIX):
        return _listen_unix(Path(address.removeprefix(UNIX_PREFIX)))
    host = LOOPBACK if address is None else address
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ListenError(f"--address {host}: {error.strerror}") from None
    except UnicodeError:
        raise ListenError(f"--address {host}: not a host name") from None
    family, _, _, _, where = found[0]
    loopback = ipaddress.ip_address(str(where[0]).partition("%")[0]).is_loopback
    if not (loopback or insecure or tls):
        raise ListenError(
            f"--address {host}: every host that reaches it could read or write the memory of tasks: "
            "use --tls or --insecure"
        )
    get_ready()
    try:
        sock = listen_tcp(family, where)
    except OSError as error:
        raise ListenError(f"cannot listen at {host} port {port}: {error.strerror}") from None
    if insecure and not (loopback or tls):
        log.warning("--insecure: every host that reaches %s can read or write the memory of tasks", host)
    bound, number = sock.getsockname()[:2]
    return sock, f"[{bound}]:{number}" if family == socket.AF_INET6 else f"{bound}:{number}"


def listen_tcp(family: int, where: Any) -> socket.socket:
    """A socket that listens at an address of getaddrinfo(). Raises OSError."""
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(where)
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


@contextmanager
def removed_afterwards(path: Path) -> Iterator[None]:
    """The file of a unix socket that has just been made: it is removed on exit, if it is still this one."""
    made = path.lstat()
    try:
        yield
    finally:
        with suppress(OSError):
            found = path.lstat()
            if (found.st_dev, found.st_ino) == (made.st_dev, made.st_ino):
                path.unlink()


def _listen_unix(path: Path) -> tuple[socket.socket, str]:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        if path.is_socket() and not _is_alive(path):
            path.unlink()
        sock.bind(str(path))
        path.chmod(0o600)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise ListenError(f"cannot listen at {UNIX_PREFIX}{path}: {error.strerror or error}") from None
    return sock, f"{UNIX_PREFIX}{path}"


def _is_alive(path: Path) -> bool:
    """Whether a process listens at the socket. SOCK_DGRAM, because some servers accept one connection only."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(str(path))
        except OSError as error:
            return error.errno == errno.EPROTOTYPE
        return True


def connected_socket(fd: int) -> socket.socket:
    """The socket of --ps-socket. Raises ListenError."""
    try:
        sock = socket.socket(fileno=fd)
        sock.getpeername()
        sock.setblocking(True)
    except OSError as error:
        raise ListenError(f"--ps-socket {fd}: not a connected socket: {error.strerror}") from None
    return sock


def prepare(sock: socket.socket, tls: TlsFiles | None, name: str | None, *, strangers: bool) -> socket.socket:
    """Check an accepted socket and prepare it for reading; with `tls`, after the handshake.

    `name`: the server's --address, or None (TlsFiles.verify_client). `strangers`: whether other users of this host may
    connect; with TLS the certificate decides.

    Raises TlsError, StrangerError; the socket is closed then.
    """
    if sock.family != socket.AF_UNIX:
        with suppress(OSError):  # if the client has disconnected, the first read reports it
            tune(sock)
    if tls is None:
        if not strangers:
            try:
                check_peer(sock)
            except StrangerError:
                sock.close()
                raise
        return sock
    sock.settimeout(HANDSHAKE_TIMEOUT)  # for the whole handshake
    try:
        secure = tls.server_context().wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
    except OSError as error:  # the client has disconnected
        sock.close()
        raise TlsError(explain_handshake(error, "client")) from None
    try:
        secure.do_handshake()
    except TimeoutError:
        secure.close()
        raise TlsError(f"TLS: no handshake within {HANDSHAKE_TIMEOUT:g} s") from None
    except OSError as error:
        _refuse(secure, b"" if reason_of(error) not in NO_TLS else NO_TLS_ALERT)
        raise TlsError(explain_handshake(error, "client")) from None
    try:
        tls.verify_client(secure.getpeercert(), name)
    except TlsError:
        secure.close()
        raise
    secure.settimeout(None)
    return secure


def _refuse(secure: ssl.SSLSocket, alert: bytes) -> None:
    """Close a connection whose handshake has failed so that the client receives the alert: OpenSSL's, or this one.

    Bytes that are not read would make close() send a reset, which may overtake the alert.
    """
    with socket.socket(fileno=secure.detach()) as sock, suppress(OSError):
        sock.settimeout(REFUSAL_TIMEOUT)
        sock.sendall(alert)
        sock.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + REFUSAL_TIMEOUT
        while time.monotonic() < deadline and sock.recv(1 << 16):
            pass


def hang_up(sock: socket.socket, *, clean: bool) -> None:
    """Close a connection. After a clean end of a TLS connection, exchange close_notify first."""
    if clean and isinstance(sock, ssl.SSLSocket):
        with suppress(OSError, ValueError):
            sock.settimeout(1.0)
            sock.unwrap()
    sock.close()


@contextmanager
def until_signalled() -> Iterator[int]:
    """A file descriptor that becomes readable when SIGINT or SIGTERM arrives."""
    readable, writable = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    wakeup = signal.set_wakeup_fd(writable)
    for number in before:
        signal.signal(number, lambda *_: None)
    try:
        yield readable
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        os.close(readable)
        os.close(writable)


def accept_all(
    listener: socket.socket,
    stop: int,
    handle: Callable[[socket.socket, str], object],
    *,
    last_words: float = 0.0,
) -> None:
    """Run `handle(socket, name)` in a thread for each client until `stop` is readable; then shut down all connections.

    `handle` closes its socket. `last_words`: seconds for which `handle` may still send after that; it receives no more.
    """
    listener.setblocking(False)
    clients: dict[threading.Thread, socket.socket] = {}
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        selector.register(stop, selectors.EVENT_READ)
        while not any(key.fd == stop for key, _ in selector.select()):
            for ended in [thread for thread in clients if not thread.is_alive()]:
                del clients[ended]
            try:
                with suppress(BlockingIOError, ConnectionAbortedError):  # the client has disconnected already
                    reserve = os.dup(
                        stop
                    )  # a client needs two descriptors: fail before accept if one is missing
                    try:
                        accepted = listener.accept()
                    finally:
                        os.close(reserve)
                    _start_client(*accepted, handle, clients)
            except (OSError, RuntimeError) as error:  # no descriptor or no thread is free
                log.warning("cannot accept a client: %s", getattr(error, "strerror", None) or error)
                select.select([stop], [], [], RETRY)
    if last_words:
        _shut(clients, socket.SHUT_RD)
        deadline = time.monotonic() + last_words
        for thread in clients:
            thread.join(max(0.0, deadline - time.monotonic()))
    _shut(clients, socket.SHUT_RDWR)
    for thread in clients:
        thread.join()


def _shut(clients: dict[threading.Thread, socket.socket], how: int) -> None:
    for sock in clients.values():
        with suppress(OSError):
            sock.shutdown(how)


def _start_client(
    sock: socket.socket,
    peer: Any,
    handle: Callable[[socket.socket, str], object],
    clients: dict[threading.Thread, socket.socket],
) -> None:
    """Start the thread of a client. Raises OSError, RuntimeError; the socket is closed then."""
    name = f"client {peer[0]} port {peer[1]}" if peer else "a client"
    with ExitStack() as cleanup:
        cleanup.callback(sock.close)
        sock.setblocking(True)
        # For shutdown(): the thread may have wrapped or closed the original.
        duplicate = sock.dup()
        cleanup.callback(duplicate.close)
        thread = threading.Thread(
            target=_handle, args=(handle, sock, duplicate, name), name=name, daemon=True
        )
        thread.start()
        cleanup.pop_all()
    clients[thread] = duplicate


def _handle(
    handle: Callable[[socket.socket, str], object], sock: socket.socket, duplicate: socket.socket, name: str
) -> None:
    try:
        handle(sock, name)
    finally:
        duplicate.close()  # the connection ends with its last descriptor


Admit = Callable[[socket.socket, str], socket.socket]


def accept_one(listener: socket.socket, stop: int, admit: Admit) -> tuple[socket.socket, str] | None:
    """The first client that `admit(socket, name)` accepts; None if `stop` becomes readable before.

    `admit` runs in a thread for each client, so that a slow handshake does not delay other clients. It returns the
    socket to use, or closes it and raises LazyPagesError, which is logged.
    """
    listener.setblocking(False)
    with selectors.DefaultSelector() as selector, _Admission(admit) as admission:
        for fd in (listener, stop, admission.fd):
            selector.register(fd, selectors.EVENT_READ)
        while not any(key.fd == stop for key, _ in selector.select()):
            if admission.admitted is not None:
                return admission.admitted
            try:
                with suppress(BlockingIOError, ConnectionAbortedError):
                    _start_client(*listener.accept(), admission.ask, admission.clients)
            except (OSError, RuntimeError) as error:
                log.warning("cannot accept a client: %s", getattr(error, "strerror", None) or error)
                select.select([stop], [], [], RETRY)
    return None


class _Admission:
    """Runs `admit` for several clients. `fd` becomes readable when one is `admitted`; on exit the others are closed."""

    def __init__(self, admit: Admit) -> None:
        self._admit = admit
        self._lock = threading.Lock()
        self._over = False
        self.clients: dict[threading.Thread, socket.socket] = {}
        self.admitted: tuple[socket.socket, str] | None = None
        self._chosen: threading.Thread | None = None
        self.fd = os.eventfd(0, os.EFD_CLOEXEC)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._over = True
        for thread, sock in self.clients.items():
            if thread is not self._chosen:
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
            thread.join()
        os.close(self.fd)

    def ask(self, sock: socket.socket, name: str) -> None:
        """Runs in the thread of a client."""
        try:
            sock = self._admit(sock, name)
        except LazyPagesError as error:
            log.error("%s: %s", name, error)
            return
        with self._lock:
            if self._over or self.admitted is not None:
                log.warning("%s: another client was accepted before", name)
                sock.close()
            else:
                self.admitted, self._chosen = (sock, name), threading.current_thread()
                os.eventfd_write(self.fd, 1)
