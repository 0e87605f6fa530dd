"""Where the pages of a lazy dump with CRIU come from: all that was not written since the pre-dumps, from these."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from tests.real.test_criu_namespace import NAMESPACE
from tests.real.test_dump_backend import by_criu
from tests.real.test_dump_lazy import lazy_dump, ours
from tests.support.compiling import PROGRAMS, compiled
from tests.support.criu import Criu
from tests.support.dumptool import check, stats, task
from tests.support.processes import descendants, nothing_left, start, tail, wait_for
from tests.support.schemas import check as check_schema

MIB = 1024
WRITTEN = 4096
"""Pages: 16 MiB, all over the memory, so that each huge page has some."""


def restored(pid: int) -> int:
    """The other process of the same program."""
    for other in descendants():
        if other != pid and Path(f"/proc/{other}/comm").read_text() == "scattered\n":
            return other
    pytest.fail("there is no restored task")


@pytest.mark.slow
def test_only_what_was_written_leaves_the_source(tmp_path: Path) -> None:
    """The whole goes through two pre-dumps. Then the network has what was written since, and 2 % more at most."""
    criu, output = Criu("4.2"), tmp_path / "output"
    images, work = tmp_path / "3", tmp_path / "work"
    work.mkdir()

    def says(line: str) -> None:
        wait_for(f"{line!r}", lambda: output.read_text().endswith(f"{line}\n"))

    with task(compiled(PROGRAMS / "scattered.c"), str(MIB), str(WRITTEN), output=output) as pid:
        says("ready")
        parents: list[str] = []
        for level in (1, 2):
            check("pre-dump", "-t", pid, "-D", tmp_path / str(level), "--no-sync", *parents)
            parents = ["--prev-images-dir", f"../{level}"]
            os.kill(pid, signal.SIGUSR1)
            says(f"step {level}")
        with (
            lazy_dump(pid, images, "--no-sync", *parents, *by_criu(criu)) as source,
            nothing_left(),
        ):
            source.wait_ready()
            with ours(source.port).start(images, work) as server:
                server.wait_ready()
                command = [criu.path, "restore", "-D", images, "-W", work, "--lazy-pages"]
                start([*NAMESPACE, *command, "-v4", "-o", "restore.log"], cwd=tmp_path)
                wait_for("the restore", lambda: "Tasks resumed" in tail(work / "restore.log"))
                os.kill(restored(pid), signal.SIGUSR2)  # it touches all, against the background transfer
                says("right")
                assert server.wait() == 0, tail(work / "restore.log")
            assert source.wait() == 0
    numbers = json.loads((work / "stats.json").read_text())
    check_schema("stats.json", numbers)
    copied, sent, in_images = numbers["copied_by_source"], numbers["page_servers"][0]["pages"], stats(images)
    assert WRITTEN <= sent + in_images.pages_written <= WRITTEN * 1.02
    assert sent == copied.pop("remote") == in_images.pages_lazy, "no page was read twice"
    assert sum(copied.values()) >= MIB * 256 - WRITTEN
