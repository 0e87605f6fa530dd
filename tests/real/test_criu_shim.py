"""A `criu` that is ours where it should be, for tools that call `criu` (docs/criu-shim.md)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lazypages.cli.served import incomplete, wait_until_complete
from tests.support.compiling import compiled
from tests.support.criu import Criu
from tests.support.processes import Server, descendants, nothing_left, reap, start, wait_for
from tests.support.resident import daemon as resident_daemon
from tests.support.restore import Checkpoint, Checkpoints, Daemon, lazy_restore, our_daemon

REAL = Criu("4.2")
SERVED = Path(__file__).parents[1] / "support" / "programs" / "registered.c"


@dataclass(frozen=True)
class Shim(Criu):
    """The shim, in front of that release."""

    shim: Path = Path()

    @property
    def path(self) -> Path:
        return self.shim


def install(folder: Path, real: Path, *options: str) -> Path:
    folder.mkdir(exist_ok=True)
    subprocess.run(
        [sys.executable, "-m", "lazypages", "criu-shim", "--install", folder, "--criu", real, *options],
        check=True,
        capture_output=True,
        timeout=60,
    )
    return folder / "criu"


@pytest.fixture
def shim(tmp_path: Path) -> Path:
    return install(tmp_path / "bin", REAL.path)


def test_what_is_not_ours_is_criu_s_own(tmp_path: Path) -> None:
    """Not a byte of the arguments, the environment or the exit status changes, and no Python is started."""
    said = tmp_path / "said"
    real = tmp_path / "real"
    real.write_text(
        f'#!/bin/sh\nfor word; do printf "%s\\0" "$word"; done >{said}\nenv -0 >>{said}\nexit 7\n'
    )
    real.chmod(0o755)
    shim = install(tmp_path / "bin", real)
    script = shim.read_text()
    assert script.count(sys.executable) == 1
    shim.write_text(script.replace(sys.executable, "/bin/false"))
    environment = {"PATH": os.environ["PATH"], "ODD": "a\nb 'c"}
    for words in (
        ["swrk", "7"],
        ["check", "--feature", "uffd"],
        ["-V"],
        [],
        ["restore", "-D", "a b\n", "", "--lazy-pages", "*", "--page-server"],
        ["page-server", "--port", "7"],
    ):
        done = subprocess.run([shim, *words], env=environment, check=False, timeout=30)
        assert done.returncode == 7
        arguments = [word.encode() for word in words]
        assert said.read_bytes().split(b"\0")[: len(words)] == arguments
        assert b"ODD=a\nb 'c" in said.read_bytes().split(b"\0")[len(words) :]
    assert subprocess.run([shim, "dump"], env=environment, check=False, timeout=30).returncode == 1


@pytest.mark.parametrize(
    "words",
    [
        ["-D", "lazy-pages", "check"],
        ["cpuinfo", "dump", "x"],
        ["lazy-pages", "--help"],
        ["-V", "dump"],
        ["dump"],
    ],
)
def test_what_looks_like_ours_and_is_not(words: Sequence[str], tmp_path: Path) -> None:
    said = tmp_path / "said"
    real = tmp_path / "real"
    real.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >{said}\n')
    real.chmod(0o755)
    subprocess.run([install(tmp_path / "bin", real), *words], check=True, timeout=30)
    assert said.read_text().split("\n")[:-1] == words


@pytest.mark.parametrize("ignored", [False, True], ids=["default", "ignored"])
@pytest.mark.parametrize("locale", [{}, {"PYTHONCOERCECLOCALE": "warn", "real": "7", "word": "8"}])
def test_python_leaves_no_trace_in_criu(locale: Mapping[str, str], ignored: bool, tmp_path: Path) -> None:
    """The ignored signals and the environment of a dump are those of a command without Python."""
    said = tmp_path / "said"
    real = tmp_path / "real"
    real.write_text(f"#!/bin/sh\ngrep SigIgn /proc/$$/status >{said}\nenv -0 | sort -z >>{said}\n")
    real.chmod(0o755)
    shim = install(tmp_path / "bin", real)
    environment = {"PATH": os.environ["PATH"], **locale}
    seen = []
    for command in ([real, "dump"], [shim, "check"], [shim, "dump"]):
        # we ignore SIGPIPE and SIGXFSZ, as Python does
        subprocess.run(command, env=environment, check=True, timeout=30, restore_signals=not ignored)
        seen.append(said.read_bytes())
    assert seen[0].startswith(b"SigIgn:")
    mask = int(seen[0].split()[1], 16)
    assert bool(mask >> (signal.SIGPIPE - 1) & 1) == ignored
    assert seen[1] == seen[0]
    assert seen[2] == seen[0]


def test_a_name_without_a_slash_is_refused(shim: Path) -> None:
    """It may be the shim again, for ever."""
    path = f"{shim.parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [shim, "check"],
        env={"PATH": path, "LAZYPAGES_CRIU": "criu"},
        check=False,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 1
    assert done.stderr == "criu-shim: LAZYPAGES_CRIU is criu: let it be a path with a slash\n"


def test_strange_paths_of_criu(tmp_path: Path) -> None:
    said = tmp_path / "said"
    odd = Path(os.fsdecode(bytes(tmp_path) + b"/o'd \xff\xc3\xa9"))
    line = tmp_path / "a\ntouch b"
    for real in (odd, line):
        real.write_text(f"#!/bin/sh\necho $1 >{said}\n")
        real.chmod(0o755)
    shim = install(tmp_path / "bin", odd)
    for word in ("check", "dump"):
        subprocess.run([shim, word], check=True, timeout=30)
        assert said.read_text() == f"{word}\n"
    with pytest.raises(subprocess.CalledProcessError) as refused:
        install(tmp_path / "other", line)
    assert b"control characters" in refused.value.stderr
    assert not (tmp_path / "other/criu").exists()


def test_it_does_not_call_itself(shim: Path) -> None:
    done = subprocess.run(
        [shim, "check"],
        env={**os.environ, "LAZYPAGES_CRIU": str(shim)},
        check=False,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 1
    assert "LAZYPAGES_CRIU is this shim" in done.stderr


def test_lazy_pages_is_ours(shim: Path, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """A whole restore, with `lazy-pages` and `restore` both called as `criu`."""
    checkpoint = checkpoints.get(REAL, "tree")
    ours = Checkpoint(
        Shim("4.2", shim), checkpoint.scenario, checkpoint.pid, checkpoint.images, checkpoint.results
    )
    daemon = Daemon("shim", (str(shim), "-v4", "--no-default-config", "-j", "lazy-pages"), ours=False)
    with lazy_restore(ours, daemon, tmp_path) as restored:
        restored.check_all()
    assert "tasks in" in (tmp_path / "serve.log").read_text()


def test_lazy_pages_by_the_resident_daemon(shim: Path, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """The one that LAZYPAGES_VIA names; it is an error if that does not run."""
    checkpoint = checkpoints.get(REAL, "single")
    environment = os.environ | {"LAZYPAGES_VIA": str(tmp_path / "daemon.socket")}
    command = [str(shim), "lazy-pages", "-D", str(checkpoint.images), "-W", str(tmp_path), "-v4"]
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert "no daemon at" in done.stderr
    with resident_daemon(tmp_path) as resident:
        with Server(command, output=tmp_path / "output", env=environment) as server:
            server.wait_ready()
            REAL.restore(checkpoint.images, work=tmp_path)
            checkpoint.forget_results()
            wait_for(
                "the restore to be served", lambda: resident.status()[1]["state"] in {"serving", "ended"}
            )
            os.kill(checkpoint.pid, signal.SIGKILL)
            reap(checkpoint.pid)
            assert server.wait() in {0, 1}  # it may have been complete
        assert resident.status()[1]["state"] == "ended"


@pytest.mark.parametrize("release", ["4.1", "4.2"])
def test_configurations_are_read_as_by_criu(release: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Where the socket is, of the real one and of ours: options come from four files and the command line."""
    images = checkpoints.get(Criu(release), "single").images
    home, places = tmp_path / "home", ["default", "environment", "named", "line"]
    (home / ".criu").mkdir(parents=True)
    for place in places:
        (tmp_path / place).mkdir()
        path = home / ".criu/default.conf" if place == "default" else tmp_path / f"{place}.conf"
        path.write_text(f'# where\nwork-dir "{tmp_path / place}"\nlog-file log # what\nshell-job\n')
    real = Criu(release).path
    named, line = ["--config", str(tmp_path / "named.conf")], ["-W", str(tmp_path / "line")]
    environment = {"PATH": os.environ["PATH"], "HOME": str(home)}
    with_file = {**environment, "CRIU_CONFIG_FILE": str(tmp_path / "environment.conf")}
    for program in (real, install(tmp_path / "bin", real)):
        for words, variables, place in (
            (["lazy-pages"], environment, "default"),
            (["lazy-pages"], with_file, "environment"),
            ([*named, "lazy-pages"], environment, "named"),
            (["lazy-pages", *named], with_file, "named"),
            ([*named, *line, "lazy-pages"], with_file, "line"),
            (["--no-default-config", "lazy-pages", *line], environment, "line"),
        ):
            command = [str(program), *words, "-D", str(images)]
            with Server(command, output=tmp_path / "output", env=variables) as server:
                socket = tmp_path / place / "lazy-pages.socket"
                wait_for(f"{command} to listen at {socket}", socket.exists)
                server.signal(signal.SIGKILL)
            socket.unlink()


