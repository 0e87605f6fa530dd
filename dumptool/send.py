"""Send pages to a page server instead of writing them to the disk (``--page-server``).

The server is CRIU's or ours, in receive mode (docs/criu.md, "Page server protocol"): it writes the pagemaps and pages
files of all tasks to its own directory. As with CRIU, the small images stay here. In addition each pagemap is kept as
``sent-pagemap-<pid>.img``: the next level must know which pages this one has.
"""

from __future__ import annotations

import logging
import mmap
import os
import socket
import ssl
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from dumptool.chain import SENT_PREFIX
from dumptool.errors import DumpError
from dumptool.memory import BUFFER_PAGES, Runs
from images_spec.flags import PAGE_SIZE, PE_PRESENT
from images_spec.images import Kind
from images_spec.pagemap import PagemapWriter
from lazypages.net import wire
from lazypages.net.link import tune_client
from lazypages.net.refused import why_closed
from lazypages.net.tls import TlsFiles
from lazypages.net.tls_errors import explain, explain_handshake
from lazypages.net.url import ConnectedSocket, PageServerAddress, TcpServer, UnixServer
from lazypages.net.wire import Command, Header, ImageType, Layout, encode_dst_id

log = logging.getLogger("lazypages")

STEP_PAGES = 1024
"""Pages gathered before they are sent: 4 MiB. With ``BUFFER_PAGES`` more, the largest pagemap entry at the server."""
CONNECT_TIMEOUT = 10.0  # s
PATIENCE = 60.0  # s without progress, after which a frozen tree goes on
PROBE_PATIENCE = 2.0  # s, plus some round trips, in which a server of CRIU up to 4.1.1 answers the probe
MAX_IOVS = 1024  # IOV_MAX (limits.h)


class SendError(DumpError):
    """The page server can't be reached or has not received everything."""


@dataclass(frozen=True, slots=True)
class PageServer:
    """The page server of the command line. ``layout``: of the protocol's headers; None: detect it."""

    address: PageServerAddress
    tls: TlsFiles | None = None
    layout: Layout | None = None


