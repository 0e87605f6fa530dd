"""Layout events of several threads come in another order than what they tell of happened: nobody may get wrong memory.

The kernel queues an event when the change has been made and the mmap lock been dropped, and mremap tells of the move
first and, after that has been read, of the old place being unmapped (mm/mremap.c, ``notify_uffd``). Meanwhile the place
is free, and the kernel itself gives it to the next mremap. See ``lp_space_next_change`` in csrc/serve/address_space.h.
"""

from __future__ import annotations

import mmap
import os
import select
from contextlib import suppress

import pytest

from lazypages.engine._uffd import lib
from lazypages.engine.events import TaskEventKind
from tests.support.uffd import BASE, MREMAP_FIXED, MREMAP_MAYMOVE, PAGE, PagesFile, Service, until

PLACE, ASIDE, OTHER, ONWARD, SPARE = (BASE + (i << 30) for i in range(5))
PAGES = 16


@pytest.mark.every_kernel
@pytest.mark.parametrize("aside", [ASIDE, 0], ids=["moved", "unmapped"])
@pytest.mark.parametrize("onward", [0, ONWARD], ids=["stays", "leaves again"])
@pytest.mark.parametrize("background", [False, True], ids=["faults", "transfer"])
def test_memory_that_arrives_where_other_memory_is_just_leaving(
    aside: int, onward: int, background: bool
) -> None:
    """The thread that leaves is slow to tell so: it shares its CPU with one that has far more right to it."""
    file = PagesFile(2 * PAGES)
    for _ in range(4):
        with Service() as service:
            task = service.task()
            uffd = task.open_uffd()
            task.map((PLACE, PAGES), (OTHER, PAGES), (SPARE, 1))
            served = service.serve(
                uffd,
                [(PLACE, PAGES, 0, 0), (OTHER, PAGES, PAGES * PAGE, 0)],
                [(PLACE, PAGES), (OTHER, PAGES), (SPARE, 1)],
                file,
                pid=task.pid,
            )
            task.do("madvise", SPARE, 1, mmap.MADV_DONTNEED)  # from its first event on, each is read alone
            if background:
                service.transfer(served, PAGE, pause=0.001)
            problem = ""
            try:
                task.do("race", PLACE, aside, OTHER, onward, PAGES, file.first_id, file.first_id + PAGES)
            except pytest.fail.Exception as error:
                problem = str(error)
            if not problem:
                assert served.lost == 0
                continue
            # Where everything is slow the thread may be late for longer than it is waited for: then all is lost.
            assert onward and problem == f"task {task.pid} ended"  # noqa: PT018
            assert any(notice.kind is TaskEventKind.LOST for notice in service.look())


@pytest.mark.loop("4")
@pytest.mark.every_kernel
@pytest.mark.parametrize("seed", range(1, 5))
def test_threads_that_reallocate_memory_of_their_own(seed: int) -> None:
    pages = 16384
    file = PagesFile(pages)
    with Service() as service:
        task = service.task()
        uffd = task.open_uffd()
        task.map((BASE, pages))
        served = service.serve(
            uffd, [(BASE, pages, 0, 0)], [(BASE, pages)], file, max_readahead=1, pid=task.pid
        )
        service.transfer(served, 16 << 10, pause=0.002)
        task.do("swarm", BASE, pages, file.first_id, seed, 200, 16, 4)
        assert served.lost == 0


@pytest.mark.every_kernel
@pytest.mark.parametrize("call", ["munmap", "mremap", "mapover"])
def test_who_waits_to_tell_that_a_place_was_left(call: str) -> None:
    """No event is read here, so the thread stands where a late one stands in the end."""
    with Service() as service:
        task = service.task()
        uffd = task.open_uffd()
        task.map((PLACE, PAGES), (OTHER, PAGES))

        def tells(at: int, pages: int = PAGES) -> bool:
            return lib.lp_reports_departure(task.pid, -1, at, at + pages * PAGE) == 1

        assert not tells(PLACE)
        if call == "mremap":
            task.tell("mremap", PLACE, PAGES, PAGES, MREMAP_FIXED | MREMAP_MAYMOVE, ASIDE)
        else:
            task.tell(call, PLACE, PAGES)
        until("its event can be read", lambda: select.select([uffd], [], [], 0)[0])
        until("the thread waits for a reader", lambda: tells(PLACE))
        assert tells(PLACE + PAGE, 1)
        assert not tells(PLACE - PAGE, 1)
        assert not tells(PLACE, PAGES + 1)
        assert not tells(OTHER)

        def replied() -> bool:
            with suppress(BlockingIOError):
                os.read(uffd, 32)
            return task.replied()

        until("the call to return", replied)
        task.reply()
        assert not tells(PLACE)
