"""`lazypages page-server` as a command, and as a server of many clients; TLS between our own client and server."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from images_spec import pagemap
from lazypages.net import wire
from lazypages.net.tls import TlsError
from lazypages.net.url import TcpServer
from lazypages.net.wire import PAGE_SIZE, Command, Header, Layout
from lazypages.sources.page_server import RemoteOptions
from tests.support.certificates import Authority
from tests.support.pages import (
    BASE,
    KEEP_SERVING,
    LOOP_NAMES,
    LOOPS,
    Contents,
    PageServer,
    fetch,
    page_at,
    page_server,
    page_server_command,
    write_images,
)
from tests.support.processes import Server, wait_for

both = pytest.mark.parametrize("layout", Layout)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Contents]:
    directory = tmp_path_factory.mktemp("images")
    return directory, write_images(directory, {77: [(0, 300), (400, 8)]})


@pytest.fixture(scope="module")
def server(images: tuple[Path, Contents]) -> Iterator[PageServer]:
    with page_server(images[0], *KEEP_SERVING) as server:
        server.wait_ready()
        yield server


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("pki"))


def converse(port: int, said: bytes) -> bytes:
    """All that the server answers until it closes, or cuts us off."""
    answers = bytearray()
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=30) as sock:
        sock.sendall(said)
        sock.shutdown(socket.SHUT_WR)
        while data := sock.recv(1 << 16):
            answers += data
    return bytes(answers)


def receive(sock: socket.socket, count: int) -> bytes:
    """So many bytes, or fewer if the server closes."""
    received = bytearray()
    while len(received) < count and (data := sock.recv(count - len(received))):
        received += data
    return bytes(received)


def get(layout: Layout, first: int, count: int, pid: int = 77) -> bytes:
    return layout.pack(Header(Command.GET, count, BASE + first * PAGE_SIZE, pid))


def answer(layout: Layout, first: int, count: int, data: int = -1) -> bytes:
    pages = count if data < 0 else data
    header = layout.pack(Header(Command.ADD_F, count, BASE + first * PAGE_SIZE, 77, 4))
    return header + b"".join(page_at(77, BASE + i * PAGE_SIZE) for i in range(first, first + pages))


@both
def test_as_criu_speaks(layout: Layout, server: PageServer) -> None:
    """Whole and short answers, again and again, and CLOSE; in the layout of the client."""
    said = get(layout, 3, 2) + get(layout, 299, 1) + get(layout, 298, 9) + get(layout, 3, 2)
    expected = answer(layout, 3, 2) + answer(layout, 299, 1) + answer(layout, 298, 2) + answer(layout, 3, 2)
    assert converse(server.port, said + layout.pack(Header(Command.CLOSE))) == expected + bytes(4)


@both
@pytest.mark.parametrize(("first", "pid"), [(300, 77), (408, 77), (0, 78)])
def test_missing_page_as_criu(layout: Layout, first: int, pid: int, server: PageServer) -> None:
    """No answer, and the end of this connection, as with CRIU's server; what came before is answered."""
    said = get(layout, 3, 1) + get(layout, first, 1, pid) + get(layout, 4, 1)
    received = bytearray()
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as sock:
        sock.sendall(said)
        try:
            while data := sock.recv(1 << 16):
                received += data
        except ConnectionResetError:
            pass
    assert answer(layout, 3, 1).startswith(received)
    assert "which is not in the images" in server.story()


def test_garbage(server: PageServer) -> None:
    """A client that makes no sense is cut off; the others go on."""
    for said in (
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\xff" * 100,
        get(Layout.CRIU_4_2, 0, 1)[:20],
    ):
        assert converse(server.port, said) == b""
    added = Layout.CRIU_4_2.pack(Header(Command.OPEN2, dst_id=77 << 8 | 1))
    assert converse(server.port, added) == b""
    assert converse(server.port, get(Layout.CRIU_4_1, 0, 1)) == answer(Layout.CRIU_4_1, 0, 1)


