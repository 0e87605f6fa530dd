"""`lazypages restore` of images of real CRIU and of dumptool: victims check every byte from inside.

Eager, lazily under CRIU's own daemon, and lazily under `lazypages serve`.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.support.criu import Criu, all_criu
from tests.support.dumptool import DumpedByUs
from tests.support.processes import tail
from tests.support.restore import (
    Checkpoints,
    Program,
    criu_daemon,
    eager_restore,
    lazy_restore,
    our_daemon,
)

RESTORE = (sys.executable, "-m", "lazypages", "restore")
older, newer = all_criu()

EAGER = ["threads", "protection", "tree", "interpreter"]


class OurRestore(Criu):
    """In CRIU's place where the harness restores."""

    def restore(
        self,
        images: Path,
        *arguments: str | Path,
        work: Path | None = None,
        lazy: bool = True,
        timeout: float = 60,
        check: bool = True,
    ) -> int:
        work = work or images
        output = work / "restore.out"
        mode = ["--lazy-pages"] if lazy else []
        command = [*RESTORE, "-D", str(images), "-W", str(work), "-d", "-v4", "-o", "restore.log", *mode]
        with output.open("wb") as stream:
            code = subprocess.run(
                [*command, *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                timeout=timeout,
                check=False,
            ).returncode
        if check and code:
            pytest.fail(f"exit {code}\n{tail(output)}{tail(work / 'restore.log')}", pytrace=False)
        return code


@pytest.mark.loop("threads-criu-4.1")
@pytest.mark.parametrize("criu", [older])
@pytest.mark.parametrize("scenario", EAGER)
def test_eager(criu: Criu, scenario: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoint = replace(checkpoints.get(criu, scenario), criu=OurRestore(criu.release))
    with eager_restore(checkpoint, tmp_path, checkpoint.images) as restored:
        restored.go()
        assert restored.wait_tasks() == 0
        restored.check_verdict()


@pytest.mark.loop("tree-criu-4.2", "family-criu-4.2")
@pytest.mark.parametrize("criu", [newer])
@pytest.mark.parametrize(
    "scenario", [*EAGER, "stack", "heap", "moves", "discards", "family", "inherit_early", "syscalls", "crowd"]
)
def test_lazy(criu: Criu, scenario: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoint = replace(checkpoints.get(criu, scenario), criu=OurRestore(criu.release))
    with lazy_restore(checkpoint, our_daemon("--no-background"), tmp_path) as restored:
        restored.check_all()


# Scenarios that CRIU's own daemon can serve (docs/criu.md, "Limits of CRIU's daemon and page server").
@pytest.mark.loop("tree-criu-4.2")
@pytest.mark.parametrize("criu", [older, newer])
@pytest.mark.parametrize("scenario", ["small_stacks", "tree"])
def test_lazy_under_criu(criu: Criu, scenario: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoint = replace(checkpoints.get(criu, scenario), criu=OurRestore(criu.release))
    with lazy_restore(checkpoint, criu_daemon(criu), tmp_path) as restored:
        restored.check_all()


@pytest.fixture(scope="module")
def chains(program: Program) -> Iterator[Checkpoints]:
    """Taken by dumptool: two pre-dumps, then the dump."""
    with TemporaryDirectory(prefix="lazypages-dumps-") as folder:
        yield Checkpoints(Path(folder), program)


@pytest.mark.loop("lazy-threads")
@pytest.mark.parametrize("scenario", ["threads", "fragments", "tree", "interpreter"])
@pytest.mark.parametrize("mode", ["eager", "lazy", "lazy under criu"])
def test_no_criu_at_all(mode: str, scenario: str, chains: Checkpoints, tmp_path: Path) -> None:
    """Unchanged pages are in the parents; CRIU's own daemon needs them to be eager."""
    by = DumpedByUs("4.2", pre_dumps=2)
    if mode == "lazy under criu":
        by = DumpedByUs("4.1", pre_dumps=2, parent_pages="eager")
        scenario = "small_stacks" if scenario == "threads" else scenario
    dumped = chains.get(by, scenario)
    checkpoint = replace(dumped, criu=OurRestore(by.release))
    if mode == "eager":
        with eager_restore(checkpoint, tmp_path, checkpoint.images) as restored:
            restored.go()
            assert restored.wait_tasks() == 0
            restored.check_verdict()
        return
    daemon = our_daemon() if mode == "lazy" else criu_daemon(Criu(by.release))
    with lazy_restore(checkpoint, daemon, tmp_path) as lazy:
        lazy.check_all()
