"""`lazypages restore` of ordinary programs in the middle of their work: they go on where they were."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from images_spec import images
from images_spec.images import Kind
from images_spec.messages import CoreEntry
from tests.real.test_restore import RESTORE, OurRestore
from tests.support.compiling import compiled
from tests.support.criu import Criu
from tests.support.dumptool import DumpedByUs, is_unharmed
from tests.support.processes import descendants, nothing_left, reap, start, wait_for
from tests.support.restore import criu_daemon, our_daemon
from tests.support.terminal import OnTerminal

SOURCES = Path(__file__).parent / "restore_programs"
MODES = ["eager", "lazy under lazypages", "lazy under criu"]


@dataclass
class Job:
    """A program under way, in a session of its own; its standard descriptors are /dev/null."""

    command: list[str]
    folder: Path
    criu: Criu
    pid: int = 0

    @property
    def images(self) -> Path:
        return self.folder / "images"

    def start(self, ready: Callable[[], object]) -> None:
        self.pid = start(self.command, cwd=self.folder).pid
        wait_for("the program to be in the middle of its work", ready)

    def dump(self, *options: str) -> None:
        self.images.mkdir()
        self.criu.dump(self.pid, self.images, *options)
        dumped = [path.stem.removeprefix("core-") for path in self.images.glob("core-*.img")]

        def gone() -> bool:
            with suppress(ChildProcessError):
                os.waitpid(-1, os.WNOHANG)  # orphans of the task are our children
            return not any(Path("/proc", tid).exists() for tid in dumped)

        wait_for("the dumped tasks to be gone", gone)

    @contextmanager
    def restored(self, mode: str) -> Iterator[Callable[[], None]]:
        """The job runs again; what is yielded waits until all memory is there, as the end of the block does."""
        ours = OurRestore(self.criu.release)
        if mode == "eager":
            ours.restore(self.images, lazy=False)
            yield lambda: None
            return
        daemon = our_daemon() if mode == "lazy under lazypages" else criu_daemon(self.criu)
        with daemon.start(self.images, self.images) as server:
            server.wait_ready()
            ours.restore(self.images)

            def complete() -> None:
                assert server.wait() == 0

            yield complete
            complete()

    def go(self) -> None:
        """The programs wait for this half-way, so that they can't end too early."""
        (self.folder / "out.go").touch()

    def end(self) -> int:
        return os.waitstatus_to_exitcode(reap(self.pid))


@pytest.fixture(params=[pytest.param(Criu("4.1"), id="criu"), pytest.param(DumpedByUs("4.1"), id="dumptool")])
def criu(request: pytest.FixtureRequest) -> Criu:
    assert isinstance(request.param, Criu)
    return request.param


@pytest.fixture(autouse=True)
def _cleanup() -> Iterator[None]:
    with nothing_left():
        yield


def lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.slow
def test_attached_ends_as_the_task_does(criu: Criu, tmp_path: Path) -> None:
    out = tmp_path / "out"
    job = Job([str(compiled(SOURCES / "counter.c", "-static")), str(out)], tmp_path, criu)
    job.start(lambda: lines(out) > 20)
    job.dump()
    at_dump = out.read_bytes()
    job.go()
    attached = [*RESTORE, "-D", str(job.images), "--pidfile", "pid"]
    assert subprocess.run(attached, check=False, timeout=60).returncode == 42
    assert (job.images / "pid").read_text() == str(job.pid)
    assert lines(out) == 200
    # Once more, and ended by a signal.
    (tmp_path / "out.go").unlink()
    out.write_bytes(at_dump)
    (job.images / "pid").unlink()
    with subprocess.Popen(attached) as restorer:
        wait_for("the task", (job.images / "pid").exists)
        is_unharmed(job.pid)
        assert list(descendants(restorer.pid)) == [job.pid]
        os.kill(job.pid, signal.SIGTERM)
        assert restorer.wait(30) == 128 + signal.SIGTERM


