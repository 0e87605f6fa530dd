"""The service of one task, with a real task, engine and kernel, and no daemon around it."""

from __future__ import annotations

import errno
import os
import resource
import select
import signal

import anyio
import pytest

from lazypages.engine.events import TaskEvent, TaskEventKind
from lazypages.engine.task import ServedTask
from lazypages.loop import service as service_module
from lazypages.loop.processes import Process
from lazypages.loop.service import Identity, TaskService
from lazypages.observe.metrics import State
from tests.support.uffd import BASE, PAGE, PagesFile, Service, until

PAGES = 64
REMOTE = 0xFFFFFFFE  # csrc/common/extent.h


@pytest.mark.parametrize("room", [4 * PAGE, 4 * PAGE - 1], ids=["room", "no room"])
def test_pages_that_a_task_can_not_take_now(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It forks, and nobody reads of it (there is no file descriptor for the child): its pages do not hold up others."""
    monkeypatch.setattr(service_module, "PARKED_MOST", room)
    file = PagesFile(PAGES)
    with Service() as engine:
        task = engine.task()
        uffd = task.open_uffd()
        task.map((BASE, PAGES))
        served = engine.serve(uffd, [(BASE, PAGES, 0, REMOTE)], [(BASE, PAGES)], max_readahead=1)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)

        def forks_in_vain() -> None:
            free = os.dup(0)
            os.close(free)
            resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
            task.tell("fork")
            assert engine.wait(TaskEventKind.FAILED, served).error == errno.EMFILE

        async def run(served: ServedTask) -> None:
            serving = TaskService(
                served,
                Identity("the task", task.pid, False, PAGES, ()),
                process=None,
                transfer_turns=anyio.CapacityLimiter(1),
                remote=None,
            )
            async with anyio.create_task_group() as group:
                group.start_soon(serving.run)
                await anyio.wait_all_tasks_blocked()
                forks_in_vain()
                data = bytearray(file.page_bytes(0, 4))
                with anyio.move_on_after(60 if room == 4 * PAGE else 0.2) as waited:
                    await serving.pages_arrived(BASE, memoryview(data))
                data[:] = bytes(len(data))  # it is not needed any more
                assert waited.cancelled_caught == (room < 4 * PAGE)
                assert served.pending == PAGES
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
                engine.adopt(task.forked())
                if room == 4 * PAGE:
                    with anyio.fail_after(60):
                        while served.pending > PAGES - 4:
                            await anyio.sleep(0.001)
                    task.check(BASE, 4, file.first_id)
                else:
                    assert served.pending == PAGES
                group.cancel_scope.cancel()

        try:
            anyio.run(run, served)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_task_of_which_nobody_knows_what_it_misses() -> None:
    """It is killed, with what it has forked, and its uffd stays open until it is gone."""
    file = PagesFile(PAGES)
    with Service() as engine:
        task = engine.task()
        uffd = task.open_uffd()
        task.map((BASE, PAGES))
        served = engine.serve(uffd, [(BASE, PAGES, 0, 0)], [(BASE, PAGES)], file, pid=task.pid)
        child = engine.adopt(task.fork(orphan=True))
        process = Process(task.pid, os.pidfd_open(task.pid))
        childs_fd = os.pidfd_open(child.pid)
        try:
            serving = TaskService(
                served,
                Identity("the task", task.pid, False, PAGES, ()),
                process=process,
                transfer_turns=anyio.CapacityLimiter(1),
                remote=None,
            )
            serving.handle(TaskEvent(TaskEventKind.BROKEN, served, errno.ENOMEM, 0, 0, 0, 0), [])
            assert serving.report().state is State.KILLED
            until("the end of its memory", lambda: not served.probe())
            assert task.process
            assert task.process.wait(60) == -signal.SIGKILL
            assert select.select([childs_fd], [], [], 60)[0]
        finally:
            os.close(childs_fd)
            process.close()
