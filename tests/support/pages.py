"""Checkpoints that hold only pages, a page server on them, and a client that fetches and compares everything."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio

from images_spec import pagemap
from images_spec.flags import PE_LAZY, PE_PRESENT
from lazypages.net.url import PageServerAddress, TcpServer
from lazypages.net.wire import PAGE_SIZE
from lazypages.sources.page_server import RemoteOptions
from lazypages.sources.remote import ServerStats, open_remote
from tests.support.processes import Server
from tests.support.sink import Sink

BASE = 0x7F00_0000_0000
LOOPS: list[dict[str, Any]] = [
    {"backend": "asyncio", "backend_options": {"use_uvloop": False}},
    {"backend": "asyncio", "backend_options": {"use_uvloop": True}},
    {"backend": "trio"},
]
LOOP_NAMES = ["asyncio", "uvloop", "trio"]

Contents = dict[tuple[int, int], bytes]  # (pid, address) -> page


def page_at(pid: int, address: int, salt: int = 0) -> bytes:
    """The bytes of a page that no other page has."""
    return hashlib.blake2b(b"%d %d %d" % (pid, address, salt), digest_size=32).digest() * (PAGE_SIZE // 32)


def write_images(directory: Path, runs: dict[int, Sequence[tuple[int, int]]]) -> Contents:
    """Images with the pages [BASE + first, BASE + first + count) (in pages) of each pid, all lazy."""
    directory.mkdir(exist_ok=True)
    contents: Contents = {}
    for number, (pid, ranges) in enumerate(runs.items(), 1):
        entries = [(BASE + first * PAGE_SIZE, count, PE_LAZY | PE_PRESENT) for first, count in ranges]
        pagemap.write(directory / f"pagemap-{pid}.img", number, entries)
        with (directory / f"pages-{number}.img").open("wb") as file:
            for vaddr, count, _ in entries:
                for address in range(vaddr, vaddr + count * PAGE_SIZE, PAGE_SIZE):
                    contents[pid, address] = page_at(pid, address)
                    file.write(contents[pid, address])
    return contents


class PageServer(Server):
    """Our page server, on loopback at `port` once wait_ready() has returned."""

    port = 0

    def wait_ready(self, timeout: float = 30) -> None:
        super().wait_ready(timeout)
        found = re.search(r"page server at \S+:(\d+)", self._output.read_text())
        assert found, self.story()
        self.port = int(found[1])

    @property
    def address(self) -> TcpServer:
        return TcpServer("127.0.0.1", self.port)


def page_server_command(*arguments: str | Path) -> list[str]:
    """`lazypages page-server …`."""
    return [sys.executable, "-m", "lazypages", "page-server", *map(str, arguments)]


#: Options of a server that many clients come to, one after the other or at once.
KEEP_SERVING = ("--lazy-pages", "--keep-serving")


def page_server(images: Path, *options: str | Path, output: Path | None = None) -> PageServer:
    """`lazypages page-server -D images …`; its log goes to `output`."""
    command = page_server_command("-D", images, "-v3", *options)
    return PageServer(command, output=output or images / "page-server.out")


@dataclass
class Fetched:
    """What a client got: pages, which of them came twice and differed, what was lost, and what the servers gave."""

    pages: Contents = field(default_factory=dict)
    wrong: set[tuple[int, int]] = field(default_factory=set)
    lost: dict[tuple[int, int], str] = field(default_factory=dict)
    stats: list[ServerStats] = field(default_factory=list)

    def check(self, contents: Contents) -> None:
        """Every page came, and has every byte right, however often it came."""
        assert self.lost == {}
        assert self.pages.keys() == contents.keys()
        assert [place for place, page in contents.items() if self.pages[place] != page] == []
        assert self.wrong == set()


def fetch(
    servers: Sequence[PageServerAddress],
    places: Sequence[tuple[int, int]],
    *,
    options: RemoteOptions | None = None,
    loop: dict[str, Any] | None = None,
    faults: int = 7,
    connections: int = 0,
    timeout: float = 60,
) -> Fetched:
    """Ask for all `places`: each `faults`th as a fault, the rest in the background.

    Then wait until the first server has had so many `connections`.
    """
    fetched = Fetched()
    wanted = sorted(places)

    async def run() -> None:
        def on_lost(pid: int, address: int, nr_pages: int, reason: str) -> None:
            for number in range(nr_pages):
                fetched.lost[pid, address + number * PAGE_SIZE] = reason

        def on_pages(pid: int, address: int, data: bytes) -> None:
            for offset in range(0, len(data), PAGE_SIZE):
                place, page = (pid, address + offset), data[offset : offset + PAGE_SIZE]
                # What was silent and speaks again may bring a page that was asked for elsewhere meanwhile. The engine
                # drops it; here it is only seen whether it is the same.
                if fetched.pages.setdefault(place, page) != page:
                    fetched.wrong.add(place)

        with anyio.fail_after(timeout), Sink(on_pages) as sink:
            async with open_remote(servers, on_lost, options, engine=sink) as remote:
                remote.request(((*place, 1) for place in wanted[::faults]), urgent=True)
                background = [place for number, place in enumerate(wanted) if number % faults]
                remote.request(((*place, 1) for place in background), urgent=False)
                while len(fetched.pages.keys() | fetched.lost.keys()) < len(wanted):
                    await anyio.sleep(0.005)
                while remote.stats()[0].connections < connections:
                    await anyio.sleep(0.005)
                fetched.stats = remote.stats()

    anyio.run(run, **(loop or LOOPS[0]))
    return fetched
