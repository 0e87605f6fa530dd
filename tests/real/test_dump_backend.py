"""`dumptool dump --backend criu`: CRIU saves everything but memory, dumptool the memory; real programs live on."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from dumptool.proc import children
from images_spec.flags import PE_LAZY, PE_PARENT, PE_PRESENT
from tests.real.test_criu_namespace import NAMESPACE, restore
from tests.real.test_dump_lazy import lazy_dump, ours, running
from tests.real.test_dump_precopy import PAGES, Writer, written_in
from tests.support.compiling import PROGRAMS, compiled
from tests.support.criu import Criu, all_criu
from tests.support.dumptool import check, is_unharmed, pages, reap_all, stats, task, tracker_of
from tests.support.processes import nothing_left, reap, start, wait_for
from tests.support.restore import Program, eager_restore, our_daemon
from tests.support.services import service

both = pytest.mark.parametrize("criu", all_criu())


def by_criu(criu: Criu) -> list[str]:
    """Options of dumptool."""
    return ["--backend", "criu", "--criu", str(criu.path)]


MIB = 48
"""Of the service's memory."""
OTHERS = 300
"""Pages of a small program that change in any case, or that CRIU does not count as lazy."""


def pre_dumped(pid: int, folder: Path) -> list[str]:
    """Two pre-dumps; the option for the dump."""
    check("pre-dump", "-t", pid, "-D", folder / "1")
    check("pre-dump", "-t", pid, "-D", folder / "2", "--prev-images-dir", "../1")
    return ["--prev-images-dir", "../2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("criu", "scenario"),
    [(Criu("4.1"), "interpreter"), (Criu("4.2"), "tree")],
    ids=["interpreter-4.1", "tree-4.2"],
)
def test_every_byte_after_a_plain_restore(
    criu: Criu, scenario: str, program: Program, tmp_path: Path
) -> None:
    """Without any daemon of ours: the images are complete ones of CRIU's. One tree ran on and was ended later."""
    with running(criu, scenario, program, tmp_path) as victim:
        goes_on = ["-R"] if scenario == "interpreter" else []
        check("dump", "-t", victim.pid, "-D", victim.checkpoint.images, *goes_on, *by_criu(criu))
        if goes_on:
            is_unharmed(victim.pid)
            os.kill(victim.pid, signal.SIGKILL)
        assert victim.has_ended()
        reap_all()
        with eager_restore(victim.checkpoint, tmp_path, victim.checkpoint.images) as restored:
            restored.go()
            assert restored.wait_tasks() == 0
            restored.check_verdict()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("criu", "scenario"), [(Criu("4.1"), "tree"), (Criu("4.2"), "threads")], ids=["tree-4.1", "threads-4.2"]
)
def test_lazily_from_the_stopped_tree(criu: Criu, scenario: str, program: Program, tmp_path: Path) -> None:
    """dumptool serves the memory of the tree that CRIU keeps stopped, and the tree ends when all has arrived."""
    work = tmp_path / "work"
    work.mkdir()
    with (
        running(criu, scenario, program, tmp_path) as victim,
        lazy_dump(victim.pid, victim.checkpoint.images, *by_criu(criu)) as source,
    ):
        source.wait_ready()
        with restore(victim.checkpoint, ours(source.port), work) as (restored, restorer):
            restored.go()
            assert restorer.wait(60) == 0
            restored.check_verdict()
            assert restored.server.wait() == 0
        assert source.wait() == 0
        assert victim.has_ended()


@pytest.mark.slow
@both
def test_only_what_was_written_is_written(criu: Criu, tmp_path: Path) -> None:
    """After two pre-dumps of a program that writes known pages; a plain restore finds the rest in the parents."""
    output = tmp_path / "output"
    with task(compiled(PROGRAMS / "writer.c"), output=output) as pid:
        wait_for("the table", lambda: output.read_text().endswith("\n"))
        writer, parents = Writer(pid, output), []
        for level in (1, 2):
            check("pre-dump", "-t", pid, "-D", tmp_path / str(level), *parents)
            parents = ["--prev-images-dir", f"../{level}"]
            writer.next_step()
        top = tmp_path / "3"
        check("dump", "-t", pid, "-D", top, *parents, *by_criu(criu))
        reap_all()
        written = written_in(2)
        assert writer.table_flags(top) == {
            page: PE_PRESENT | PE_LAZY if page in written else PE_PARENT | PE_LAZY for page in range(PAGES)
        }
        assert stats(top).pages_written < len(written) + OTHERS
        criu.restore(top, work=tmp_path, lazy=False)
        writer.ends_right()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["auto", "uffd-wp"])
