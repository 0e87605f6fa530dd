"""Programs that dumptool can't save itself, through two pre-dumps and `dump --backend criu`, and back by real CRIU.

All of them change their memory meanwhile, and say afterwards whether all of it is right. Their memory comes from the
images (`kept`), or from the stopped tree and the parents (`served`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from _pytest.mark import ParameterSet

from dumptool.proc import children
from tests.real.test_criu_namespace import NAMESPACE
from tests.real.test_dump_backend import by_criu
from tests.real.test_dump_lazy import lazy_dump, ours
from tests.support.criu import Criu
from tests.support.dumptool import check, reap_all
from tests.support.processes import nothing_left, start, tail, wait_for
from tests.support.restore import our_daemon
from tests.support.services import FAMILY, JAVA, NODE, SERVICE, Service, service

NAMESPACES = ("unshare", "--pid", "--mount", "--net", "--fork", "sh", "-c")
ENTER = """
root=$0
ip link set lo up && mount --bind / "$root" && cd "$root" && mount -t devtmpfs dev dev && mount -t proc proc proc &&
pivot_root . . && umount -l . && cd / && exec setsid "$@" </dev/null >/dev/null 2>&1
"""
WITH_ROOT = ("unshare", "--mount", "sh", "-c", 'mount --bind / "$0" && exec "$@"')
"""CRIU wants a root that is a mount point for a tree with a mount namespace of its own."""


@dataclass(frozen=True)
class Case:
    """``size``: of its memory, as it counts that. ``own``: in PID, mount and network namespaces of its own.

    ``between``: requests after each pre-dump.
    """

    program: Sequence[str | Path]
    size: int
    own: bool = False
    between: Sequence[bytes] = (b"write",)


CASES = {
    "java": Case(JAVA, 8000),
    "node": Case(NODE, 4000),
    "asyncio": Case(SERVICE, 48),
    "namespaces": Case(SERVICE, 24, own=True),
    "family": Case(FAMILY, 6, between=(b"write", b"fork")),
}
NEW = Criu("4.2")


def cases(*names: str) -> list[ParameterSet]:
    """(name, criu). Not each program in each way with each release: CI has no time for that."""
    found = []
    for case in names:
        name, _, release = case.rpartition("-")
        found.append(pytest.param(name, Criu(release), id=case))
    return found


@dataclass(frozen=True)
class Run:
    """One of them, with one CRIU. ``tcp``: it is connected to itself, which only one network namespace has room for."""

    case: Case
    criu: Criu
    folder: Path
    tcp: bool

    @property
    def options(self) -> list[str]:
        return ["--tcp-established"] if self.tcp else []

    @property
    def root(self) -> Path:
        return self.folder / "root"

    @contextmanager
    def pre_dumped(self) -> Iterator[tuple[Service, int, list[str]]]:
        """The running program, the pid to dump, and the options for that."""
        inside = [*NAMESPACES, ENTER, str(self.root)] if self.case.own else []
        self.root.mkdir()
        with (
            nothing_left(),
            service(self.folder, self.case.size, inside, program=self.case.program, tcp=self.tcp) as running,
        ):
            pid = children(running.pid, running.pid)[0] if inside else running.pid
            parents: list[str] = []
            for level in (1, 2):
                check("pre-dump", "-t", pid, "-D", self.folder / str(level), *parents)
                parents = ["--prev-images-dir", f"../{level}"]
                for request in self.case.between:
                    assert running.ask(request) == b"done"
            yield running, pid, [*parents, *by_criu(self.criu), *self.options]

    def restore(self, images: Path, work: Path, *, beside: bool) -> None:
        """Starts `criu restore`. ``beside``: the stopped tree is still there, and has its pids."""
        command = [self.criu.path, "restore", "-D", images, "-W", work, "--lazy-pages", *self.options]
        command += ["-v4", "-o", "restore.log"]
        if self.case.own:
            command = [*WITH_ROOT, self.root, *command, "--root", self.root, "-d"]
        elif beside:
            command = [*NAMESPACE, *command]
        else:
            command += ["-d"]
        start(command, cwd=self.folder)


def lives(running: Service) -> None:
    """All is right, and remains so when it goes on."""
    assert running.ask(b"check") == b"right"
    assert running.ask(b"write") == b"done"
    assert running.ask(b"check") == b"right"
    assert running.ask(b"quit") == b"done"


def from_the_parents(work: Path) -> dict[str, Any]:
    """What `serve` counted. Pages came from the parents, too."""
    numbers: dict[str, Any] = json.loads((work / "stats.json").read_text())
    copied = numbers["copied_by_source"]
    assert sum(count for source, count in copied.items() if source.startswith("parent")) > 0, copied
    return numbers


@pytest.mark.slow
@pytest.mark.parametrize(("name", "criu"), cases("node-4.1", "asyncio-4.2", "family-4.2", "namespaces-4.1"))
def test_kept(name: str, criu: Criu, tmp_path: Path) -> None:
    images, work = tmp_path / "images", tmp_path / "work"
    work.mkdir()
    run = Run(CASES[name], criu, tmp_path, tcp=CASES[name].program == SERVICE and criu == NEW)
    with run.pre_dumped() as (running, pid, options):
        check("dump", "-t", pid, "-D", images, *options)
        reap_all()
        with our_daemon().start(images, work) as server:
            server.wait_ready()
            run.restore(images, work, beside=False)
            wait_for("the end of the daemon", lambda: server.process.poll() is not None)
            assert server.wait() == 0, tail(work / "restore.log")
            lives(running)
        from_the_parents(work)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "criu"), cases("java-4.2", "family-4.1", "namespaces-4.2"))
def test_served(name: str, criu: Criu, tmp_path: Path) -> None:
    images, work = tmp_path / "images", tmp_path / "work"
    work.mkdir()
    run = Run(CASES[name], criu, tmp_path, tcp=CASES[name].own and criu == NEW)
    with (
        run.pre_dumped() as (running, pid, options),
        lazy_dump(pid, images, *options) as source,
    ):
        source.wait_ready()
        with ours(source.port).start(images, work) as server:
            server.wait_ready()
            run.restore(images, work, beside=True)
            wait_for("the end of the daemon", lambda: server.process.poll() is not None)
            assert server.wait() == 0, tail(work / "restore.log")
            assert source.wait() == 0
            lives(running)
        assert from_the_parents(work)["copied_by_source"]["remote"] > 0
