"""The service of one task, with a real task, engine and kernel, and no daemon around it."""

from __future__ import annotations

import errno
import os
import select
import signal

import anyio

from lazypages.engine.events import TaskEvent, TaskEventKind
from lazypages.loop.processes import Process
from lazypages.loop.service import Identity, TaskService
from lazypages.observe.metrics import State
from tests.support.uffd import BASE, PagesFile, Service, until

PAGES = 64
REMOTE = 0xFFFFFFFE  # csrc/common/extent.h


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
