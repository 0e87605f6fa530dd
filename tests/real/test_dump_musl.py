"""A static program without handlers of signals: built with musl it has no return from them that could be used."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from dumptool.proc import layout
from dumptool.tracee import OWN_CODE, SIGRETURN, Gadgets, read_memory
from tests.real.test_dump_kills import kill_in_sessions
from tests.real.test_dump_tracking import SOURCE, Mover, level, moving
from tests.real.test_restore import OurRestore
from tests.support.compiling import compiled
from tests.support.criu import Criu, all_criu
from tests.support.dumptool import is_unharmed, reap_all
from tests.support.processes import end


@pytest.fixture(scope="module")
def musl() -> Path:
    path = compiled(SOURCE, "-static", "-O1", compiler="musl-gcc")
    assert SIGRETURN not in path.read_bytes()
    return path


@pytest.fixture
def mover(musl: Path, tmp_path: Path) -> Iterator[Mover]:
    with moving(musl, tmp_path) as mover:
        yield mover


def vdso(pid: int) -> bytes:
    found = next(vma for vma in layout(pid).vmas if vma.name == "[vdso]")
    return read_memory(pid, found.start, found.end - found.start)


@pytest.mark.loop("ours")
@pytest.mark.parametrize("restorer", [*all_criu(), pytest.param(OurRestore("4.1"), id="ours")])
def test_every_byte(restorer: Criu, mover: Mover, tmp_path: Path) -> None:
    before = vdso(mover.pid)
    level(mover, tmp_path, 0, "pre-dump")
    mover.next_step()
    level(mover, tmp_path, 1, "dump", "-R", "--track-mem")
    assert vdso(mover.pid) == before, "what was lent is taken back"
    mover.next_step()
    top = level(mover, tmp_path, 2, "dump")
    reap_all()
    restorer.restore(top, work=tmp_path, lazy=False)
    mover.is_right()
    end(mover.pids)


@pytest.mark.slow
def test_dumped_by_criu(mover: Mover, tmp_path: Path) -> None:
    """And restored by us, which runs system calls in it as well."""
    images = tmp_path / "images"
    images.mkdir()
    mover.next_step()
    Criu("4.2").dump(mover.pid, images)
    reap_all()
    OurRestore("4.2").restore(images, lazy=False)
    mover.is_right()
    end(mover.pids)


@pytest.mark.slow
def test_killed_between_any_two_system_calls(mover: Mover) -> None:
    """The way back is there as long as a thread may need it; what stays of it is used again."""
    chance = random.Random(5)
    gadgets = Gadgets(mover.pid, layout(mover.pid).vmas)
    for _ in range(20):
        kill_in_sessions(mover.pid, gadgets, chance, room=True)
    assert vdso(mover.pid).endswith((OWN_CODE, bytes(len(OWN_CODE))))
    again = Gadgets(mover.pid, layout(mover.pid).vmas)
    kill_in_sessions(mover.pid, again, chance, room=True)
    is_unharmed(mover.pid)
    mover.next_step()
    mover.is_right()
    assert os.path.exists(f"/proc/{mover.pid}")
