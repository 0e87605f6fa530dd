"""A page server that lies: what it says of the pages it gives is wrong now and then, the pages are not."""

from __future__ import annotations

import random
import socket
import threading
from contextlib import suppress
from functools import partial

from lazypages.net import wire
from lazypages.net.wire import PAGE_SIZE, Command, Features, Header, Layout, PageFlags, ServerCodec
from tests.support.listener import Listener, Work
from tests.support.pages import Contents

LIES = ["address", "task", "more", "command", "flags", "unasked", "stale", "short", "nothing"]


class Liar(Listener):
    """Serves as our own server would. `lies`: how many answers are wrong, at random. `told`: which kinds were."""

    def __init__(self, contents: Contents, lies: int) -> None:
        super().__init__()
        self._contents, self._left = contents, lies
        self._chance = random.Random(11)
        self._choice = threading.Lock()
        self.told: set[str] = set()

    @property
    def truthful(self) -> bool:
        """Whether all lies have been told."""
        return self._left == 0

    def accepted(self, client: socket.socket) -> list[Work]:
        return [partial(self._serve, client)]

    def _serve(self, client: socket.socket) -> None:
        codec, before = ServerCodec(), b""
        with suppress(OSError):
            while True:
                codec.received(client.recv_into(codec.writable()))
                while (event := codec.next_event()) is not None:
                    match event:
                        case wire.Probed(features):
                            granted = features & (Features.MISSING | Features.CONNECTIONS)
                            client.sendall(codec.answer_probe(granted))
                        case Header(command=Command.GET):
                            answer = self._answer(event, before)
                            client.sendall(answer)
                            before = answer
                        case wire.Eof():
                            return
                        case _:
                            client.sendall(wire.answer_close())

    def _answer(self, asked: Header, before: bytes) -> bytes:
        with self._choice:
            lie = ""
            if self._left and self._chance.random() < 0.5:
                lie, self._left = self._chance.choice(LIES), self._left - 1
                self.told.add(lie)
        nr_pages = 0
        while nr_pages < asked.nr_pages and self._has(asked, nr_pages):
            nr_pages += 1
        header = Header(Command.ADD_F, nr_pages, asked.vaddr, asked.dst_id, PageFlags.PRESENT)
        pages = b"".join(
            self._contents[asked.dst_id, asked.vaddr + i * PAGE_SIZE] for i in range(header.nr_pages)
        )
        match lie:
            case "address":
                header = header._replace(vaddr=header.vaddr + PAGE_SIZE)
            case "task":
                header = header._replace(dst_id=header.dst_id + 1)
            case "more":
                header = header._replace(nr_pages=asked.nr_pages + 1)
                pages = (pages + bytes(PAGE_SIZE) * header.nr_pages)[: header.nr_pages * PAGE_SIZE]
            case "command":
                header = header._replace(command=Command.GET)
            case "flags":
                header = header._replace(flags=PageFlags.PRESENT | PageFlags.PARENT)
            case "unasked":
                pages += Layout.CRIU_4_2.pack(header) + pages
            case "stale" if before:
                return before
            case "short":
                header = header._replace(nr_pages=1)
                pages = pages[:PAGE_SIZE]
            case "nothing":
                header, pages = header._replace(nr_pages=0), b""
        return Layout.CRIU_4_2.pack(header) + pages

    def _has(self, asked: Header, page: int) -> bool:
        return (asked.dst_id, asked.vaddr + page * PAGE_SIZE) in self._contents