def test_many_clients(images: tuple[Path, Contents], server: PageServer) -> None:
    """At the same time, on both protocols of CRIU's and on our own."""
    wrong: list[object] = []

    def old(layout: Layout) -> None:
        expected = answer(layout, 0, 300)
        wrong.extend(n for n in range(20) if converse(server.port, get(layout, 0, 300)) != expected)

    def own() -> None:
        try:
            fetch([server.address], list(images[1])).check(images[1])
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=old, args=(layout,)) for layout in Layout for _ in range(3)]
    threads += [threading.Thread(target=own) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []


def test_parents(tmp_path: Path) -> None:
    """Pages of the chain, to any depth; a hole without any page below is missing."""
    for level in range(4):
        directory = tmp_path / str(level)
        directory.mkdir()
        if level:
            (directory / "parent").symlink_to(f"../{level - 1}")
        # page `level` is here, those before are in the parent, the last one in none
        flags = [(BASE, level, 1)] * bool(level) + [(BASE + level * PAGE_SIZE, 1, 6)]
        pagemap.write(
            directory / "pagemap-77.img", 9, [*flags, (BASE + 10 * PAGE_SIZE, 1, 1 if level else 2)]
        )
        (directory / "pages-9.img").write_bytes(page_at(77, BASE + level * PAGE_SIZE))
    with page_server(tmp_path / "3", *KEEP_SERVING) as server:
        server.wait_ready()
        layout = Layout.CRIU_4_2
        assert converse(server.port, get(layout, 0, 9)) == answer(layout, 0, 4)
        assert converse(server.port, get(layout, 10, 1)) == b""


def test_zero_pages_are_not_sent(tmp_path: Path) -> None:
    """To our own client; one of CRIU's gets all their bytes."""
    (tmp_path / "images").mkdir()
    pagemap.write(tmp_path / "images" / "pagemap-77.img", 1, [(BASE, 64, 6)])
    (tmp_path / "images" / "pages-1.img").write_bytes(bytes(63 * PAGE_SIZE) + b"x" * PAGE_SIZE)
    zero = bytes(PAGE_SIZE)
    expected = {(77, BASE + i * PAGE_SIZE): zero for i in range(63)} | {
        (77, BASE + 63 * PAGE_SIZE): b"x" * PAGE_SIZE
    }
    with page_server(tmp_path / "images", *KEEP_SERVING) as server:
        server.wait_ready()
        fetch([server.address], list(expected), faults=1).check(expected)
        said = wire.PROBE_FIRST + get(Layout.CRIU_4_2, 0, 63)
        assert len(converse(server.port, said)) == wire.PROBE_ANSWER_SIZE + Layout.CRIU_4_2.header_size
        assert len(converse(server.port, get(Layout.CRIU_4_2, 0, 63))) == 32 + 63 * PAGE_SIZE


@pytest.mark.slow
@pytest.mark.parametrize("more", [0, 77])
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_file_cut_short(tls: bool, more: int, authority: Authority, tmp_path: Path) -> None:
    """While it is served: that is never answered with zeros, and the server lives on."""
    contents = write_images(tmp_path / "images", {77: [(0, 100)]})
    mine = authority.issue(f"cut-{tls}-{more}")
    options = [*KEEP_SERVING, *(["--address", "127.0.0.1", *authority.options(mine)] if tls else [])]
    with page_server(tmp_path / "images", *options) as server:
        server.wait_ready()
        os.truncate(tmp_path / "images" / "pages-1.img", 50 * PAGE_SIZE + more)
        told = RemoteOptions(deadline=2, tls=authority.files(mine))
        address = TcpServer("127.0.0.1", server.port, tls=tls)
        fetched = fetch([address], list(contents), options=told, faults=1)
        assert all(page == contents[place] for place, page in fetched.pages.items())
        assert {(77, BASE + i * PAGE_SIZE) for i in range(50, 100)} <= set(fetched.lost)
        assert server.process.poll() is None


# -- the command -----------------------------------------------------------------------------------------------


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        page_server_command(*arguments), capture_output=True, text=True, timeout=30, check=False
    )


@pytest.mark.loop("arguments2-cannot listen at 203.0.113.1")
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--lazy-pages", "--address", "0.0.0.0"], "use --tls or --insecure"),
        (["--lazy-pages", "--address", "::"], "use --tls or --insecure"),
        (["--lazy-pages", "--address", "203.0.113.1", "--insecure"], "cannot listen at 203.0.113.1"),
        (["--lazy-pages", "--tls", "--tls-cert", "/no/such"], "--tls-cert /no/such: No such file"),
        (["--prev-images-dir", "../nowhere"], "--prev-images-dir ../nowhere: not a directory"),
        (["--lazy-pages", "--ps-socket", "0"], "--ps-socket 0: not a connected socket"),
        (["-W", "/no/such"], "-W /no/such is not a directory"),
    ],
)
def test_refusals(arguments: list[str], says: str, images: tuple[Path, Contents]) -> None:
    """One line that says what to do, exit 1."""
    done = run("-D", images[0], *arguments)
    assert done.returncode == 1
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_no_images(tmp_path: Path) -> None:
    done = run("-D", tmp_path, "--lazy-pages")
    assert done.returncode == 1
    assert "has no pagemap image" in done.stderr


