"""Guards that a task installs while its memory is missing: nobody copies over them, and what they hid is zero.

A kernel without guards (before Linux 6.13) says EINVAL to whoever wants one; then there is data everywhere.
"""

from __future__ import annotations

import os
import resource
import select
import signal
from collections.abc import Iterable
from contextlib import ExitStack, suppress

import pytest

from lazypages.engine._uffd import ffi, lib
from lazypages.engine.errors import BusyError
from lazypages.engine.events import TaskEventKind
from lazypages.engine.task import ServedTask
from tests.support.guards import MADV_GUARD_INSTALL, MADV_GUARD_REMOVE, guards_of, has_guards
from tests.support.remote_task import deliver
from tests.support.uffd import BASE, FORWARD, PAGE, PagesFile, Service, Task, until

pytestmark = pytest.mark.every_kernel

PAGES = 1024
REMOTE = 0xFFFFFFFE  # csrc/common/extent.h
#: (first page, pages), some alone, some in a row, at both ends, across the bounds of page tables and of 512 KiB.
GUARDS = [(0, 1), (10, 10), (31, 1), (33, 1), (120, 16), (500, 24), (1020, 4)]
GUARDED = sum(pages for _, pages in GUARDS)
SIGSEGV = "signal 11"


@pytest.fixture(scope="module")
def file() -> PagesFile:
    return PagesFile(PAGES)


def guard(task: Task, guards: Iterable[tuple[int, int]] = GUARDS, advice: int = MADV_GUARD_INSTALL) -> None:
    for first, pages in guards:
        result = task.do("madvise", BASE + first * PAGE, pages, advice)
        assert result == "0" if has_guards() else result != "0"


def gaps(guards: Iterable[tuple[int, int]] = GUARDS, total: int = PAGES) -> list[tuple[int, int]]:
    """What lies between: (first page, pages)."""
    found, at = [], 0
    for first, pages in [*guards, (total, 0)]:
        if first > at:
            found.append((at, first - at))
        at = first + pages
    return found


def check(
    task: Task, file: PagesFile, guards: list[tuple[int, int]] = GUARDS, *, removed: bool = False
) -> None:
    """Data between the guards, SIGSEGV in them; zeros where they were if they have been removed."""
    if not has_guards():
        task.check(BASE, PAGES, file.first_id)
        return
    for first, pages in gaps(guards):
        task.check(BASE + first * PAGE, pages, file.first_id + first)
    for first, pages in guards:
        for page in range(first, first + pages):
            assert task.do("peek", BASE + page * PAGE) == ("0" if removed else SIGSEGV), page


def serve(service: Service, file: PagesFile, **options: int) -> tuple[Task, ServedTask]:
    """A task with one mapping of which everything is missing."""
    task = service.task()
    uffd = task.open_uffd()
    task.map((BASE, PAGES))
    return task, service.serve(
        uffd, [(BASE, PAGES, 0, 0)], [(BASE, PAGES)], file, **{"pid": task.pid, **options}
    )


def bring_all(served: ServedTask) -> None:
    """What the background brings, to the end."""

    def done() -> bool:
        with suppress(BusyError):
            served.transfer(1 << 20)
        return not served.pending

    until("the transfer", done)


def check_fates(served: ServedTask) -> None:
    """Every page was copied, or dropped because a guard was there."""
    copied, dropped, _ = served.sources()
    assert (copied.total, dropped.total) == ((PAGES - GUARDED, GUARDED) if has_guards() else (PAGES, 0))


@pytest.mark.parametrize("then", ["stay", "go"])
def test_background(then: str, file: PagesFile) -> None:
    with Service() as service:
        task, served = serve(service, file)
        guard(task)
        bring_all(served)
        check_fates(served)
        if then == "go":
            guard(task, advice=MADV_GUARD_REMOVE)
        check(task, file, removed=then == "go")
        assert not [event for event in service.look() if event.kind is TaskEventKind.UNSEEN]


def test_readahead(file: PagesFile) -> None:
    """A fault brings its neighbours, before and behind it: not those that are guards."""
    with Service() as service:
        task, _ = serve(service, file, max_readahead=64)
        guard(task)
        for first, pages in gaps():
            task.check(BASE + first * PAGE, pages, file.first_id + first, order=FORWARD)
        check(task, file)


@pytest.mark.parametrize("once", [True, False], ids=["at once", "page by page"])
def test_delivery(once: bool, file: PagesFile) -> None:
    """Pages that a page server has sent, with which nobody can know what has become of their places meanwhile."""
    with Service() as service:
        task = service.task()
        uffd = task.open_uffd()
        task.map((BASE, PAGES))
        served = service.serve(uffd, [(BASE, PAGES, 0, REMOTE)], [(BASE, PAGES)], pid=task.pid)
        guard(task)
        step = PAGES if once else 1
        for page in range(0, PAGES, step):
            deliver(served, BASE + page * PAGE, file.page_bytes(page, step))
        assert not served.pending
        check_fates(served)
        check(task, file)


def test_a_thread_that_waits_for_what_becomes_a_guard(file: PagesFile) -> None:
    """The page that it has asked for comes too late: it is told that there is a guard."""
    with Service() as service:
        task = service.task()
        uffd = task.open_uffd()
        task.map((BASE, PAGES))
        served = service.serve(
            uffd, [(BASE, PAGES, 0, REMOTE)], [(BASE, PAGES)], pid=task.pid, max_readahead=1
        )
        task.tell("peek_guarded", BASE)
        assert service.wait(TaskEventKind.NEED, served).dump_addr == BASE
        os.kill(task.pid, signal.SIGUSR1)
        if has_guards():
            until("the guard", lambda: guards_of(task.pid, BASE, 1))
        deliver(served, BASE, file.page_bytes(0))
        assert task.reply() == (SIGSEGV if has_guards() else str(file.first_id))