# What of /proc is no property of the task but of the moment or the machine.
STATUS = re.compile(
    r"^(Name|Umask|State|Tgid|Pid|PPid|TracerPid|Uid|Gid|FDSize|Groups|Threads|SigPnd|ShdPnd|SigBlk|SigIgn|SigCgt"
    r"|Cap\w+|NoNewPrivs|Seccomp|THP_enabled):.*$",
    re.MULTILINE,
)
STAT_FIELDS = {"ppid": 3, "pgrp": 4, "session": 5, "tty": 6, "nice": 18, "threads": 19, "policy": 40} | {
    name: number
    for number, name in enumerate(
        ["start_data", "end_data", "start_brk", "arg_start", "arg_end", "env_start", "env_end"], 44
    )
}


def descriptor(proc: Path, fd: str) -> tuple[str, int, int]:
    """What it is, position, flags; without O_LARGEFILE, which open(2) adds to all that it opens."""
    info = dict(
        line.split(":\t", 1) for line in (proc / "fdinfo" / fd).read_text().splitlines() if ":\t" in line
    )
    name = re.sub(r"pipe:\[\d+\]", "pipe", os.readlink(proc / "fd" / fd))
    return name, int(info["pos"]), int(info["flags"], 8) & ~0o100000


def snapshot(pid: int) -> dict[str, object]:
    """All that can be seen of a quiet task from outside."""
    proc = Path(f"/proc/{pid}")
    seen: dict[str, object] = {}
    for tid in sorted(int(path.name) for path in (proc / "task").iterdir()):
        task = proc / "task" / str(tid)
        status = (task / "status").read_text(errors="replace")
        seen[f"{tid} status"] = [m[0] for m in STATUS.finditer(status) if not m[0].startswith("FDSize")]
        seen[f"{tid} comm"] = (task / "comm").read_bytes()
    fields = (proc / "stat").read_bytes().rpartition(b")")[2].split()
    seen["stat"] = {name: fields[number - 2] for name, number in STAT_FIELDS.items()}
    if fields[0] == b"Z":
        return {"stat": seen["stat"], "comm": seen[f"{pid} comm"], "exit": fields[-1]}
    for name in ("cmdline", "environ", "auxv", "limits", "personality", "oom_score_adj"):
        seen[name] = (proc / name).read_bytes()
    seen["links"] = {name: os.readlink(proc / name) for name in ("exe", "cwd", "root")}
    seen["fds"] = {path.name: descriptor(proc, path.name) for path in (proc / "fd").iterdir()}
    seen["maps"] = (proc / "maps").read_text()
    # "ac", accounted for: stays with mappings that were writable while their contents came.
    seen["VmFlags"] = [
        set(flags.split()) - {"ac"}
        for flags in re.findall("^VmFlags:(.*)$", (proc / "smaps").read_text(), re.MULTILINE)
    ]
    return seen


def leaderless(criu: Criu) -> list[str]:
    """dumptool does not dump a process group without its leader."""
    return [] if isinstance(criu, DumpedByUs) else ["leaderless"]


def wait_quiet(pids: list[int]) -> None:
    states = [path / "status" for pid in pids for path in Path(f"/proc/{pid}/task").iterdir()]
    wait_for("all tasks to sleep", lambda: not any("State:\tR" in path.read_text() for path in states))


def memory(pid: int, areas_of_rseq: list[range]) -> dict[str, bytes]:
    """All readable memory; without the areas in which the kernel notes the CPU."""
    seen = {}
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as file:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            if "[vvar" in line or "[vsyscall" in line or line.split()[1][0] != "r":
                continue
            data = bytearray()
            file.seek(start)
            while len(data) < end - start:
                piece = file.read(end - start - len(data))
                assert piece
                data += piece
            for area in areas_of_rseq:
                if start <= area.start < end:
                    data[area.start - start : area.stop - start] = bytes(len(area))
            seen[f"{start:x}-{end:x}"] = bytes(data)
    return seen


