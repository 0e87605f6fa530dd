"""What `lazypages restore` refuses, what it says then, and that nothing half-made is left running."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from images_spec import images
from images_spec.images import Kind
from images_spec.messages import CoreEntry, FdType, FileEntry
from tests.real.test_restore import RESTORE
from tests.real.test_restore_programs import SOURCES, Job, lines
from tests.support.blocked import wait_for_faults
from tests.support.compiling import compiled
from tests.support.criu import Criu, all_criu
from tests.support.processes import descendants, nothing_left, reap
from tests.support.restore import SOCKET, criu_daemon


@pytest.fixture(scope="module")
def dumped(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The counter, in the middle of its work. Its images and its file are copied before they are damaged."""
    criu: Criu = all_criu()[0].values[0]  # type: ignore[assignment]
    folder = tmp_path_factory.mktemp("dumped")
    job = Job([str(compiled(SOURCES / "counter.c", "-static")), str(folder / "out")], folder, criu)
    with nothing_left():
        job.start(lambda: lines(folder / "out") > 20)
        job.dump()
    return job


@pytest.fixture(autouse=True)
def _cleanup(dumped: Job) -> Iterator[None]:
    with nothing_left():
        yield


@pytest.fixture
def job(dumped: Job, tmp_path: Path) -> Job:
    """The same with images of its own."""
    shutil.copytree(dumped.images, tmp_path / "images")
    return Job(dumped.command, tmp_path, dumped.criu, dumped.pid)