class Sender:
    """A connection to a page server in receive mode; a context manager. All methods raise ``SendError``.

    The constructor also raises ``TlsError``.
    """

    def __init__(self, server: PageServer) -> None:
        self._address, self._tls = server.address, server.tls
        self._guessed = False  # the layout is a guess
        self._named = server.layout
        self._answered = False
        self._layout = server.layout or Layout.CRIU_4_1
        with self._errors():
            self._sock = _connect(server)
        try:
            # A server from 4.2 on would wait for ever for the rest of a shorter header, while the tree is frozen.
            if self._named is None or (self._named is Layout.CRIU_4_1 and not self._encrypted):
                self._layout = self._find_layout()
        except BaseException:
            self._sock.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()

    def has_parent(self, pid: int) -> bool:
        """Whether the server's parent directory has a pagemap of this process."""
        return bool(self._ask(Header(Command.PARENT, dst_id=encode_dst_id(ImageType.TASK, pid)), "=i"))

    def open(self, dst_id: int) -> bool:
        """Begins an image. Returns whether the server has its parent."""
        return bool(self._ask(Header(Command.OPEN2, dst_id=dst_id), "=B"))

    def send(self, dst_id: int, runs: Runs, pages: memoryview) -> None:
        """Sends entries of the open image. ``pages``: the bytes of the PRESENT ones, without gaps."""
        pieces: list[bytes | memoryview] = []
        at = 0
        for start, end, flags in runs:
            header = Header(Command.ADD_F, (end - start) // PAGE_SIZE, start, dst_id, flags)
            pieces.append(self._layout.pack(header))
            if flags & PE_PRESENT:
                pieces.append(pages[at : at + end - start])
                at += end - start
        self._send(pieces)

    def close(self) -> None:
        """Returns when the server has written everything."""
        # As CRIU does: after CLOSE its server waits for the end of the connection, which never comes for a socket that
        # another process has open as well (docs/criu.md, "Page server protocol").
        force = isinstance(self._address, ConnectedSocket)
        status = self._ask(Header(Command.FORCE_CLOSE if force else Command.CLOSE), "=i")
        if status:
            raise SendError(f"page server {self._address}: reports that it has failed (status {status})")
        if isinstance(self._sock, ssl.SSLSocket):
            with self._errors():
                self._sock = self._sock.unwrap()
        self._sock.close()

    @property
    def _encrypted(self) -> bool:
        return isinstance(self._sock, ssl.SSLSocket)

    def _find_layout(self) -> Layout:
        if self._encrypted:
            self._guessed = True
            return Layout.CRIU_4_1
        self._send([wire.PROBE_FIRST])
        with self._errors():
            round_trip = _round_trip(self._sock)
            self._sock.settimeout(PROBE_PATIENCE + 8 * round_trip)
            try:
                answer = self._sock.recv(1)
                layout = Layout.CRIU_4_1
            except TimeoutError:
                answer, layout = b"", Layout.CRIU_4_2
            self._sock.settimeout(PATIENCE)
        if layout is Layout.CRIU_4_2:
            self._send([wire.PROBE_REST])
        elif not answer:
            raise self._closed()
        answer += self._receive(wire.PROBE_ANSWER_SIZE - len(answer))
        if wire.probe_answer(answer) is not None:
            return Layout.CRIU_4_2
        if self._named not in {layout, None}:
            log.warning(
                "page server %s: speaks %s, not %s as --page-server-protocol says: using %s",
                *(self._address, layout.value, self._named.value, layout.value),
            )
        return layout

    def _ask(self, header: Header, answer: str) -> int:
        self._send([self._layout.pack(header)])
        (value,) = struct.unpack(answer, self._receive(struct.calcsize(answer)))
        assert isinstance(value, int)
        return value

    def _receive(self, size: int) -> bytes:
        data = b""
        with self._errors():
            while len(data) < size:
                more = self._sock.recv(size - len(data))
                if not more:
                    raise self._closed()
                data += more
        self._answered = True
        return data

    def _send(self, pieces: list[bytes | memoryview]) -> None:
        with self._errors():
            if isinstance(self._sock, ssl.SSLSocket):
                for piece in pieces:  # CRIU's server expects each header in a TLS record of its own
                    self._sock.sendall(piece)
                return
            first = 0
            while first < len(pieces):
                sent = self._sock.sendmsg(pieces[first : first + MAX_IOVS])
                while first < len(pieces) and sent >= len(pieces[first]):
                    sent -= len(pieces[first])
                    first += 1
                if sent:
                    pieces[first] = memoryview(pieces[first])[sent:]

    def _closed(self) -> SendError:
        if not self._answered:
            why = why_closed(
                *(self._address, self._tls, self._layout), guessed=self._guessed, named=bool(self._named)
            )
            return SendError(
                f"page server {self._address}: has closed the connection before it answered: {why}"
            )
        return SendError(
            f"page server {self._address}: has closed the connection; see its log. What it has received is not an image"
        )

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except TimeoutError:
            raise SendError(f"page server {self._address}: no progress for {PATIENCE:g} s") from None
        except (BrokenPipeError, ConnectionResetError, ssl.SSLEOFError):
            raise self._closed() from None
        except OSError as error:
            raise SendError(f"page server {self._address}: {explain(error, 'server')}") from None
        except UnicodeError:
            raise SendError(f"page server {self._address}: not a host name") from None


class SentImage:
    """One image at the server; a ``dumptool.memory.Image``."""

    step_pages = STEP_PAGES
    durable = False

    def __init__(self, sender: Sender, dst_id: int, record: PagemapWriter, stack: ExitStack) -> None:
        self._sender, self._dst_id, self._record = sender, dst_id, record
        self.pages_fd = os.memfd_create("lazypages-pages", os.MFD_CLOEXEC)
        stack.callback(os.close, self.pages_fd)
        size = (STEP_PAGES + BUFFER_PAGES) * PAGE_SIZE
        os.ftruncate(self.pages_fd, size)
        self._pages = memoryview(mmap.mmap(self.pages_fd, size))  # unmapped with the last reference

    def add(self, runs: Runs) -> None:
        """Sends one step: the entries, and the pages at the start of ``pages_fd``."""
        self._sender.send(self._dst_id, runs, self._pages)
        os.lseek(self.pages_fd, 0, os.SEEK_SET)
        for start, end, flags in runs:
            self._record.add(start, (end - start) // PAGE_SIZE, flags)


@dataclass(frozen=True, slots=True)
class SentTarget:
    """The destination of an image: the server for the pages, ``directory`` for a copy of the pagemap.

    ``number``: the pid of a process or the id of shared memory. ``parents``: the image refers to pages of its parent.
    ``keep``: see ``dumptool.output.Output``.
    """

    sender: Sender
    directory: Path
    kind: ImageType
    number: int
    parents: bool = False
    keep: Callable[[Path, int], None] | None = None

    @property
    def record(self) -> Path:
        """The copy of the pagemap."""
        name = self.number if self.kind is ImageType.TASK else f"shmem-{self.number}"
        return self.directory / (SENT_PREFIX + Kind.PAGEMAP.file_name(name))

    @contextmanager
    def open(self) -> Iterator[SentImage]:
        """Raises ``SendError``, ``ImageError``."""
        dst_id = encode_dst_id(self.kind, self.number)
        if not self.sender.open(dst_id) and self.parents:
            raise SendError(f"the page server no longer has the parent of the pages of task {self.number}")
        with PagemapWriter(self.record, 1, self.keep) as record, ExitStack() as stack:
            yield SentImage(self.sender, dst_id, record, stack)

    def remove(self) -> None:
        """Makes the next level send all pages: those at the server are of a process that was exiting."""
        self.record.unlink(missing_ok=True)


def _connect(server: PageServer) -> socket.socket:
    match server.address:
        case UnixServer(path):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            try:
                sock.settimeout(CONNECT_TIMEOUT)
                sock.connect(str(path))
            except BaseException:
                sock.close()
                raise
        case ConnectedSocket(fd):
            sock = socket.socket(fileno=fd)
            sock.getpeername()
        case TcpServer(host, port):
            sock = socket.create_connection((host, port), CONNECT_TIMEOUT)
            tune_client(sock)
    sock.settimeout(PATIENCE)
    return sock if server.tls is None else _start_tls(sock, server.tls, server.address)


def _start_tls(sock: socket.socket, files: TlsFiles, address: PageServerAddress) -> ssl.SSLSocket:
    assert isinstance(address, TcpServer)
    try:
        secure = files.client_context().wrap_socket(sock, server_hostname=address.host)
    except TimeoutError:
        sock.close()
        raise
    except OSError as error:
        sock.close()
        raise SendError(f"page server {address}: {explain_handshake(error, 'server')}") from None
    except BaseException:
        sock.close()
        raise
    try:
        files.verify_server(secure.getpeercert(), address.host)
    except BaseException:
        secure.close()
        raise
    return secure


def _round_trip(sock: socket.socket) -> float:
    """Seconds, as measured by the kernel for TCP (struct tcp_info, tcpi_rtt)."""
    if sock.family == socket.AF_UNIX:
        return 0.0
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    return int.from_bytes(info[68:72], "little") / 1e6
