"""What tasks do while allocations of the engine fail (failing_memory.py); each says whether the engine gave one up."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress

from lazypages.engine.channel import ChannelEventKind
from lazypages.engine.events import TaskEvent, TaskEventKind
from tests.real.test_channel import REMOTE, TAG, Source
from tests.support.uffd import BASE, PAGE, RANDOM, PagesFile, Service, Task, until

PAGES = 64
LEVELS = 20  # more than the engine has counters for without asking for memory
MADV_DONTNEED = 4


class BrokenError(Exception):
    """The engine says that a task can't go on."""


def is_broken(service: Service) -> bool:
    return any(event.kind is TaskEventKind.BROKEN for event in service.look())


def wait(service: Service, ready: Callable[[], object]) -> None:
    """Raises BrokenError."""
    until("that, or word of the end", lambda: ready() or is_broken(service))
    if not ready():
        raise BrokenError


def do(service: Service, task: Task, command: str, *args: int) -> None:
    """Raises BrokenError."""
    task.tell(command, *args)
    wait(service, task.replied)
    task.reply()


def fork(service: Service, task: Task) -> Task:
    """Raises BrokenError."""
    task.tell("fork", 0)
    wait(service, task.replied)
    return service.adopt(task.forked())


class Checks:
    """Of a task's bytes, meanwhile something else. Each raises BrokenError."""

    def __init__(self, service: Service, meanwhile: Callable[[], object] = lambda: None) -> None:
        self._service = service
        self._meanwhile = meanwhile

    def __call__(self, task: Task, page: int, pages: int, first_id: int, threads: int = 1) -> None:
        def settled() -> bool:
            self._meanwhile()
            return task.replied()

        task.tell_check(BASE + page * PAGE, pages, first_id, order=RANDOM, threads=threads)
        wait(self._service, settled)
        task.reply()


def layout(begin: Callable[[], None]) -> bool:
    """Faults, all kinds of layout events, a fork, the background."""
    file, parents = PagesFile(PAGES), [PagesFile(1, level) for level in range(1, LEVELS)]
    with Service() as service:
        task = service.task()
        uffd = task.open_uffd()
        task.map((BASE, PAGES))
        served = service.serve(
            uffd, [(BASE, PAGES, 0, 0)], [(BASE, PAGES)], file, *parents, max_readahead=1, pid=task.pid
        )
        check = Checks(service)
        begin()
        try:
            check(task, 0, 8, file.first_id, threads=4)
            do(service, task, "mremap", BASE + 8 * PAGE, 8, 8, 3, BASE + 1024 * PAGE)
            check(task, 1024, 4, file.first_id + 8)
            do(service, task, "madvise", BASE + 16 * PAGE, 4, MADV_DONTNEED)
            check(task, 16, 4, 0)
            do(service, task, "munmap", BASE + 20 * PAGE, 4)
            child = fork(service, task)
            for one in (child, task):
                check(one, 1028, 4, file.first_id + 12)
                check(one, 24, 8, file.first_id + 24, threads=4)
            transfer = service.transfer(served)
            wait(service, lambda: not served.pending)
            assert not transfer.error
            for one in (task, child):
                check(one, 32, PAGES - 32, file.first_id + 32, threads=4)
            service.wait(TaskEventKind.COMPLETE, served)
            service.wait(TaskEventKind.FORKED)
        except BrokenError:
            return True
    return False


class Owner:
    """Does what Python does for a channel: asks for what the engine needs, makes another when one has ended."""

    def __init__(self, service: Service, file: PagesFile) -> None:
        self._service, self._file = service, file
        self._wanted: list[tuple[int, int]] = []
        self._seen: list[TaskEvent] = []
        self._connect()

    def _connect(self) -> None:
        while True:
            with suppress(OSError):  # this allocation was the one
                self._source = Source(self._service)
                break
        threading.Thread(target=self._answer, args=[self._source], daemon=True).start()

    def _answer(self, source: Source) -> None:
        with suppress(EOFError, OSError):
            while True:
                source.send(source.answer(self._file, source.asked()))

    def _ask(self, image: int, nr_pages: int) -> None:
        self._source.channel.ask(TAG, image, nr_pages, urgent=True)

    def look(self) -> None:
        for event in self._service.look():
            if event.kind in {TaskEventKind.NEED, TaskEventKind.ESCALATE} and event not in self._seen:
                self._seen.append(event)
                self._wanted.append((event.dump_addr, event.nr_pages))
                self._ask(event.dump_addr, event.nr_pages)
        if any(event.kind is ChannelEventKind.ENDED for event in self._source.channel.events()):
            self._wanted += [(one.dump_addr, one.nr_pages) for one in self._source.channel.outstanding()]
            self._source.close()
            self._connect()
            for image, nr_pages in self._wanted:
                self._ask(image, nr_pages)

    def bring(self, served: object) -> None:
        self._source.channel.set_budget(served, 8 * PAGE)  # type: ignore[arg-type]

    def close(self) -> None:
        self._source.close()


def remote(begin: Callable[[], None]) -> bool:
    """Faults for pages of a page server, in a task and its child."""
    pages = 256
    file = PagesFile(pages)
    with Service() as service:
        task = service.task()
        uffd = task.open_uffd()
        task.map((BASE, pages))
        served = service.serve(
            uffd, [(BASE, pages, 0, REMOTE)], [(BASE, pages)], max_readahead=1, pid=task.pid, tag=TAG
        )
        owner = Owner(service, file)
        check = Checks(service, owner.look)
        begin()
        try:
            check(task, 0, 16, file.first_id, threads=8)
            child = fork(service, task)
            check(child, 16, 64, file.first_id + 16, threads=8)
            owner.bring(served)
            check(task, 80, pages - 80, file.first_id + 80, threads=8)
            check(child, 0, pages, file.first_id)
        except BrokenError:
            return True
        finally:
            owner.close()
    return False
