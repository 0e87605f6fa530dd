"""Pages that a server of pages has and can't read: lost, said to be lost, and no page beside them suffers."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
from contextlib import suppress
from pathlib import Path

import anyio
import pytest

from images_spec import pagemap
from images_spec.flags import PE_LAZY
from lazypages.net import wire
from lazypages.net.url import TcpServer
from lazypages.net.wire import PAGE_SIZE, ClientCodec, Command, Features, Header, Layout
from lazypages.sources.page_server import RemoteOptions
from lazypages.sources.pool import DENIED
from lazypages.sources.remote import open_remote
from tests.real.test_dump_lazy import lazy_dump
from tests.support import fake
from tests.support.bad_disk import bad_disk
from tests.support.certificates import Authority
from tests.support.dumptool import pages, task
from tests.support.pages import BASE, Contents, fetch, page_server, write_images
from tests.support.processes import nothing_left, wait_for
from tests.support.sink import Sink

PAGES = 1500
#: 40 pages: alone, side by side, the first and the last, at both sides of a 256 KiB buffer
BAD = {0, 63, 64, 65, 127, 128, 500, PAGES - 1} | set(range(700, 720)) | set(range(900, 1500, 50))


def place(page: int) -> tuple[int, int]:
    return 77, BASE + page * PAGE_SIZE


def split(contents: Contents) -> tuple[Contents, set[tuple[int, int]]]:
    """What can be had, and what is lost."""
    lost = {place(page) for page in BAD}
    return {at: page for at, page in contents.items() if at not in lost}, lost


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tls", "direct"),
    [(False, False), (False, True), (True, True)],
    ids=["plain, page cache", "plain, direct", "tls"],
)
def test_all_but_the_bad_pages(tls: bool, direct: bool, tmp_path: Path) -> None:
    """There is no deadline, and no connection is lost but where an answer had promised a page."""
    good, lost = split(write_images(tmp_path / "images", {77: [(0, PAGES)]}))
    assert len(lost) == 40
    authority = Authority(tmp_path / "pki")
    mine = authority.issue("both")
    options = ["--lazy-pages", *(["--address", "127.0.0.1", *authority.options(mine)] if tls else [])]
    with (
        bad_disk(tmp_path / "images", tmp_path / "disk", BAD, direct=direct) as disk,
        page_server(disk, *options, output=tmp_path / "out") as server,
    ):
        server.wait_ready()
        told = RemoteOptions(tls=authority.files(mine))
        fetched = fetch([TcpServer("127.0.0.1", server.port, tls=tls)], [*good, *lost], options=told)
        story = server.story()
    assert fetched.pages == good
    assert set(fetched.lost) == lost
    assert set(fetched.lost.values()) == {DENIED}
    assert "can't be read and is lost" in story
    assert "Input/output error" in story
    assert fetched.stats[0].connections <= 6


def test_a_disk_that_heals(tmp_path: Path) -> None:
    """A page that can't be read is asked for again, for a while: then nothing is lost."""
    contents = write_images(tmp_path / "images", {77: [(0, 100)]})
    bad = {10, 11, 60}
    with (
        bad_disk(tmp_path / "images", tmp_path / "disk", bad, direct=True) as disk,
        page_server(disk, "--lazy-pages", output=tmp_path / "out") as server,
    ):
        server.wait_ready()

        def heal() -> None:  # as soon as it has been found: the client has not given up by then
            wait_for("a bad page", lambda: "can't be read" in server.story())
            bad.clear()

        healer = threading.Thread(target=heal)
        healer.start()
        fetch([server.address], list(contents)).check(contents)
        healer.join()