def test_loopback_unless_told(images: tuple[Path, Contents], tmp_path: Path) -> None:
    with page_server(images[0], *KEEP_SERVING, output=tmp_path / "out") as server:
        server.wait_ready()
        assert "page server at 127.0.0.1:" in server.story()
        assert "this host only" in server.story()
    with page_server(
        images[0], *KEEP_SERVING, "--address", "0.0.0.0", "--insecure", output=tmp_path / "out"
    ) as server:
        server.wait_ready()
        assert converse(server.port, get(Layout.CRIU_4_2, 0, 1)) == answer(Layout.CRIU_4_2, 0, 1)


def test_daemon(images: tuple[Path, Contents], tmp_path: Path) -> None:
    """The command returns when it listens; pidfile and log are in the work directory."""
    options = [*KEEP_SERVING, "-W", tmp_path, "-d", "--pidfile", "pid", "-o", "log", "-v3"]
    done = run("-D", images[0], *options)
    assert done.returncode == 0, done.stderr
    pid = int((tmp_path / "pid").read_text())
    try:
        log = tmp_path / "log"
        wait_for("the log", lambda: "page server at" in log.read_text())
        port = int(log.read_text().partition("page server at 127.0.0.1:")[2].split()[0])
        assert converse(port, get(Layout.CRIU_4_2, 0, 1)) == answer(Layout.CRIU_4_2, 0, 1)
        assert run("-D", images[0], *options).returncode == 1  # the pidfile exists
    finally:
        os.kill(pid, signal.SIGTERM)
        _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_signal_cuts_clients_off(images: tuple[Path, Contents], tmp_path: Path) -> None:
    with page_server(images[0], *KEEP_SERVING, output=tmp_path / "out") as server:
        server.wait_ready()
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as sock:
            sock.sendall(get(Layout.CRIU_4_2, 0, 1))
            assert sock.recv(1)
            server.process.terminate()
            assert server.wait(10) == 0


def test_signal_while_receiving(tmp_path: Path) -> None:
    """A dump that is cut off by us is not complete: exit 1. The same for one that goes without a word."""
    for begun in (False, True):
        with page_server(tmp_path) as server:
            server.wait_ready()
            with socket.create_connection(("127.0.0.1", server.port), timeout=30) as sock:
                if begun:
                    sock.sendall(Layout.CRIU_4_2.pack(Header(Command.OPEN2, dst_id=77 << 8 | 1)))
                    assert sock.recv(1) == b"\0"
                else:
                    wait_for("the connection", lambda: "connected" in server.story())
                    sock.shutdown(
                        socket.SHUT_RDWR
                    )  # before it has closed, so that it can be asked for its user
                    assert server.wait(10) == 1
                    continue
                server.process.terminate()
                assert server.wait(10) == 1


def test_a_socket_that_somebody_listens_at(tmp_path: Path) -> None:
    """The second server finds that out without being taken for the dump that the first one waits for."""
    where = tmp_path / "socket"
    command = page_server_command("-D", tmp_path, "--address", f"unix:{where}")
    with Server(command, output=tmp_path / "out") as server:
        server.wait_ready()
        done = run("-D", tmp_path, "--address", f"unix:{where}")
        assert done.returncode == 1
        assert f"cannot listen at unix:{where}: Address already in use" in done.stderr
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(30)
            sock.connect(str(where))
            sock.sendall(Layout.CRIU_4_2.pack(Header(Command.CLOSE)))
            assert sock.recv(4) == bytes(4)
        assert server.wait(10) == 0


def test_no_room_for_what_is_received(tmp_path: Path) -> None:
    command = ["prlimit", f"--fsize={8 * PAGE_SIZE}", *page_server_command("-D", tmp_path, "-v3")]
    with PageServer(command, output=tmp_path / "out") as server:
        server.wait_ready()
        header = Header(Command.ADD_F, 64, BASE, 77 << 8 | 1, wire.PageFlags.PRESENT)
        converse(server.port, Layout.CRIU_4_2.pack(header) + b"x" * (64 * PAGE_SIZE))
        assert server.wait(10) == 1
    story = (tmp_path / "out").read_text()
    assert "the images can't be written: File too large" in story
    assert "Traceback" not in story


# -- TLS -------------------------------------------------------------------------------------------------------


