"""Pages files that are cut short in the middle of a page, which the kernel fills up with zeros in every mapping.

Before a page is taken: ``test_engine.py::test_truncated_pages_file``, and here while it is. For that moment to come, a
page of the file is missing and under a userfaultfd of the test's own: whoever reads it waits until the file is cut.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import select
import struct
from collections.abc import Callable

import anyio
import pytest

from lazypages.engine._uffd import ffi, lib
from lazypages.engine.events import TaskEvent, TaskEventKind
from lazypages.engine.memory import MAP_FAILED, MappedFile, TaskMemory
from lazypages.engine.task import ServedTask
from lazypages.loop.processes import Process
from lazypages.loop.service import Identity, TaskService
from lazypages.observe.metrics import State
from tests.support.uffd import BASE, PAGE, ExtentTable, PagesFile, Service, Task

PAGES, HOLE = 8, 3
ATTEMPTS = 10
UFFDIO_API, UFFDIO_REGISTER, UFFDIO_COPY = 0xC018AA3F, 0xC020AA00, 0xC028AA03
UFFD_API, MODE_MISSING, EVENT_PAGEFAULT = 0xAA, 1, 0x12


def page_bytes(number: int) -> bytes:
    return struct.pack("<Q", 1 + number) * 512


class HoleyFile(MappedFile):
    """PAGES pages of shared memory; the one at HOLE is missing. Writable, or it could not be registered."""

    def __init__(self) -> None:
        self.size = PAGES * PAGE
        self.fd = os.memfd_create("pages", os.MFD_CLOEXEC)
        for number in set(range(PAGES)) - {HOLE}:
            os.pwrite(self.fd, page_bytes(number), number * PAGE)
        address = lib.mmap(ffi.NULL, self.size, mmap.PROT_READ | mmap.PROT_WRITE, lib.MAP_SHARED, self.fd, 0)
        assert address != MAP_FAILED
        self.address = ffi.gc(address, lambda mapped: lib.munmap(mapped, PAGES * PAGE))


def cut_when_read(file: HoleyFile, size: int, touched: Callable[[], bool]) -> bool:
    """Who reads HOLE of the mapping waits until the file has ``size`` bytes. False: ``touched`` before anybody did."""
    start = int(ffi.cast("uintptr_t", file.address))
    uffd = lib.syscall(lib.SYS_userfaultfd, ffi.cast("int", os.O_CLOEXEC | os.O_NONBLOCK))
    assert uffd >= 0
    fcntl.ioctl(uffd, UFFDIO_API, struct.pack("<QQQ", UFFD_API, 0, 0))
    fcntl.ioctl(uffd, UFFDIO_REGISTER, struct.pack("<QQQQ", start, file.size, MODE_MISSING, 0))
    hole = ffi.new("char[]", page_bytes(HOLE))
    try:
        while not select.select([uffd], [], [], 0.01)[0]:
            if touched():
                return False
        (event, _, address) = struct.unpack_from("<B15sQ", os.read(uffd, 32))
        assert (event, (address - start) // PAGE) == (EVENT_PAGEFAULT, HOLE)
        os.ftruncate(file.fd, size)
        source = int(ffi.cast("uintptr_t", hole))
        fcntl.ioctl(uffd, UFFDIO_COPY, struct.pack("<QQQQq", start + HOLE * PAGE, source, PAGE, 0, 0))
        return True
    finally:
        os.close(uffd)


def pages_are_in_memory(service: Service) -> None:
    """The engine has seen that reads are fast, and so copies from the mapping (csrc/serve/cold.h)."""
    file = PagesFile(512)
    task, _ = service.mapped(file, (BASE, 512), max_readahead=1)
    task.check(BASE, 512, file.first_id)


def spoilt_page(service: Service) -> tuple[Task, ServedTask]:
    """A task has touched a page of a file that was cut in the middle of it while it was copied."""
    for _ in range(ATTEMPTS):
        pages_are_in_memory(service)
        task, file = service.task(), HoleyFile()
        uffd = task.open_uffd()
        task.map((BASE, PAGES))
        memory = TaskMemory(ExtentTable([(BASE, PAGES, 0, 0)]), [(BASE, BASE + PAGES * PAGE)], (), [file], 1)
        served = service.engine.add(uffd, memory)
        task.tell("peek", BASE + HOLE * PAGE)
        if cut_when_read(file, HOLE * PAGE + 100, task.replied):
            return task, served
        task.reply()
        served.close()
    pytest.fail("threads waited so long each time that the engine took the file to be on a slow disk")


def spoilt(service: Service) -> tuple[TaskEvent, int]:
    """What is told then, and the task's pid."""
    task, served = spoilt_page(service)
    return service.wait(TaskEventKind.LOST, served), task.pid


def test_cut_while_it_is_copied() -> None:
    """The copy has begun: the page comes as it is then, and nobody can take it back; it is told."""
    with Service() as service:
        event, _ = spoilt(service)
        assert (event.error, event.addr, event.nr_pages) == (errno.ESTALE, BASE + HOLE * PAGE, 1)


def test_cut_while_it_is_closed() -> None:
    """Whoever closes the task before he has taken the event hears of it all the same."""
    with Service() as service:
        _, served = spoilt_page(service)
        assert served.close()
    with Service() as service:
        task = service.task()
        uffd = task.open_uffd()
        task.map((BASE, PAGES))
        assert not service.serve(uffd, [], [(BASE, PAGES)], PagesFile(PAGES)).close()


def test_its_task_is_killed() -> None:
    async def tend(event: TaskEvent, process: Process) -> State:
        served = event.task
        tended = TaskService(
            served,
            Identity("the task", process.pid, False, served.total, ("local",)),
            process=process,
            transfer_turns=anyio.CapacityLimiter(1),
            remote=None,
        )
        tended.handle(event, [])
        return tended.report().state

    with Service() as service:
        event, pid = spoilt(service)
        pidfd = os.pidfd_open(pid)
        assert anyio.run(tend, event, Process(pid, pidfd)) is State.KILLED
        assert select.select([pidfd], [], [], 60)[0]  # it has ended
        os.close(pidfd)
