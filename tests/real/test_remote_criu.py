"""Our client with real CRIU's servers, 4.1.1 and 4.2.1: every lazy page, byte for byte."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from images_spec.flags import PE_LAZY, PE_PRESENT
from images_spec.pagemap import Pagemap
from lazypages.bench.pipes import raised_pipe_limit
from lazypages.net.url import TcpServer
from lazypages.net.wire import PAGE_SIZE, Layout
from lazypages.sources.page_server import RemoteOptions
from tests.support.criu import Criu, all_criu
from tests.support.pages import LOOP_NAMES, LOOPS, Contents, fetch
from tests.support.processes import nothing_left, start, wait_for
from tests.support.restore import Checkpoints, Program

both = pytest.mark.parametrize("criu", all_criu())


@pytest.fixture(autouse=True)
def _pipes() -> Iterator[None]:
    with raised_pipe_limit():
        yield


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


def lazy_pages(images: Path) -> Contents:
    """What the page images of a directory say of all pages that are lazy there."""
    contents: Contents = {}
    for path in images.glob("pagemap-*.img"):
        pid = path.stem.removeprefix("pagemap-")
        if not pid.isdigit():
            continue
        pages = Pagemap.load(path)
        with (images / f"pages-{pages.pages_id}.img").open("rb") as file:
            for vaddr, nr_pages, flags in pages:
                for address in range(vaddr, vaddr + nr_pages * PAGE_SIZE, PAGE_SIZE):
                    data = file.read(PAGE_SIZE) if flags & PE_PRESENT else b""
                    if flags & PE_LAZY:
                        contents[int(pid), address] = data
    return contents


def read_memory(pid: int, places: list[tuple[int, int]]) -> Contents:
    """The pages as the task itself has them."""
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        return {place: os.pread(memory.fileno(), PAGE_SIZE, place[1]) for place in places}


def layout_of(criu: Criu) -> Layout:
    return Layout.CRIU_4_2 if criu.wire_header_size == 32 else Layout.CRIU_4_1


def how_told(criu: Criu) -> list[RemoteOptions]:
    """All ways in which a user or the images may have said, or not, whom we talk to; some of them wrong."""
    layout = layout_of(criu)
    return [
        RemoteOptions(),
        RemoteOptions(layout=layout),
        RemoteOptions(written_by=Layout.CRIU_4_1),
        RemoteOptions(written_by=Layout.CRIU_4_2),
    ]


@pytest.mark.loop("nothing-criu-4.2")
@both
@pytest.mark.parametrize("told", range(4), ids=["nothing", "layout", "images of 4.1", "images of 4.2"])
def test_page_server(criu: Criu, told: int, checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoint = checkpoints.get(criu, "single")
    contents = lazy_pages(checkpoint.images)
    port = free_port()
    options = ["--lazy-pages", "--address", "127.0.0.1", "--port", str(port)]
    with nothing_left(), criu.page_server(checkpoint.images, *options, work=tmp_path) as server:
        server.wait_ready()
        loop: dict[str, Any] = LOOPS[told % len(LOOPS)]
        fetched = fetch(
            [TcpServer("127.0.0.1", port)], list(contents), options=how_told(criu)[told], loop=loop
        )
        assert server.wait() == 0  # it has got our CLOSE
    fetched.check(contents)
    assert fetched.stats[0].connections == 1


@pytest.mark.loop("asyncio-criu-4.2")
@both
@pytest.mark.parametrize("loop", LOOPS, ids=LOOP_NAMES)
def test_frozen_task(criu: Criu, loop: dict[str, Any], program: Program, tmp_path: Path) -> None:
    """`criu dump --lazy-pages` gives the bytes that the frozen task has."""
    lazy, results = tmp_path / "lazy", tmp_path / "results"
    for directory in (lazy, results):
        directory.mkdir()
    port = free_port()
    with nothing_left():
        victim = start(program.command("single", results), cwd="/")
        wait_for("the victim to fill its memory", (results / "ready").exists)
        options = ["--address", "127.0.0.1", "--port", str(port)]
        with criu.lazy_dump(victim.pid, lazy, *options) as server:
            server.wait_ready()
            promised = lazy_pages(lazy)
            assert not any(promised.values())
            assert len(promised) > 1000
            contents = read_memory(victim.pid, list(promised))
            fetched = fetch([TcpServer("127.0.0.1", port)], list(promised), loop=loop)
            assert server.wait() == 0
        victim.wait(30)  # CRIU ends it once the client has all
    fetched.check(contents)


@pytest.mark.slow
@both
def test_missing_page_ends_it(criu: Criu, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """CRIU's server closes for a page that it hasn't got, and is gone: what it gave is right, the rest is lost."""
    checkpoint = checkpoints.get(criu, "single")
    contents = lazy_pages(checkpoint.images)
    pid = next(iter(contents))[0]
    port = free_port()
    options = ["--lazy-pages", "--address", "127.0.0.1", "--port", str(port)]
    with nothing_left(), criu.page_server(checkpoint.images, *options, work=tmp_path) as server:
        server.wait_ready()
        places = [*list(contents)[:20], (pid, 0x10000)]
        fetched = fetch(
            [TcpServer("127.0.0.1", port)],
            places,
            options=RemoteOptions(deadline=2, layout=layout_of(criu)),
            faults=1,
        )
        assert server.wait() == 1
    assert (pid, 0x10000) in fetched.lost
    assert all(page == contents[place] for place, page in fetched.pages.items())
