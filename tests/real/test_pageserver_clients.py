"""Who may be a page server's client, what ends the server, and how long it waits for the rest of a message."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from lazypages.net import listen, patience, peers
from lazypages.net.page_connection import PageConnection
from lazypages.net.tls import TlsError
from lazypages.net.url import TcpServer, UnixServer
from lazypages.net.wire import PAGE_SIZE, PROBE_FIRST, Command, Header, Layout
from lazypages.pageserver.images import ServedImages
from lazypages.pageserver.receive import ImageReceiver, ReceiveConnection, ReceiveError
from tests.real.test_dump_lazy import lazy_dump, running
from tests.support.certificates import Authority
from tests.support.criu import Criu
from tests.support.pages import (
    BASE,
    KEEP_SERVING,
    Contents,
    PageServer,
    fetch,
    page_server,
    page_server_command,
    write_images,
)
from tests.support.processes import Server, wait_for
from tests.support.proxy import Fault, Proxy
from tests.support.restore import Program

STRANGER = 65534  # a user that is not ours
layouts = pytest.mark.parametrize("layout", Layout)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Contents]:
    directory = tmp_path_factory.mktemp("images")
    return directory, write_images(directory, {77: [(0, 300)]})


def get(layout: Layout, first: int = 0, count: int = 1) -> bytes:
    return layout.pack(Header(Command.GET, count, BASE + first * PAGE_SIZE, 77))


@contextmanager
def served(images: Path, tmp_path: Path, *options: str) -> Iterator[PageServer]:
    with page_server(images, "--lazy-pages", *options, output=tmp_path / "out") as server:
        server.wait_ready()
        yield server


def connect(server: PageServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=30)


def talk(sock: socket.socket, said: bytes, answer: int) -> bytes:
    """Say something, and get so many bytes."""
    sock.sendall(said)
    return sock.recv(answer, socket.MSG_WAITALL)


# -- what ends it --------------------------------------------------------------------------------------------


@pytest.mark.slow
@layouts
@pytest.mark.parametrize("how", ["CLOSE", "end", "end in a message", "reset", "missing page"])
def test_ends_with_a_client_of_criu(
    layout: Layout, how: str, images: tuple[Path, Contents], tmp_path: Path
) -> None:
    """As CRIU's server: 0 after CLOSE and after a mere end between messages, else 1 (observed with 4.1.1 and 4.2.1)."""
    size = layout.header_size + PAGE_SIZE
    with served(images[0], tmp_path) as server, connect(server) as sock:
        assert talk(sock, get(layout), size)[layout.header_size :] == images[1][77, BASE]
        assert server.process.poll() is None
        match how:
            case "CLOSE":
                assert talk(sock, layout.pack(Header(Command.CLOSE)), 4) == bytes(4)
            case "end in a message":
                sock.sendall(get(layout)[:7])
            case "reset":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            case "missing page":
                assert talk(sock, get(layout, 1000), 1) == b""
        sock.close()
        assert server.wait(30) == (0 if how in {"CLOSE", "end"} else 1)


def test_ends_with_a_client_of_ours(images: tuple[Path, Contents], tmp_path: Path) -> None:
    """Which opens two connections, and whose connections are cut: it comes back. Who only looks is no client."""
    with served(images[0], tmp_path) as server:
        for _ in range(3):
            with connect(server):
                pass
        with connect(server) as prober:
            prober.sendall(b"\0")
        with connect(server) as killed:
            assert len(talk(killed, PROBE_FIRST, 4)) == 4
        wait_for("the end of a connection", lambda: "waiting until it connects again" in server.story())
        with Proxy(("127.0.0.1", server.port), lambda number: Fault(50_000) if number < 2 else None) as proxy:
            fetched = fetch([TcpServer("127.0.0.1", proxy.port)], list(images[1]))
        fetched.check(images[1])
        assert fetched.stats[0].connections > 2
        assert server.wait(30) == 0


def test_a_signal_before_its_client_is_done(images: tuple[Path, Contents], tmp_path: Path) -> None:
    with served(images[0], tmp_path) as server, connect(server) as sock:
        assert len(talk(sock, PROBE_FIRST, 4)) == 4
        server.signal(signal.SIGTERM)
        assert server.wait(30) == 1
        assert "ended by a signal before a client was done" in server.story()


def test_keep_serving(images: tuple[Path, Contents], tmp_path: Path) -> None:
    with served(images[0], tmp_path, "--keep-serving") as server:
        for _ in range(3):
            fetch([server.address], list(images[1])[:20]).check(dict(list(images[1].items())[:20]))
        server.signal(signal.SIGTERM)
        assert server.wait(30) == 0


