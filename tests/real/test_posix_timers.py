"""Timers of timer_create: dumped, restored under their ids by either restorer, and running."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.real.test_restore import OurRestore
from tests.support.compiling import compiled
from tests.support.criu import Criu
from tests.support.dumptool import DumpedByUs, task
from tests.support.processes import reap, wait_for

SOURCE = Path(__file__).parent.parent / "support" / "programs" / "timers.c"

COUNTING = """
import sys
from lazypages.restore.machine import Machine
Machine.chooses_timer_ids = False
from lazypages.__main__ import main
sys.argv[1:] = ["restore", "-D", sys.argv[1], "-d"]
main()
"""


class Counting(Criu):
    """Our restore on a kernel without PR_TIMER_CREATE_RESTORE_IDS."""

    def restore(self, images: Path, *_arguments: str | Path, **_options: object) -> int:  # type: ignore[override]
        return subprocess.run(
            [sys.executable, "-c", COUNTING, str(images)], check=True, timeout=60
        ).returncode


@pytest.fixture(scope="module")
def program() -> Path:
    return compiled(SOURCE)


def timers(pid: int) -> list[str]:
    """What the kernel shows of each, by id."""
    parts = re.split(r"^(?=ID:)", Path(f"/proc/{pid}/timers").read_text(), flags=re.MULTILINE)[1:]
    return sorted(parts, key=lambda timer: int(timer.split()[1]))


@pytest.mark.loop("dumper0-restorer0")
@pytest.mark.parametrize(
    ("dumper", "restorer"),
    [
        (DumpedByUs("4.1"), Criu("4.1")),
        (DumpedByUs("4.2"), Criu("4.2")),
        (DumpedByUs("4.1"), OurRestore("4.1")),
        (DumpedByUs("4.1"), Counting("4.1")),
        (Criu("4.1"), OurRestore("4.1")),
        (Criu("4.2"), OurRestore("4.2")),
    ],
)
def test_timers(dumper: Criu, restorer: Criu, program: Path, tmp_path: Path) -> None:
    output, images = tmp_path / "output", tmp_path / "images"
    images.mkdir()
    with task(program, cwd=tmp_path, output=output) as pid:
        wait_for("the timers", lambda: output.read_text() == "ready\n")
        before = timers(pid)
        assert [int(timer.split()[1]) for timer in before] == [1, 4, 5, 6]
        dumper.dump(pid, images)
        reap(pid)
        restorer.restore(images, lazy=False)
        assert timers(pid) == before
        (tmp_path / "go").touch()
        assert reap(pid) == 0
    assert output.read_text() == "ready\n700 5 left\n"
