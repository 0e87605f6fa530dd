"""Channels: the engine asks a page server by itself. A server of ours here says what a test wants, on a real socket.

What must never happen: a page that nobody gave, old bytes after the task has thrown them away, a request that is
forgotten.
"""

from __future__ import annotations

import errno
import os
import random
import resource
import select
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import pytest

from lazypages.engine.channel import Channel, ChannelEvent, ChannelEventKind
from lazypages.engine.events import TaskEventKind
from lazypages.engine.task import ServedTask
from lazypages.errors import LazyPagesError
from lazypages.net.wire import Features
from lazypages.sources.base import Connected
from lazypages.sources.pool import Pool
from lazypages.sources.remote import RemotePages
from tests.support.compiling import CHANNEL_SOURCES
from tests.support.uffd import BASE, PAGE, RANDOM, PagesFile, Service, Task, needs_while_it_churns, until

GIB = 1 << 30
PAGES = 64
REMOTE = 0xFFFFFFFE  # csrc/common/extent.h
TAG = 4711
GET, ADD_F, CLOSE = 7, 6, 0x1023
PRESENT, ZERO, ZSTD = 4, 0x100, 0x200
MADV_DONTNEED = 4
HEADERS = {24: struct.Struct("=IIQQ"), 32: struct.Struct("=I4xQQQ")}  # docs/criu.md, "Page server protocol"

both = pytest.mark.parametrize("size", HEADERS)


@pytest.fixture(scope="module")
def file() -> PagesFile:
    return PagesFile(4096)


class Get(NamedTuple):
    nr_pages: int
    image: int
    tag: int