def test_keep_serving_is_no_word_for_a_receiver(tmp_path: Path) -> None:
    with page_server(tmp_path, "--keep-serving") as server:
        assert server.wait(30) == 1
        assert "--keep-serving needs --lazy-pages" in server.story()


# -- receive mode with TLS ----------------------------------------------------------------------------------


def test_a_failed_handshake_costs_only_its_connection(tmp_path: Path) -> None:
    """Clients without TLS, with a foreign certificate, or that stay silent: the dump that comes then is taken."""
    authority, foreign = Authority(tmp_path / "pki"), Authority(tmp_path / "other", "stranger")
    ours, theirs, strange = authority.issue("ours"), authority.issue("theirs"), foreign.issue("strange")
    into = tmp_path / "into"
    into.mkdir()
    options = ["--address", "127.0.0.1", *authority.options(ours)]
    layout = Layout.CRIU_4_2
    with page_server(into, *options, output=tmp_path / "out") as server:
        server.wait_ready()
        with connect(server) as silent, connect(server) as plain:
            plain.sendall(layout.pack(Header(Command.OPEN2, dst_id=77 << 8 | 1)))
            with suppress(ConnectionResetError):
                plain.recv(100)
            context = foreign.files(strange)._replace(cacert=authority.files(theirs).cacert).client_context()
            with (
                suppress(OSError),
                context.wrap_socket(connect(server), server_hostname="127.0.0.1") as secure,
            ):
                secure.recv(1)
            wait_for("both refusals", lambda: server.story().count("ERROR") >= 2)
            assert "the client does not use TLS" in server.story()
            assert "self-signed certificate" in server.story() or "unable to get" in server.story()
            assert server.process.poll() is None
            context = authority.files(theirs).client_context()
            with context.wrap_socket(connect(server), server_hostname="127.0.0.1") as sock:
                sock.sendall(layout.pack(Header(Command.OPEN2, dst_id=77 << 8 | 1)))
                assert sock.recv(1) == b"\0"
                sock.sendall(
                    layout.pack(Header(Command.ADD_F, 2, BASE, 77 << 8 | 1, 4)) + b"x" * 2 * PAGE_SIZE
                )
                sock.sendall(layout.pack(Header(Command.CLOSE)))
                assert sock.recv(4) == bytes(4)
            assert server.wait(30) == 0
            with suppress(OSError):
                assert silent.recv(1) == b""
    assert (into / "pages-65537.img").read_bytes() == b"x" * 2 * PAGE_SIZE
    assert "Traceback" not in (tmp_path / "out").read_text()


@pytest.mark.slow
def test_a_slow_handshake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time is for all of it, however often another byte comes."""
    authority = Authority(tmp_path / "pki")
    files = authority.files(authority.issue("one"))
    monkeypatch.setattr(listen, "HANDSHAKE_TIMEOUT", 0.5)
    ours, theirs = socket.socketpair()
    over = threading.Event()

    def drip() -> None:
        hello = b"\x16\x03\x01\x02\x00\x01" + bytes(1000)
        with suppress(OSError):
            for number in range(len(hello)):
                if over.wait(0.05):
                    return
                theirs.sendall(hello[number : number + 1])

    with theirs:
        thread = threading.Thread(target=drip)
        thread.start()
        with pytest.raises(TlsError, match=r"no handshake within 0\.5 s"):
            listen.prepare(ours, files, None, strangers=False)
        over.set()
        thread.join()


# -- the rest of a message ----------------------------------------------------------------------------------


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> float:
    """How long the rest of a message may take."""
    monkeypatch.setattr(patience, "MESSAGE_TIMEOUT", 1.0)
    return 1.0


def give(images: Path, sock: socket.socket, *, in_c: bool) -> bool:
    served = ServedImages(images)
    connection = PageConnection(sock, served, "it", served.answerer(sock.fileno()) if in_c else None)
    return connection.run()


def in_thread(work: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    result: list[object] = []

    def run() -> None:
        try:
            result.append(work())
        except Exception as error:
            result.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, result


@pytest.mark.slow
@pytest.mark.parametrize("first", [False, True], ids=["later", "first message"])
@pytest.mark.parametrize("in_c", [False, True], ids=["python", "c"])
def test_a_request_that_is_not_finished(
    in_c: bool, first: bool, short: float, images: tuple[Path, Contents]
) -> None:
    """However it drips; a client that says nothing between two requests may be silent for longer."""
    layout = Layout.CRIU_4_2 if in_c else Layout.CRIU_4_1
    ours, theirs = socket.socketpair()
    theirs.settimeout(30)
    with ours, theirs:
        thread, result = in_thread(lambda: give(images[0], ours, in_c=in_c))
        size = layout.header_size + PAGE_SIZE
        if not first:
            time.sleep(1.2 * short)
            assert len(talk(theirs, get(layout), size)) == size
            whole = get(layout)  # in pieces, but in time
            theirs.sendall(whole[:5])
            assert len(talk(theirs, whole[5:], size)) == size
        with suppress(BrokenPipeError):
            for number in range(layout.header_size - 1):
                theirs.sendall(get(layout)[number : number + 1])
                thread.join(short / 4)
                if not thread.is_alive():
                    break
        thread.join(30)
        assert result == [False]


@pytest.mark.slow
def test_pages_that_drip(short: float, tmp_path: Path) -> None:
    """Receive mode: a dump may be slow, but not a byte a minute."""
    layout = Layout.CRIU_4_2
    ours, theirs = socket.socketpair()
    with ours, theirs:
        receiver = ImageReceiver(tmp_path, auto_dedup=False)
        thread, result = in_thread(ReceiveConnection(ours, receiver).run)
        time.sleep(1.2 * short)
        theirs.sendall(layout.pack(Header(Command.ADD_F, 20, BASE, 77 << 8 | 1, 4)))
        for _ in range(6):  # for longer than the rest of a message may take, in all
            theirs.sendall(b"x" * PAGE_SIZE)
            time.sleep(short / 4)
        assert result == []
        with suppress(BrokenPipeError):
            while thread.is_alive():
                theirs.sendall(b"x")
                thread.join(short / 4)
        receiver.close()
        (error,) = result
        assert isinstance(error, ReceiveError)
        assert "did not arrive within 1 s" in str(error)


@pytest.mark.slow
def test_a_client_that_does_not_hang_up(short: float, images: tuple[Path, Contents]) -> None:
    """After CLOSE nobody waits for it for ever."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        thread, result = in_thread(lambda: give(images[0], ours, in_c=True))
        assert talk(theirs, Layout.CRIU_4_2.pack(Header(Command.CLOSE)), 4) == bytes(4)
        thread.join(30)
        assert result == [True]


