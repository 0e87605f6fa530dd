"""Victims that dumptool has dumped, brought back by real CRIU, check every byte of their memory from inside."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.support.criu import RELEASES
from tests.support.dumptool import DumpedByUs, stats
from tests.support.restore import Checkpoints, Program, criu_daemon, eager_restore, lazy_restore, our_daemon


@pytest.fixture(scope="module")
def dumps(program: Program) -> Iterator[Checkpoints]:
    """Checkpoints of the victims, taken by dumptool."""
    with TemporaryDirectory(prefix="lazypages-dumps-") as folder:
        yield Checkpoints(Path(folder), program)


@pytest.mark.loop("single-4.2")
@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize(
    "scenario", ["single", "threads", "fragments", "stack", "heap", "protection", "tree", "interpreter"]
)
def test_restored_at_once(release: str, scenario: str, dumps: Checkpoints, tmp_path: Path) -> None:
    checkpoint = dumps.get(DumpedByUs(release), scenario)
    with eager_restore(checkpoint, tmp_path, checkpoint.images) as restored:
        restored.go()
        assert restored.wait_tasks() == 0
        restored.check_verdict()


@pytest.mark.loop("tree-4.2")
@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("scenario", ["small_stacks", "stack", "tree", "interpreter"])
def test_restored_lazily_by_criu(release: str, scenario: str, dumps: Checkpoints, tmp_path: Path) -> None:
    criu = DumpedByUs(release)
    with lazy_restore(dumps.get(criu, scenario), criu_daemon(criu), tmp_path) as restored:
        restored.check_all()


@pytest.mark.slow
@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("scenario", ["threads", "tree"])
def test_chain_restored_lazily_by_us(release: str, scenario: str, program: Program, tmp_path: Path) -> None:
    """Unchanged pages are lazy too, and come from the pre-dumps."""
    checkpoint = Checkpoints(tmp_path, program).get(DumpedByUs(release, pre_dumps=2), scenario)
    assert stats(checkpoint.images).pages_skipped_parent > 0
    with lazy_restore(checkpoint, our_daemon(), tmp_path) as restored:
        restored.check_all()


@pytest.mark.slow
@pytest.mark.parametrize("release", RELEASES)
def test_chain_restored_lazily_by_criu(release: str, program: Program, tmp_path: Path) -> None:
    """Its own daemon needs unchanged pages to be eager."""
    criu = DumpedByUs(release, pre_dumps=2, parent_pages="eager")
    checkpoint = Checkpoints(tmp_path, program).get(criu, "interpreter")
    assert stats(checkpoint.images).pages_skipped_parent > 0
    with lazy_restore(checkpoint, criu_daemon(criu), tmp_path) as restored:
        restored.check_all()