def test_a_child_has_its_parents_guards(file: PagesFile) -> None:
    """Of a child no process is known, so that its guards can't be seen: those of its parent can, when it forks."""
    with Service() as service:
        task, served = serve(service, file)
        guard(task)
        child = service.adopt(task.fork())
        child_served = service.wait(TaskEventKind.FORKED).task
        for one, by in ((task, served), (child, child_served)):
            bring_all(by)
            check(one, file)
            guard(one, advice=MADV_GUARD_REMOVE)
            check(one, file, removed=True)


def test_a_guard_that_the_child_has_not(file: PagesFile) -> None:
    """The parent has forked, of which nobody has been told, and installs a guard: in the child there is data."""
    with ExitStack() as stack:
        service = Service()  # which reads no events yet
        task, _ = serve(service, file)
        stack.callback(task.close)
        guard(task, GUARDS[:3])
        task.do("fork_apart")
        assert select.select([task.uffd], [], [], 60)[0]
        guard(task, GUARDS[3:])
        stack.enter_context(service)
        child = service.adopt(task.forked())
        child_served = service.wait(TaskEventKind.FORKED).task
        bring_all(child_served)
        check(child, file, GUARDS[:3])


def test_moved(file: PagesFile) -> None:
    """Guards move with their memory."""
    to = BASE + (1 << 32)
    with Service() as service:
        task, served = serve(service, file)
        guard(task, [(16, 16)])
        assert task.mremap(BASE, 64, to) == to
        bring_all(served)
        for page in range(16, 32):
            assert task.do("peek", to + page * PAGE) == (
                SIGSEGV if has_guards() else str(file.first_id + page)
            )
        task.check(to, 16, file.first_id)
        task.check(to + 32 * PAGE, 32, file.first_id + 32)


def test_the_guard_of_another_mapping(file: PagesFile) -> None:
    """It is where pages are missing that have moved away, of which the engine has not been told: those stay missing."""
    to = BASE + (1 << 32)
    with ExitStack() as stack:
        service = Service()  # which reads no events yet
        task, served = serve(service, file)
        stack.callback(task.close)
        assert task.do("leave_guards", BASE, PAGES, to) == ("0" if has_guards() else "errno 22")
        with suppress(BusyError):
            served.transfer(PAGES * PAGE)
        assert served.pending == PAGES
        stack.enter_context(service)
        until("the move", lambda: served.stats().remaps)
        bring_all(served)
        task.check(to, PAGES, file.first_id)
        assert task.do("peek", BASE) == (SIGSEGV if has_guards() else "0")


def test_no_descriptor_is_free(file: PagesFile) -> None:
    """The page tables can be looked at all the same, of more tasks than are kept open at a time."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Service() as service:
        tasks = [serve(service, file) for _ in range(12)]
        for task, _ in tasks:
            guard(task)
        free = os.dup(0)
        os.close(free)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
            for _, served in tasks:
                bring_all(served)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for task, _ in tasks:
            check(task, file)


def test_many_tasks(file: PagesFile) -> None:
    """In turns, as the server has them: each finds its own page tables, and no more descriptors are used than a few."""
    with Service() as service:
        tasks = [serve(service, file) for _ in range(24)]
        for number, (task, _) in enumerate(tasks):
            guard(task, [(number, 2)])
        before = len(os.listdir("/proc/self/fd"))
        while any(served.pending for _, served in tasks):
            for _, served in tasks:
                if served.pending:
                    served.transfer(64 << 10)
        assert len(os.listdir("/proc/self/fd")) - before <= 8
        for number, (task, _) in enumerate(tasks):
            check(task, file, [(number, 2)])


def test_page_tables_that_may_not_be_read(file: PagesFile) -> None:
    """A process that has gone, here: the owner hears of it, once, and the memory comes all the same."""
    with Service() as service:
        task, served = serve(service, file, pid=1 << 22)
        bring_all(served)
        task.check(BASE, PAGES, file.first_id)
        told = [event for event in service.look() if event.kind is TaskEventKind.UNSEEN]
        assert len(told) == (1 if looks() else 0)


def looks() -> bool:
    """Whether the engine has to look for guards here: copies overwrite them."""
    with Service() as service:
        task = service.task()
        uffd = task.open_uffd()
        os.close(uffd)
        task.map((BASE, 1))
        guard(task, [(0, 1)])
        return has_guards() and task.do("copy", BASE, 1) == "0"


SWAPPED, GUARD = 0x10, 0x100  # PAGE_IS_*, linux/fs.h


@pytest.mark.parametrize("category", [SWAPPED, GUARD], ids=["6.13", "6.15"])
def test_what_a_scan_finds(category: int) -> None:
    """A kernel that has guards, but can't tell them from what is swapped out (6.13, 6.14), tells that."""
    if not has_guards():
        assert lib.lp_guarded_scan(-1, category, BASE, BASE + PAGE, ffi.new("struct lp_range *")) < 0
        return
    with Service() as service:
        task = service.task()
        task.map((BASE, PAGES), register=False)
        task.do("poke", BASE + 40 * PAGE, 4, 7)
        guard(task)
        fd = os.open(f"/proc/{task.pid}/pagemap", os.O_RDONLY)
        try:
            found, at, end = [], BASE, BASE + PAGES * PAGE
            while at < end:
                run = ffi.new("struct lp_range *")
                assert lib.lp_guarded_scan(fd, category, at, end, run) == 0
                if run.start < end:
                    found.append(((run.start - BASE) // PAGE, (run.end - run.start) // PAGE))
                at = run.end
        finally:
            os.close(fd)
        assert found == GUARDS