def test_one_dump_after_the_other(method: str, tmp_path: Path) -> None:
    """--track-mem --leave-running, without any pre-dump: each dump has what was written since the one before.

    auto also compares, if the tracker knows nothing of the level.
    """
    criu, output = Criu("4.2"), tmp_path / "output"
    with task(compiled(PROGRAMS / "writer.c"), output=output) as pid:
        wait_for("the table", lambda: output.read_text().endswith("\n"))
        writer, parents = Writer(pid, output), []
        for level in range(3):
            goes_on = ["-R", "--track-mem"] if level < 2 else []
            goes_on += ["--dirty-tracking", method]
            check("dump", "-t", pid, "-D", tmp_path / str(level), *parents, *goes_on, *by_criu(criu))
            parents = ["--prev-images-dir", f"../{level}"]
            if level < 2:
                is_unharmed(pid)
                assert tracker_of(pid)
                writer.next_step()
        reap_all()
        for level in range(3):
            assert writer.table_flags(tmp_path / str(level)) == {
                page: PE_PRESENT | PE_LAZY if page in written_in(level) else PE_PARENT | PE_LAZY
                for page in range(PAGES)
            }, f"level {level}"
        criu.restore(tmp_path / "2", work=tmp_path, lazy=False)
        writer.ends_right()


@pytest.mark.slow
@both
def test_a_stack_pointer_at_the_start_of_a_page(criu: Criu, tmp_path: Path) -> None:
    """CRIU makes no page lazy then. Here they are: what has not changed is left in the parent, for a lazy restore."""
    output = tmp_path / "output"
    with task(compiled(PROGRAMS / "aligned.c"), output=output) as pid:
        wait_for("the program", lambda: output.read_text() == "ready\n")
        parents = pre_dumped(pid, tmp_path)
        top = tmp_path / "3"
        check("dump", "-t", pid, "-D", top, *parents, *by_criu(criu))
        reap_all()
        flags = list(pages(top, pid).values())
        assert flags.count(PE_PARENT | PE_LAZY) > 2000
        assert flags.count(PE_PRESENT) + flags.count(PE_PRESENT | PE_LAZY) < 20
        with our_daemon().start(top, tmp_path) as server:
            server.wait_ready()
            criu.restore(top, work=tmp_path)
            os.kill(pid, signal.SIGUSR2)
            assert reap(pid) == 0
            assert server.wait() == 0
        assert output.read_text().endswith("right\n")


@pytest.mark.slow
@both
def test_only_what_was_written_crosses_the_network(criu: Criu, tmp_path: Path) -> None:
    """PARENT | LAZY pages come from the parents, the others from the stopped tree, and none of them twice."""
    images, work = tmp_path / "images", tmp_path / "work"
    work.mkdir()
    with nothing_left(), service(tmp_path, MIB) as running:
        parents = pre_dumped(running.pid, tmp_path)
        assert running.ask(b"write") == b"done"
        with lazy_dump(running.pid, images, *parents, *by_criu(criu)) as source:
            source.wait_ready()
            flags = list(pages(images, running.pid).values())
            left, unchanged = flags.count(PE_LAZY), flags.count(PE_PARENT | PE_LAZY)
            assert unchanged > left > 0
            with ours(source.port).start(images, work) as server:
                server.wait_ready()
                command = [
                    criu.path,
                    "restore",
                    "-D",
                    images,
                    "-W",
                    work,
                    "--lazy-pages",
                    "-o",
                    "restore.log",
                ]
                start([*NAMESPACE, *command], cwd=tmp_path)
                wait_for("the end of the daemon", lambda: server.process.poll() is not None)
                assert server.wait() == 0
                assert source.wait() == 0
                assert running.ask(b"check") == b"right"
            numbers = json.loads((work / "stats.json").read_text())
            copied = numbers["copied_by_source"]
            assert copied.pop("remote") == left
            assert sum(copied.values()) == unchanged
            assert (
                numbers["page_servers"][0]["pages"] <= left + numbers["faults"]
            )  # a fault may ask once more


@pytest.mark.slow
@both
def test_in_namespaces_of_its_own(criu: Criu, tmp_path: Path) -> None:
    """Pids in the images are those inside; two pre-dumps before."""
    images = tmp_path / "images"
    with (
        nothing_left(),
        service(tmp_path, 16, ["unshare", "--pid", "--fork", "--uts", "--ipc", "setsid"]) as running,
    ):
        (pid,) = children(running.pid, running.pid)
        parents = pre_dumped(pid, tmp_path)
        assert running.ask(b"write") == b"done"
        check("dump", "-t", pid, "-D", images, *parents, *by_criu(criu))
        assert (images / "pagemap-1.img").exists()
        reap_all()
        with our_daemon().start(images, tmp_path) as server:
            server.wait_ready()
            criu.restore(images, work=tmp_path)
            assert running.ask(b"check") == b"right"
            assert server.wait() == 0
        assert running.ask(b"quit") == b"done"