@pytest.mark.slow
def test_a_restored_task(restored_program: Path, tmp_path: Path) -> None:
    """Faults and background in the engine: the daemon ends, all is there but what is lost, and that is SIGBUS."""
    here, there = tmp_path / "here", tmp_path / "there"
    with nothing_left(), fake.restored_tasks(restored_program, 1, PAGES) as tasks:
        for directory in (here, there):
            directory.mkdir()
            fake.write_images(directory, tasks.pids, PAGES)
        pagemap.write(there / f"pagemap-{tasks.pids[0]}.img", 1, [(fake.BASE, PAGES, PE_LAZY)])
        (there / "pages-1.img").write_bytes(b"")
        with (
            bad_disk(here, tmp_path / "disk", BAD - {0}, direct=True) as disk,
            page_server(disk, "--lazy-pages", output=tmp_path / "out") as server,
        ):
            server.wait_ready()
            with fake.serve(there, "--page-server", "--port", str(server.port)) as daemon:
                daemon.wait_ready()
                tasks.say(f"connect {there}/lazy-pages.socket")
                tasks.say("touch 63")
                tasks.say("finish")
                assert daemon.wait() == 1
                assert DENIED in daemon.story()
                tasks.say("touch 63")
                tasks.say("check")
                assert tasks.statuses() == [128 + signal.SIGBUS]
        (counted,) = json.loads((there / "stats.json").read_text())["tasks"]
        assert counted["state"] == "lost"
        assert counted["pages"]["copied_by_source"] == {"remote": PAGES - len(BAD) + 1}


def converse(port: int, *said: bytes) -> bytes:
    """All that the server answers until it closes; the first message is for Python, then C has the connection."""
    answers = bytearray()
    with suppress(ConnectionResetError), socket.create_connection(("127.0.0.1", port), timeout=30) as sock:
        sock.sendall(said[0])
        answers += sock.recv(1 << 16)
        for message in said[1:]:
            sock.sendall(message)
        while data := sock.recv(1 << 16):
            answers += data
    return bytes(answers)


@pytest.mark.parametrize("layout", Layout)
def test_as_criu_speaks(layout: Layout, tmp_path: Path) -> None:
    """There is no word for a lost page: answers end before it, and the connection when it is the first one."""
    contents = write_images(tmp_path / "images", {77: [(0, PAGES)]})

    def get(first: int, count: int = 1024) -> bytes:
        return layout.pack(Header(Command.GET, count, BASE + first * PAGE_SIZE, 77))

    def answer(first: int, end: int) -> bytes:
        header = Header(Command.ADD_F, end - first, BASE + first * PAGE_SIZE, 77, wire.PageFlags.PRESENT)
        return layout.pack(header) + b"".join(contents[place(page)] for page in range(first, end))

    options = ["--lazy-pages", "--keep-serving"]
    with (
        bad_disk(tmp_path / "images", tmp_path / "disk", {500, 1100}, direct=True) as disk,
        page_server(disk, *options, output=tmp_path / "out") as server,
    ):
        server.wait_ready()
        first, start = get(1, 1), answer(1, 2)
        promised = converse(server.port, first, get(0))
        assert promised.startswith(start)
        assert promised[len(start) + layout.header_size :] in b"".join(
            contents[place(page)] for page in range(500)
        )
        assert len(promised) < 501 * PAGE_SIZE
        wait_for("the end", lambda: "cannot complete an answer" in server.story())
        # once known to be bad, no answer promises what has not been read
        said = get(0) + get(64) + get(450) + get(500) + get(1)
        expected = start + answer(0, 64) + answer(64, 128) + answer(450, 500)
        received = converse(server.port, first, said)
        assert expected.startswith(received)  # the end may be lost in the reset
        assert len(received) > len(start)
        assert converse(server.port, first, get(500)) == start
        assert converse(server.port, get(500)) == b""
        assert server.process.poll() is None


def test_a_client_told_the_layout(tmp_path: Path) -> None:
    """Ours, that takes the server for CRIU's: it finds out which pages are at fault. The others come, however long
    that takes; these alone are given up, at the deadline.
    """
    contents = write_images(tmp_path / "images", {77: [(0, 600)]})
    bad = {place(page): contents.pop(place(page)) for page in (5, 6, 300)}
    with (
        bad_disk(tmp_path / "images", tmp_path / "disk", {5, 6, 300}) as disk,
        page_server(disk, "--lazy-pages", "--keep-serving", output=tmp_path / "out") as server,
    ):
        server.wait_ready()
        came: Contents = {}
        told = RemoteOptions(layout=Layout.CRIU_4_1)

        def on_pages(pid: int, address: int, data: bytes) -> None:
            for offset in range(0, len(data), PAGE_SIZE):
                came[pid, address + offset] = data[offset : offset + PAGE_SIZE]

        def on_lost(*_: object) -> None:
            pytest.fail("there is no deadline")

        async def run() -> int:
            with anyio.fail_after(60), Sink(on_pages) as sink:
                async with open_remote([server.address], on_lost, told, engine=sink) as remote:
                    remote.request([(77, BASE, 600)], urgent=False)
                    while len(came) < len(contents):
                        await anyio.sleep(0.005)
                    return remote.stats()[0].connections

        assert anyio.run(run) < 100
        assert came == contents
        told = RemoteOptions(layout=Layout.CRIU_4_1, deadline=1)
        fetched = fetch([server.address], list(bad), options=told, faults=1)
    assert fetched.pages == {}
    assert fetched.lost.keys() == bad.keys()


