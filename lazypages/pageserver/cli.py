"""``lazypages page-server``: options as those of ``criu page-server``."""

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
from lazypages.daemonize import daemonize, open_pidfile, tell_ready
from lazypages.errors import LazyPagesError
from lazypages.logs import MESSAGE
from lazypages.options import verbosity_option
from lazypages.pageserver.images import ServedImages
from lazypages.pageserver.listen import (
    LOOPBACK,
    accept_all,
    accept_one,
    connected_socket,
    hang_up,
    listen,
    prepare,
    until_signalled,
)
from lazypages.pageserver.receive import ImageReceiver, ReceiveConnection
from lazypages.pageserver.serve import Gate, PageConnection
from lazypages.tls import TlsError, TlsFiles
from lazypages.tls_defaults import DEFAULT_CACERT, DEFAULT_CERT, DEFAULT_KEY
from lazypages.wire import PAGE_SIZE

log = logging.getLogger("lazypages")

#: Seconds a thread may keep Python to itself while another one has a request to answer.
SWITCH_INTERVAL = 0.0005

EPILOG = """\b
Examples
  Receive the images of a dump, into the directory ckpt:
    lazypages page-server -D ckpt --port 27000
    criu dump -t PID -D meta --page-server --address 127.0.0.1 --port 27000
  Give the pages of a checkpoint to lazy restores elsewhere, encrypted:
    lazypages page-server -D ckpt --lazy-pages --address 10.0.0.1 --port 27000 --tls

\b
How long it runs
  Receiving: for one dump, as criu page-server does; exit status 0 if it was complete.
  --lazy-pages: for any number of clients, until SIGTERM or SIGINT; exit status 0.
"""

_PATH = click.Path(path_type=Path)


@click.command(epilog=EPILOG)
@click.option(
    "-D", "--images-dir", metavar="DIR", type=_PATH, default=Path(), help="The images.  [default: .]"
)
@click.option(
    "-W",
    "--work-dir",
    metavar="DIR",
    type=_PATH,
    help="Where the log and the pidfile go.  [default: the images directory]",
)
@click.option(
    "--lazy-pages", is_flag=True, help="Give pages of the images, and of their parents, to lazy restores."
)
@click.option(
    "--address",
    metavar="ADDRESS",
    help=f"Listen there: a host, an IPv4 or IPv6 address, or unix:PATH.  [default: {LOOPBACK}]",
)
@click.option(
    "--port",
    metavar="PORT",
    type=click.IntRange(0, 65535),
    default=0,
    help="0: a free one, named in the log.",
)
@click.option("--ps-socket", metavar="FD", type=click.IntRange(min=0), help="Use this connected socket.")
@click.option(
    "--prev-images-dir",
    metavar="DIR",
    type=_PATH,
    help="The images of the dump before, relative to -D; becomes the link `parent` in it.",
)
@click.option(
    "--auto-dedup", is_flag=True, help="Free the room of pages in parent images that have come anew."
)
@click.option("-o", "--log-file", metavar="FILE", type=_PATH, help="Log to FILE (- for stdout).")
@verbosity_option()
@click.option("-d", "--daemon", is_flag=True, help="Go into the background once it listens.")
@click.option(
    "--pidfile", metavar="FILE", type=_PATH, help="With -d: write the daemon's pid to FILE (a new one)."
)
@click.option(
    "--status-fd", metavar="FD", type=click.IntRange(min=0), help="Write one 0 byte to FD when it listens."
)
@click.option("--tls", is_flag=True, help="Certificates on both sides, and encryption.")
@click.option(
    "--tls-cacert", metavar="FILE", type=_PATH, help=f"Who is trusted.  [default: {DEFAULT_CACERT}]"
)
@click.option("--tls-cacrl", metavar="FILE", type=_PATH, help="Which certificates are revoked.")
@click.option("--tls-cert", metavar="FILE", type=_PATH, default=DEFAULT_CERT, show_default=True)
@click.option("--tls-key", metavar="FILE", type=_PATH, default=DEFAULT_KEY, show_default=True)
@click.option(
    "--tls-no-cn-verify", is_flag=True, help="Let clients pass whose certificate does not name --address."
)
@click.option("--insecure", is_flag=True, help="Allow an address that others can reach without --tls.")
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
    insecure: bool,
) -> None:
    """Receive the images of a dump over the network or, with --lazy-pages, give their pages to lazy restores.

    Takes the place of `criu page-server`, for CRIU on the other side as well.
    """
    for option, path in (("-D", images_dir), ("-W", work_dir)):
        if path is not None and not path.is_dir():
            raise LazyPagesError(f"{option} {path} is not a directory")
    images_dir = images_dir.absolute()
    work = (work_dir or images_dir).absolute()
    logs.start(
        verbosity,
        _log_stream(log_file and (log_file if log_file == logs.STDOUT else work / log_file), daemon),
        None,
    )
    files = TlsFiles(tls_cacert, tls_cert, tls_key, tls_cacrl, not tls_no_cn_verify) if tls else None
    if files:
        files.server_context()  # to fail before anybody connects
    server = _Server(images_dir, address, files)
    if ps_socket is None:
        listener, name = listen(address, port, public=insecure or tls)
    else:
        listener, name = connected_socket(ps_socket), f"the socket {ps_socket}"
    if lazy_pages:
        server.images = ServedImages(images_dir)
        server.identity = _identity(images_dir)
    else:
        _link_parent(images_dir, prev_images_dir)
        server.receiver = ImageReceiver(images_dir, auto_dedup=auto_dedup)
    tell_starter = None
    if daemon:
        tell_starter = daemonize(open_pidfile(work / pidfile) if pidfile else None)
    elif pidfile:
        log.warning("--pidfile does nothing without -d")
    sys.setswitchinterval(SWITCH_INTERVAL)
    with until_signalled() as stop, listener:
        if ps_socket is None:
            alone = "" if address is not None else " (this machine only; --address for others)"
            log.log(MESSAGE, "page server at %s%s", name, alone)
        if tell_starter:
            tell_starter()
        if status_fd is not None:
            tell_ready(status_fd)
        try:
            ok = server.run(listener, stop, connected=ps_socket is not None)
        except (LazyPagesError, ImageError) as error:
            log.error("%s", error, extra=logs.SAID)
            raise
    if address is not None and address.startswith("unix:"):
        Path(address.removeprefix("unix:")).unlink(missing_ok=True)
    ctx.exit(0 if ok else 1)