class Peer:
    """The other end of a channel."""

    def __init__(self, end: socket.socket, *, size: int) -> None:
        self._end = end
        self._header = HEADERS[size]
        self._end.settimeout(60)

    def hang_up(self) -> None:
        self._end.close()

    def command(self) -> tuple[int, Get]:
        data = b""
        while len(data) < self._header.size:
            more = self._end.recv(self._header.size - len(data))
            if not more:
                raise EOFError
            data += more
        command, nr_pages, image, tag = self._header.unpack(data)
        return command, Get(nr_pages, image, tag)

    def asked(self) -> Get:
        command, get = self.command()
        assert command == GET
        return get

    def quiet(self, seconds: float = 0.1) -> bool:
        """Whether nothing is asked for so long."""
        return not select.select([self._end], [], [], seconds)[0]

    def header(self, get: Get, *, command: int = ADD_F, flags: int = PRESENT) -> bytes:
        return self._header.pack(command | flags << 16, *get)

    def answer(self, file: PagesFile, get: Get) -> bytes:
        """What the server has to say to that."""
        return self.header(get) + file.page_bytes((get.image - BASE) // PAGE, get.nr_pages)

    def send(self, data: bytes) -> None:
        self._end.sendall(data)


class Source(Peer):
    """A channel and its other end."""

    def __init__(self, service: Service, *, size: int = 24, zeros: bool = False, max_pages: int = 16) -> None:
        end, channels = socket.socketpair()
        super().__init__(end, size=size)
        with channels:
            self.channel: Channel = service.engine.channel(
                channels.fileno(), header_size=size, max_pages=max_pages, zeros=zeros, background=True
            )
        self._events: list[ChannelEvent] = []

    def close(self) -> None:
        """Both ends."""
        self.channel.close()
        self._end.close()

    def event(self, kind: ChannelEventKind) -> ChannelEvent:
        """The next one of this kind."""
        deadline = time.monotonic() + 60
        while True:
            self._events += self.channel.events()
            for place, event in enumerate(self._events):
                if event.kind is kind:
                    return self._events.pop(place)
            if time.monotonic() > deadline:
                pytest.fail(f"no {kind.name}, but {self._events}")
            select.select([self.channel.event_fd], [], [], 1)

    def events(self) -> list[ChannelEventKind]:
        self._events += self.channel.events()
        return [event.kind for event in self._events]


@contextmanager
def remote_task(pages: int = PAGES, readahead: int = 1) -> Iterator[tuple[Service, Task, ServedTask]]:
    with Service() as service:
        task = service.task()
        uffd = task.open_uffd()
        task.map((BASE, pages))
        served = service.serve(
            uffd, [(BASE, pages, 0, REMOTE)], [(BASE, pages)], max_readahead=readahead, tag=TAG
        )
        yield service, task, served


def counted(
    served: ServedTask, *, pending: int | None = None, remote: int | None = None, faults: int = 0
) -> None:
    """Pages are counted when they are in their place, and then a thread may have seen them already."""
    until(
        "pages to be counted",
        lambda: (
            pending in {None, served.pending}
            and remote in {None, served.sources()[0].remote}
            and served.sources()[2].remote >= faults
        ),
    )


def no_event(service: Service) -> bool:
    return not [one for one in service.look() if one.kind in {TaskEventKind.NEED, TaskEventKind.ESCALATE}]


@both
def test_a_fault_byte_by_byte(size: int, file: PagesFile) -> None:
    with remote_task() as (service, task, served):
        source = Source(service, size=size)
        for page in (5, 6, 40):
            task.tell_check(BASE + page * PAGE, 1, file.first_id + page)
            get = source.asked()
            assert get == (1, BASE + page * PAGE, TAG)
            for byte in source.answer(file, get):
                assert not task.replied()
                source.send(bytes([byte]))
            task.reply()
        assert no_event(service)
        assert source.events() == []
        counted(served, remote=3, faults=3)
        until("the answer to be settled", lambda: not source.channel.state().outstanding)
        state = source.channel.state()
        assert (state.outstanding, state.urgent, state.requests, state.pages) == (0, 0, 3, 3)
        assert state.bytes == 3 * (size + PAGE)
        source.close()


def test_many_faults_at_once(file: PagesFile) -> None:
    """All are asked for before any is answered; answers that come in one piece are told apart."""
    with remote_task() as (service, task, served):
        source = Source(service)
        task.tell_check(BASE, PAGES, file.first_id, order=RANDOM, threads=8)
        for _ in range(PAGES // 8):
            gets = [source.asked() for _ in range(8)]
            source.send(b"".join(source.answer(file, get) for get in gets))
        task.reply()
        counted(served, pending=0, faults=PAGES)
        assert source.channel.state().requests == PAGES
        source.close()


@pytest.mark.parametrize("pages", [1, 3])
@pytest.mark.parametrize(
    "cut", [0, 1, 23, 24, 25, 24 + PAGE - 1, 24 + PAGE, 24 + PAGE + 1], ids=lambda cut: f"after {cut}"
)
def test_cut(cut: int, pages: int, file: PagesFile) -> None:
    """What has not come by then is handed back, and nothing else; what has come whole is in its place."""
    cut = min(cut, 24 + pages * PAGE)
    whole = max(0, cut - 24) // PAGE
    with remote_task(pages) as (service, task, served):
        source = Source(service)
        source.channel.set_budget(served, pages * PAGE)
        get = source.asked()
        assert get == (pages, BASE, TAG)
        source.send(source.answer(file, get)[:cut])
        source.hang_up()
        ended = source.event(ChannelEventKind.ENDED)
        assert (ended.status, ended.at_boundary) == (0, cut in {0, 24 + pages * PAGE})
        left = [(one.dump_addr, one.nr_pages, one.reported) for one in source.channel.outstanding()]
        assert left == ([(BASE + whole * PAGE, pages - whole, False)] if whole < pages else [])
        assert served.pending == pages - whole
        source.close()
        # a thread that waits is no worse off: the owner is asked, and another channel brings it
        if whole < pages:
            task.tell_check(BASE, pages, file.first_id)
            assert service.wait(TaskEventKind.ESCALATE, served).dump_addr == BASE + whole * PAGE
            second = Source(service)
            second.channel.ask(TAG, BASE + whole * PAGE, pages - whole, urgent=True)
            second.send(second.answer(file, second.asked()))
            arrived = second.event(ChannelEventKind.ARRIVED)
            assert (arrived.dump_addr, arrived.nr_pages) == (BASE + whole * PAGE, pages - whole)
            task.reply()
            second.close()
        counted(served, remote=pages)


@both
@pytest.mark.parametrize(
    "what", ["command", "pid", "address", "more", "flags", "zeros that nobody agreed on", "noise"]
)
def test_wrong_answers(what: str, size: int, file: PagesFile) -> None:
    """Nothing of them reaches the task, and the request is not forgotten."""
    with remote_task() as (service, task, served):
        source = Source(service, size=size)
        task.tell_check(BASE, 1, file.first_id)
        get = source.asked()
        wrong = {
            "command": source.header(get, command=GET),
            "pid": source.header(get._replace(tag=TAG + 1)),
            "address": source.header(get._replace(image=BASE + PAGE)),
            "more": source.header(get._replace(nr_pages=2)),
            "flags": source.header(get, flags=PRESENT | 1),
            "zeros that nobody agreed on": source.header(get, flags=ZERO),
            "noise": random.Random(5).randbytes(size),
        }
        source.send(wrong[what] + file.page_bytes(1, 2))
        ended = source.event(ChannelEventKind.ENDED)
        assert ended.status == errno.EPROTO
        assert [(one.dump_addr, one.nr_pages) for one in source.channel.outstanding()] == [(BASE, 1)]
        assert source.channel.outstanding()[0].since > 0
        assert task.busy()
        assert served.pending == PAGES
        source.close()
        second = Source(service, size=size)
        second.channel.ask(TAG, BASE, 1, urgent=True)
        second.send(second.answer(file, second.asked()))
        task.reply()
        second.close()


def test_an_answer_that_nobody_asked_for(file: PagesFile) -> None:
    with remote_task() as (service, _task, served):
        source = Source(service)
        source.send(source.answer(file, Get(1, BASE, TAG)))
        assert source.event(ChannelEventKind.ENDED).status == errno.EPROTO
        assert served.pending == PAGES
        source.close()


def test_a_short_answer(file: PagesFile) -> None:
    """The server had no more in one piece: the rest is asked for at once."""
    with remote_task(readahead=4) as (service, task, served):
        source = Source(service)
        task.tell_check(BASE, 7, file.first_id)  # 1, 2 and 4 pages, as the faults run on
        first = source.asked()
        source.send(source.answer(file, first))
        second = source.asked()
        assert second == (2, BASE + PAGE, TAG)
        source.send(source.answer(file, second._replace(nr_pages=1)))
        rest = source.asked()
        assert rest == (1, BASE + 2 * PAGE, TAG)
        assert task.busy()
        source.send(source.answer(file, rest))
        third = source.asked()
        source.send(source.answer(file, third._replace(nr_pages=3)))
        rest = source.asked()
        assert rest == (third.nr_pages - 3, third.image + 3 * PAGE, TAG)
        source.send(source.answer(file, rest))
        task.reply()
        counted(served, pending=PAGES - 7)
        until("the answer to be settled", lambda: not source.channel.state().outstanding)
        source.close()


def test_requests_are_no_larger_than_the_server_takes(file: PagesFile) -> None:
    with remote_task(readahead=16) as (service, task, _served):
        source = Source(service, max_pages=4)
        task.tell_check(BASE, 31, file.first_id)  # 1, 2, 4, 8 and 16 pages, as the faults run on
        seen = 0
        while seen < 31:
            get = source.asked()
            assert get.nr_pages <= 4
            source.send(source.answer(file, get))
            seen += get.nr_pages
        task.reply()
        source.close()


def test_a_page_that_the_server_has_not(file: PagesFile) -> None:
    """The owner is told, and the next answers are none the worse for it."""
    with remote_task() as (service, task, _served):
        source = Source(service, size=32)
        task.tell_check(BASE + 3 * PAGE, 1, file.first_id + 3)
        get = source.asked()
        source.send(source.header(get._replace(nr_pages=0), flags=0))
        refused = source.event(ChannelEventKind.REFUSED)
        assert (refused.tag, refused.dump_addr, refused.nr_pages, refused.reported) == (
            TAG,
            get.image,
            1,
            False,
        )
        assert refused.since > 0
        assert task.busy()
        source.channel.ask(TAG, get.image, 1, urgent=True)
        source.send(source.answer(file, source.asked()))
        task.reply()
        source.close()


class Ready:
    """A source that is connected already."""

    name, kind, once = "a test", "page server", False

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self.failure: LazyPagesError | None = None
        self.at_boundary = True
        self.compressed_pages = self.compressed_bytes = 0

    async def connect(self, **_: object) -> Connected:
        return Connected(self, features=Features.MISSING, answered=True)

    def fileno(self) -> int:
        return self._end.fileno()

    async def aclose(self) -> None:
        self._end.close()


class Recorded:
    """The engine, and the last channel that it has made."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.made: Channel | None = None

    def channel(self, fd: int, **options: Any) -> Channel:
        self.made = self._service.engine.channel(fd, **options)
        return self.made


def test_a_refusal_that_nobody_has_heard(file: PagesFile) -> None:
    """A channel is given up before its events have been read: the page is wanted all the same."""
    ours, theirs = socket.socketpair()
    peer = Peer(ours, size=32)

    def lost(*_: object) -> None:
        pytest.fail("nothing is lost")

    async def give_up(engine: Recorded, task: Task) -> Pool:
        async with anyio.create_task_group() as group:
            remote = RemotePages([Ready(theirs)], lost, group=group, engine=engine)
            group.start_soon(remote.run)
            while not remote.pool.servers[0].connected:
                await anyio.sleep(0.001)
            channel = engine.made
            assert channel
            # From here on the event loop does nothing.
            task.tell_check(BASE, 1, file.first_id)
            peer.send(peer.header(peer.asked()._replace(nr_pages=0), flags=0))
            until("the refusal to be read", lambda: not channel.state().outstanding)
            group.cancel_scope.cancel()
        return remote.pool

    with remote_task() as (service, task, _served):
        second = Source(service)
        second.channel.pause(paused=True)
        pool = anyio.run(give_up, Recorded(service), task)
        assert [(wanted.pid, wanted.start, wanted.nr_pages) for wanted in pool.backlog] == [(TAG, BASE, 1)]
        assert pool.backlog.queued_pages(urgent=True) == 0
        assert [wanted.refused for wanted in pool.backlog.refused] == [{pool.servers[0]}]
        peer.hang_up()
        second.channel.ask(TAG, BASE, 1, urgent=True)
        second.send(second.answer(file, second.asked()))
        task.reply()
        second.close()


def test_requests_that_may_be_compressed(file: PagesFile) -> None:
    """Those of the background say so, to a relay; those of faults never do."""
    with remote_task() as (service, task, served):
        end, channels = socket.socketpair()
        peer = Peer(end, size=32)
        with channels:
            channel = service.engine.channel(
                channels.fileno(), header_size=32, max_pages=16, zeros=False, background=True, compress=True
            )
        task.tell_check(BASE + 40 * PAGE, 1, file.first_id + 40)
        command, get = peer.command()
        assert command == GET
        peer.send(peer.answer(file, get))
        task.reply()
        channel.set_budget(served, 16 * PAGE)
        command, get = peer.command()
        assert command == GET | ZSTD << 16
        peer.send(peer.answer(file, get))
        counted(served, remote=1 + get.nr_pages)
        channel.close()
        peer.hang_up()


def test_zeros(file: PagesFile) -> None:
    """Pages of zeros come without bytes, where that was agreed on."""
    with remote_task(pages=300) as (service, task, served):
        source = Source(service, size=32, zeros=True, max_pages=300)
        source.channel.ask(TAG, BASE, 200, urgent=False)
        source.channel.ask(TAG, BASE + 200 * PAGE, 1, urgent=False)
        source.send(source.header(source.asked(), flags=ZERO))
        source.send(source.answer(file, source.asked()))
        task.check(BASE, 200, 0)
        task.check(BASE + 200 * PAGE, 1, file.first_id + 200)
        counted(served, remote=201)
        source.close()


def test_a_thread_waits_for_what_is_on_its_way(file: PagesFile) -> None:
    """It is not asked for again, nobody is bothered, and the fault is counted."""
    with remote_task() as (service, task, served):
        source = Source(service)
        source.channel.set_budget(served, 16 * PAGE)
        gets = []
        while sum(get.nr_pages for get in gets) < 16:
            gets.append(source.asked())
        task.tell_check(BASE + 10 * PAGE, 1, file.first_id + 10)
        assert task.busy()
        assert source.quiet()
        assert no_event(service)
        assert any(one.since for one in source.channel.outstanding())
        source.send(b"".join(source.answer(file, get) for get in gets))
        task.reply()
        counted(served, faults=1)
        source.close()


def test_a_held_channel(file: PagesFile) -> None:
    """It sends nothing of its own accord; faults are the owner's then."""
    with remote_task() as (service, task, served):
        source = Source(service)
        task.tell_check(BASE, 1, file.first_id)
        get = source.asked()
        source.channel.pause(paused=True)
        assert [one[:3] for one in source.channel.outstanding()] == [(TAG, BASE, 1)]
        source.channel.set_budget(served, PAGE)
        assert source.event(ChannelEventKind.BUDGET_SPENT).nr_pages == 0
        source.send(source.answer(file, get)[:100])
        source.event(ChannelEventKind.HEARD)
        source.send(source.answer(file, get)[100:])
        assert source.event(ChannelEventKind.ARRIVED).dump_addr == BASE  # taken back, and come all the same
        source.event(ChannelEventKind.QUIET)
        task.reply()
        task.tell_check(BASE + PAGE, 1, file.first_id + 1)
        assert service.wait(TaskEventKind.NEED, served).dump_addr == BASE + PAGE
        assert source.quiet()
        source.channel.ask(TAG, BASE + PAGE, 1, urgent=True)
        source.send(source.answer(file, source.asked()))
        task.reply()
        source.channel.pause(paused=False)
        task.tell_check(BASE + 2 * PAGE, 1, file.first_id + 2)
        source.send(source.answer(file, source.asked()))
        task.reply()
        source.close()


@both
def test_the_end(size: int, file: PagesFile) -> None:
    """After all answers the server says how it went."""
    with remote_task() as (service, task, _served):
        source = Source(service, size=size)
        task.tell_check(BASE, 1, file.first_id)
        get = source.asked()
        source.channel.finish(force=False)
        assert source.command()[0] == CLOSE
        source.send(source.answer(file, get) + struct.pack("=i", 7))
        task.reply()
        assert source.event(ChannelEventKind.CLOSED).status == 7
        source.channel.close()
        with pytest.raises(EOFError):
            source.command()
        source.hang_up()


def test_a_short_answer_before_the_end(file: PagesFile) -> None:
    """The rest is not asked for behind CLOSE: its status is what follows."""
    with remote_task() as (service, _task, _served):
        source = Source(service)
        source.channel.ask(TAG, BASE, 4, urgent=False)
        get = source.asked()
        source.channel.finish(force=False)
        source.channel.ask(TAG, BASE + 8 * PAGE, 4, urgent=False)
        assert source.command()[0] == CLOSE
        source.send(source.answer(file, get._replace(nr_pages=2)) + struct.pack("=i", 7))
        assert source.event(ChannelEventKind.CLOSED).status == 7
        source.channel.close()
        with pytest.raises(EOFError):
            source.command()
        source.hang_up()


# The task does something meanwhile.


def test_layout_changes_while_pages_are_on_their_way(file: PagesFile) -> None:
    """What comes is placed where its memory is by now, in pieces, and nowhere if that is gone: never old bytes."""
    with remote_task() as (service, task, served):
        source = Source(service, max_pages=PAGES)
        source.channel.set_budget(served, PAGES * PAGE)
        gets: list[Get] = []
        while sum(get.nr_pages for get in gets) < 16:
            gets.append(source.asked())
        first = b"".join(source.answer(file, get) for get in gets)
        source.send(first[: 24 + 100])  # a page is in the middle of its way
        assert task.mremap(BASE + PAGE, 2, BASE + GIB) == BASE + GIB
        assert task.do("madvise", BASE, 1, MADV_DONTNEED) == "0"
        assert task.do("munmap", BASE + 6 * PAGE, 2) == "0"
        task.tell_check(BASE + GIB, 2, file.first_id + 1)
        source.send(first[24 + 100 :])
        task.reply()
        left = PAGES - sum(get.nr_pages for get in gets)
        while left:
            get = source.asked()
            source.send(source.answer(file, get))
            left -= get.nr_pages
        source.event(ChannelEventKind.BUDGET_SPENT)
        until("all to be there", lambda: served.pending == 0)
        task.check(BASE, 1, 0)
        task.check(BASE + 3 * PAGE, 3, file.first_id + 3)
        task.check(BASE + 8 * PAGE, PAGES - 8, file.first_id + 8)
        assert served.sources()[1].remote == 3
        source.close()


def test_a_fork_while_a_page_is_on_its_way(file: PagesFile) -> None:
    """One request, one answer: both get it."""
    with remote_task(pages=8) as (service, task, served):
        source = Source(service)
        task.tell_check(BASE + 2 * PAGE, 1, file.first_id + 2)
        get = source.asked()
        other = Source(service)  # the better one for whatever comes next, as it has nothing to do
        source.channel.set_budget(served, 8 * PAGE)
        gets: list[Get] = []
        while sum(one.nr_pages for one in gets) < 7:
            gets.append(source.asked())
        source.send(source.answer(file, get))
        task.reply()
        child = adopt_fork(service, task)
        forked = service.wait(TaskEventKind.FORKED).task
        child.tell_check(BASE, 8, file.first_id, threads=4)
        task.tell_check(BASE, 8, file.first_id, threads=4)
        assert child.busy()
        assert other.quiet()
        assert no_event(service)
        for one in gets:
            source.send(source.answer(file, one))
        child.reply()
        task.reply()
        counted(served, pending=0)
        counted(forked, pending=0)
        source.close()
        other.close()


def adopt_fork(service: Service, task: Task) -> Task:
    return service.adopt(task.fork())


def another_task(service: Service) -> tuple[Task, ServedTask]:
    """Beside that of remote_task, with pages of its own."""
    task = service.task()
    uffd = task.open_uffd()
    task.map((BASE, PAGES))
    served = service.serve(uffd, [(BASE, PAGES, 0, REMOTE)], [(BASE, PAGES)], max_readahead=1, tag=TAG + 1)
    return task, served


def test_a_task_that_ends_while_pages_are_on_their_way(file: PagesFile) -> None:
    """Its pages come for nobody; those of the other task on the same channel are where they belong."""
    with remote_task() as (service, task, served):
        source = Source(service)
        other, second = another_task(service)
        task.tell_check(BASE, 1, file.first_id)
        gone = source.asked()
        source.channel.set_budget(served, 8 * PAGE)
        gets: list[Get] = []
        while sum(get.nr_pages for get in gets) < 8:
            gets.append(source.asked())
        other.tell_check(BASE + PAGE, 1, file.first_id + 1)
        mine = source.asked()
        task.close()
        until("it to be gone", lambda: not served.probe())
        source.channel.set_budget(served, 8 * PAGE)
        served.close()
        for get in (gone, *gets, mine):
            source.send(source.answer(file, get))
        other.reply()
        assert source.event(ChannelEventKind.BUDGET_SPENT).nr_pages == 8
        source.event(ChannelEventKind.BUDGET_SPENT)
        counted(second, remote=1)
        until("the answers to be settled", lambda: not source.channel.state().outstanding)
        source.close()


def test_a_task_that_can_take_nothing_keeps_nothing_from_others(file: PagesFile) -> None:
    """One forks, and nobody reads of it (there is no file descriptor for the child): its pages wait, and no others."""
    with remote_task() as (service, task, served):
        source = Source(service)
        other, second = another_task(service)
        source.channel.set_budget(served, 8 * PAGE)
        gets: list[Get] = []
        while sum(get.nr_pages for get in gets) < 8:
            gets.append(source.asked())
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        free = os.dup(0)
        os.close(free)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
            task.tell("fork")
            assert service.wait(TaskEventKind.FAILED, served).error == errno.EMFILE
            for get in gets:
                source.send(source.answer(file, get))
            for page in range(4):
                other.tell_check(BASE + page * PAGE, 1, file.first_id + page)
                source.send(source.answer(file, source.asked()))
                other.reply()
            until("the answers to be taken", lambda: not source.channel.state().outstanding)
            assert served.pending == PAGES
            source.close()  # what has come is none of its business any more
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        child = service.adopt(task.forked())
        forked = service.wait(TaskEventKind.FORKED).task
        counted(served, pending=PAGES - 8, remote=8)
        counted(forked, pending=PAGES - 8)
        counted(second, pending=PAGES - 4)
        task.check(BASE, 8, file.first_id)
        child.check(BASE, 8, file.first_id)


@pytest.mark.slow
def test_parking(tmp_path: Path) -> None:
    """As above, with more than there is room for, and a server that hangs up meanwhile: in C, turn by turn."""
    root = Path(__file__).parents[2]
    sources = [root / "tests/support/channel_deferred.c", *CHANNEL_SOURCES]
    flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{root / 'csrc'}"]
    flags += os.environ.get("LAZYPAGES_SANITIZER", "").split()  # .ci/sanitize
    subprocess.run(["gcc", *flags, *sources, "-o", tmp_path / "channel_deferred"], check=True)
    subprocess.run([tmp_path / "channel_deferred"], check=True, timeout=60)


class Server(threading.Thread):
    """Answers what it is asked, in pieces of all sizes, and hangs up now and then."""

    def __init__(self, source: Source, file: PagesFile, seed: int) -> None:
        super().__init__(daemon=True)
        self._source, self._file = source, file
        self._random = random.Random(seed)
        self.start()

    def run(self) -> None:
        rng, source = self._random, self._source
        lives = rng.randrange(1, 40)
        try:
            while lives:
                lives -= 1
                get = source.asked()
                part = get._replace(nr_pages=rng.randrange(1, get.nr_pages + 1))
                data = source.answer(self._file, part)
                if not lives:
                    data = data[: rng.randrange(len(data) + 1)]
                while data:
                    size = rng.choice([1, 24, 100, PAGE, 4 * PAGE, len(data)])
                    source.send(data[:size])
                    data = data[size:]
                    if rng.random() < 0.2:
                        time.sleep(0.0005)
            source.hang_up()
        except (EOFError, OSError):
            pass


def test_turmoil(file: PagesFile) -> None:
    """A task that changes its layout all the time, and connections that are cut all the time: every byte is right."""
    pages = 4096
    with remote_task(pages, readahead=8) as (service, task, served):
        source = Source(service)
        servers = [Server(source, file, 0)]
        turn_taken = False
        for needs in needs_while_it_churns(service, task, served, file, pages):
            for need in needs:
                served.fail_remote(need.dump_addr, need.nr_pages, lost=False)
            if not turn_taken:
                source.channel.set_budget(served, 32 * PAGE)
                turn_taken = True
            for event in source.channel.events():
                if event.kind is ChannelEventKind.BUDGET_SPENT:
                    turn_taken = False
                if event.kind is ChannelEventKind.ENDED:
                    for left in source.channel.outstanding():
                        served.fail_remote(left.dump_addr, left.nr_pages, lost=False)
                    source.close()
                    source = Source(service)
                    servers.append(Server(source, file, len(servers)))
                    turn_taken = False
                    break
            select.select([source.channel.event_fd, service.engine.event_fd], [], [], 0.01)
        assert len(servers) > 3
        source.close()
        for server in servers:
            server.join(60)
            assert not server.is_alive()
