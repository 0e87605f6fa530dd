"""A process is killed, and its pid is another's at once: the other is not touched, not read, and not in the images."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dumptool import proc, survey, tracee
from dumptool.dump import Settings, Watcher, pre_dump
from dumptool.errors import TaskGoneError
from dumptool.freeze import freeze, members
from dumptool.identity import one_process
from images_spec.images import Kind
from tests.support.dumptool import is_unharmed, task
from tests.support.processes import descendants, describe, end, start_as, wait_for

FAMILY = """
import os, signal, time
signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # its children leave no zombies
if os.fork() == 0: time.sleep(1000)
time.sleep(1000)
"""


@pytest.fixture
def family() -> Iterator[tuple[int, int]]:
    """A parent, and its child."""
    with task(sys.executable, "-c", FAMILY) as pid:
        wait_for("its child", lambda: len(descendants(pid)) == 1)
        yield pid, next(iter(descendants(pid)))


def replace_process(pid: int) -> None:
    """Kills it, and starts another with its pid."""
    os.kill(pid, signal.SIGKILL)
    wait_for("its end", lambda: tracee.reap(pid) and not os.path.exists(f"/proc/{pid}"))
    start_as(pid)


def is_alive(pid: int) -> None:
    assert proc.stat(pid).state in "SR", describe(pid)
    assert proc.status(pid)["TracerPid"] == "0"


def test_the_end_of_a_tree(family: tuple[int, int]) -> None:
    """The parent is ended, who has the child's pid now is not."""
    parent, child = family
    with freeze(parent) as tree:
        assert [process.pid for process in tree.processes] == [parent, child]
        replace_process(child)
        tree.hold()
        tree.kill()
    is_alive(child)
    assert parent not in descendants() or descendants()[parent] == "Z"
    end([child])


@pytest.mark.slow
def test_a_tree_that_is_held_and_let_go(family: tuple[int, int]) -> None:
    parent, child = family
    with freeze(parent) as tree:
        tree.hold()
        replace_process(child)
    is_alive(child)
    is_unharmed(parent)
    end([child])


def test_while_pages_are_copied(family: tuple[int, int], tmp_path: Path) -> None:
    """What was read by then may be of the wrong process: the level has nothing of it."""
    parent, child = family

    class Killer(Watcher):
        def stage(self, name: str) -> None:
            if name == "copying":
                replace_process(child)

    pre_dump(Settings(parent, tmp_path / "0"), Killer())
    assert (tmp_path / "0" / Kind.PAGEMAP.file_name(parent)).exists()
    assert not (tmp_path / "0" / Kind.PAGEMAP.file_name(child)).exists()
    is_alive(child)
    is_unharmed(parent)
    end([child])


def test_what_is_read_by_pid(family: tuple[int, int]) -> None:
    _, child = family
    with pytest.raises(TaskGoneError), one_process(child):
        replace_process(child)
    end([child])


def test_an_earlier_look_at_another_process(family: tuple[int, int]) -> None:
    """The layout that it has found is not taken for this one's, equal or not."""
    parent, _ = family
    process = members(parent)[0]
    seen = survey.look_at(process)
    assert survey.look_at(process, seen).layout is seen.layout
    other = replace(seen, stat=replace(seen.stat, start_time=seen.stat.start_time - 1))
    assert survey.look_at(process, other).layout is not other.layout
