"""Compression between our own client and server, over a slow link: fewer bytes cross, and every byte is right."""

from __future__ import annotations

import json
import random
from contextlib import ExitStack
from pathlib import Path

import pytest

from images_spec import pagemap
from lazypages.net.trial import PHASE_BYTES
from lazypages.net.url import TcpServer
from lazypages.net.wire import PAGE_SIZE
from lazypages.sources.page_server import RemoteOptions
from lazypages.sources.remote import ServerStats
from tests.support.certificates import Authority
from tests.support.fake import BASE as BASE_OF_TASKS
from tests.support.fake import restored_tasks, serve_command, write_images
from tests.support.hosts import Link, two_hosts
from tests.support.pages import BASE, Contents, fetch, page_server, page_server_command
from tests.support.processes import Server
from tests.support.slow_link import SlowLink

MIB = 1 << 20
PAGES = 12 * MIB // PAGE_SIZE
RATE = 5 * MIB  # bytes a second
WORDS = [b"%d=word" % number for number in range(300)]


def compressible(number: int) -> bytes:
    """A page of text and small numbers: some of what programs keep in memory."""
    return b" ".join(random.Random(number).choices(WORDS, k=PAGE_SIZE))[:PAGE_SIZE]


def noise(number: int) -> bytes:
    return random.Random(number).randbytes(PAGE_SIZE)


def write(directory: Path, kind: str) -> Contents:
    directory.mkdir()
    pages = [(compressible if kind == "compressible" else noise)(number) for number in range(PAGES)]
    pagemap.write(directory / "pagemap-77.img", 1, [(BASE, PAGES, 6)])
    (directory / "pages-1.img").write_bytes(b"".join(pages))
    return {(77, BASE + number * PAGE_SIZE): page for number, page in enumerate(pages)}


def fetch_slowly(
    contents: Contents, images: Path, tmp_path: Path, *, authority: Authority | None
) -> tuple[int, ServerStats]:
    """All pages over the slow link: bytes that crossed it, and what the client has counted."""
    told, options = RemoteOptions(), ["--lazy-pages"]
    if authority is not None:
        mine = authority.issue("both", f"IP:127.0.0.1,IP:{SlowLink.host}")
        told = RemoteOptions(tls=authority.files(mine))
        options += ["--address", "127.0.0.1", *authority.options(mine)]
    with page_server(images, *options, output=tmp_path / "out") as server:
        server.wait_ready()
        with SlowLink(("127.0.0.1", server.port), RATE) as link:
            address = TcpServer(link.host, link.port, tls=authority is not None)
            fetched = fetch([address], list(contents), options=told, faults=200)
            crossed = link.crossed
    fetched.check(contents)
    (stats,) = fetched.stats
    assert stats.pages == PAGES
    assert stats.bytes == PAGES * PAGE_SIZE
    return crossed, stats


@pytest.mark.loop("plain")
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_compressible(tls: bool, tmp_path: Path) -> None:
    """Fewer bytes cross; the numbers say how many pages came so, in how many bytes.

    On a busy machine the compressor may be found too slow after the first try; that try there always is.
    """
    contents = write(tmp_path / "images", "compressible")
    authority = Authority(tmp_path / "pki") if tls else None
    crossed, stats = fetch_slowly(contents, tmp_path / "images", tmp_path, authority=authority)
    assert crossed < 0.95 * PAGES * PAGE_SIZE
    assert stats.compressed_pages * PAGE_SIZE >= PHASE_BYTES
    assert 0 < stats.compressed_bytes < 0.5 * stats.compressed_pages * PAGE_SIZE
    plain = (PAGES - stats.compressed_pages) * PAGE_SIZE
    assert plain + stats.compressed_bytes <= crossed < 1.02 * (plain + stats.compressed_bytes) + (64 << 10)


@pytest.mark.slow
def test_noise(tmp_path: Path) -> None:
    """What does not get shorter crosses as it is, although the client would take it compressed."""
    contents = write(tmp_path / "images", "noise")
    crossed, stats = fetch_slowly(contents, tmp_path / "images", tmp_path, authority=None)
    assert stats.compressed_pages == stats.compressed_bytes == 0
    assert PAGES * PAGE_SIZE <= crossed < 1.02 * PAGES * PAGE_SIZE


@pytest.mark.slow
def test_a_restored_task_from_another_host(restored_program: Path, tmp_path: Path) -> None:
    """All of it together: its background comes compressed, its faults do not, and it finds every byte right."""
    here, there = tmp_path / "here", tmp_path / "there"
    with two_hosts(Link(delay=0.001, rate=20e6)) as (source, destination), ExitStack() as stack:
        tasks = stack.enter_context(restored_tasks(restored_program, 1, PAGES))
        for directory in (here, there):
            directory.mkdir()
            write_images(directory, tasks.pids, PAGES)
        (pagemap_file,) = there.glob("pagemap-*.img")
        pagemap.write(pagemap_file, 1, [(BASE_OF_TASKS, PAGES, 2)])  # lazy, and not here
        (there / "pages-1.img").write_bytes(b"")
        listen = ["--lazy-pages", "--address", source.address, "--port", "27000", "--insecure"]
        server = Server(
            source.command(*page_server_command("-D", here, *listen)), output=tmp_path / "page-server.out"
        )
        server = stack.enter_context(server)
        server.wait_ready()
        ask = ["--page-server", "--address", source.address, "--port", "27000"]
        daemon = Server(
            destination.command(*serve_command(there, *ask)),
            output=tmp_path / "serve.out",
            logs=[tmp_path / "page-server.out"],
        )
        daemon = stack.enter_context(daemon)
        daemon.wait_ready()
        tasks.say(f"connect {there}/lazy-pages.socket")
        tasks.say("touch 20")
        tasks.say("finish")
        assert daemon.wait() == 0
        tasks.say("check")
        assert tasks.statuses() == [0]
        crossed = source.sent()
    (stats,) = json.loads((there / "stats.json").read_text())["page_servers"]
    assert stats["compressed_pages"] * PAGE_SIZE >= PHASE_BYTES
    assert crossed < 0.95 * PAGES * PAGE_SIZE
