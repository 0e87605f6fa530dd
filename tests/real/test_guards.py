"""Guard regions (MADV_GUARD_INSTALL) of restored tasks, with real CRIU and without: each byte, and each SIGSEGV.

Dumped and restored by CRIU they are among the scenarios of test_criu_serve.py, too.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from images_spec import images
from images_spec.checkpoint import open_checkpoint
from images_spec.images import Kind
from images_spec.placement import guard_regions
from lazypages.restore.dump import load
from lazypages.restore.errors import RestoreError
from lazypages.restore.machine import Machine
from lazypages.restore.planner import Order, check
from tests.real.test_criu_serve import check_counts
from tests.real.test_restore import OurRestore
from tests.support import dumptool
from tests.support.criu import Criu, all_criu
from tests.support.dumptool import DumpedByUs
from tests.support.guards import has_guards
from tests.support.processes import nothing_left, start, wait_for
from tests.support.remote import leave_at_source, our_page_server
from tests.support.restore import (
    Checkpoints,
    LazyRestore,
    Program,
    eager_restore,
    lazy_restore,
    our_daemon,
)

CRIU = Criu("4.2")
GUARDED = ["guarded", "guarded_threads"]
MODES = {"background": (), "no-background": ("--no-background",)}
modes = pytest.mark.parametrize("mode", MODES)


@pytest.fixture(scope="module")
def dumps(program: Program) -> Iterator[Checkpoints]:
    """Taken by dumptool."""
    with TemporaryDirectory(prefix="lazypages-dumps-") as folder:
        yield Checkpoints(Path(folder), program)


def installed(restored: LazyRestore) -> bool:
    """Whether the victim has made its guards."""
    return any(report.name == "installed" for report in restored.reports())


@pytest.mark.loop("lazypages restore-criu-4.2")
@pytest.mark.parametrize("criu", all_criu())
@pytest.mark.parametrize("ours", [False, True], ids=["criu restore", "lazypages restore"])
def test_installed_while_all_is_missing(
    ours: bool, criu: Criu, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """SIGTERM has the rest brought: between the guards."""
    checkpoint = checkpoints.get(criu, "guards_late")
    if ours:
        checkpoint = replace(checkpoint, criu=OurRestore(criu.release))
    with lazy_restore(checkpoint, our_daemon("--no-background"), tmp_path) as restored:
        restored.go()
        wait_for("the guards", lambda: installed(restored))
        restored.server.signal(signal.SIGTERM)
        restored.check_end()
        check_counts(restored)


@pytest.mark.loop("guarded-no-background")
@modes
@pytest.mark.parametrize("scenario", GUARDED)
def test_dumped_by_criu(scenario: str, mode: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """And restored by us."""
    checkpoint = replace(checkpoints.get(CRIU, scenario), criu=OurRestore(CRIU.release))
    with lazy_restore(checkpoint, our_daemon(*MODES[mode]), tmp_path) as restored:
        restored.check_all()
        check_counts(restored)


@pytest.mark.loop("lazypages restore-guarded_threads-no-background")
@modes
@pytest.mark.parametrize("scenario", GUARDED)
@pytest.mark.parametrize("ours", [False, True], ids=["criu restore", "lazypages restore"])
def test_dumped_by_us(ours: bool, scenario: str, mode: str, dumps: Checkpoints, tmp_path: Path) -> None:
    """A thread whose stack has a guard region, as glibc makes them from 2.42 on, among them."""
    checkpoint = dumps.get(DumpedByUs(CRIU.release), scenario)
    if ours:
        checkpoint = replace(checkpoint, criu=OurRestore(CRIU.release))
    with lazy_restore(checkpoint, our_daemon(*MODES[mode]), tmp_path) as restored:
        restored.check_all()
        check_counts(restored)


@pytest.mark.loop("lazypages restore-guarded")
@pytest.mark.parametrize("scenario", GUARDED)
@pytest.mark.parametrize("by", [CRIU, OurRestore("4.2")], ids=["criu restore", "lazypages restore"])
def test_eagerly(by: Criu, scenario: str, dumps: Checkpoints, tmp_path: Path) -> None:
    checkpoint = replace(dumps.get(DumpedByUs(CRIU.release), scenario), criu=by)
    with eager_restore(checkpoint, tmp_path, checkpoint.images) as restored:
        restored.go()
        assert restored.wait_tasks() == 0
        restored.check_verdict()


@pytest.mark.slow
def test_a_chain(program: Program, tmp_path: Path) -> None:
    """Pre-dumps mark what they find, and leave guards alone."""
    checkpoint = Checkpoints(tmp_path, program).get(DumpedByUs(CRIU.release, pre_dumps=2), "guarded")
    assert dumptool.stats(checkpoint.images).pages_skipped_parent > 0
    with lazy_restore(checkpoint, our_daemon(), tmp_path) as restored:
        restored.check_all()
        check_counts(restored)


def test_at_a_page_server(checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoint = checkpoints.get(CRIU, "guarded")
    left, work = tmp_path / "images", tmp_path / "server"
    work.mkdir()
    leave_at_source(checkpoint.images, left)
    with nothing_left(), ExitStack() as stack:
        port, _ = stack.enter_context(our_page_server(checkpoint.images, work))
        daemon = our_daemon("--page-server", "--address", "127.0.0.1", "--port", str(port))
        restored = stack.enter_context(lazy_restore(checkpoint, daemon, tmp_path, left))
        restored.check_all()
        check_counts(restored)


def test_a_kernel_without_guards(dumps: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before anything is made."""
    checkpoint = dumps.get(DumpedByUs(CRIU.release), "guarded")
    monkeypatch.setattr(Machine, "has_guards", False)
    order = Order(
        lazy=False, shell_job=False, detached=True, own_session=os.getsid(0), own_group=os.getpgrp()
    )
    with pytest.raises(RestoreError, match=r"need Linux 6\.13") if has_guards() else nullcontext():
        check(load(checkpoint.images, lazy=False), order, Machine())


def test_both_find_the_same(program: Program, tmp_path: Path) -> None:
    """dumptool and CRIU, of one process: entry by entry."""
    results, ours, theirs = (tmp_path / name for name in ("results", "ours", "theirs"))
    for folder in (results, theirs):
        folder.mkdir()
    with nothing_left():
        victim = start(program.command("guarded", results), cwd="/")
        wait_for("the victim to fill its memory", (results / "ready").exists)
        dumptool.check("dump", "-t", victim.pid, "-D", ours, "--leave-running")
        CRIU.dump(victim.pid, theirs)
        victim.wait(30)
    name = Kind.MM.file_name(victim.pid)
    found = [
        [vma for vma in images.read_one(folder / name, Kind.MM).vmas if vma.status & 0x10000]
        for folder in (ours, theirs)
    ]
    assert found[0] == found[1]
    assert len(found[0]) == (6 if has_guards() else 0)
    mm = images.read_one(ours / name, Kind.MM)
    assert open_checkpoint(ours).load_task(victim.pid, False).guards == guard_regions(mm, ours / name)