def refuse(job: Job, *options: str) -> str:
    """The restore must fail with one line that is not a traceback, and leave nothing."""
    before = descendants()
    command = [*RESTORE, "-D", str(job.images), "-d", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, done
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("lazypages")
    assert not Path(f"/proc/{job.pid}").exists()
    assert descendants().keys() <= before.keys()
    return done.stderr


def change(job: Job, kind: Kind, change_it: Callable[..., None], ident: int | None = None) -> None:  # type: ignore[type-arg]
    path = job.images / kind.file_name(ident)
    messages = images.read(path, kind)
    for message in messages:
        change_it(message)
    images.write(path, kind, messages)


@pytest.mark.slow
def test_pid_in_use(job: Job) -> None:
    last = Path("/proc/sys/kernel/ns_last_pid")
    with nothing_left():
        for _ in range(20):
            last.write_text(str(job.pid - 1))
            other = subprocess.Popen(["sleep", "60"])
            if other.pid == job.pid:
                break
            other.kill()
            other.wait()
        assert other.pid == job.pid
        done = subprocess.run(
            [*RESTORE, "-D", str(job.images), "-d"], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 1
        assert f"task {job.pid}: this pid is in use" in done.stderr
        assert other.poll() is None
        other.kill()
        other.wait()


def test_missing_and_changed_files(job: Job, dumped: Job) -> None:
    out = dumped.folder / "out"
    os.rename(out, job.folder / "out")
    assert f"{out}: No such file or directory" in refuse(job)
    shutil.copyfile(job.folder / "out", out)
    out.chmod(0o600)
    assert "mode is 0o100600, but was 0o100644" in refuse(job)
    out.unlink()
    os.rename(job.folder / "out", out)
    program = Path(dumped.command[0])
    original = program.read_bytes()
    try:
        with program.open("ab") as file:
            file.write(b"more")
        text = refuse(job)
        assert f"{program}: has {len(original) + 4} bytes, but had {len(original)}" in text
    finally:
        program.write_bytes(original)


@pytest.mark.parametrize(
    "name", ["core-{}.img", "mm-{}.img", "pagemap-{}.img", "pstree.img", "inventory.img", "files.img"]
)
def test_truncated_and_missing_images(name: str, job: Job) -> None:
    path = job.images / name.format(job.pid)
    os.truncate(path, path.stat().st_size - 2)
    assert path.name in refuse(job)
    path.unlink()
    assert f"{path.name}: no such image" in refuse(job)


def test_short_pages(job: Job) -> None:
    (path,) = job.images.glob("pages-*.img")
    os.truncate(path, path.stat().st_size - 4096)
    assert path.name in refuse(job)


def test_no_daemon(job: Job) -> None:
    assert "no daemon listens" in refuse(job, "--lazy-pages")
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(job.images / SOCKET))
    assert "no daemon listens" in refuse(job, "--lazy-pages")


def test_daemon_that_goes_away(job: Job) -> None:
    """Its end closes the uffd it has, which would fill the task with zeros: the task must not live."""
    with socket.socket(socket.AF_UNIX) as daemon:
        daemon.bind(str(job.images / SOCKET))
        daemon.listen()
        command = [*RESTORE, "-D", str(job.images), "-d", "--lazy-pages"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as restore:
            connection, _ = daemon.accept()
            connection.recv(4)
            data, fds, *_ = socket.recv_fds(connection, 1, 1)
            assert data == b"\0"
            connection.close()
            os.close(fds[0])
            _, said = restore.communicate(timeout=60)
        assert restore.returncode == 1
        assert "report to the daemon that all is restored (has it exited?): Broken pipe" in said
        assert not Path(f"/proc/{job.pid}").exists()


def test_credentials_name_the_task(job: Job) -> None:
    """A daemon that asks for them (SO_PASSCRED) learns the task's pid; killed restorers take the task along."""
    with socket.socket(socket.AF_UNIX) as daemon:
        daemon.bind(str(job.images / SOCKET))
        daemon.listen()
        daemon.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        command = [*RESTORE, "-D", str(job.images), "-d", "--lazy-pages"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as restore:
            connection, _ = daemon.accept()
            data, ancillary, *_ = connection.recvmsg(4, 256)
            assert int.from_bytes(data, "little") == job.pid
            ((_, kind, credentials),) = [part for part in ancillary if part[1] == socket.SCM_CREDENTIALS]
            assert kind == socket.SCM_CREDENTIALS
            assert int.from_bytes(credentials[:4], "little") == job.pid
            wait_for_faults(job.pid)  # nobody answers them
            restore.send_signal(signal.SIGTERM)
            _, said = restore.communicate(timeout=60)
        assert restore.returncode == 1
        assert "ended by signal 15" in said
        assert not Path(f"/proc/{job.pid}").exists()
        connection.close()


def test_killed_in_the_middle(job: Job) -> None:
    """SIGKILL leaves the restorer no time to clean up; the kernel does it (PTRACE_O_EXITKILL)."""
    with nothing_left(), socket.socket(socket.AF_UNIX) as daemon:
        daemon.bind(str(job.images / SOCKET))
        daemon.listen()
        command = [*RESTORE, "-D", str(job.images), "-d", "--lazy-pages"]
        with subprocess.Popen(command) as restore:
            connection, _ = daemon.accept()
            _, fds, *_ = socket.recv_fds(connection, 5, 1)
            assert Path(f"/proc/{job.pid}").exists()
            restore.kill()
            restore.wait()
        # We are the subreaper, and wait for it.
        assert os.waitstatus_to_exitcode(reap(job.pid)) == -signal.SIGKILL
        for fd in fds:
            os.close(fd)
        connection.close()


def too_small_a_stack(core: CoreEntry) -> None:
    core.thread_core.sas.ss_flags, core.thread_core.sas.ss_size = 0, 1


def test_what_fails_half_way(job: Job) -> None:
    """A system call that fails: which step of which task, and why."""
    change(job, Kind.CORE, too_small_a_stack, job.pid)
    text = refuse(job)
    assert f"task {job.pid}: set the alternate signal stack: Cannot allocate memory" in text


def test_hard_limits(job: Job) -> None:
    def raise_it(core: object) -> None:
        core.tc.rlimits.rlimits[7].max = 1 << 40  # type: ignore[attr-defined]

    change(job, Kind.CORE, raise_it, job.pid)
    assert "hard limit RLIMIT_NOFILE" in refuse(job)


def test_other_kernel(job: Job) -> None:
    """One byte of the vdso is enough; so is its size."""
    pagemap = images.read(job.images / f"pagemap-{job.pid}.img", Kind.PAGEMAP)
    mm = images.read_one(job.images / f"mm-{job.pid}.img", Kind.MM)
    (vdso,) = (vma for vma in mm.vmas if vma.status & 8)
    place = 0
    for entry in pagemap[1:]:
        if entry.vaddr == vdso.start:
            break
        place += (entry.nr_pages or entry.compat_nr_pages) * 4096
    (path,) = job.images.glob("pages-*.img")
    data = bytearray(path.read_bytes())
    data[place + 100] ^= 1
    path.write_bytes(data)
    assert "not this kernel's" in refuse(job)

    def grow(mm: object) -> None:
        for vma in mm.vmas:  # type: ignore[attr-defined]
            if vma.status & 8:
                vma.end += 4096

    change(job, Kind.MM, grow, job.pid)
    assert "it was dumped under another kernel" in refuse(job)


SOCKETS = [
    (FdType.FD_UNIXSK, "a unix socket"),
    (FdType.FD_INETSK, "an internet socket"),
    (FdType.FD_EVENTPOLL, "an epoll descriptor"),
]


@pytest.mark.parametrize(("kind", "name"), SOCKETS)
def test_kinds_of_files(kind: int, name: str, job: Job) -> None:
    path = job.images / "files.img"
    entries = [
        FileEntry(type=kind, id=entry.id) if entry.reg.name == b"/dev/null" else entry
        for entry in images.read(path, Kind.FILES)
    ]
    images.write(path, Kind.FILES, entries)
    assert f"task {job.pid}, fd 0: is {name}, which can't be restored" in refuse(job)


def test_namespaces(job: Job) -> None:
    change(job, Kind.IDS, lambda ids: setattr(ids, "net_ns_id", 99), job.pid)
    core = images.read_one(job.images / f"core-{job.pid}.img", Kind.CORE)
    if core.HasField("ids"):
        core.ids.net_ns_id = 99
        images.write(job.images / f"core-{job.pid}.img", Kind.CORE, [core])
    assert "net namespace of its own" in refuse(job)


def test_pidfile_that_is_there(job: Job) -> None:
    (job.images / "pid").touch()
    assert "--pidfile" in refuse(job, "--pidfile", "pid")
    assert "the directory" in refuse(job, "--pidfile", "no/pid")


@pytest.mark.slow
def test_restored_many_times(job: Job, dumped: Job) -> None:
    out = dumped.folder / "out"
    at_dump = out.read_bytes()
    dumped.go()
    for _ in range(3):
        out.write_bytes(at_dump)
        done = subprocess.run([*RESTORE, "-D", str(job.images)], timeout=60, check=False)
        assert done.returncode == 42
        assert lines(out) == 200
    out.write_bytes(at_dump)


def test_criu_daemon_sees_a_failed_restore(job: Job) -> None:
    """It must not wait for ever for tasks that never come."""
    change(job, Kind.CORE, too_small_a_stack, job.pid)
    with criu_daemon(job.criu).start(job.images, job.images) as server:
        server.wait_ready()
        refuse(job, "--lazy-pages")
        assert server.wait() != 0
