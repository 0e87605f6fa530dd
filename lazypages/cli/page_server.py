"""``lazypages page-server``: the options, which are those of ``criu page-server``, and one run of the server."""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

import click

from images_spec.checkpoint import PARENT_LINK
from images_spec.errors import ImageError
from images_spec.identity import identify
from images_spec.images import Kind
from lazypages import logs
from lazypages.cli.config_files import CRIU_OPTIONS, Configured, log_settings
from lazypages.cli.config_files import EPILOG as CONFIG_EPILOG
from lazypages.cli.daemonize import check_status_fd, into_background, kept_standard_error, report_ready
from lazypages.cli.options import LOG_FORMAT_OPTION, add_options, readiness_options, verbosity_option
from lazypages.errors import LazyPagesError
from lazypages.logs import MESSAGE
from lazypages.net.listen import (
    LOOPBACK,
    accept_all,
    accept_one,
    connected_socket,
    hang_up,
    listen,
    prepare,
    until_signalled,
)
from lazypages.net.page_connection import Gate, PageConnection
from lazypages.net.tls import TlsFiles
from lazypages.net.tls_defaults import DEFAULT_CACERT, DEFAULT_CERT, DEFAULT_KEY
from lazypages.net.wire import PAGE_SIZE
from lazypages.outputs import STDOUT, check_output
from lazypages.pageserver.ending import Ending, Verdict
from lazypages.pageserver.images import ServedImages
from lazypages.pageserver.receive import ImageReceiver, ReceiveConnection

log = logging.getLogger("lazypages")

#: Seconds after which a thread gives the GIL to another one that has a request to answer.
SWITCH_INTERVAL = 0.0005

EPILOG = """\b
Examples
  Receive the images of a dump, into the directory ckpt:
    lazypages page-server -D ckpt --port 27000
    criu dump -t PID -D meta --page-server --address 127.0.0.1 --port 27000
  Serve the pages of a checkpoint to a lazy restore on another host, with TLS:
    lazypages page-server -D ckpt --lazy-pages --address 10.0.0.1 --port 27000 --tls
  The same for many restores:
    lazypages page-server -D ckpt --lazy-pages --keep-serving --address 10.0.0.1 --port 27000 --tls

\b
How long it runs
  Receiving: for one dump, as criu page-server does; exit status 0 if it was complete.
  --lazy-pages: for one client, as criu page-server does; exit status 0 if it ended in order (CLOSE). If a
  `lazypages serve` loses its connections, the server waits until it connects again.
  --lazy-pages --keep-serving: for any number of clients, until SIGTERM or SIGINT; exit status 0.

\b
Access
  From this host: processes of the same user and of root; --address unix:PATH is the safest. From other hosts: only
  with --tls or --insecure.
"""

_PATH = click.Path(path_type=Path)


