"""The engine and the kernel: tasks that register their own memory, each byte checked from inside.

What CRIU can't be made to do on purpose, and what must never happen: wrong bytes, zeros for data, a thread that waits
for ever. See ``tests/support/uffd.py``.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import re
import resource
import signal
import struct
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from lazypages.engine.engine import Engine
from lazypages.engine.errors import BusyError, TaskGoneError
from lazypages.engine.events import TaskEventKind
from lazypages.engine.memory import PreparedMemory, TaskMemory
from lazypages.engine.task import ServedTask
from tests.support import remote_task
from tests.support.blocked import misses_a_page
from tests.support.kernel import cannot_poison
from tests.support.processes import end, start_as
from tests.support.remote_task import claim
from tests.support.uffd import (
    BACKWARD,
    BASE,
    FORWARD,
    MREMAP_DONTUNMAP,
    PAGE,
    RANDOM,
    ExtentTable,
    PagesFile,
    Service,
    Task,
    needs_while_it_churns,
    until,
)

GIB = 1 << 30
PAGES = 512
REMOTE, LOST = 0xFFFFFFFE, 0xFFFFFFFF  # csrc/common/extent.h
MADV_DONTNEED, MADV_DONTFORK, MADV_NOHUGEPAGE, MADV_WIPEONFORK, MADV_KEEPONFORK = 4, 10, 15, 18, 19


@pytest.fixture(scope="module")
def file() -> PagesFile:
    return PagesFile(16384)


def one_mapping(service: Service, file: PagesFile, pages: int = PAGES, **options: int) -> tuple[Task, int]:
    """A task with one registered mapping of `pages` at BASE. Returns it and its uffd."""
    task = service.task()
    uffd = task.open_uffd()
    task.map((BASE, pages))
    return task, uffd


def bring(served: ServedTask) -> int:
    """What background transfer brings, if the layout is at rest."""
    try:
        return served.transfer(1 << 20)
    except BusyError:
        return 0


def place_without_waking(uffd: int, at: int, page: bytes) -> None:
    """UFFDIO_COPY with MODE_DONTWAKE (userfaultfd(2))."""
    source = ctypes.create_string_buffer(page, len(page))
    fcntl.ioctl(uffd, 0xC028AA03, struct.pack("QQQQq", at, ctypes.addressof(source), len(page), 1, 0))


# Faults.


@pytest.mark.parametrize("order", [FORWARD, BACKWARD, RANDOM], ids=["up", "down", "random"])
@pytest.mark.parametrize("writes", [False, True], ids=["reads", "writes"])
@pytest.mark.parametrize(
    ("threads", "together"), [(1, False), (4, False), (4, True)], ids=["1", "4", "4 together"]
)
def test_faults(file: PagesFile, order: int, writes: bool, threads: int, together: bool) -> None:
    with Service() as service:
        task, served = service.mapped(file, (BASE, PAGES))
        task.check(BASE, PAGES, file.first_id, order=order, threads=threads, writes=writes, together=together)
        service.wait(TaskEventKind.COMPLETE, served)
        copied, dropped, answered = served.sources()
        assert copied.levels == (PAGES,)
        assert dropped.total == 0
        assert 0 < answered.levels[0] <= served.stats().faults
        task.check(BASE, PAGES, file.first_id)


@pytest.mark.loop("1")
@pytest.mark.parametrize("hogs", [0, 1, 3])
def test_faults_of_a_task_that_is_followed(file: PagesFile, hogs: int) -> None:
    """The serving thread gives way on the task's CPU; others that want that CPU as well do not stop it for good."""
    pages = 8192
    with Service() as service, ExitStack() as stack:
        for _ in range(hogs):
            hog = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            stack.callback(hog.kill)
        task, uffd = one_mapping(service, file, pages)
        served = service.serve(
            uffd, [(BASE, pages, 0, 0)], [(BASE, pages)], file, max_readahead=1, pid=task.pid
        )
        task.check(BASE, pages, file.first_id, order=RANDOM, writes=True)
        service.wait(TaskEventKind.COMPLETE, served)
        assert served.stats().faults >= pages


@pytest.mark.parametrize("order", [FORWARD, BACKWARD], ids=["up", "down"])
def test_a_scan_goes_on_past_pages_that_are_there(file: PagesFile, order: int) -> None:
    """A fault for each window, not for each hole that earlier faults have made."""
    with Service() as service:
        task, served = service.mapped(file, (BASE, PAGES), max_readahead=64)
        for page in range(5, PAGES, 11):
            task.check(BASE + page * PAGE, 1, file.first_id + page)
        before = served.stats().faults
        task.check(BASE, PAGES, file.first_id, order=order)
        service.wait(TaskEventKind.COMPLETE, served)
        assert served.sources()[0].total == PAGES  # each once
        assert served.stats().faults - before <= PAGES // 64 + 16


def bytes_from_disks() -> int:
    """That this process has read; 0 for ever if its files are in memory."""
    return int(re.findall(r"^read_bytes: (\d+)", Path("/proc/self/io").read_text(), re.MULTILINE)[0])


