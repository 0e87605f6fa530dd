"""Checkpoint a victim with real CRIU, bring it back lazily under some daemon, and read its verdict.

A checkpoint is taken once and restored many times. Its tasks keep their pids, so each restore first makes
sure that nobody took one meanwhile, and takes a fresh checkpoint otherwise.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytest
from _pytest.mark import ParameterSet

from tests.support import schemas
from tests.support.criu import RELEASES, Criu, makes_none_lazy
from tests.support.processes import Server, descendants, describe, nothing_left, reap, start, tail, wait_for

VICTIMS = Path(__file__).parent / "victims"
SOCKET = "lazy-pages.socket"
SEED = 20_231_123


@dataclass(frozen=True)
class Scenario:
    """A victim's name, and how many reports its verdict has when every task and thread got to its end.

    `releases`: those of CRIU that bring back all that it is about.
    """

    name: str
    reports: int = 1
    releases: tuple[str, ...] = RELEASES

    def __str__(self) -> str:
        return self.name


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("single"),
        Scenario("plain"),
        Scenario("threads", 16),
        Scenario("small_stacks", 16),
        Scenario("writes"),
        Scenario("fragments"),
        Scenario("stack"),
        Scenario("heap"),
        Scenario("protection"),
        Scenario("moves"),
        Scenario("moves_over"),
        Scenario("chase"),
        Scenario("resizes"),
        Scenario("leaves_behind"),
        Scenario("refused"),
        Scenario("shrinks"),
        Scenario("unmaps"),
        Scenario("discards"),
        Scenario("huge_unmap"),
        Scenario("huge_discard"),
        Scenario("huge_move"),
        Scenario("races", 8),
        Scenario("family", 3),
        Scenario("orphan", 2),
        Scenario("brief", 9),
        Scenario("partings", 2),
        Scenario("inherit_early", 2, ("4.2",)),  # CRIU 4.1.1 loses MADV_WIPEONFORK at the dump (observed)
        Scenario("inherit_late", 2),
        Scenario("forks_under_load", 12),
        Scenario("syscalls", 2),
        Scenario("tree", 6),
        Scenario("crowd", 41),
        Scenario("interpreter", 5),
        Scenario("guarded", 2, ("4.2",)),  # CRIU 4.1.1 can't dump guard regions (images_spec/mm.md)
        Scenario("guarded_threads", 8, ("4.2",)),
        Scenario("guards_late", 2),  # waits until all has come
        Scenario("forever"),
    )
}


def all_cases(*, every_kernel: Container[str] = ()) -> list[ParameterSet]:
    """(criu, scenario) for every victim that comes to an end by itself, with every CRIU that can restore it.

    ``every_kernel``: scenarios that are marked so, with the newest CRIU.
    """
    return [
        pytest.param(
            Criu(release),
            scenario.name,
            id=f"{scenario}-{release}",
            marks=[pytest.mark.every_kernel]
            if scenario.name in every_kernel and release == scenario.releases[-1]
            else [],
        )
        for scenario in SCENARIOS.values()
        for release in scenario.releases
        if scenario.name not in {"guards_late", "forever"}
    ]


@dataclass(frozen=True)
class Report:
    """What one task or thread saw: counts of pages, and the first place that was wrong."""

    name: str
    pid: int
    data: int
    zero: int
    bad: int
    where: str
    what: str


#: What a task says whose child was killed (victims/victim.c).
CHILD_ENDED = "a child ended otherwise than it should"


@dataclass(frozen=True)
class Program:
    """The victims: those in C, compiled, and the Python one."""

    path: Path

    @classmethod
    def compile(cls, folder: Path) -> Self:
        """Build the executable in `folder`."""
        path = folder / "victim"
        sources = sorted(str(source) for source in VICTIMS.glob("*.c"))
        flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread"]
        subprocess.run(["gcc", *flags, "-o", str(path), *sources], check=True, timeout=600)
        return cls(path)

    def command(self, scenario: str, results: Path) -> list[str]:
        """What to execute for that scenario, to leave its traces in `results`."""
        interpreted = VICTIMS / f"{scenario}.py"
        start = [sys.executable, str(interpreted)] if interpreted.exists() else [str(self.path)]
        return [*start, scenario, str(results), str(SEED)]


@dataclass(frozen=True)
class Checkpoint:
    """Images of a victim that waits for its go, taken by `criu`. Nobody may change them.

    `results` is where the victim looks for its go and leaves its verdict, in whatever incarnation.
    """

    criu: Criu
    scenario: Scenario
    pid: int
    images: Path
    results: Path

    @property
    def pids(self) -> list[int]:
        """Every pid and thread id that a restore needs, the root's included."""
        return [int(path.stem.removeprefix("core-")) for path in self.images.glob("core-*.img")]

    def taken(self) -> bool:
        """Has somebody got one of our pids?"""
        return any(Path(f"/proc/{pid}").exists() for pid in self.pids)

    def restore(self, work: Path, images: Path | None = None, *, lazy: bool = True) -> None:
        """Bring it back, detached, with the daemon that listens in `work`; from `images` made out of it, if given.

        Other processes of the machine come and go: when one has got a pid of ours, wait for its end.
        """
        for _attempt in range(5):
            wait_for(f"the pids {self.pids} to be free", lambda: not self.taken())
            code = self.criu.restore(images or self.images, work=work, lazy=lazy, check=False)
            if code == 0:
                return
            if "File exists" not in (work / "restore.log").read_text(errors="replace"):
                break
        pytest.fail(f"the restore of {self.scenario} failed\n{tail(work / 'restore.log')}", pytrace=False)

    def go(self, order: str = "random") -> None:
        """What Restored.go does; before a restore, the victim begins as soon as it runs again."""
        draft = self.results / "going"
        draft.write_text(order)
        draft.rename(self.results / "go")

    def forget_results(self) -> None:
        """Make room for another incarnation."""
        for path in self.results.iterdir():
            path.unlink()