def test_page_server_if_asked(tmp_path: Path) -> None:
    shim = install(tmp_path / "bin", REAL.path, "--page-server")
    (tmp_path / "images").mkdir()
    command = [
        str(shim),
        "page-server",
        "-D",
        str(tmp_path / "images"),
        "--port",
        "0",
        "--address",
        "127.0.0.1",
    ]
    with nothing_left():
        server = start(command, output=tmp_path / "output")
        wait_for("our page server", lambda: "page server at 127.0.0.1" in (tmp_path / "output").read_text())
        server.terminate()
        server.wait(30)


@dataclass(frozen=True)
class WithoutCgroups(Criu):
    """Leaves the tasks in the cgroups of the caller."""

    def run(self, action: str, *arguments: str | Path, **options: Any) -> int:
        return super().run(action, "--manage-cgroups=ignore", *arguments, **options)


def check_images(checkpoint: Checkpoint, images: Path, work: Path, criu: Criu = REAL) -> None:
    work.mkdir()
    checkpoint.forget_results()
    again = Checkpoint(criu, checkpoint.scenario, checkpoint.pid, images, checkpoint.results)
    with lazy_restore(again, our_daemon(), work) as restored:
        restored.check_all()


def test_a_dump_waits(shim: Path, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """The daemon brings at once what is missing, though it was told --no-background."""
    checkpoint = checkpoints.get(REAL, "tree")
    lazy = our_daemon("--no-background")
    daemon = Daemon(lazy.name, ("unshare", "--net", *lazy.command))  # the kernel does not tell it who traces
    images = tmp_path / "images"
    images.mkdir()
    with lazy_restore(checkpoint, daemon, tmp_path) as restored:
        Shim("4.2", shim).dump(checkpoint.pid, images)
        assert f"criu-shim: waiting: process {checkpoint.pid}" in (images / "dump.out").read_text()
        reap(checkpoint.pid)
        assert restored.server.wait() == 0
        log = (tmp_path / "serve.log").read_text()
        traced = [line for line in log.splitlines() if "traces it" in line]
        assert traced
        assert all("criu-shim (pid" in line for line in traced), "never by CRIU"
    check_images(checkpoint, images, tmp_path / "again")


def test_a_dump_waits_where_no_daemon_makes_it_wait(
    shim: Path, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """A daemon in a PID namespace of its own sees no tracer from outside. Without the shim this dump is of zeros."""
    checkpoint = checkpoints.get(REAL, "single")
    lazy = our_daemon("--no-background")
    apart = ("unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc")
    images, said = tmp_path / "images", tmp_path / "said"
    images.mkdir()
    with lazy_restore(checkpoint, Daemon(lazy.name, (*apart, *lazy.command)), tmp_path) as restored:
        dump = [str(shim), "-v4", "dump", "-D", str(images), "-o", "dump.log", "-t", str(checkpoint.pid)]
        dumping = start(dump, output=said)
        wait_for("the shim to trace it", lambda: is_traced_by(dumping.pid, checkpoint.pid))
        assert f"criu-shim: waiting: process {checkpoint.pid}" in said.read_text()
        [server] = [
            pid
            for pid in descendants(restored.server.process.pid)
            if b"serve" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        os.kill(server, signal.SIGTERM)  # completes the task
        assert dumping.wait(60) == 0
        reap(checkpoint.pid)
        assert restored.server.wait() == 0
    check_images(checkpoint, images, tmp_path / "again")


@contextmanager
def frozen(pid: int) -> Iterator[Path]:
    """A cgroup, frozen, that has only this process."""
    parent = Path("/sys/fs/cgroup/freezer")
    file, freeze, thaw = "freezer.state", "FROZEN", "THAWED"
    if not parent.exists():
        parent, file, freeze, thaw = parent.parent, "cgroup.freeze", "1", "0"
    group = parent / f"lazypages-test-{os.getpid()}"
    group.mkdir()
    try:
        (group / "cgroup.procs").write_text(str(pid))
        (group / file).write_text(freeze)
        yield group
    finally:
        (group / file).write_text(thaw)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        wait_for("the cgroup to be empty", lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()


def test_a_dump_of_a_frozen_task(shim: Path, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """As a container that is paused. It gets its memory without running."""
    checkpoint = checkpoints.get(REAL, "single")
    images = tmp_path / "images"
    images.mkdir()
    with (
        lazy_restore(checkpoint, our_daemon("--no-background"), tmp_path) as restored,
        frozen(checkpoint.pid) as group,
    ):
        Shim("4.2", shim).dump(checkpoint.pid, images, "--freeze-cgroup", group)
        assert f"criu-shim: waiting: process {checkpoint.pid}" in (images / "dump.out").read_text()
        reap(checkpoint.pid)
        assert restored.server.wait() == 0
    check_images(checkpoint, images, tmp_path / "again", WithoutCgroups("4.2"))


def test_ctrl_c_while_a_dump_waits(tmp_path: Path) -> None:
    """Ends the shim, and CRIU never starts; the task goes on, traced by nobody."""
    said, started, real = tmp_path / "said", tmp_path / "started", tmp_path / "real"
    real.write_text(f"#!/bin/sh\ntouch {started}\n")
    real.chmod(0o755)
    shim = install(tmp_path / "bin", real)
    with nothing_left():
        start([compiled(SERVED)], output=said)
        wait_for("the child", lambda: said.read_text().count("\n") == 1)
        child = int(said.read_text())
        waiting = start(
            [str(shim), "dump", "-t", str(child)],
            output=tmp_path / "output",
            # a background job ignores it, and so would the shim
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        wait_for("the tracer", lambda: is_traced_by(waiting.pid, child))
        os.killpg(waiting.pid, signal.SIGINT)
        assert waiting.wait(30) == -signal.SIGINT
        wait_for("its end", lambda: "TracerPid:\t0\n" in Path(f"/proc/{child}/status").read_text())
        os.kill(child, signal.SIGUSR1)
        wait_for("its signal", lambda: said.read_text().count("signal\n") == 1)
        assert "Traceback" not in (tmp_path / "output").read_text()
        assert not started.exists()


WAIT = "from lazypages.cli.served import *; wait_until_complete(int(__import__('sys').argv[1]), print)"


def is_traced_by(waiting: int, task: int) -> bool:
    """By the child of the process that waits."""
    return any(
        f"TracerPid:\t{tracer}\n" in Path(f"/proc/{task}/status").read_text()
        for tracer in descendants(waiting)
    )


def test_signals_of_a_task_that_is_waited_for(tmp_path: Path) -> None:
    """It is traced meanwhile, and gets them all the same; it can be stopped and continued, and may end."""
    said = tmp_path / "said"
    with nothing_left():
        holder = start(
            [compiled(SERVED)], output=said
        )  # it has the userfaultfd of a child, which is registered
        wait_for("the child", lambda: said.read_text().count("\n") == 1)
        child = int(said.read_text())
        assert incomplete(child) == [child]
        waiting = start([sys.executable, "-c", WAIT, str(child)])
        for count in range(1, 6):
            wait_for("the tracer", lambda: is_traced_by(waiting.pid, child))
            os.kill(child, signal.SIGUSR1)
            wait_for("its signal", lambda count=count: said.read_text().count("signal\n") == count)
        os.kill(child, signal.SIGSTOP)
        wait_for("its stop", lambda: "\nState:\tT" in Path(f"/proc/{child}/status").read_text())
        os.kill(child, signal.SIGCONT)
        os.kill(child, signal.SIGUSR1)
        wait_for("its signal", lambda: said.read_text().count("signal\n") == 6)
        assert waiting.poll() is None
        holder.kill()  # nothing is registered any more
        assert waiting.wait(30) == 0
        os.kill(child, signal.SIGUSR1)
        wait_for("its signal", lambda: said.read_text().count("signal\n") == 7)
        assert "TracerPid:\t0\n" in Path(f"/proc/{child}/status").read_text()


def test_a_task_that_can_t_stop(tmp_path: Path) -> None:
    """As in vfork(2). The wait ends when the memory is complete, and the task is not traced any more."""
    said = tmp_path / "said"
    with nothing_left():
        holder = start([compiled(SERVED), "vfork"], output=said)
        wait_for("the child", lambda: said.read_text().count("\n") == 1)
        child = int(said.read_text())
        status = Path(f"/proc/{child}/status")
        wait_for("its vfork", lambda: "\nState:\tD" in status.read_text())
        [vforked] = descendants(child)
        waiting = start([sys.executable, "-c", WAIT, str(child)])
        wait_for("the tracer", lambda: is_traced_by(waiting.pid, child))
        os.kill(child, signal.SIGUSR1)
        holder.kill()  # nothing is registered any more
        assert waiting.wait(30) == 0
        assert "TracerPid:\t0\n" in status.read_text()
        os.kill(vforked, signal.SIGTERM)
        wait_for("its signal", lambda: said.read_text().count("signal\n") == 1)


def test_signals_are_passed_on_at_once(tmp_path: Path) -> None:
    """A timer of 1 ms ticks at least half as often as without the tracer."""
    said = tmp_path / "said"

    def rates(count: int) -> list[int]:
        """Of the next so many tenths of a second."""
        seen = said.read_text().count("ticks")
        wait_for("ticks", lambda: said.read_text().count("ticks") > seen + count)
        return [int(line[6:]) for line in said.read_text().split("\n")[:-1] if line.startswith("ticks")][
            seen:
        ]

    with nothing_left():
        start([compiled(SERVED), "tick"], output=said)
        wait_for("the child", lambda: "\n" in said.read_text())
        child = int(said.read_text().split("\n")[0])
        untraced = max(rates(5))
        waiting = start([sys.executable, "-c", WAIT, str(child)])
        wait_for("the tracer", lambda: is_traced_by(waiting.pid, child))
        traced = rates(15)
        assert sorted(traced)[len(traced) // 2] * 2 > untraced, (traced, untraced)
        os.kill(waiting.pid, signal.SIGTERM)  # as Ctrl-C ends the shim (SIG_DFL), where SIGINT is not ignored
        waiting.wait(30)
        wait_for("its end", lambda: "TracerPid:\t0\n" in Path(f"/proc/{child}/status").read_text())
        assert rates(1)


def test_a_process_whose_first_thread_has_exited(tmp_path: Path) -> None:
    said = tmp_path / "said"
    with nothing_left():
        start([compiled(SERVED), "leave"], output=said)
        wait_for("the child", lambda: said.read_text().count("\n") == 1)
        child = int(said.read_text())
        wait_for("the end of its thread", lambda: "\nState:\tZ" in Path(f"/proc/{child}/status").read_text())
        assert not Path(f"/proc/{child}/smaps").read_text()
        assert incomplete(child) == [child]
        waiting = start([sys.executable, "-c", WAIT, str(child)])
        [thread] = set(os.listdir(f"/proc/{child}/task")) - {str(child)}
        wait_for("the tracer", lambda: is_traced_by(waiting.pid, int(thread)))


def print_nothing(text: str) -> None:
    pytest.fail(text)


def test_nothing_to_wait_for() -> None:
    wait_until_complete(os.getpid(), print_nothing)
    with nothing_left():
        process = start(["true"])
        process.wait(30)
        wait_until_complete(process.pid, print_nothing)