@click.command(cls=Configured, epilog=EPILOG + CONFIG_EPILOG)
@click.option(
    "-D", "--images-dir", metavar="DIR", type=_PATH, default=Path(), help="The images.  [default: .]"
)
@click.option(
    "-W",
    "--work-dir",
    metavar="DIR",
    type=_PATH,
    help="Directory of the log and the pidfile.  [default: the images directory]",
)
@click.option(
    "--lazy-pages", is_flag=True, help="Serve pages of the images and of their parents to lazy restores."
)
@click.option(
    "--address",
    metavar="ADDRESS",
    help=f"Address to listen at: a host name, an IPv4 or IPv6 address, or unix:PATH.  [default: {LOOPBACK}]",
)
@click.option(
    "--port",
    metavar="PORT",
    type=click.IntRange(0, 65535),
    default=0,
    help="Port to listen at; 0: a free one, which the log names.",
)
@click.option("--ps-socket", metavar="FD", type=click.IntRange(min=0), help="Use this connected socket.")
@click.option(
    "--prev-images-dir",
    metavar="DIR",
    type=_PATH,
    help="Images of the previous dump, relative to -D; becomes the link `parent` there.",
)
@click.option(
    "--auto-dedup", is_flag=True, help="Punch holes in parent images where a newer page has arrived."
)
@click.option("-o", "--log-file", metavar="FILE", type=_PATH, help="Log to FILE (- for stdout).")
@LOG_FORMAT_OPTION
@verbosity_option()
@add_options(readiness_options("the server listens"))
@click.option("--tls", is_flag=True, help="Use TLS, with certificates on both sides.")
@click.option(
    "--tls-cacert",
    metavar="FILE",
    type=_PATH,
    help=f"Certificates of trusted authorities.  [default: {DEFAULT_CACERT}]",
)
@click.option("--tls-cacrl", metavar="FILE", type=_PATH, help="List of revoked certificates.")
@click.option(
    "--tls-cert",
    metavar="FILE",
    type=_PATH,
    default=DEFAULT_CERT,
    show_default=True,
    help="Our certificate; it must name the address that clients connect to.",
)
@click.option(
    "--tls-key",
    metavar="FILE",
    type=_PATH,
    default=DEFAULT_KEY,
    show_default=True,
    help="Its private key.",
)
@click.option(
    "--tls-no-cn-verify",
    is_flag=True,
    help="Without --tls-cacert: accept certificates of the system's authorities, whatever they name.",
)
@click.option(
    "--keep-serving", is_flag=True, help="With --lazy-pages: serve any number of clients, until a signal."
)
@click.option(
    "--insecure",
    is_flag=True,
    help="Without --tls: allow addresses that other hosts can reach, and other users of this host.",
)
@add_options(CRIU_OPTIONS)
@click.pass_context
def page_server_command(
    ctx: click.Context,
    *,
    images_dir: Path,
    work_dir: Path | None,
    lazy_pages: bool,
    address: str | None,
    port: int,
    ps_socket: int | None,
    prev_images_dir: Path | None,
    auto_dedup: bool,
    log_file: Path | None,
    log_format: str,
    verbosity: int,
    daemon: bool,
    pidfile: Path | None,
    status_fd: int | None,
    tls: bool,
    tls_cacert: Path | None,
    tls_cacrl: Path | None,
    tls_cert: Path,
    tls_key: Path,
    tls_no_cn_verify: bool,
    keep_serving: bool,
    insecure: bool,
) -> None:
    """Receive the images of a dump over the network or, with --lazy-pages, serve their pages to lazy restores.

    Replaces `criu page-server`; CRIU and lazypages can be on the other side.
    """
    if status_fd is not None:
        check_status_fd(status_fd)
    for option, path in (("-D", images_dir), ("-W", work_dir)):
        if path is not None and not path.is_dir():
            raise LazyPagesError(f"{option} {path} is not a directory")
    images_dir = images_dir.absolute()
    work = (work_dir or images_dir).absolute()
    if daemon and pidfile:
        check_output("--pidfile", work / pidfile, new=True)
    logs.start(
        verbosity,
        _log_stream(log_file and (log_file if log_file == STDOUT else work / log_file), daemon),
        None,
        log_format=log_format,
    )
    log_settings(ctx)
    files = TlsFiles(tls_cacert, tls_cert, tls_key, tls_cacrl, not tls_no_cn_verify) if tls else None
    if files:
        files.server_context()  # fails now if the certificates can't be used
    if keep_serving and not lazy_pages:
        raise LazyPagesError("--keep-serving needs --lazy-pages: without it the server receives one dump")
    server = _Server(address, files, keep_serving=keep_serving, strangers=insecure or ps_socket is not None)
    if ps_socket is None:
        listener, name = listen(address, port, insecure=insecure, tls=tls)
    else:
        listener, name = connected_socket(ps_socket), f"the socket {ps_socket}"
    if lazy_pages:
        server.images = ServedImages(images_dir)
        server.identity = _identity(images_dir)
    else:
        _link_parent(images_dir, prev_images_dir)
        server.receiver = ImageReceiver(images_dir, auto_dedup=auto_dedup)
    ready = into_background(daemon, pidfile and work / pidfile)
    sys.setswitchinterval(SWITCH_INTERVAL)
    with until_signalled() as stop, listener:
        if ps_socket is None:
            alone = "" if address is not None else " (this host only; --address for others)"
            log.log(MESSAGE, "page server at %s%s", name, alone)
        for signal_ready in ready:
            signal_ready()
        if status_fd is not None:
            report_ready(status_fd)
        try:
            ok = server.run(listener, stop, connected=ps_socket is not None)
        except (LazyPagesError, ImageError) as error:
            log.error("%s", error, extra=logs.PRINTED)
            raise
    if address is not None and address.startswith("unix:"):
        Path(address.removeprefix("unix:")).unlink(missing_ok=True)
    ctx.exit(0 if ok else 1)