class Checkpoints:
    """Takes checkpoints when they are first asked for and keeps them in `folder`."""

    def __init__(self, folder: Path, program: Program) -> None:
        self._folder, self._program = folder, program
        self._kept: dict[tuple[Criu, str], Checkpoint] = {}

    def get(self, criu: Criu, name: str) -> Checkpoint:
        """The checkpoint of that scenario, ready to be restored."""
        kept = self._kept.get((criu, name))
        if kept is not None and kept.taken():
            shutil.rmtree(kept.images.parent)
            kept = None
        if kept is None:
            kept = self._kept[criu, name] = self._take(criu, SCENARIOS[name])
        kept.forget_results()
        return kept

    def _take(self, criu: Criu, scenario: Scenario) -> Checkpoint:
        folder = self._folder / f"{scenario}-{criu.release}"
        images, results = folder / "images", folder / "results"
        images.mkdir(parents=True)
        results.mkdir()
        with nothing_left():
            victim = start(
                self._program.command(scenario.name, results),
                cwd="/",
                env={"PATH": os.environ["PATH"], "PYTHONHASHSEED": "7"},
            )

            def is_ready() -> bool:
                if victim.poll() is not None:
                    pytest.fail(f"the victim {scenario} ended with {victim.returncode}")
                return (results / "ready").exists()

            wait_for(f"the victim {scenario} to fill its memory", is_ready)
            criu.dump(victim.pid, images)
            victim.wait(30)
        if makes_none_lazy(images):
            shutil.rmtree(folder)
            return self._take(criu, scenario)
        return Checkpoint(criu, scenario, victim.pid, images, results)


@dataclass(frozen=True)
class Daemon:
    """A command that serves as `criu lazy-pages` does, and what the tests may ask of it."""

    name: str
    command: tuple[str, ...]
    ours: bool = True

    def __str__(self) -> str:
        return self.name

    def start(self, images: Path | str, work: Path) -> Server:
        """Start it on `images`, with its log, statistics and socket in `work`."""
        command = [*self.command, "-D", str(images), "-W", str(work), "-v4", "-o", "serve.log"]
        if self.ours:
            command += ["--stats-json", str(work / "stats.json")]
        return Server(command, output=work / "serve.out", logs=[work / "serve.log"])


