"""Calls that fail after the kernel has told of them, and memory that grows again, unseen, where it went.

See csrc/serve/doubt.h.

What a kernel does is asked of it in each test: before 6.10 nothing can be sealed, before 6.12 an mmap that fails
has unmapped what was in its place, before 6.18 an mremap that fails has.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lazypages.engine.events import TaskEventKind
from tests.support.uffd import BASE, PAGE, SIGBUS, PagesFile, Service, Task

pytestmark = pytest.mark.every_kernel

PAGES = 16
FAR = BASE + (1 << 40)
TIB = 1 << 40
SIGSEGV = 11
ENOSYS, EPERM, ENOMEM, EFAULT = "errno 38", "errno 1", "errno 12", "errno 14"

known = pytest.mark.parametrize("known", [True, False], ids=["pid", "no pid"])


@pytest.fixture(scope="module")
def file() -> PagesFile:
    return PagesFile(4 * PAGES)


def stays(task: Task, file: PagesFile, first: int = 0, pages: int = PAGES) -> None:
    task.check(BASE + first * PAGE, pages, file.first_id + first)


def is_gone(task: Task, first: int = 0, pages: int = PAGES) -> None:
    for page in range(first, first + pages):
        assert task.do("peek", BASE + page * PAGE) == f"signal {SIGSEGV}"


def seal(task: Task, first: int, pages: int) -> bool:
    """Whether this kernel can."""
    answer = task.do("seal", BASE + first * PAGE, pages)
    assert answer in ("0", ENOSYS)
    return answer == "0"


@known
@pytest.mark.parametrize("delivered", [0, 3])
def test_munmap_of_what_is_sealed_in_part(file: PagesFile, known: bool, delivered: int) -> None:
    with Service() as service:
        task, served = service.mapped(file, (BASE, PAGES), known=known, max_readahead=1)
        stays(task, file, 0, delivered)
        if seal(task, PAGES // 2, PAGES // 2):
            assert task.do("munmap", BASE, PAGES) == EPERM
            stays(task, file)
            assert served.lost == 0
        else:
            assert task.do("munmap", BASE, PAGES) == "0"
            is_gone(task)


@known
@pytest.mark.parametrize("delivered", [0, 3])
def test_munmap_that_fails_in_the_middle_of_a_mapping(file: PagesFile, known: bool, delivered: int) -> None:
    """What lies below is of the same mapping. It could have grown there; nothing tells where no process is known."""
    start, half = 4, PAGES // 2
    with Service() as service:
        task, served = service.mapped(file, (BASE, PAGES), known=known, max_readahead=1)
        stays(task, file, start, delivered)
        if not seal(task, half, PAGES - half):
            assert task.do("munmap", BASE + start * PAGE, PAGES - start) == "0"
            is_gone(task, start, PAGES - start)
            return
        assert task.do("munmap", BASE + start * PAGE, PAGES - start) == EPERM
        stays(task, file, 0, start)
        if known or delivered:
            stays(task, file)
            assert served.lost == 0
            return
        service.wait(TaskEventKind.LOST, served)
        assert served.poison(everything=False) == PAGES - start
        assert task.do("peek", BASE + start * PAGE) == f"signal {SIGBUS}"


@known
@pytest.mark.parametrize("limited", [True, False], ids=["limit", "memory"])
def test_mmap_that_fails_in_the_place_of_memory(file: PagesFile, known: bool, limited: bool) -> None:
    with Service() as service:
        task, served = service.mapped(file, (BASE, PAGES), known=known)
        if limited:
            assert task.do("limit", 1 << 30) == "0"
        assert task.do("mapover", BASE, (2 << 30 if limited else TIB) // PAGE) == ENOMEM
        if task.do("mapped", BASE) == "1":
            stays(task, file)
            assert served.lost == 0
        else:
            is_gone(task)


@known
def test_mmap_that_succeeds_in_the_place_of_memory(file: PagesFile, known: bool) -> None:
    with Service() as service:
        task, served = service.mapped(file, (BASE, PAGES), known=known)
        assert task.do("mapover", BASE + 2 * PAGE, 4) == "0"
        task.check(BASE + 2 * PAGE, 4, 0)
        stays(task, file, 0, 2)
        stays(task, file, 6, PAGES - 6)
        assert served.lost == 0


@known
@pytest.mark.parametrize("seal_at", [0, 8])
def test_mremap_onto_what_refuses(file: PagesFile, known: bool, seal_at: int) -> None:
    """The destination is memory of the dump, too, sealed in part. Without mseal it is a plain move."""
    with Service() as service:
        task, served = service.mapped(file, (BASE, PAGES), (FAR, PAGES), known=known)
        can = task.do("seal", FAR + seal_at * PAGE, 8) == "0"
        moved = task.do("mremap", BASE, PAGES, PAGES, 3, FAR)
        assert moved == (EPERM if can else str(FAR))
        if can:
            stays(task, file)
            task.check(FAR, PAGES, file.first_id + PAGES)
        else:
            task.check(FAR, PAGES, file.first_id)
            is_gone(task)
        assert served.lost == 0


@known
@pytest.mark.parametrize("gap", [0, 4, 12])
@pytest.mark.parametrize("onto", [True, False], ids=["onto", "away"])
def test_mremap_of_several_mappings(file: PagesFile, known: bool, gap: int, onto: bool) -> None:
    """It fails, but some of it, or of what was in the way, may be gone: what is where is asked of the kernel."""
    with Service() as service:
        task, served = service.mapped(file, (BASE, PAGES), (FAR, PAGES), known=known)
        assert task.do("munmap", BASE + gap * PAGE, 4) == "0"
        to = FAR if onto else FAR + TIB
        assert task.do("mremap", BASE, PAGES, PAGES, 3, to) == EFAULT
        for page in range(PAGES):
            place = FAR + page * PAGE
            if task.do("mapped", place) == "1":
                task.check(place, 1, file.first_id + PAGES + page)
            if gap <= page < gap + 4:
                is_gone(task, page, 1)
            else:
                stays(task, file, page, 1)
        assert served.lost == 0


@pytest.mark.parametrize("behind", ["registered", "fresh", "nothing"])
@pytest.mark.parametrize("first", [0, 4])
def test_mremap_that_moves_and_shrinks(file: PagesFile, behind: str, first: int) -> None:
    """Kernels before 6.15 tell the length from before: what lies behind the new place must stay as it is."""
    pages, new = 8, 3
    with Service() as service:
        task = service.task()
        uffd = task.open_uffd()
        task.map((BASE, PAGES), (FAR, new))
        if behind == "registered":
            task.map((FAR + new * PAGE, PAGES))
        elif behind == "fresh":
            assert task.do("map", FAR + new * PAGE, PAGES) == "0"
        served = service.serve(
            uffd,
            [
                (BASE, PAGES, 0, 0),
                *([(FAR + new * PAGE, PAGES, PAGES * PAGE, 0)] if behind == "registered" else []),
            ],
            [(BASE, PAGES), (FAR, new + PAGES if behind == "registered" else new)],
            file,
        )
        assert task.mremap(BASE + first * PAGE, pages, FAR, new) == FAR
        task.check(FAR, new, file.first_id + first)
        if behind == "nothing":
            assert task.do("peek", FAR + new * PAGE) == f"signal {SIGSEGV}"
        else:
            task.check(FAR + new * PAGE, PAGES, file.first_id + PAGES if behind == "registered" else 0)
        stays(task, file, 0, first)
        is_gone(task, first, pages)
        stays(task, file, first + pages, PAGES - first - pages)
        assert served.lost == 0


@contextmanager
def slow_service() -> Iterator[Service]:
    """One that shares its CPU with its tasks, which go first: they run on before it can ask what they have done."""
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cpus)})
    try:
        with Service() as service:
            os.sched_setscheduler(service.thread_id, os.SCHED_IDLE, os.sched_param(0))
            yield service
    finally:
        os.sched_setaffinity(0, cpus)


@known
def test_memory_that_grows_again_where_it_went(known: bool) -> None:
    """mremap tells that the end of a chunk is unmapped, and not that it grows back: the task must find zeros there."""
    chunks, stride = 300, PAGES + 4
    file = PagesFile(chunks * PAGES)
    places = [BASE + chunk * stride * PAGE for chunk in range(chunks)]
    with slow_service() as service:
        task, served = service.mapped(file, *[(place, PAGES) for place in places], known=known)
        task.do("regrow", BASE, PAGES, file.first_id, chunks, stride)
        assert served.lost == 0


@known
@pytest.mark.parametrize("aside", [FAR, 0], ids=["moved", "unmapped"])
def test_forks_that_are_told_after_what_came_later(known: bool, aside: int) -> None:
    """The child has what there was when it was forked."""
    rounds = 20
    file = PagesFile(rounds * PAGES)
    found = set()
    with Service() as service:
        places = [BASE + i * 2 * PAGES * PAGE for i in range(rounds)]
        task, _ = service.mapped(file, *[(place, PAGES) for place in places], known=known)
        for i, place in enumerate(places):
            there = aside and aside + i * 2 * PAGES * PAGE
            found.add(task.do("late", place, there, PAGES, file.first_id + i * PAGES, 32 << 8))
    assert found <= {"before", "after"}
    assert "before" in found
