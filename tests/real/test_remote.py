"""The client of page servers: our own server on real sockets, and everything that can happen to them."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from lazypages.net.url import ConnectedSocket, TcpServer, UnixServer
from lazypages.net.wire import PAGE_SIZE, Layout
from lazypages.sources.remote import RemoteOptions
from tests.support.certificates import Authority
from tests.support.liar import LIES, Liar
from tests.support.pages import (
    BASE,
    KEEP_SERVING,
    LOOP_NAMES,
    LOOPS,
    Contents,
    PageServer,
    fetch,
    page_server,
    write_images,
)
from tests.support.proxy import Fault, Proxy

every_loop = pytest.mark.parametrize("loop", LOOPS, ids=LOOP_NAMES)
PROBE = 4  # bytes of the server's answer to the probe
HEADER = 32


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Contents]:
    """Two tasks: runs long and short, and every second page."""
    directory = tmp_path_factory.mktemp("images")
    runs = {77: [(0, 300), (400, 1), (500, 700)], 78: [(number, 1) for number in range(0, 200, 2)]}
    return directory, write_images(directory, runs)


@pytest.fixture(scope="module")
def server(images: tuple[Path, Contents]) -> Iterator[PageServer]:
    with page_server(images[0], *KEEP_SERVING) as server:
        server.wait_ready()
        yield server
        server.process.terminate()
        assert server.wait() == 0


@every_loop
def test_everything_once(loop: dict[str, Any], images: tuple[Path, Contents], server: PageServer) -> None:
    fetched = fetch([server.address], list(images[1]), loop=loop, connections=2)
    fetched.check(images[1])
    assert fetched.stats[0].pages == len(images[1])
    assert fetched.stats[0].connections == 2  # faults have their own


@pytest.mark.parametrize("layout", Layout)
def test_told_the_layout(layout: Layout, images: tuple[Path, Contents], server: PageServer) -> None:
    """Then it is not asked; our own server speaks both."""
    fetch([server.address], list(images[1])[:50], options=RemoteOptions(layout=layout)).check(
        dict(list(images[1].items())[:50])
    )


def test_addresses(images: tuple[Path, Contents], tmp_path: Path) -> None:
    """IPv6, names, unix sockets, and a socket that is connected already."""
    some = dict(list(images[1].items())[:40])
    with page_server(images[0], *KEEP_SERVING, "--address", "::1", output=tmp_path / "out") as server:
        server.wait_ready()
        fetch([TcpServer("::1", server.port)], list(some)).check(some)
        sock = socket.create_connection(("::1", server.port))
        fetch([ConnectedSocket(sock.detach())], list(some)).check(some)
    with page_server(images[0], *KEEP_SERVING, "--address", "localhost", output=tmp_path / "out") as server:
        server.wait_ready()
        fetch([TcpServer("localhost", server.port)], list(some)).check(some)
    path = tmp_path / "socket"
    options = [*KEEP_SERVING, "--address", f"unix:{path}", "--port", "1"]
    with page_server(images[0], *options, output=tmp_path / "out") as server:
        super(PageServer, server).wait_ready()
        fetch([UnixServer(path)], list(some)).check(some)
        server.process.terminate()
        assert server.wait() == 0
        assert not path.exists()


# -- loss ----------------------------------------------------------------------------------------------------

BOUNDARIES = [
    0,
    1,
    PROBE - 1,
    PROBE,
    PROBE + 1,
    PROBE + HEADER - 1,
    PROBE + HEADER,
    PROBE + HEADER + 1,
    PROBE + HEADER + PAGE_SIZE - 1,
    PROBE + HEADER + PAGE_SIZE,
    PROBE + HEADER + PAGE_SIZE + HEADER // 2,
]


@pytest.mark.loop("asyncio-reset", "asyncio-close", "asyncio-garbage")
@pytest.mark.parametrize("how", ["close", "reset", "garbage"])
@every_loop
def test_cut_anywhere(
    loop: dict[str, Any], how: str, images: tuple[Path, Contents], server: PageServer
) -> None:
    """Each of the first connections is cut at another place: on every boundary, and in the middle of all."""
    boundaries = BOUNDARIES
    some = dict(list(images[1].items())[:400])

    def plan(number: int) -> Fault | None:
        return Fault(boundaries[number], how) if number < len(boundaries) else None

    with Proxy(("127.0.0.1", server.port), plan) as proxy:
        fetched = fetch([TcpServer("127.0.0.1", proxy.port)], list(some), loop=loop)
        check_bytes(fetched.pages, some, how)
        assert proxy.connections > len(boundaries)


@pytest.mark.loop("reset")
@pytest.mark.parametrize("how", ["close", "reset", "garbage"])
def test_cut_anywhere_with_tls(how: str, images: tuple[Path, Contents], tmp_path: Path) -> None:
    """In the handshake, in the first messages, in the middle of records and between them: behind a relay."""
    authority = Authority(tmp_path / "pki")
    mine = authority.issue("both")
    some = dict(list(images[1].items())[:400])
    cuts = [0, 100, 1000, *range(1500, 4000, 100), 6000, 20_000, 20_001, 100_000, 300_000]
    told = RemoteOptions(tls=authority.files(mine))
    options = [*KEEP_SERVING, "--address", "127.0.0.1", *authority.options(mine)]

    def plan(number: int) -> Fault | None:
        return Fault(cuts[number], how) if number < len(cuts) else None

    with page_server(images[0], *options, output=tmp_path / "out") as server:
        server.wait_ready()
        with Proxy(("127.0.0.1", server.port), plan) as proxy:
            while proxy.connections < len(cuts):
                fetch([TcpServer("127.0.0.1", proxy.port, tls=True)], list(some), options=told).check(some)


def check_bytes(pages: Contents, expected: Contents, how: str) -> None:
    assert pages.keys() == expected.keys()
    if how != "garbage":  # noise in place of a page's bytes can't be told from them, only noise in headers
        assert pages == expected


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_500_random_cuts(images: tuple[Path, Contents], server: PageServer) -> None:
    """Every byte is right at the end, and no page comes twice."""
    rng = random.Random(4)
    cuts = [
        Fault(rng.randrange(PROBE, 3 * (HEADER + 64 * PAGE_SIZE)), rng.choice(["close", "reset"]))
        for _ in range(500)
    ]

    def plan(number: int) -> Fault | None:
        return cuts[number] if number < len(cuts) else None

    contents = images[1]
    with Proxy(("127.0.0.1", server.port), plan) as proxy:
        while proxy.connections < len(cuts):
            fetch([TcpServer("127.0.0.1", proxy.port)], list(contents), timeout=150).check(contents)


@every_loop
def test_wrong_answers(loop: dict[str, Any], images: tuple[Path, Contents]) -> None:
    """To another address, for another task, of too many pages, of what was asked before…: none of it is taken."""
    contents = images[1]
    with Liar(contents, 60) as liar:
        while not liar.truthful:
            fetch([TcpServer("127.0.0.1", liar.port)], list(contents), loop=loop).check(contents)
        assert liar.told == set(LIES)


def test_answers_in_another_order(images: tuple[Path, Contents], server: PageServer) -> None:
    """Three ways to the same server, each connection as slow as chance will have it: later requests come first."""
    contents = images[1]
    chance = random.Random(9)
    pauses = [chance.choice([0.0, 0.001, 0.02]) for _ in range(100)]
    with ExitStack() as stack:
        proxies = [
            stack.enter_context(
                Proxy(("127.0.0.1", server.port), lambda _: None, lambda number: pauses[number % 100])
            )
            for _ in range(3)
        ]
        addresses = [TcpServer("127.0.0.1", proxy.port) for proxy in proxies]
        fetched = fetch(addresses, list(contents))
        fetched.check(contents)
        assert all(one.pages for one in fetched.stats)


@pytest.mark.slow
def test_stalls(images: tuple[Path, Contents], server: PageServer) -> None:
    """Connections that fall silent: before the answer to the probe, in an answer, between answers."""
    some = dict(list(images[1].items())[:100])
    stalls = [0, PROBE + HEADER + 100, PROBE]

    def plan(number: int) -> Fault | None:
        return Fault(stalls[number], "stall") if number < len(stalls) else None

    with Proxy(("127.0.0.1", server.port), plan) as proxy:
        fetch([TcpServer("127.0.0.1", proxy.port)], list(some)).check(some)
        assert proxy.connections > 2


@pytest.mark.slow
def test_silent_server_is_kept(images: tuple[Path, Contents], server: PageServer) -> None:
    """One that takes no second connection and answers late, as CRIU's may, is not given up."""
    some = dict(list(images[1].items())[:100])
    proceed = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0), backlog=1)
    seen = bytearray()

    def late() -> None:
        client, _ = listener.accept()
        listener.close()
        with client, socket.create_connection(("127.0.0.1", server.port)) as upstream:

            def back() -> None:
                while data := upstream.recv(1 << 16):
                    if len(seen) > 2 * PAGE_SIZE:
                        proceed.wait(5)  # longer than the client's patience
                    seen.extend(data)
                    client.sendall(data)

            thread = threading.Thread(target=back)
            thread.start()
            while data := client.recv(1 << 16):
                upstream.sendall(data)
            upstream.shutdown(socket.SHUT_WR)
            thread.join()

    thread = threading.Thread(target=late)
    thread.start()
    try:
        timer = threading.Timer(6, proceed.set)
        timer.start()
        fetched = fetch([TcpServer("127.0.0.1", listener.getsockname()[1])], list(some))
        fetched.check(some)
        assert fetched.stats[0].connections == 1
    finally:
        proceed.set()
        thread.join()
        timer.join()


