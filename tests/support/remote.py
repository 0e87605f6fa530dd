"""Checkpoints whose lazy pages were left at the source, in whole or in part, and the servers that have them."""

from __future__ import annotations

import random
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from images_spec import pagemap as pagemaps
from images_spec.flags import PAGE_SIZE, PE_LAZY, PE_PRESENT
from images_spec.pagemap import Pagemap
from lazypages.bench.pipes import raised_pipe_limit
from tests.support.criu import Criu
from tests.support.processes import Server

Entries = list[tuple[int, int, int]]


def leave_at_source(source: Path, target: Path, *, share: float = 1.0) -> dict[int, int]:
    """Copies the checkpoint `source`; a share of the lazy pages is then LAZY without data, as after

    `criu dump --lazy-pages`. Returns how many, by pid.
    """
    target.mkdir()
    for path in source.glob("*.img"):
        if not path.name.startswith(("pagemap-", "pages-")):
            shutil.copy(path, target)
    left: dict[int, int] = {}
    for path in sorted(source.glob("pagemap-*.img")):
        pagemap = Pagemap.load(path)
        number = path.stem.removeprefix("pagemap-")
        data = memoryview((source / f"pages-{pagemap.pages_id}.img").read_bytes())
        chance = random.Random(number)
        entries: Entries = []
        kept = bytearray()
        offset = 0
        for vaddr, nr_pages, flags in pagemap:
            for page in range(nr_pages):
                away = flags & PE_LAZY and chance.random() < share
                _add(entries, vaddr + page * PAGE_SIZE, flags & ~PE_PRESENT if away else flags)
                if away:
                    left[int(number)] = left.get(int(number), 0) + 1
                else:
                    kept += data[offset : offset + PAGE_SIZE]
                offset += PAGE_SIZE
        pagemaps.write(target / path.name, pagemap.pages_id, entries)
        (target / f"pages-{pagemap.pages_id}.img").write_bytes(kept)
    return left


def _add(entries: Entries, vaddr: int, flags: int) -> None:
    if entries:
        start, nr, last = entries[-1]
        if start + nr * PAGE_SIZE == vaddr and last == flags:
            entries[-1] = (start, nr + 1, flags)
            return
    entries.append((vaddr, 1, flags))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def criu_page_server(criu: Criu, images: Path, work: Path) -> Iterator[tuple[int, Server]]:
    """Real `criu page-server --lazy-pages`; its port."""
    port = free_port()
    with (
        raised_pipe_limit(),
        criu.page_server(
            images, "--lazy-pages", "--address", "127.0.0.1", "--port", str(port), work=work
        ) as server,
    ):
        server.wait_ready()
        yield port, server


@contextmanager
def our_page_server(images: Path, work: Path, *options: str) -> Iterator[tuple[int, Server]]:
    """`lazypages page-server --lazy-pages`; its port."""
    port = free_port()
    command = [sys.executable, "-m", "lazypages", "page-server", "--lazy-pages", "-D", str(images)]
    command += ["-W", str(work), "--port", str(port), "-v4", "-o", "page-server.log", *options]
    with Server(command, output=work / "page-server.out", logs=[work / "page-server.log"]) as server:
        server.wait_ready()
        yield port, server