# -- whose the client is ------------------------------------------------------------------------------------


def socket_of(user: int, family: int, where: object, *, device: bytes = b"") -> socket.socket:
    """A socket that a process of that user has made and connected, and given to us."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        child = os.fork()
        if not child:
            try:
                os.setgroups([])
                os.setgid(user)
                os.setuid(user)
                sock = socket.socket(family)
                if device:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device)
                sock.connect(where)  # type: ignore[arg-type]
                socket.send_fds(theirs, [b"+"], [sock.fileno()])
            except OSError as error:
                theirs.sendall(os.strerror(error.errno or 0).encode())
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        said, fds, _, _ = socket.recv_fds(ours, 100, 1)
        if not fds:
            raise OSError(said.decode())
        sock = socket.socket(fileno=fds[0])
        sock.settimeout(30)
        return sock


@pytest.mark.parametrize("device", [b"", b"lo"], ids=["", "bound to a device"])
@pytest.mark.parametrize(
    ("address", "to"),
    [("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("::", "127.0.0.1"), ("0.0.0.0", "127.0.0.2")],
)
def test_whose_a_connection_is(address: str, to: str, device: bytes) -> None:
    """The kernel tells, in both ways that it can be asked; and not of a socket that nobody has any more."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as listener:
        listener.bind((address, 0))
        listener.listen()
        where = to, listener.getsockname()[1]
        with socket_of(
            STRANGER, socket.AF_INET6 if ":" in to else socket.AF_INET, where, device=device
        ) as client:
            accepted, _ = listener.accept()
            with accepted:
                ends = (
                    peers.connection_end(accepted.getpeername()),
                    peers.connection_end(accepted.getsockname()),
                )
                for find in (peers.find_owner, peers.owner_from_kernel, peers.owner_from_proc):
                    owner = find(*ends)
                    assert owner is not None
                    assert owner.uid == STRANGER
                    assert owner.inode
                with pytest.raises(
                    peers.StrangerError, match=f"refused: user {STRANGER}; from this host only user"
                ):
                    peers.check_peer(accepted)
                client.sendall(b"now you have it")
                client.close()
                with pytest.raises(
                    peers.StrangerError, match="disconnected on this host before its user could be checked"
                ):
                    peers.check_peer(accepted)
        with socket_of(0, socket.AF_INET6 if ":" in to else socket.AF_INET, where, device=device):
            accepted, _ = listener.accept()
            with accepted:
                peers.check_peer(accepted)


def unix_folder(tmp_path: Path) -> Path:
    """A folder that others can get into."""
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.getuid() and folder.parts[:2] == ("/", "tmp") and len(folder.parts) > 2:
            folder.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize("how", ["tcp", "unix"])