def criu_daemon(criu: Criu) -> Daemon:
    """CRIU's own: the harness is checked against it.

    Not for scenarios in which memory is unmapped right after a part of it was discarded, such as the stacks in
    "threads": by the time it hears of the first ("REMOVE"), it can't unregister any more what is gone, and ends
    ("Failed to unregister: Invalid argument", observed with CRIU 4.1.1).
    """
    return Daemon("criu", (str(criu.path), "lazy-pages"), ours=False)


def our_daemon(*options: str, name: str = "lazypages") -> Daemon:
    """`lazypages serve`."""
    command = (sys.executable, "-X", "faulthandler", "-m", "lazypages", "serve", *options)
    return Daemon(name, command)


@dataclass
class Restored:
    """Tasks that run again. The restore's log is in `work`."""

    checkpoint: Checkpoint
    work: Path

    def go(self, order: str = "random") -> None:
        """Tell the victim to touch and check everything: in "forward", "reverse" or "random" order."""
        self.checkpoint.go(order)

    def wait_tasks(self, timeout: float = 60) -> int:
        """Until the root task has ended: its exit code (negative: the signal)."""
        return os.waitstatus_to_exitcode(reap(self.checkpoint.pid, timeout))

    def reports(self) -> list[Report]:
        """The verdict so far."""
        path = self.checkpoint.results / "verdict"
        return [Report(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []

    def check_verdict(self) -> None:
        """Every task and thread has come to its end and found every byte right."""
        reports = self.reports()
        assert [report for report in reports if report.bad] == []
        assert len(reports) == self.checkpoint.scenario.reports, reports
        assert sum(report.data for report in reports) > 0

    def story(self) -> str:
        """What there is to see from outside, for a failure message."""
        tasks = "".join(f"{describe(pid)}\n" for pid in descendants())
        return f"{tail(self.work / 'restore.log')}--- our processes\n{tasks}--- reports: {self.reports()}\n"


@dataclass
class LazyRestore(Restored):
    """Tasks that run again while `server` has most of their memory."""

    daemon: Daemon
    server: Server

    def check_all(self, order: str = "random") -> None:
        """From go to the end: verdict, exit codes of task and daemon, nothing left behind."""
        self.go(order)
        self.check_end()

    def check_end(self) -> None:
        """The same once the victim has its go."""
        code = self.wait_tasks()
        self.check_verdict()
        assert code == 0
        assert self.server.wait() == 0
        if self.daemon.ours:
            assert not (self.work / SOCKET).exists()

    def stats(self) -> dict[str, Any]:
        """What our daemon wrote as --stats-json."""
        stats: dict[str, Any] = json.loads((self.work / "stats.json").read_text())
        schemas.check("stats.json", stats)
        return stats


@contextmanager
def eager_restore(checkpoint: Checkpoint, work: Path, images: Path) -> Iterator[Restored]:
    """Restore `images`, made from the checkpoint, without any daemon; ends all on the way out."""
    with nothing_left():
        checkpoint.restore(work, images, lazy=False)
        yield Restored(checkpoint, work)


@contextmanager
def lazy_restore(
    checkpoint: Checkpoint,
    daemon: Daemon,
    work: Path,
    images: Path | None = None,
    *,
    pack: Path | str | None = None,
) -> Iterator[LazyRestore]:
    """Start the daemon and restore the checkpoint (or `images` made from it); ends all on the way out.

    `pack`: the daemon's -D; it places the images in `work`.
    """
    images = work if pack else images or checkpoint.images
    with nothing_left(), daemon.start(pack or images, work) as server:
        server.wait_ready()
        restored = LazyRestore(checkpoint, work, daemon, server)
        try:
            checkpoint.restore(work, images)
            yield restored
        except BaseException as error:
            error.add_note(restored.story())
            raise