@pytest.mark.slow
def test_server_that_comes_later(images: tuple[Path, Contents], tmp_path: Path) -> None:
    """Refused at first; then ended and started again in the middle."""
    some = dict(list(images[1].items())[:300])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    servers: list[PageServer] = []

    def start() -> None:
        servers.append(
            page_server(
                images[0], *KEEP_SERVING, "--port", str(port), output=tmp_path / f"out-{len(servers)}"
            )
        )

    timer = threading.Timer(0.5, start)
    timer.start()
    try:
        fetch([TcpServer("127.0.0.1", port)], list(some)).check(some)
    finally:
        timer.join()
        for server in servers:
            server.__exit__(None, None, None)


@pytest.mark.slow
def test_told_server_that_is_not_there_yet(images: tuple[Path, Contents], tmp_path: Path) -> None:
    """Who accepts for it hangs up at once: it is asked less and less often, and no page counts as refused."""
    some = dict(list(images[1].items())[:300])
    servers: list[PageServer] = []
    hung_up = 0

    def stand_in(listener: socket.socket) -> None:
        nonlocal hung_up
        end = time.monotonic() + 2
        while time.monotonic() < end:
            with suppress(TimeoutError):
                listener.accept()[0].close()
                hung_up += 1
        listener.close()
        servers.append(page_server(images[0], *KEEP_SERVING, "--port", str(port), output=tmp_path / "out"))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        listener.settimeout(0.1)
        thread = threading.Thread(target=stand_in, args=(listener,))
        thread.start()
        try:
            options = RemoteOptions(layout=Layout.CRIU_4_1)
            fetched = fetch([TcpServer("127.0.0.1", port)], list(some), options=options)
        finally:
            thread.join()
            for server in servers:
                server.__exit__(None, None, None)
    fetched.check(some)
    assert 2 <= hung_up < 25