def rseq_areas(directory: Path) -> list[range]:
    entries = [
        images.read_one(path, Kind.CORE).thread_core.rseq_entry for path in directory.glob("core-*.img")
    ]
    return [range(e.rseq_abi_pointer, e.rseq_abi_pointer + e.rseq_abi_size) for e in entries]


@pytest.mark.loop("dumptool-lazy under lazypages")
@pytest.mark.parametrize("mode", MODES)
def test_everything_that_a_task_has(mode: str, criu: Criu, tmp_path: Path) -> None:
    """A tree with as much state as there is, compared from outside before and after, memory too."""
    folder = tmp_path / "work"
    folder.mkdir()
    job = Job([str(compiled(SOURCES / "state.c")), str(folder), *leaderless(criu)], tmp_path, criu)
    job.start((folder / "ready").exists)
    pids = [job.pid, *descendants(job.pid)]
    wait_quiet(pids)
    before = {pid: snapshot(pid) for pid in pids}
    contents = {pid: memory(pid, []) for pid in pids if "maps" in before[pid]}
    job.dump("--file-locks")
    areas = rseq_areas(job.images)
    with job.restored(mode) as complete:
        complete()  # /proc shows no memory that is still to come
        assert sorted([job.pid, *descendants(job.pid)]) == sorted(pids)
        wait_quiet(pids)
        after = {pid: snapshot(pid) for pid in pids}
        assert len(after) == 5 + len(leaderless(criu))
        for pid in pids:
            for key, value in before[pid].items():
                if key == "auxv" and isinstance(criu, DumpedByUs):
                    continue  # it leaves out what lies past the 44 words that CRIU takes, AT_NULL included
                assert after[pid][key] == value, f"{key} of {pid}"
            if pid in contents:
                now = memory(pid, areas)
                assert now.keys() == contents[pid].keys()
                for where, data in contents[pid].items():
                    start = int(where.split("-")[0], 16)
                    expected = bytearray(data)
                    for area in areas:
                        if start <= area.start < start + len(data):
                            expected[area.start - start : area.stop - start] = bytes(len(area))
                    assert now[where] == expected, f"{where} of {pid}"
        for pid in sorted(pids, reverse=True):
            os.kill(pid, signal.SIGKILL)


def settled(path: Path) -> CoreEntry:
    """A core image without what moves on by itself."""
    core = images.read_one(path, Kind.CORE)
    if not core.HasField("thread_info"):
        return core
    for timer in (core.tc.timers.real, core.tc.timers.virt, core.tc.timers.prof):
        timer.vsec = timer.vusec = 0
    # The CPU notices on its own that a component is as it was at first.
    core.thread_info.fpregs.xsave.xstate_bv &= ~3
    core.tc.flags = 0  # PF_* bits: whether it has used privileges, whether it has forked and not executed
    return core


@pytest.mark.slow
def test_dumped_again(criu: Criu, tmp_path: Path) -> None:
    """What /proc does not show: handlers, masks, alternate stacks, timers, all registers, rseq, robust lists …"""
    folder = tmp_path / "work"
    folder.mkdir()
    job = Job([str(compiled(SOURCES / "state.c")), str(folder), *leaderless(criu)], tmp_path, criu)
    job.start((folder / "ready").exists)
    wait_quiet([job.pid, *descendants(job.pid)])
    job.dump("--file-locks")
    again = tmp_path / "again"
    again.mkdir()
    with job.restored("eager"):
        criu.dump(job.pid, again)
    cores = sorted(path.name for path in job.images.glob("core-*.img"))
    assert cores == sorted(path.name for path in again.glob("core-*.img"))
    for name in cores:
        assert str(settled(again / name)) == str(settled(job.images / name)), name
    for name in (path.name for path in job.images.glob("mm-*.img")):
        assert str(images.read_one(again / name, Kind.MM)) == str(images.read_one(job.images / name, Kind.MM))
    real = images.read_one(again / f"core-{job.pid}.img", Kind.CORE).tc.timers.real
    assert real.isec == 3000
    assert 4000 < real.vsec <= 5000
    assert [
        (entry.pid, entry.ppid, entry.pgid, entry.sid)
        for entry in images.read(again / "pstree.img", Kind.PSTREE)
    ] == [
        (entry.pid, entry.ppid, entry.pgid, entry.sid)
        for entry in images.read(job.images / "pstree.img", Kind.PSTREE)
    ]