def test_compressed_answers(tmp_path: Path) -> None:
    """Python reads for them; they end before a bad page as well."""
    contents = write_images(tmp_path / "images", {77: [(0, 300)]})
    answered: list[tuple[int, int, bool]] = []
    with (
        bad_disk(tmp_path / "images", tmp_path / "disk", {100, 101, 200}) as disk,
        page_server(disk, "--lazy-pages", output=tmp_path / "out") as server,
    ):
        server.wait_ready()
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as sock:
            sock.sendall(wire.PROBE_FIRST)
            features = wire.probe_answer(sock.recv(wire.PROBE_ANSWER_SIZE, socket.MSG_WAITALL))
            assert features is not None
            assert features & Features.COMPRESSED
            codec = ClientCodec(Layout.CRIU_4_2, features)
            for first in (0, 100, 101, 102, 200, 201):
                sock.sendall(codec.get(77, BASE + first * PAGE_SIZE, 300, compress=True))
            while len(answered) < 6:
                codec.received(sock.recv_into(codec.writable()))
                while (event := codec.next_event()) is not None:
                    match event:
                        case wire.Pages(_, address, data):
                            for offset in range(0, len(data), PAGE_SIZE):
                                assert data[offset : offset + PAGE_SIZE] == contents[77, address + offset]
                        case wire.Answered(asked, nr_pages, frame):
                            answered.append(((asked.vaddr - BASE) // PAGE_SIZE, nr_pages, frame > 0))
    assert answered == [
        (0, 100, True),
        (100, 0, False),
        (101, 0, False),
        (102, 98, True),
        (200, 0, False),
        (201, 99, True),
    ]


@pytest.mark.slow
def test_a_frozen_task(tmp_path: Path) -> None:
    """`dumptool dump --lazy-pages` of a task with memory that the kernel does not give."""
    program, said = tmp_path / "poisoned", tmp_path / "said"
    source = Path(__file__).parents[1] / "support" / "programs" / "poisoned.c"
    subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", "-o", program, source], check=True, timeout=60)
    count, step = 512, 13
    with task(program, str(count), str(step), output=said) as pid:
        wait_for("its memory", lambda: said.exists() and said.read_text().endswith("\n"))
        base = int(said.read_text(), 16)
        with lazy_dump(pid, tmp_path / "images") as source_of_pages:
            source_of_pages.wait_ready()
            lazy = [at for at, flags in pages(tmp_path / "images", pid).items() if flags == PE_LAZY]
            bad = {(pid, base + page * PAGE_SIZE) for page in range(0, count, step)}
            assert bad <= {(pid, at) for at in lazy}
            fetched = fetch([TcpServer("127.0.0.1", source_of_pages.port)], [(pid, at) for at in lazy])
            assert fetched.lost.keys() == bad
            for page in set(range(count)) - set(range(0, count, step)):
                assert fetched.pages[pid, base + page * PAGE_SIZE] == bytes([page % 255 + 1]) * PAGE_SIZE
            assert source_of_pages.wait() == 0
            assert "can't be read and is lost" in source_of_pages.story()
            assert fetched.stats[0].connections == 2


@pytest.mark.slow
def test_most_of_a_file_is_gone(tmp_path: Path) -> None:
    """Thousands of lost pages take seconds, not the square of that."""
    contents = write_images(tmp_path / "images", {77: [(0, 4000)]})
    with page_server(tmp_path / "images", "--lazy-pages", output=tmp_path / "out") as server:
        server.wait_ready()
        os.truncate(tmp_path / "images" / "pages-1.img", 1000 * PAGE_SIZE)
        fetched = fetch([server.address], list(contents), timeout=100)
    assert fetched.pages == {place(page): contents[place(page)] for page in range(1000)}
    assert fetched.lost.keys() == {place(page) for page in range(1000, 4000)}