class _Server:
    """One run of the command, in either mode."""

    def __init__(
        self, address: str | None, tls: TlsFiles | None, *, keep_serving: bool, strangers: bool
    ) -> None:
        self._address = address
        self._tls = tls
        self._strangers = strangers
        self._ending = None if keep_serving else Ending()
        self._over = os.eventfd(0, os.EFD_CLOEXEC)
        self.images: ServedImages | None = None
        self.receiver: ImageReceiver | None = None
        self.identity: bytes | None = None

    def run(self, listener: socket.socket, stop: int, *, connected: bool) -> bool:
        """Serve until the end; return whether all went well. `connected`: `listener` is the client's connection."""
        if self.images is None:
            if connected:
                with _cut_off(listener, stop):
                    client = self._admit(listener.dup(), "the dump"), "the dump"
            elif (found := accept_one(listener, stop, self._admit)) is not None:
                client = found
            else:
                log.error("ended by a signal before a dump arrived")
                return False
            listener.close()
            return self._receive(*client, stop)
        if connected:
            with _cut_off(listener, stop):
                return self._give(listener.dup(), "the client")
        with select.epoll() as ends:
            ends.register(stop, select.EPOLLIN)
            ends.register(self._over, select.EPOLLIN)
            accept_all(listener, ends.fileno(), self._give)
        if self._ending is None or self._ending.verdict is Verdict.DONE:
            return True
        if self._ending.verdict is not Verdict.FAILED:
            log.error("ended by a signal before a client was done")
        return False

    def _admit(self, sock: socket.socket, name: str) -> socket.socket:
        """Check and prepare a connection. Raises LazyPagesError if it is refused; the socket is closed then."""
        log.info("%s: connected", name)
        return prepare(sock, self._tls, self._address, strangers=self._strangers)

    def _give(self, sock: socket.socket, name: str) -> bool:
        assert self.images is not None
        try:
            sock = self._admit(sock, name)
        except LazyPagesError as error:
            log.error("%s: %s", name, error)
            return False
        answerer = None if self._tls else self.images.answerer(sock.fileno())
        connection = PageConnection(sock, self.images, name, answerer, Gate(self.identity), tls=self._tls)
        if self._ending is not None:
            self._ending.connected(connection)
        clean = False
        try:
            clean = connection.run()
        finally:
            hang_up(sock, clean=clean)
            log.info("%s: disconnected after %.1f MiB", name, connection.pages * PAGE_SIZE / (1 << 20))
            if self._ending is not None:
                self._gone(self._ending.gone(connection, clean=clean), name)
        return clean

    def _gone(self, verdict: Verdict, name: str) -> None:
        if verdict is Verdict.WAIT:
            log.warning("%s: disconnected without CLOSE; waiting until it connects again", name)
        elif verdict in {Verdict.DONE, Verdict.FAILED}:
            os.eventfd_write(self._over, 1)

    def _receive(self, sock: socket.socket, name: str, stop: int) -> bool:
        """Raises LazyPagesError, ImageError."""
        receiver = self.receiver
        assert receiver is not None
        clean = False
        with socket.socket(fileno=os.dup(sock.fileno())) as plain, _cut_off(plain, stop):
            try:
                ReceiveConnection(sock, receiver, self._tls).run()
                clean = True
            finally:
                hang_up(sock, clean=clean)
                with suppress(OSError):  # nothing is open after CLOSE; without it the dump has failed already
                    receiver.close()
        log.info("%s: %.1f MiB received", name, receiver.pages / (1 << 20))
        return True


def _identity(directory: Path) -> bytes | None:
    """The identity of the checkpoint; None if it has no inventory. Raises ImageError."""
    inventory = directory / Kind.INVENTORY.file_name()
    if inventory.exists():
        return identify(directory).digest
    log.warning(
        "%s not found: without it the server can't identify this dump, and `lazypages serve` takes no page: copy it",
        inventory,
    )
    return None


@contextmanager
def _cut_off(sock: socket.socket, stop: int) -> Iterator[None]:
    """Shut the connection down when `stop` becomes readable (a signal)."""
    over, done = os.pipe2(os.O_CLOEXEC)

    def watch() -> None:
        if over not in select.select([stop, over], [], [])[0]:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        os.close(done)
        watcher.join()
        os.close(over)


def _link_parent(directory: Path, parent: Path | None) -> None:
    """Create the link `parent`, as `criu page-server --prev-images-dir` does. Raises LazyPagesError."""
    if parent is None:
        return
    link = directory / PARENT_LINK
    if not (directory / parent).is_dir():
        raise LazyPagesError(f"--prev-images-dir {parent}: not a directory, relative to {directory}")
    try:
        os.symlink(parent, link)
    except OSError as error:
        if error.errno == errno.EEXIST and link.is_symlink() and os.readlink(link) == str(parent):
            return
        raise LazyPagesError(f"--prev-images-dir: {link}: {error.strerror}") from None


def _log_stream(path: Path | None, daemon: bool) -> TextIO:
    if path is not None:
        return logs.open_log(path)
    return kept_standard_error() if daemon else sys.stderr