@pytest.mark.slow
def test_another_user(criu: Criu, tmp_path: Path) -> None:
    """CRIU can't dump it without CAP_SYS_RESOURCE, so the image is changed to say so."""
    out = tmp_path / "out"
    job = Job([str(compiled(SOURCES / "counter.c", "-static")), str(out)], tmp_path, criu)
    job.start(lambda: lines(out) > 20)
    job.dump()
    path = job.images / f"core-{job.pid}.img"
    core = images.read_one(path, Kind.CORE)
    creds = core.thread_core.creds
    creds.uid, creds.euid, creds.suid, creds.fsuid = 2001, 2002, 2003, 2002
    creds.gid, creds.egid, creds.sgid, creds.fsgid = 3001, 3002, 3003, 3002
    creds.groups[:] = [5, 77]
    creds.cap_prm[:] = creds.cap_eff[:] = [1 << 10, 0]
    core.tc.oom_score_adj = 77
    images.write(path, Kind.CORE, [core])
    with job.restored("eager"):
        status = Path(f"/proc/{job.pid}/status").read_text()
        assert "\nUid:\t2001\t2002\t2003\t2002\n" in status
        assert "\nGid:\t3001\t3002\t3003\t3002\n" in status
        assert "\nGroups:\t5 77 \n" in status
        assert f"\nCapPrm:\t{1 << 10:016x}\nCapEff:\t{1 << 10:016x}\n" in status
        assert Path(f"/proc/{job.pid}/oom_score_adj").read_text() == "77\n"
        job.go()
        assert job.end() == 42
    assert lines(out) == 200


TERMINAL = """
    import sys, termios
    settings = termios.tcgetattr(0)
    settings[3] &= ~termios.ECHO
    termios.tcsetattr(0, termios.TCSANOW, settings)
    print("ready", flush=True)
    for line in sys.stdin:
        print("you said", line.strip(), flush=True)
        if line.strip() == "end": break
    print("echo is", bool(termios.tcgetattr(0)[3] & termios.ECHO), flush=True)
"""


@pytest.mark.loop("dumptool")
def test_shell_job(criu: Criu, tmp_path: Path) -> None:
    """A program on a terminal goes on on another one."""
    directory = tmp_path / "images"
    directory.mkdir()
    program = [sys.executable, "-c", textwrap.dedent(TERMINAL)]
    shell = ["/bin/sh", "-c", '"$0" "$@"; :', *program]
    with OnTerminal(shell) as terminal:
        terminal.wait_for("ready")
        (pid,) = descendants(terminal.process.pid)
        terminal.press(b"one\n")
        terminal.wait_for("you said one")
        criu.dump(pid, directory, "--shell-job")
    output = subprocess.run(
        [*RESTORE, "-D", str(directory), "-d"], capture_output=True, text=True, timeout=60, check=False
    )
    assert output.returncode == 1
    assert "--shell-job" in output.stderr
    restore = ["/bin/sh", "-c", '"$0" "$@"; echo exit $?', *RESTORE, "-D", str(directory), "--shell-job"]
    with OnTerminal(restore) as terminal:
        wait_for("the program to be back", Path(f"/proc/{pid}").exists)
        terminal.press(b"two\n")
        terminal.wait_for("you said two")
        terminal.press(b"end\n")
        terminal.wait_for("exit 0")
        assert "echo is False" in terminal.text()
