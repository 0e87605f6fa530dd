"""A restore in a PID namespace of its own, with the daemon outside: pids of the images mean nothing there."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.criu import Criu, all_criu
from tests.support.processes import nothing_left, wait_for
from tests.support.restore import SCENARIOS, Checkpoint, Daemon, LazyRestore, Program, our_daemon

NAMESPACE = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")

# $1: the victim's results, $2 ...: its command. The shell stays as the namespace's init: in that place CRIU
# crashes when the zombie of the tree becomes its child (observed with CRIU 4.1.1 and 4.2.1).
TAKE = """
results=$1; shift
setsid "$@" </dev/null >/dev/null 2>&1 &
until [ -e "$results/ready" ]; do sleep 0.02; done
"$CRIU" dump -t $! -D "$IMAGES" -v4 -o dump.log
exit $?
"""


def take(criu: Criu, scenario: str, program: Program, folder: Path) -> Checkpoint:
    """A checkpoint with small pids, made inside a namespace that is gone afterwards."""
    images, results = folder / "images", folder / "results"
    images.mkdir()
    results.mkdir()
    command = program.command(scenario, results)
    with nothing_left():
        subprocess.run(
            [*NAMESPACE, "sh", "-c", TAKE, "sh", str(results), *command],
            env={"CRIU": str(criu.path), "IMAGES": str(images), "PATH": "/usr/bin:/bin"},
            stdin=subprocess.DEVNULL,
            timeout=60,
            check=True,
        )
    pid = min(int(path.stem.removeprefix("core-")) for path in images.glob("core-*.img"))
    return Checkpoint(criu, SCENARIOS[scenario], pid, images, results)


@contextmanager
def restore(
    checkpoint: Checkpoint, daemon: Daemon, work: Path
) -> Iterator[tuple[LazyRestore, subprocess.Popen[bytes]]]:
    """Daemon outside, `criu restore` as the first process of a new namespace."""
    with nothing_left(), daemon.start(checkpoint.images, work) as server:
        server.wait_ready()
        restored = LazyRestore(checkpoint, work, daemon, server)
        command = [str(checkpoint.criu.path), "restore", "-D", str(checkpoint.images), "-W", str(work)]
        with subprocess.Popen(
            [*NAMESPACE, *command, "--lazy-pages", "-v4", "-o", "restore.log"], stdin=subprocess.DEVNULL
        ) as criu:
            try:
                yield restored, criu
            except BaseException as error:
                error.add_note(restored.story())
                raise
            finally:
                criu.kill()


@pytest.mark.loop("no-background-criu-4.2")
@pytest.mark.parametrize("criu", all_criu())
@pytest.mark.parametrize("options", [(), ("--no-background",)], ids=["background", "no-background"])
def test_tasks_in_a_namespace(criu: Criu, options: tuple[str, ...], program: Program, tmp_path: Path) -> None:
    checkpoint = take(criu, "tree", program, tmp_path)
    with restore(checkpoint, our_daemon(*options), tmp_path) as (restored, restorer):
        restored.go()
        assert restorer.wait(60) == 0
        restored.check_verdict()
        assert restored.server.wait() == 0


@pytest.mark.slow
@pytest.mark.parametrize("criu", all_criu()[:1])
def test_the_right_task_is_killed(criu: Criu, program: Program, tmp_path: Path) -> None:
    """Interrupted twice: its pid in the namespace is the one of somebody else outside."""
    checkpoint = take(criu, "forever", program, tmp_path)
    with restore(checkpoint, our_daemon("--no-background"), tmp_path) as (restored, restorer):
        log = tmp_path / "restore.log"
        wait_for("the restore", lambda: log.exists() and "Tasks resumed" in log.read_text(errors="replace"))
        restored.server.signal(signal.SIGSTOP)  # so that both wait for it when it goes on
        restored.server.signal(signal.SIGINT)
        restored.server.signal(signal.SIGTERM)
        restored.server.signal(signal.SIGCONT)
        assert restored.server.wait() == 1
        restorer.wait(30)  # CRIU, which is the namespace's init here, waits for its task
        assert [task["state"] for task in restored.stats()["tasks"]] == ["killed"]