@pytest.mark.parametrize("insecure", [False, True], ids=["", "insecure"])
def test_pages_for_whom(how: str, insecure: bool, images: tuple[Path, Contents], tmp_path: Path) -> None:
    """Another user of this host gets nothing, unless --insecure; root gets all."""
    path = unix_folder(tmp_path) / "socket"
    options = [
        *(["--address", f"unix:{path}"] if how == "unix" else []),
        *(["--insecure"] if insecure else []),
    ]
    command = page_server_command("-D", images[0], "-v3", *KEEP_SERVING, *options)
    with PageServer(command, output=tmp_path / "out") as server:
        where: object
        if how == "unix":
            Server.wait_ready(server)
            path.chmod(0o666)  # somebody has meant well
            family, where = socket.AF_UNIX, str(path)
        else:
            server.wait_ready()
            family, where = socket.AF_INET, ("127.0.0.1", server.port)
        layout, received = Layout.CRIU_4_1, bytearray()
        with socket_of(STRANGER, family, where) as sock, suppress(ConnectionResetError, BrokenPipeError):
            sock.sendall(get(layout))
            while len(received) < 24 + PAGE_SIZE and (data := sock.recv(1 << 16)):
                received += data
        if insecure:
            assert bytes(received[24:]) == images[1][77, BASE]
        else:
            assert received == b""
            wait_for(
                "the refusal", lambda: f"refused: user {STRANGER}; from this host only user" in server.story()
            )
        address = UnixServer(path) if how == "unix" else server.address
        fetch([address], list(images[1])).check(images[1])


def test_a_dump_from_whom(tmp_path: Path) -> None:
    """Receive mode: another user's connection writes nothing, and costs only itself."""
    layout = Layout.CRIU_4_2
    said = layout.pack(Header(Command.ADD_F, 1, BASE, 77 << 8 | 1, 4))
    with page_server(tmp_path) as server:
        server.wait_ready()
        for quick in (False, True):  # the second one has gone before it can be asked for
            sock = socket_of(STRANGER, socket.AF_INET, ("127.0.0.1", server.port))
            with sock, suppress(BrokenPipeError, ConnectionResetError):
                sock.sendall(said + b"evil" * 1024 + layout.pack(Header(Command.CLOSE)))
                if not quick:
                    sock.recv(1)
        wait_for("the refusals", lambda: server.story().count("ERROR") == 2)
        assert server.process.poll() is None
        with connect(server) as sock:
            sock.sendall(said + b"good" * 1024 + layout.pack(Header(Command.CLOSE)))
            assert sock.recv(4) == bytes(4)
        assert server.wait(30) == 0
    assert (tmp_path / "pages-65537.img").read_bytes() == b"good" * 1024


def test_a_frozen_task_for_whom(program: Program, tmp_path: Path) -> None:
    """`dumptool dump --lazy-pages`: another user gets no page, and can't say that it is over."""
    with (
        running(Criu("4.1"), "single", program, tmp_path) as victim,
        lazy_dump(victim.pid, victim.checkpoint.images) as source,
    ):
        source.wait_ready()
        received = bytearray()
        sock = socket_of(STRANGER, socket.AF_INET, ("127.0.0.1", source.port))
        with sock, suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(Layout.CRIU_4_1.pack(Header(Command.CLOSE)))
            received += sock.recv(100)
        assert received == b""
        source.wait_said(f"refused: user {STRANGER};")
        assert victim.is_frozen(source.pid)
        source.signal(signal.SIGTERM)
        assert source.wait() == 1
        victim.goes_on_here(tmp_path)


def test_an_address_for_all_is_warned_of(images: tuple[Path, Contents], tmp_path: Path) -> None:
    with page_server(
        images[0], "--lazy-pages", "--address", "0.0.0.0", "--insecure", output=tmp_path / "out"
    ) as server:
        server.wait_ready()
        assert "WARNING --insecure: every host that reaches 0.0.0.0 can read" in server.story()


def test_a_server_that_is_not_roots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own user and root may connect, nobody else."""
    monkeypatch.setattr(os, "geteuid", lambda: STRANGER)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        for user in (STRANGER, 0, STRANGER - 1):
            with socket_of(user, socket.AF_INET, listener.getsockname()):
                accepted, _ = listener.accept()
                with accepted:
                    if user in {STRANGER, 0}:
                        peers.check_peer(accepted)
                    else:
                        with pytest.raises(
                            peers.StrangerError,
                            match=f"refused: user {user}; from this host only user {STRANGER} and root",
                        ):
                            peers.check_peer(accepted)