@pytest.mark.loop("trio")
@pytest.mark.parametrize("loop", LOOPS, ids=LOOP_NAMES)
def test_tls(
    loop: dict[str, str], images: tuple[Path, Contents], authority: Authority, tmp_path: Path
) -> None:
    ours, theirs = authority.issue("one"), authority.issue("two")
    options = [
        *KEEP_SERVING,
        "--address",
        "127.0.0.1",
        *authority.options(ours, "--tls-cacrl", str(authority.crl)),
    ]
    with page_server(images[0], *options, output=tmp_path / "out") as server:
        server.wait_ready()
        address = TcpServer("127.0.0.1", server.port, tls=True)
        told = RemoteOptions(tls=authority.files(theirs, crl=True))
        fetch([address], list(images[1]), options=told, loop=loop).check(images[1])


def test_a_certificate_for_each_host(images: tuple[Path, Contents], tmp_path: Path) -> None:
    """One authority; each certificate names its own host. The server needs no name in the client's."""
    authority = Authority(tmp_path / "pki")
    server_cert, client_cert = (
        authority.issue("server", "IP:127.0.0.1"),
        authority.issue("client", "DNS:desk"),
    )
    options = [*KEEP_SERVING, "--address", "127.0.0.1", *authority.options(server_cert)]
    with page_server(images[0], *options, output=tmp_path / "out") as server:
        server.wait_ready()
        address = TcpServer("127.0.0.1", server.port, tls=True)
        told = RemoteOptions(tls=authority.files(client_cert))
        fetch([address], list(images[1]), options=told).check(images[1])