class _Server:
    """One run of the command, in either mode."""

    def __init__(self, directory: Path, address: str | None, tls: TlsFiles | None) -> None:
        self._directory = directory
        self._address = address
        self._tls = tls
        self.images: ServedImages | None = None
        self.receiver: ImageReceiver | None = None
        self.identity: bytes | None = None

    def run(self, listener: socket.socket, stop: int, *, connected: bool) -> bool:
        """Serve until the end. `connected`: `listener` is the one client itself. Whether all went well."""
        if self.images is None:
            client = (listener.dup(), "the dump") if connected else accept_one(listener, stop)
            if client is None:
                log.error("ended before a dump came")
                return False
            listener.close()
            return self._receive(*client, stop)
        if connected:
            with _cut_off(listener, stop):
                return self._give(listener.dup(), "the client")
        accept_all(listener, stop, self._give)
        return True

    def _give(self, sock: socket.socket, name: str) -> bool:
        assert self.images is not None
        log.info("%s: connected", name)
        try:
            sock = prepare(sock, self._tls, self._address)
        except TlsError as error:
            log.error("%s: %s", name, error)
            return False
        answerer = None if self._tls else self.images.answerer(sock.fileno())
        connection = PageConnection(sock, self.images, name, answerer, Gate(self.identity))
        clean = False
        try:
            clean = connection.run()
        finally:
            hang_up(sock, clean=clean)
            log.info("%s: gone after %.1f MiB", name, connection.pages * PAGE_SIZE / (1 << 20))
        return clean

    def _receive(self, sock: socket.socket, name: str, stop: int) -> bool:
        """Raises LazyPagesError, ImageError."""
        receiver = self.receiver
        assert receiver is not None
        clean = False
        with sock.dup() as plain, _cut_off(plain, stop):
            sock = prepare(sock, self._tls, self._address)
            try:
                ReceiveConnection(sock, receiver).run()
                clean = True
            finally:
                hang_up(sock, clean=clean)
                with suppress(OSError):  # nothing is open after CLOSE; else all has failed already
                    receiver.close()
        log.info("%s: %.1f MiB received", name, receiver.pages / (1 << 20))
        return True


def _identity(directory: Path) -> bytes | None:
    """Of the checkpoint. Raises ImageError."""
    inventory = directory / Kind.INVENTORY.file_name()
    if inventory.exists():
        return identify(directory).digest
    log.warning(
        "%s: without it nothing tells which dump this is, and no `lazypages serve` takes a page: copy it there",
        inventory,
    )
    return None


@contextmanager
def _cut_off(sock: socket.socket, stop: int) -> Iterator[None]:
    """End the connection when a signal comes."""
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
    """As `criu page-server --prev-images-dir` does. Raises LazyPagesError."""
    if parent is None:
        return
    link = directory / PARENT_LINK
    if not (directory / parent).is_dir():
        raise LazyPagesError(f"--prev-images-dir {parent}: no directory, seen from {directory}")
    try:
        os.symlink(parent, link)
    except OSError as error:
        if error.errno == errno.EEXIST and link.is_symlink() and os.readlink(link) == str(parent):
            return
        raise LazyPagesError(f"--prev-images-dir: {link}: {error.strerror}") from None


def _log_stream(path: Path | None, daemon: bool) -> TextIO:
    if path is not None:
        return logs.open_log(path)
    if daemon:  # standard error will be /dev/null, but errors belong where the caller's went
        return os.fdopen(os.dup(sys.stderr.fileno()), "w", encoding="utf-8", errors="backslashreplace")
    return sys.stderr