@pytest.mark.slow
def test_a_fault_reads_no_more_from_a_disk_than_it_needs() -> None:
    """A thread does not wait until a disk has read megabytes around its page, as a mapping would have it."""
    pages, touches = 32768, 128
    file = PagesFile(pages)
    file.forget()
    with Service() as service:
        task, served = service.mapped(file, (BASE, pages), max_readahead=1)
        before = bytes_from_disks()
        for page in range(0, pages, pages // touches):
            task.check(BASE + page * PAGE, 1, file.first_id + page)
        assert bytes_from_disks() - before <= pages * PAGE // 2
        task.check(BASE, pages, file.first_id)
        service.wait(TaskEventKind.COMPLETE, served)


def test_memory_that_is_prepared_is_for_one_task(file: PagesFile) -> None:
    memory = PreparedMemory(
        TaskMemory(ExtentTable([(BASE, 4, 0, 0)]), [(BASE, BASE + 4 * PAGE)], (), [file.map])
    )
    PreparedMemory(
        TaskMemory(ExtentTable([(BASE, 4, 0, 0)]), [(BASE, BASE + 4 * PAGE)], (), [file.map])
    )  # for none
    with Service() as service:
        task, uffd = one_mapping(service, file, 4)
        served = service.engine.add(uffd, memory)
        with pytest.raises(ValueError, match="in use by a task"):
            memory.take()
        task.check(BASE, 4, file.first_id)
        service.wait(TaskEventKind.COMPLETE, served)


def test_a_uffd_that_cannot_be_served_stays_open(file: PagesFile, tmp_path: Path) -> None:
    """Closed, it would let its task run on zeros before anybody can kill it. (epoll takes no regular files.)"""
    unfit = tmp_path / "unfit"
    unfit.touch()
    memory = TaskMemory(ExtentTable([(BASE, 4, 0, 0)]), [(BASE, BASE + 4 * PAGE)], (), [file.map])
    with Service() as service:
        with pytest.raises(PermissionError):
            service.engine.add(os.open(unfit, os.O_RDONLY | os.O_CLOEXEC), memory)
        fds = {fd: Path(f"/proc/self/fd/{fd}") for fd in map(int, os.listdir("/proc/self/fd"))}
        held = [fd for fd, link in fds.items() if link.exists() and link.samefile(unfit)]
        assert len(held) == 1
        os.close(held[0])


@pytest.mark.parametrize("order", [FORWARD, BACKWARD, RANDOM], ids=["up", "down", "random"])
def test_faults_while_the_background_brings_the_same(file: PagesFile, order: int) -> None:
    pages = 8192
    with Service() as service:
        task, served = service.mapped(file, (BASE, pages))
        transfers = [service.transfer(served, 64 << 10) for _ in range(2)]
        task.check(BASE, pages, file.first_id, order=order, threads=4, writes=True)
        service.wait(TaskEventKind.COMPLETE, served)
        assert not any(transfer.error for transfer in transfers)
        assert served.sources()[0].total == pages  # each once


def test_background_alone_brings_all(file: PagesFile) -> None:
    with Service() as service:
        task, served = service.mapped(file, (BASE, PAGES))
        brought = 0
        while count := served.transfer(1 << 20):
            brought += count
        assert brought == PAGES * PAGE
        assert served.pending == 0
        task.check(BASE, PAGES, file.first_id)
        assert served.stats().faults == 0


def test_fragments_levels_and_zeros(file: PagesFile) -> None:
    """Every second page from one level or another, the pages between were never touched."""
    parent = PagesFile(64, level=1)
    extents = [(BASE + 2 * i * PAGE, 1, (i // 2) * PAGE, i % 2) for i in range(64)]
    with Service() as service:
        task, uffd = one_mapping(service, file, 128)
        served = service.serve(uffd, extents, [(BASE, 128)], file, parent)
        assert served.remaining().levels == (32, 32)
        for i in range(64):
            task.check(BASE + 2 * i * PAGE, 1, (parent if i % 2 else file).first_id + i // 2)
            task.check(BASE + (2 * i + 1) * PAGE, 1, 0)
        # a fault is counted when its thread runs again already
        until("the last count", lambda: served.sources()[0].levels == (32, 32))
        until("the last count", lambda: served.stats().faults_zero == 64)


def test_many_tasks_at_once(file: PagesFile) -> None:
    count, pages = 200, 32
    with Service() as service:
        tasks = [service.task() for _ in range(count)]
        for task in tasks:
            task.tell("uffd", 0x4E)
        uffds = [task.received_uffd() for task in tasks]
        for task in tasks:
            task.map((BASE, pages))
        served = [
            service.serve(uffd, [(BASE, pages, i * pages * PAGE, 0)], [(BASE, pages)], file)
            for i, uffd in enumerate(uffds)
        ]
        for i, task in enumerate(tasks):
            task.tell_check(BASE, pages, file.first_id + i * pages, order=RANDOM, threads=2)
        for task in tasks:
            task.reply()
        until("all to be complete", lambda: not any(one.pending for one in served))


# What is there already, can't be reached, or can't be read.


@pytest.mark.every_kernel
@pytest.mark.parametrize("background", [False, True])
def test_pages_that_the_task_has_placed_itself(file: PagesFile, background: bool) -> None:
    """EEXIST: theirs stay. In the middle of a run it makes the copy a partial one."""
    own = 77 << 40
    with Service() as service:
        task, uffd = one_mapping(service, file)
        for page in (0, 1, 17, 100, PAGES - 1):
            assert task.do("copy", BASE + page * PAGE, own + page) == "0"
        served = service.serve(uffd, [(BASE, PAGES, 0, 0)], [(BASE, PAGES)], file, max_readahead=64)
        if background:
            while served.transfer(1 << 20):
                pass
        else:
            task.check(BASE + 2 * PAGE, 15, file.first_id + 2)
            task.check(BASE + 18 * PAGE, 82, file.first_id + 18, order=BACKWARD)
            task.check(BASE + 101 * PAGE, PAGES - 102, file.first_id + 101)
        for page in (0, 1, 17, 100, PAGES - 1):
            task.check(BASE + page * PAGE, 1, own + page)
        for first, last in ((2, 17), (18, 100), (101, PAGES - 1)):
            task.check(BASE + first * PAGE, last - first, file.first_id + first)
        assert served.stats().present >= 1
        assert served.lost == 0


def test_a_layout_that_never_stops_changing_delays_no_other_task(file: PagesFile) -> None:
    """Each event that is read has its thread go on, and make the next one: the engine must not read for ever."""
    threads = 32
    with Service() as service:
        restless, moving = one_mapping(service, file, threads + 1)
        service.serve(moving, [(BASE, threads + 1, 0, 0)], [(BASE, threads + 1)], file)
        other, uffd = one_mapping(service, file, 32)
        served = service.serve(uffd, [(BASE, 32, 0, 0)], [(BASE, 32)], file, max_readahead=1)
        restless.do("munmap", BASE + threads * PAGE, 1)  # from this on each event is read alone
        restless.do("discards", BASE, threads)
        other.check(BASE, 32, file.first_id)
        until("all of it", lambda: served.pending == 0)


def test_a_page_that_somebody_places_without_waking(file: PagesFile) -> None:
    """EEXIST again: whoever waits for the page is woken all the same."""
    with Service() as service:
        task, uffd = one_mapping(service, file, 4)
        other = os.dup(uffd)
        served = service.serve(uffd, [(BASE, 4, 0, REMOTE)], [(BASE, 4)], max_readahead=1)
        task.tell_check(BASE, 1, file.first_id)
        need = service.wait(TaskEventKind.NEED, served)
        place_without_waking(other, BASE, file.page_bytes(0))
        os.close(other)
        assert task.busy()
        assert deliver(served, need.dump_addr, file.page_bytes(0)) == 1
        task.reply()
        assert served.stats().present == 1


@pytest.mark.every_kernel
@pytest.mark.parametrize("background", [False, True])
def test_mappings_split_without_an_event(file: PagesFile, background: bool) -> None:
    """mprotect and madvise split VMAs, and a copy must stay within one (ENOENT): every page comes all the same."""
    with Service() as service:
        task, served = service.mapped(file, (BASE, PAGES), max_readahead=64)
        for first, count in ((3, 1), (10, 7), (40, 300)):
            assert task.do("mprotect", BASE + first * PAGE, count, mmap.PROT_READ) == "0"
        assert task.do("madvise", BASE + 100 * PAGE, 5, MADV_NOHUGEPAGE) == "0"
        if background:
            while served.transfer(1 << 20):
                pass
            assert served.pending == 0
        task.check(BASE, PAGES, file.first_id)
        assert served.lost == 0


@pytest.mark.every_kernel
def test_page_that_was_never_registered(file: PagesFile) -> None:
    """Told, not silent; the registered neighbours come."""
    with Service() as service:
        task = service.task()
        uffd = task.open_uffd()
        task.map((BASE, 8))
        task.map((BASE + 8 * PAGE, 1), register=False)
        task.map((BASE + 9 * PAGE, 8))
        served = service.serve(uffd, [(BASE, 17, 0, 0)], [(BASE, 17)], file)
        while served.transfer(1 << 20):
            pass
        event = service.wait(TaskEventKind.LOST, served)
        assert (event.error, event.addr, event.dump_addr, event.nr_pages) == (
            errno.ENOENT,
            BASE + 8 * PAGE,
            BASE + 8 * PAGE,
            1,
        )
        assert (served.pending, served.lost) == (1, 1)
        task.check(BASE, 8, file.first_id)
        task.check(BASE + 9 * PAGE, 8, file.first_id + 9)
        served.forget(event.dump_addr, 4)
        assert (served.pending, served.lost) == (0, 0)
        service.wait(TaskEventKind.COMPLETE, served)


def test_forgetting_touches_nothing_but_what_is_lost(file: PagesFile) -> None:
    """By the time the owner forgets, other memory may have come to where the lost page was."""
    with Service() as service:
        task = service.task()
        uffd = task.open_uffd()
        task.map((BASE, 1), register=False)
        task.map((BASE + GIB, 8))
        served = service.serve(
            uffd,
            [(BASE, 1, 0, 0), (BASE + GIB, 8, PAGE, 0)],
            [(BASE, 1), (BASE + GIB, 8)],
            file,
            max_readahead=1,
        )
        assert served.transfer(PAGE)
        event = service.wait(TaskEventKind.LOST, served)
        assert task.mremap(BASE + GIB, 8, BASE) == BASE
        served.forget(event.dump_addr, 8)
        assert served.lost == 0
        task.check(BASE, 8, file.first_id + 1)


@pytest.mark.every_kernel
@pytest.mark.parametrize("more", [0, 1, 2000, PAGE - 1])
@pytest.mark.parametrize("background", [False, True])
def test_truncated_pages_file(background: bool, more: int) -> None:
    """Lost, and a touch raises SIGBUS once they are poisoned; what is still in the file comes. A page of which a
    part is still there can be read, and is zeros behind it: lost all the same."""
    file = PagesFile(64)
    with Service() as service:
        task, served = service.mapped(file, (BASE, 64), max_readahead=64)
        file.truncate(50 * PAGE + more)
        if background:
            while served.transfer(1 << 20):
                pass
            assert (served.pending, served.lost) == (14, 14)
            task.tell("peek", BASE + 55 * PAGE)
        else:
            task.check(BASE, 30, file.first_id)
            task.tell("peek", BASE + 50 * PAGE)
        event = service.wait(TaskEventKind.LOST, served)
        assert event.error == errno.EFAULT
        assert event.addr >= BASE + 50 * PAGE
        assert task.busy()  # not zeros
        if cannot_poison(served, everything=False):
            assert task.busy()
            return
        assert served.poison(everything=False) == served.stats().poisoned > 0
        assert task.reply() == f"signal {signal.SIGBUS}"
        task.check(BASE, 50, file.first_id)


@pytest.mark.every_kernel
@pytest.mark.parametrize("closed", [False, True])
def test_poisoned_pages(file: PagesFile, closed: bool) -> None:
    """All that is pending raises SIGBUS, through mappings split in any way; what had come stays. So after the close."""
    with Service() as service:
        task, uffd = one_mapping(service, file, 64)
        served = service.serve(uffd, [(BASE, 60, 0, 0)], [(BASE, 64)], file, max_readahead=1)
        task.check(BASE + 5 * PAGE, 3, file.first_id + 5)
        for first, count in ((1, 1), (10, 7), (20, 30)):
            assert task.do("mprotect", BASE + first * PAGE, count, mmap.PROT_READ) == "0"
        if cannot_poison(served, everything=True):
            assert served.pending == 57
            return
        assert served.poison(everything=True) == 57
        assert served.pending == 0
        service.wait(TaskEventKind.COMPLETE, served)
        if closed:
            assert task.do("close") == "0"  # as CRIU's restorer does
            served.close()
        for page in (*range(5), *range(8, 60)):
            assert task.do("peek", BASE + page * PAGE) == f"signal {signal.SIGBUS}"
        task.check(BASE + 5 * PAGE, 3, file.first_id + 5)
        task.check(BASE + 60 * PAGE, 4, 0)


@pytest.mark.every_kernel
def test_a_waiting_thread_gets_the_signal(file: PagesFile) -> None:
    """A lost page that is waited for; its neighbours, pending but not lost, are not poisoned with it."""
    with Service() as service:
        task, uffd = one_mapping(service, file, 3)
        served = service.serve(
            uffd,
            [(BASE, 1, 0, 0), (BASE + PAGE, 1, 0, LOST), (BASE + 2 * PAGE, 1, 2 * PAGE, 0)],
            [(BASE, 3)],
            file,
        )
        assert served.lost == 1
        task.tell("peek", BASE + PAGE)
        event = service.wait(TaskEventKind.LOST, served)
        assert (event.error, event.addr, event.since > 0) == (0, BASE + PAGE, True)
        assert task.busy()
        if cannot_poison(served, everything=False):
            assert task.busy()
            return
        assert served.poison(everything=False) == 1
        assert task.reply() == f"signal {signal.SIGBUS}"
        task.check(BASE, 1, file.first_id)
        task.check(BASE + 2 * PAGE, 1, file.first_id + 2)


@pytest.mark.every_kernel
def test_poisoning_what_is_not_registered_is_told(file: PagesFile) -> None:
    with Service() as service:
        task = service.task()
        uffd = task.open_uffd()
        task.map((BASE, 1), register=False)
        task.map((BASE + PAGE, 3))
        served = service.serve(uffd, [(BASE, 4, 0, 0)], [(BASE, 4)], file)
        if cannot_poison(served, everything=True):
            return
        served.poison(everything=True)
        event = service.wait(TaskEventKind.LOST, served)
        assert (event.error, event.addr, event.nr_pages) == (errno.ENOENT, BASE, 1)
        assert task.do("peek", BASE + PAGE) == f"signal {signal.SIGBUS}"


# Layout.


@pytest.mark.loop("4")
@pytest.mark.every_kernel
@pytest.mark.parametrize("seed", range(1, 5))
def test_layout_in_turmoil(file: PagesFile, seed: int) -> None:
    """One thread discards, unmaps, moves over other lazy memory, moves and stays, shrinks, grows; three touch."""
    pages = 16384
    with Service() as service:
        task, served = service.mapped(file, (BASE, pages), max_readahead=8)
        transfer = service.transfer(served, 16 << 10, pause=0.001)
        story = task.do("churn", BASE, pages, file.first_id, seed, 1500, 200, 3)
        assert served.lost == 0, story
        transfer.stop()
        assert transfer.error is None
        until("the rest", lambda: bring(served) == served.pending == 0)
        copied, dropped, _ = served.sources()
        assert copied.total + dropped.total == pages


@pytest.mark.every_kernel
def test_ranges_of_many_gib(file: PagesFile) -> None:
    """Lengths beyond 32 bits in REMAP, REMOVE and UNMAP; a page of data in each GiB."""
    gib = GIB // PAGE
    with Service() as service:
        task, uffd = one_mapping(service, file, 12 * gib)
        served = service.serve(
            uffd,
            [(BASE + i * GIB, 2, 2 * i * PAGE, 0) for i in range(12)],
            [(BASE, 12 * gib)],
            file,
            max_readahead=1,
        )
        to = BASE + 100 * GIB
        assert task.mremap(BASE + 6 * GIB, 6 * gib, to) == to
        task.check(to, 1, file.first_id + 12)
        task.check(to + 5 * GIB, 2, file.first_id + 22)
        assert task.do("madvise", to + GIB, 3 * gib, MADV_DONTNEED) == "0"
        for i in range(1, 4):
            task.check(to + i * GIB, 2, 0)
        task.check(to + 4 * GIB, 2, file.first_id + 20)
        assert task.do("munmap", BASE + GIB, 5 * gib) == "0"
        task.check(BASE, 2, file.first_id)
        task.check(to + PAGE, 1, file.first_id + 13)
        service.wait(TaskEventKind.COMPLETE, served)
        assert served.sources()[1].levels == (16,)


@pytest.mark.every_kernel
def test_unmapped_and_mapped_anew(file: PagesFile) -> None:
    """What is mapped where lazy memory was is not ours, until it is registered; then it is zero."""
    with Service() as service:
        task, served = service.mapped(file, (BASE, PAGES), max_readahead=1)
        assert task.do("munmap", BASE + 10 * PAGE, 20) == "0"
        task.map((BASE + 10 * PAGE, 20), register=False)
        task.check(BASE + 10 * PAGE, 10, 0)
        assert task.do("register", BASE + 10 * PAGE, 20) == "0"
        task.check(BASE + 20 * PAGE, 10, 0)
        task.check(BASE, 10, file.first_id)
        task.check(BASE + 30 * PAGE, PAGES - 30, file.first_id + 30)
        service.wait(TaskEventKind.COMPLETE, served)


@pytest.mark.every_kernel
def test_what_dontunmap_leaves_is_zero_and_can_move_on(file: PagesFile) -> None:
    with Service() as service:
        task, served = service.mapped(file, (BASE, 16), max_readahead=1)
        away, further = BASE + GIB, BASE + 2 * GIB
        assert task.mremap(BASE, 16, away, flags=MREMAP_DONTUNMAP) == away
        task.check(BASE, 8, 0)
        assert task.mremap(BASE, 16, further) == further
        task.check(further, 16, 0)
        assert task.mremap(away, 16, BASE) == BASE
        task.check(BASE, 16, file.first_id)
        service.wait(TaskEventKind.COMPLETE, served)


@pytest.mark.every_kernel
def test_memory_that_moves_to_where_nothing_was_registered(file: PagesFile) -> None:
    """We take the place for taken, and nothing tells that it is not: it is at rest that we know."""
    with Service() as service:
        task = service.task()
        uffd = task.open_uffd()
        task.map((BASE, 16))
        task.map((BASE + GIB, 16), register=False)
        served = service.serve(uffd, [(BASE, 16, 0, 0)], [(BASE, 16), (BASE + GIB, 16)], file)
        assert task.mremap(BASE, 16, BASE + GIB) == BASE + GIB
        until("the background to bring all", lambda: bring(served) == served.pending == 0)
        assert served.stats().faults == 0
        task.check(BASE + GIB, 16, file.first_id)


@pytest.mark.every_kernel
def test_zero_pages_that_have_moved(file: PagesFile) -> None:
    """Memory that has grown since the dump is registered too, and moves with the rest."""
    with Service() as service:
        task, served = service.mapped(file, (BASE, 16), max_readahead=1)
        assert task.mremap(BASE, 16, None, 32) == BASE
        to = BASE + GIB
        assert task.mremap(BASE, 32, to) == to
        task.check(to + 16 * PAGE, 16, 0)
        task.check(to, 16, file.first_id)
        assert served.lost == 0


# Forks.


def adopt_fork(service: Service, task: Task) -> Task:
    return service.adopt(task.fork())


@pytest.mark.every_kernel
def test_generations_that_part(file: PagesFile) -> None:
    """Child and grandchild are served, and what one does to its memory does not touch the others'."""
    with Service() as service:
        task, served = service.mapped(file, (BASE, PAGES), max_readahead=1)
        task.check(BASE, 5, file.first_id)
        child = adopt_fork(service, task)
        fork = service.wait(TaskEventKind.FORKED)
        assert fork.task.tag == served.tag
        assert fork.task.total == PAGES - 5
        assert child.do("madvise", BASE, 20, MADV_DONTNEED) == "0"
        assert child.mremap(BASE + 100 * PAGE, 50, BASE + GIB) == BASE + GIB
        child.do("poke", BASE + 30 * PAGE, 2, 99 << 40)
        grandchild = adopt_fork(service, child)
        assert service.wait(TaskEventKind.FORKED).task.tag == served.tag
        assert grandchild.do("munmap", BASE + 200 * PAGE, 100) == "0"
        assert grandchild.mremap(BASE + GIB, 50, BASE + 200 * PAGE) == BASE + 200 * PAGE

        task.check(BASE, PAGES, file.first_id, order=RANDOM, threads=2)
        for one in (grandchild, child):
            one.check(BASE, 20, 0)
            one.check(BASE + 20 * PAGE, 10, file.first_id + 20)
            one.check(BASE + 30 * PAGE, 2, 99 << 40)
            one.check(BASE + 32 * PAGE, 68, file.first_id + 32)
            one.check(BASE + 150 * PAGE, 50, file.first_id + 150)
            one.check(BASE + 300 * PAGE, PAGES - 300, file.first_id + 300)
        child.check(BASE + 200 * PAGE, 100, file.first_id + 200)
        child.check(BASE + GIB, 50, file.first_id + 100)
        grandchild.check(BASE + 200 * PAGE, 50, file.first_id + 100)
        for kind in (served, fork.task):
            service.wait(TaskEventKind.COMPLETE, kind)


@pytest.mark.slow
@pytest.mark.parametrize("background", [False, pytest.param(True, marks=pytest.mark.every_kernel)])
def test_fork_storm(file: PagesFile, background: bool) -> None:
    """Children, forked while threads of the parent fault. During a fork the kernel refuses all copies.

    Nearly all pages are missing in each of them: 950 faults, of which an emulated machine has 6,500 answered a second
    when it has two processors to itself (tests/kernels).
    """
    pages, forks = 1024, 50 if "LAZYPAGES_EMULATED" in os.environ else 200
    with Service() as service:
        task, uffd = one_mapping(service, file, pages)
        task.map((BASE + GIB, 8192), register=False)
        task.do("poke", BASE + GIB, 8192, 1)  # page tables: a fork takes its time
        served = service.serve(uffd, [(BASE, pages, 0, 0)], [(BASE, pages)], file, max_readahead=1)
        if background:
            service.transfer(served, PAGE, pause=0.001)
        task.do("forks", forks, BASE, pages, file.first_id, 3, timeout=400)
        children = [service.wait(TaskEventKind.FORKED).task for _ in range(forks)]
        assert not any(child.lost for child in (served, *children))
        for child in children:  # they are gone, or have all
            until("its end", lambda child=child: not child.pending or not child.probe())
            child.close()


def threads_that_report(pid: int) -> int:
    """How many threads of a process wait until a change of the layout has been read."""
    return sum(
        "userfaultfd" in (task / "wchan").read_text() for task in Path("/proc", str(pid), "task").iterdir()
    )


@pytest.mark.parametrize("closed", [False, True], ids=["served", "closed"])
def test_a_fork_that_has_to_wait(file: PagesFile, closed: bool) -> None:
    """What has been unmapped with it is asked of the child, whose layout does not come to rest. Another task does not
    feel it, and the child loses nothing; unless its parent is closed, when it loses what can't be told."""
    pages = 32
    area, unmapped, kept = BASE, BASE + GIB, BASE + 2 * GIB
    with Service() as service:
        task, other = service.task(), service.task()
        uffd, others = task.open_uffd(), other.open_uffd()
        task.map((area, 16), (unmapped, pages), (kept, pages))
        other.map((BASE, pages))
        extents = [(unmapped, pages, 0, 0), (kept, pages, pages * PAGE, 0)]
        served = service.serve(uffd, extents, [(area, 16), (unmapped, pages), (kept, pages)], file)
        service.serve(others, [(BASE, pages, 0, 0)], [(BASE, pages)], file, max_readahead=1)
        child_pid = int(task.do("restless", area, unmapped, kept, pages, file.first_id + pages))
        until("changes of the child", lambda: threads_that_report(child_pid) == 8)
        task.do("settle")
        until("the fork", lambda: served.stats().forks)
        other.check(BASE, pages, file.first_id)
        assert not [event for event in service.look() if event.kind is TaskEventKind.FORKED]
        if closed:
            served.close()
            child = service.wait(TaskEventKind.FORKED).task
            assert child.lost == child.pending == 2 * pages
            return
        task.do("calm")
        child = service.wait(TaskEventKind.FORKED).task
        assert child.lost == 0
        task.check(kept, pages, file.first_id + pages)
        service.wait(TaskEventKind.COMPLETE, served)


def test_a_child_that_moves_on_what_its_parent_has_moved(file: PagesFile) -> None:
    """Before it can be asked whether it has that: it has not got it there any more. Then it gets no zeros for data."""
    pages = 32
    area, place, moved, onward = (BASE + i * GIB for i in range(4))
    with Service() as service:
        task = service.task()
        uffd = task.open_uffd()
        task.map((area, 8), (place, pages))
        served = service.serve(uffd, [(place, pages, 0, 0)], [(area, 8), (place, pages)], file)
        child_pid = int(task.do("runaway", area, place, moved, onward, pages, file.first_id))
        until("its mremap", lambda: threads_that_report(child_pid))
        task.do("settle")
        task.do("calm")
        task.check(moved, pages, file.first_id)
        assert served.lost == 0


@pytest.mark.parametrize("what", ["rivals", "growing"])
def test_a_child_whose_own_memory_comes_where_its_parent_moved_some(what: str, file: PagesFile) -> None:
    """To where that has arrived, or to where it was, before the child could be asked: neither zeros nor old bytes."""
    pages = 32
    area, place, moved = (BASE + i * GIB for i in range(3))
    other = place - pages * PAGE if what == "growing" else BASE + 3 * GIB
    with Service() as service:
        task = service.task()
        uffd = task.open_uffd()
        task.map((area, 8), (other, pages), (place, pages))
        vmas = [(area, 8), (other, pages), (place, pages)]
        served = service.serve(uffd, [(place, pages, 0, 0)], sorted(vmas), file)
        child_pid = int(task.do(what, area, place, moved, other, pages, file.first_id))
        until(
            "the child to report or wait", lambda: threads_that_report(child_pid) or misses_a_page(child_pid)
        )
        task.do("settle")
        task.do("calm")
        task.check(moved, pages, file.first_id)
        assert served.lost == 0


@pytest.mark.every_kernel
def test_wiped_on_fork(file: PagesFile) -> None:
    """MADV_WIPEONFORK at dump time: pages that are pending are zero in the child, and data in the parent."""
    with Service() as service:
        task, uffd = one_mapping(service, file, 48)
        assert task.do("madvise", BASE + 16 * PAGE, 16, MADV_WIPEONFORK) == "0"
        served = service.serve(
            uffd,
            [(BASE, 48, 0, 0)],
            [(BASE, 16), (BASE + 16 * PAGE, 16), (BASE + 32 * PAGE, 16)],
            file,
            wiped=[(BASE + 16 * PAGE, 16)],
            max_readahead=1,
        )
        task.check(BASE + 16 * PAGE, 2, file.first_id + 16)
        child = adopt_fork(service, task)
        child.check(BASE + 16 * PAGE, 16, 0)
        child.check(BASE, 16, file.first_id)
        child.check(BASE + 32 * PAGE, 16, file.first_id + 32)
        task.check(BASE, 48, file.first_id)
        service.wait(TaskEventKind.COMPLETE, served)


@pytest.mark.every_kernel
def test_wiped_on_fork_where_nothing_is_mapped(file: PagesFile) -> None:
    """As when a range is on its way elsewhere while the fork is told: smaps does not show it, and so does not part it
    from what the image says."""
    with Service() as service, ExitStack() as stack:
        task, uffd = one_mapping(service, file, 16)
        pidfd = os.pidfd_open(task.pid)
        stack.callback(os.close, pidfd)
        service.serve(
            uffd,
            [(BASE, 48, 0, 0)],
            [(BASE, 16), (BASE + 16 * PAGE, 16), (BASE + 32 * PAGE, 16)],
            file,
            wiped=[(BASE + 8 * PAGE, 8), (BASE + 16 * PAGE, 16)],
            pid=task.pid,
            pidfd=pidfd,
        )
        adopt_fork(service, task)
        # 8 pages are mapped, and not wiped any more; 16 are not seen, and are as in the image
        assert service.wait(TaskEventKind.FORKED).task.pending == 48 - 16


@pytest.mark.every_kernel
def test_wiped_on_fork_by_what_was_said_since(file: PagesFile) -> None:
    """MADV_WIPEONFORK and _KEEPONFORK after the restore; for children of children as well, whose pids nobody knows.

    Also when the process has ended whose pid was told, and another has its memory: then the pid may be anybody's.
    """
    with Service() as service, ExitStack() as stack:
        task, uffd = one_mapping(service, file, 48)
        assert task.do("madvise", BASE + 16 * PAGE, 16, MADV_WIPEONFORK) == "0"
        pidfd = os.pidfd_open(task.pid)
        stack.callback(os.close, pidfd)
        service.serve(
            uffd,
            [(BASE, 48, 0, 0)],
            [(BASE, 16), (BASE + 16 * PAGE, 16), (BASE + 32 * PAGE, 16)],
            file,
            wiped=[(BASE + 16 * PAGE, 16)],
            max_readahead=1,
            pid=task.pid,
            pidfd=pidfd,
        )

        def check(one: Task) -> None:
            one.check(BASE, 32, file.first_id)
            one.check(BASE + GIB, 8, 0)
            one.check(BASE + 40 * PAGE, 8, file.first_id + 40)

        assert task.do("madvise", BASE + 16 * PAGE, 16, MADV_KEEPONFORK) == "0"
        assert task.do("madvise", BASE + 32 * PAGE, 8, MADV_WIPEONFORK) == "0"
        assert task.mremap(BASE + 32 * PAGE, 8, BASE + GIB) == BASE + GIB
        child = adopt_fork(service, task)
        grandchild = adopt_fork(service, child)
        check(grandchild)
        check(child)
        pid = task.pid
        task.leave()
        start_as(pid)
        check(adopt_fork(service, task))
        task.check(BASE, 32, file.first_id)
        task.check(BASE + GIB, 8, file.first_id + 32)
        end([pid])


@pytest.mark.every_kernel
def test_child_without_some_mappings(file: PagesFile) -> None:
    """MADV_DONTFORK: what a child has not is not missed there, and nobody is told of a loss."""
    with Service() as service:
        task, _ = service.mapped(file, (BASE, 48), max_readahead=1)
        assert task.do("madvise", BASE + 16 * PAGE, 16, MADV_DONTFORK) == "0"
        child = adopt_fork(service, task)
        served = service.wait(TaskEventKind.FORKED).task
        while served.transfer(1 << 20):
            pass
        assert (served.pending, served.lost) == (0, 0)
        child.check(BASE, 16, file.first_id)
        child.check(BASE + 32 * PAGE, 16, file.first_id + 32)
        task.check(BASE, 48, file.first_id)
        assert not [event for event in service.look() if event.kind is TaskEventKind.LOST]


@pytest.mark.every_kernel
def test_no_file_descriptor_for_a_child(file: PagesFile) -> None:
    """The fork waits, the owner is told; when one is free again, all goes on."""
    with Service() as service:
        task, served = service.mapped(file, (BASE, 64), max_readahead=1)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        free = os.dup(0)
        os.close(free)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
            task.tell("forks", 1, BASE, 64, file.first_id, 1)
            assert service.wait(TaskEventKind.FAILED, served).error == errno.EMFILE
            assert not task.replied()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        task.reply()
        service.wait(TaskEventKind.FORKED)
        task.check(BASE, 64, file.first_id)


def test_others_go_on_while_a_fork_cannot_be_read(file: PagesFile) -> None:
    """The thread that serves all does not wait for the descriptor: it looks now and then; the owner is told once."""
    pages = 2000
    with Service() as service:
        stuck, served = service.mapped(file, (BASE, 64), max_readahead=1)
        other, others_uffd = one_mapping(service, file, pages)
        others = service.serve(others_uffd, [(BASE, pages, 0, 0)], [(BASE, pages)], file, max_readahead=1)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        free = os.dup(0)
        os.close(free)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
            stuck.tell("forks", 1, BASE, 64, file.first_id, 1)
            assert service.wait(TaskEventKind.FAILED, served).error == errno.EMFILE
            before = served.stats().reads
            other.check(BASE, pages, file.first_id, order=RANDOM)
            assert others.stats().faults >= pages
            assert (
                served.stats().reads - before <= pages // 4
            )  # by the clock, not once for each fault of others
            assert not [event for event in service.look() if event.kind is TaskEventKind.FAILED]
            assert not stuck.replied()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        stuck.reply()
        service.wait(TaskEventKind.FORKED)
        stuck.check(BASE, 64, file.first_id)


# Ends.


@pytest.mark.every_kernel
def test_killed_while_it_waits(file: PagesFile) -> None:
    with Service() as service:
        task, uffd = one_mapping(service, file, 4)
        served = service.serve(uffd, [(BASE, 4, 0, LOST)], [(BASE, 4)], file)
        task.tell("peek", BASE)
        service.wait(TaskEventKind.LOST, served)
        assert served.probe()
        os.kill(task.pid, signal.SIGKILL)
        until("its end to be seen", lambda: not served.probe())
        service.wait(TaskEventKind.GONE, served)
        with pytest.raises(TaskGoneError):
            served.transfer(PAGE)


def test_killed_while_the_background_copies(file: PagesFile) -> None:
    with Service() as service:
        task, served = service.mapped(file, (BASE, 16384))
        assert served.transfer(1 << 20)
        os.kill(task.pid, signal.SIGKILL)
        with pytest.raises(TaskGoneError):  # noqa: PT012
            while served.transfer(1 << 20):
                time.sleep(0.001)
        service.wait(TaskEventKind.GONE, served)


def test_no_events_about_closed_tasks(file: PagesFile) -> None:
    """Neither about a task nor of it as a parent, however many were waiting to be read."""
    with Service() as service:
        task, served = service.mapped(file, (BASE, 64))
        child = adopt_fork(service, task)
        task.check(BASE, 64, file.first_id)
        until("it to be complete", lambda: served.pending == 0)
        served.close()
        events = service.look()
        assert [event.task for event in events if event.task is served] == []
        fork = service.wait(TaskEventKind.FORKED)
        assert fork.task.tag == served.tag
        child.check(BASE, 64, file.first_id)
        task.check(BASE, 64, file.first_id)
        service.wait(TaskEventKind.COMPLETE, fork.task)


def test_what_is_closed_says_whether_its_uffd_stays(file: PagesFile) -> None:
    """Only that of a task that misses pages and lives."""
    with Service() as service:
        _, incomplete = service.mapped(file, (BASE, 64))
        incomplete.close()
        assert incomplete.left_open
        task, complete = service.mapped(file, (BASE, 8))
        task.check(BASE, 8, file.first_id)
        service.wait(TaskEventKind.COMPLETE, complete)
        complete.close()
        assert not complete.left_open
        task, killed = service.mapped(file, (BASE, 64))
        task.close()
        killed.close()
        assert not killed.left_open


def test_tasks_closed_while_others_fault(file: PagesFile) -> None:
    """A hundred come, are served and closed, beside one that keeps the engine busy."""
    with Service() as service:
        busy, _ = service.mapped(file, (BASE, 4096), max_readahead=1)
        busy.tell_check(BASE, 4096, file.first_id, order=RANDOM, threads=2)
        for _ in range(100):
            task, served = service.mapped(file, (BASE, 8))
            task.check(BASE, 8, file.first_id)
            service.wait(TaskEventKind.COMPLETE, served)
            served.close()
            task.close()
        busy.reply()


def test_engine_ends_with_tasks_open(file: PagesFile) -> None:
    """Threads that wait, transfers that were asked for, changes that were not made: no leak, no crash."""
    for _ in range(3):
        with Service() as service:
            task, uffd = one_mapping(service, file, 64)
            served = service.serve(
                uffd, [(BASE, 32, 0, 0), (BASE + 32 * PAGE, 32, 0, LOST)], [(BASE, 64)], file
            )
            adopt_fork(service, task)
            task.tell("peek", BASE + 40 * PAGE)
            service.wait(TaskEventKind.LOST, served)


def open_files(kind: str) -> set[int]:
    """Those that this process has open of what /proc calls anon_inode:[kind]."""
    links = {fd: Path(f"/proc/self/fd/{fd}") for fd in map(int, os.listdir("/proc/self/fd"))}
    return {fd for fd, link in links.items() if link.is_symlink() and f"[{kind}]" in str(link.readlink())}


@pytest.mark.every_kernel
def test_engine_fails_while_a_task_forks(file: PagesFile) -> None:
    """Whose pages are missing, and what it is forking, of which nobody has read yet, keep waiting."""
    with Service() as later:
        others = open_files("eventpoll")
        task, uffd = one_mapping(later, file, 64)
        complete, other = one_mapping(later, file, 1)
        for one in (task, complete):
            one.do("drop")
        memories = [
            TaskMemory(ExtentTable([(BASE, n, 0, 0)]), [(BASE, BASE + n * PAGE)], (), [file.map])
            for n in (64, 1)
        ]
        with Engine() as engine:
            served, small = engine.add(uffd, memories[0]), engine.add(other, memories[1])
            while small.pending:
                small.transfer(PAGE)
            served.transfer(PAGE)
            (epoll,) = open_files("eventpoll") - others
            os.dup2(0, epoll)
            with pytest.raises(OSError, match="Invalid argument"):
                engine.run()
            task.tell("fork")
            assert task.busy()
            if not cannot_poison(served, everything=True):
                with pytest.raises(BusyError):
                    served.poison(everything=True)
        assert open_files("userfaultfd") & {uffd, other} == {uffd}
        assert task.busy()
        complete.check(BASE, 1, file.first_id)
        # whoever goes on with it finds all as it was
        last = later.serve(uffd, [(BASE, 64, 0, 0)], [(BASE, 64)], file, max_readahead=1)
        child = later.adopt(task.forked())
        child.check(BASE, 64, file.first_id)
        task.check(BASE, 64, file.first_id)
        while bring(last):
            pass
        later.wait(TaskEventKind.COMPLETE, last)


def test_a_blocking_uffd(file: PagesFile) -> None:
    """It is made non-blocking, and so is that of a child: reading it must not stop the service of all."""
    with Service() as service:
        task = service.task()
        uffd = task.open_uffd(blocking=True)
        task.map((BASE, 16))
        service.serve(uffd, [(BASE, 16, 0, 0)], [(BASE, 16)], file, max_readahead=1)
        task.check(BASE, 4, file.first_id)
        child = adopt_fork(service, task)
        child.check(BASE, 16, file.first_id)
        task.check(BASE, 16, file.first_id)


def test_extents_past_the_pages_file_are_refused() -> None:
    file = PagesFile(8)
    with Service() as service:
        for extent in ((BASE, 9, 0, 0), (BASE, 1, 8 * PAGE, 0), (BASE, 1, 1 << 62, 0), (BASE, 1, 0, 1)):
            _, uffd = one_mapping(service, file, 16)
            with pytest.raises(OSError, match="Invalid argument"):
                service.serve(uffd, [extent], [(BASE, 16)], file)
            os.fstat(uffd)  # taken over, and open: closed, it would let the task run on zeros
            os.close(uffd)


# A remote source.


def deliver(served: ServedTask, image: int, data: bytes) -> int:
    """Until the layout is at rest."""
    while True:
        try:
            return remote_task.deliver(served, image, data)
        except BusyError:
            time.sleep(0.001)


def test_a_fault_that_a_remote_source_answers(file: PagesFile) -> None:
    with Service() as service:
        task, uffd = one_mapping(service, file, 64)
        served = service.serve(uffd, [(BASE, 64, 0, REMOTE)], [(BASE, 64)], max_readahead=8)
        task.tell_check(BASE + 5 * PAGE, 1, file.first_id + 5)
        need = service.wait(TaskEventKind.NEED, served)
        assert (need.dump_addr, need.nr_pages, need.since > 0) == (BASE + 5 * PAGE, 1, True)
        assert task.busy()
        assert deliver(served, need.dump_addr, file.page_bytes(5)) == 1
        task.reply()
        assert served.transfer(1 << 20) == 0  # the rest is not for the background to copy
        assert claim(served, 1000) == (BASE, 5)
        assert claim(served, 10) == (BASE + 6 * PAGE, 10)
        task.tell_check(BASE + 2 * PAGE, 1, file.first_id + 2)
        assert service.wait(TaskEventKind.ESCALATE, served).dump_addr == BASE + 2 * PAGE
        assert deliver(served, BASE, file.page_bytes(0, 5)) == 5
        task.reply()
        deliver(served, BASE + 6 * PAGE, file.page_bytes(6, 58))  # more than was asked for: good to have
        task.check(BASE, 64, file.first_id)
        service.wait(TaskEventKind.COMPLETE, served)
        assert served.sources()[0].remote == 64


def test_a_remote_source_that_fails(file: PagesFile) -> None:
    with Service() as service:
        task, uffd = one_mapping(service, file, 16)
        served = service.serve(uffd, [(BASE, 16, 0, REMOTE)], [(BASE, 16)], max_readahead=1)
        task.tell_check(BASE, 1, file.first_id)
        need = service.wait(TaskEventKind.NEED, served)
        served.fail_remote(need.dump_addr, 1, lost=False)
        need = service.wait(TaskEventKind.NEED, served)  # the thread was woken and has asked again
        served.fail_remote(need.dump_addr, 1, lost=True)
        event = service.wait(TaskEventKind.LOST, served)
        assert (event.error, event.addr, served.lost) == (errno.ENODATA, BASE, 1)
        assert task.busy()


@pytest.mark.every_kernel
def test_layout_changes_while_pages_are_on_their_way(file: PagesFile) -> None:
    """What comes is placed where its memory is by now, in pieces, and nowhere if that is gone."""
    with Service() as service:
        task, uffd = one_mapping(service, file, 64)
        served = service.serve(uffd, [(BASE, 64, 0, REMOTE)], [(BASE, 64)])
        assert claim(served, 64) == (BASE, 64)
        assert task.mremap(BASE + 10 * PAGE, 10, BASE + GIB) == BASE + GIB
        assert task.do("madvise", BASE + 30 * PAGE, 10, MADV_DONTNEED) == "0"
        assert task.do("munmap", BASE + 50 * PAGE, 5) == "0"
        task.tell_check(BASE + GIB, 10, file.first_id + 10)
        assert service.wait(TaskEventKind.ESCALATE, served).addr == BASE + GIB
        assert deliver(served, BASE, file.page_bytes(0, 64)) == 49
        task.reply()
        task.check(BASE, 10, file.first_id)
        task.check(BASE + 20 * PAGE, 10, file.first_id + 20)
        task.check(BASE + 30 * PAGE, 10, 0)
        task.check(BASE + 40 * PAGE, 10, file.first_id + 40)
        task.check(BASE + 55 * PAGE, 9, file.first_id + 55)
        assert served.pending == 0
        assert served.sources()[1].remote == 15


@pytest.mark.every_kernel
def test_a_child_forked_while_pages_are_on_their_way(file: PagesFile) -> None:
    """It asks for itself."""
    with Service() as service:
        task, uffd = one_mapping(service, file, 16)
        served = service.serve(uffd, [(BASE, 16, 0, REMOTE)], [(BASE, 16)], max_readahead=1)
        assert claim(served, 16) == (BASE, 16)
        child = adopt_fork(service, task)
        forked = service.wait(TaskEventKind.FORKED).task
        assert forked.pending == 16
        child.tell_check(BASE + 3 * PAGE, 1, file.first_id + 3)
        assert service.wait(TaskEventKind.NEED, forked).dump_addr == BASE + 3 * PAGE
        deliver(served, BASE, file.page_bytes(0, 16))
        assert (served.pending, forked.pending) == (0, 16)
        deliver(forked, BASE, file.page_bytes(0, 16))
        child.reply()
        child.check(BASE, 16, file.first_id)
        task.check(BASE, 16, file.first_id)


@pytest.mark.every_kernel
def test_remote_turmoil(file: PagesFile) -> None:
    """Layout in turmoil as above, with a remote source that answers late and loses a request now and then."""
    pages = 4096
    with Service() as service:
        task, uffd = one_mapping(service, file, pages)
        served = service.serve(uffd, [(BASE, pages, 0, REMOTE)], [(BASE, pages)], max_readahead=8)
        wanted: list[tuple[int, int]] = []
        for turn, needs in enumerate(needs_while_it_churns(service, task, served, file, pages), 1):
            wanted += [(need.dump_addr, need.nr_pages) for need in needs]
            if turn % 4 == 0 and len(wanted) < 8:
                image, count = claim(served, 16)
                if count:
                    wanted.append((image, count))
            if not wanted:
                continue
            image, count = wanted.pop(0)
            if turn % 5 == 0:
                served.fail_remote(image, count, lost=False)
            else:
                deliver(served, image, file.page_bytes((image - BASE) // PAGE, count))