#: What each side says: the client, and the server.
REFUSALS = {
    "plain client": ("the page server uses TLS: connect with --tls", "the client does not use TLS"),
    "plain server": (
        "the server does not use TLS: it needs --tls, too",
        "was started without --tls",
    ),
    "foreign client": (
        "the server refuses our certificate: its --tls-cacert",
        "the client's certificate is not valid",
    ),
    "foreign server": (
        "the server's certificate is not valid here",
        "the client refuses our certificate: its --tls-",
    ),
    "revoked client": ("the server refuses our certificate: it is revoked", "(certificate revoked)"),
    "revoked server": ("(certificate revoked)", "the client refuses our certificate: it is revoked"),
    "name": (
        "certificate is for other, not for 127.0.0.1",
        "it may refuse our certificate, which is for other",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSALS)
def test_tls_refuses(
    case: str, images: tuple[Path, Contents], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Not one page for, or from, somebody who can't be trusted; and both sides say why."""
    authority, foreign = Authority(tmp_path / "pki"), Authority(tmp_path / "other", "stranger")
    server_cert = authority.issue("server", "DNS:other" if case == "name" else "IP:127.0.0.1")
    client_cert = authority.issue("client", "IP:127.0.0.1")
    if case == "foreign client":
        client_cert = foreign.issue("client")
    if case == "foreign server":
        server_cert = foreign.issue("server")
    if case.startswith("revoked"):
        authority.revoke(client_cert if case == "revoked client" else server_cert)
    options = [*KEEP_SERVING, "--address", "127.0.0.1"]
    if case != "plain server":
        options += authority.options(server_cert, "--tls-cacrl", str(authority.crl))
    with page_server(images[0], *options, output=tmp_path / "out") as server:
        server.wait_ready()
        address = TcpServer("127.0.0.1", server.port, tls=case != "plain client")
        told = RemoteOptions(tls=authority.files(client_cert, crl=True), deadline=1)
        fetched = fetch([address], list(images[1])[:5], options=told, faults=1)
        assert fetched.pages == {}
        assert len(fetched.lost) == 5
        story = server.story()
        assert "disconnected after" not in story or case in {"name", "plain server"}
        said_by_client, said_by_server = REFUSALS[case]
        assert said_by_client in caplog.text
        assert said_by_server in story
    # ... and with the name not checked it works
    if case == "name":
        with page_server(images[0], *options, "--tls-no-cn-verify", output=tmp_path / "out") as server:
            server.wait_ready()
            address = TcpServer("127.0.0.1", server.port, tls=True)
            told = RemoteOptions(tls=authority.files(client_cert, check_name=False))
            some = dict(list(images[1].items())[:5])
            fetch([address], list(some), options=told).check(some)


def test_tls_files_that_are_not_there(images: tuple[Path, Contents], tmp_path: Path) -> None:
    """Known before any page is asked for."""
    authority = Authority(tmp_path / "pki")
    files = authority.files(authority.issue("gone"))
    files.key.unlink()
    with pytest.raises(TlsError, match=r"--tls-key .*No such file"):
        fetch([TcpServer("127.0.0.1", 1, tls=True)], [(77, BASE)], options=RemoteOptions(tls=files))


# -- clients that behave badly --------------------------------------------------------------------------------


def test_client_that_does_not_read(server: PageServer) -> None:
    """Its answers fill the sockets, and then only its own thread waits; the others are served, and so is it, later."""
    layout, number = Layout.CRIU_4_2, 200
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as slow:
        said = get(layout, 0, 300) * number  # 240 MB of answers, more than any socket holds
        slow.sendall(said)
        for _ in range(20):
            assert converse(server.port, get(layout, 3, 2)) == answer(layout, 3, 2)
        slow.shutdown(socket.SHUT_WR)
        expected = answer(layout, 0, 300)
        assert all(receive(slow, len(expected)) == expected for _ in range(number))
        assert slow.recv(1) == b""


def test_signal_while_a_client_does_not_read(images: tuple[Path, Contents], tmp_path: Path) -> None:
    with page_server(images[0], *KEEP_SERVING, output=tmp_path / "out") as server:
        server.wait_ready()
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as sock:
            sock.sendall(get(Layout.CRIU_4_2, 0, 300) * 200)
            assert sock.recv(1)
            server.process.terminate()
            assert server.wait(10) == 0


def test_one_line_for_garbage(images: tuple[Path, Contents], tmp_path: Path) -> None:
    """After good requests too, where C has the connection in hand; nothing that the client said is in the log."""
    with page_server(images[0], *KEEP_SERVING, output=tmp_path / "out") as server:
        server.wait_ready()
        layout = Layout.CRIU_4_2
        said = get(layout, 0, 1) * 3 + b"\xfeSECRET!" * 4000
        received = converse(server.port, said)
        assert (answer(layout, 0, 1) * 3).startswith(received)  # the rest may be lost in the reset
        wait_for("the end of the connection", lambda: "disconnected after" in server.story())
        lines = [line for line in (tmp_path / "out").read_text().splitlines() if "closing" in line]
        assert len(lines) == 1
        assert "unknown command" in lines[0]
        assert "SECRET" not in server.story()


@pytest.mark.slow
def test_more_clients_than_files(images: tuple[Path, Contents], tmp_path: Path) -> None:
    """Those that are too many wait until others have gone; the server says so, and does not spin."""
    with page_server(images[0], *KEEP_SERVING, output=tmp_path / "out") as server:
        server.wait_ready()
        used = len(os.listdir(f"/proc/{server.process.pid}/fd"))
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (used + 6, used + 6))
        with ExitStack() as stack:
            clients = [
                stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=30))
                for _ in range(10)
            ]
            wait_for("the limit", lambda: "cannot accept a client: Too many open files" in server.story())
            for client in clients:
                client.sendall(get(Layout.CRIU_4_2, 0, 1))
            for client in clients:
                assert receive(client, 32 + PAGE_SIZE) == answer(Layout.CRIU_4_2, 0, 1)
                client.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("mode", ["--lazy-pages", "receive"])
def test_ps_socket(mode: str, images: tuple[Path, Contents], tmp_path: Path) -> None:
    """A connected socket that the caller has; a non-blocking one will do. A signal ends it, idle as it is."""
    for signalled in (False, True):
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        directory = images[0] if mode == "--lazy-pages" else tmp_path
        options = [mode] if mode == "--lazy-pages" else []
        command = page_server_command("-D", directory, "-v3", *options, "--ps-socket", ours.fileno())
        with theirs, Server(command, output=tmp_path / "out", pass_fds=[ours.fileno()]) as server:
            ours.close()
            theirs.settimeout(30)
            if mode == "--lazy-pages":
                theirs.sendall(get(Layout.CRIU_4_2, 0, 300))
                expected = answer(Layout.CRIU_4_2, 0, 300)
                assert receive(theirs, len(expected)) == expected
            else:
                theirs.sendall(Layout.CRIU_4_2.pack(Header(Command.OPEN2, dst_id=77 << 8 | 1)))
                assert theirs.recv(1) == b"\0"
            if signalled:
                server.process.terminate()
            else:
                theirs.sendall(Layout.CRIU_4_2.pack(Header(Command.FORCE_CLOSE)))
                assert theirs.recv(4) == bytes(4)
                theirs.shutdown(socket.SHUT_WR)
            assert server.wait(10) == (1 if signalled and mode == "receive" else 0)