def test_several_servers(images: tuple[Path, Contents], server: PageServer, tmp_path: Path) -> None:
    """Reads are spread; one that refuses and one that cuts all the time are left out."""
    contents = images[1]
    with (
        page_server(images[0], *KEEP_SERVING, output=tmp_path / "out") as second,
        Proxy(("127.0.0.1", server.port), lambda number: Fault(PROBE + number * 100)) as proxy,
        socket.create_server(("127.0.0.1", 0)) as closed,
    ):
        second.wait_ready()
        dead = TcpServer("127.0.0.1", closed.getsockname()[1])
        closed.close()
        fetched = fetch(
            [dead, TcpServer("127.0.0.1", proxy.port), server.address, second.address], list(contents)
        )
    fetched.check(contents)
    assert fetched.stats[0].pages == 0
    assert fetched.stats[2].pages > 0
    assert fetched.stats[3].pages > 0


@pytest.mark.slow
def test_missing_pages(images: tuple[Path, Contents], server: PageServer) -> None:
    """Pages that the server has not: lost after the deadline, and nobody else suffers."""
    some = dict(list(images[1].items())[:300])
    missing = [(77, BASE + 300 * PAGE_SIZE), (77, BASE + 301 * PAGE_SIZE), (99, BASE)]
    fetched = fetch([server.address], [*some, *missing], options=RemoteOptions(deadline=3))
    assert fetched.pages == some
    assert set(fetched.lost) == set(missing)


def test_page_that_another_server_has(
    images: tuple[Path, Contents], server: PageServer, tmp_path: Path
) -> None:
    more = write_images(tmp_path / "more", {77: [(300, 10)]})
    with page_server(tmp_path / "more", *KEEP_SERVING) as second:
        second.wait_ready()
        fetch([server.address, second.address], list(more)).check(more)


@pytest.mark.slow
def test_deadline_without_server(images: tuple[Path, Contents]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = TcpServer("127.0.0.1", free.getsockname()[1])
    places = list(images[1])[:3]
    fetched = fetch([address], places, options=RemoteOptions(deadline=0.5), faults=1)
    assert set(fetched.lost) == set(places)
    assert "within 0.5 s" in next(iter(fetched.lost.values()))
