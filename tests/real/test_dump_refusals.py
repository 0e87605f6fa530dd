"""What dumptool can't save it names, by pid, descriptor and kind, and leaves the tasks alone."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest

from dumptool import proc, saveable
from dumptool.dump import Settings, Watcher, dump
from dumptool.errors import DumpError, UnsupportedError
from tests.support.dumptool import is_unharmed, run, task
from tests.support.guards import has_guards
from tests.support.processes import nothing_left, wait_for

SETUP = (
    "import ctypes, mmap, os, select, socket, sys, time, signal; libc = ctypes.CDLL(None, use_errno=True); "
)
READY = "; print('ready', flush=True); time.sleep(1000)"

REFUSED = {
    "unix socket": ("s = socket.socket(socket.AF_UNIX)", r"fd \d+: socket:\[\d+\] is a socket"),
    "tcp socket": ("s = socket.create_server(('127.0.0.1', 0))", r"fd \d+: socket:\[\d+\] is a socket"),
    "epoll": ("e = select.epoll()", r"fd \d+: anon_inode:\[eventpoll\]"),
    "eventfd": ("e = os.eventfd(0)", r"fd \d+: anon_inode:\[eventfd\]"),
    "signalfd": (
        "m = (ctypes.c_uint64 * 16)(1); s = libc.signalfd(-1, m, 0); assert s >= 0",
        r"fd \d+: anon_inode:\[signalfd\]",
    ),
    "timerfd": ("t = libc.timerfd_create(1, 0); assert t >= 0", r"fd \d+: anon_inode:\[timerfd\]"),
    "inotify": ("i = libc.inotify_init1(0); assert i >= 0", r"fd \d+: anon_inode:inotify"),
    "deadline": (
        "a = (ctypes.c_uint64 * 6)(6 << 32 | 48, 0, 0, 10**7, 10**9, 10**9); "
        "assert libc.syscall(314, 0, a, 0) == 0, ctypes.get_errno()",
        r"thread \d+ has a deadline",
    ),
    "huge pages": (  # reserved by nobody: mapped, though the kernel may have none
        "libc.mmap.restype = ctypes.c_void_p; a = libc.mmap(None, ctypes.c_size_t(2 << 20), 3, 0x44022, -1, "
        "ctypes.c_long(0)); assert a != ctypes.c_void_p(-1).value, ctypes.get_errno()",
        r"mapping [0-9a-f]+-[0-9a-f]+: has huge pages \(hugetlb\)",
    ),
    "timer of a thread": (
        "import threading; threading.Thread(target=time.sleep, args=[1000], daemon=True).start(); "
        "t = ctypes.c_int(); assert libc.timer_create(3, None, ctypes.byref(t)) == 0",
        r"timer 0 uses the CPU time of one of the threads",
    ),
    "memfd": ("m = os.memfd_create('x')", r"fd \d+: /memfd:x \(deleted\) is a memfd"),
    "mapped memfd": (
        "m = os.memfd_create('x'); os.truncate(m, 4096); a = mmap.mmap(m, 4096); os.close(m)",
        r"mapping [0-9a-f]+-[0-9a-f]+: is a memfd",
    ),
    "io_uring": ("u = libc.syscall(425, 4, bytes(120)); assert u >= 0", r"fd \d+: anon_inode:\[io_uring\]"),
    "userfaultfd": ("u = libc.syscall(323, 0); assert u >= 0", r"fd \d+: anon_inode:\[userfaultfd\]"),
    "pidfd": ("p = os.pidfd_open(os.getpid())", r"fd \d+: .*pidfd.* is not saved"),
    "fifo": ("os.mkfifo('fifo'); f = os.open('fifo', os.O_RDWR)", r"fd \d+: .*fifo is a named pipe"),
    "deleted file": (
        "f = open('file', 'w'); os.unlink('file')",
        r"fd \d+: .*file \(deleted\) can't be found under this name",
    ),
    "renamed file": (
        "f = open('file', 'w'); os.rename('file', 'g'); open('file', 'w')",
        None,
    ),
    "lock": (
        "import fcntl; f = open('file', 'w'); fcntl.flock(f, fcntl.LOCK_EX)",
        r"fd \d+: a lock is held on .*file: allow it with --file-locks",
    ),
    "shared memory": (
        "i = libc.shmget(0, 4096, 0o1600); libc.shmat.restype = ctypes.c_void_p; "
        "a = libc.shmat(i, None, 0); libc.shmctl(i, 0, None)",
        r"mapping [0-9a-f]+-[0-9a-f]+: is System V shared memory",
    ),
    "device": ("f = open('/dev/ptmx', 'rb+', buffering=0)", r"fd \d+: /dev/(pts/)?ptmx is a device"),
    "namespace": ("assert libc.unshare(0x04000000) == 0", r"is in a namespace of its own \(uts:\[\d+\]\)"),
    "chroot": ("os.mkdir('root'); os.chroot('root')", r"has another root directory \(chroot\): .*/root"),
    "seccomp": (
        "libc.prctl(38, 1, 0, 0, 0); f = (ctypes.c_uint64 * 1)(0x7fff000000000006); "
        "p = (ctypes.c_uint64 * 2)(1, ctypes.addressof(f)); "
        "assert libc.prctl(22, 2, p, 0, 0) == 0",
        r"thread \d+ is under seccomp",
    ),
}


@pytest.mark.loop("timerfd")
@pytest.mark.parametrize("what", [name for name, (_, reason) in REFUSED.items() if reason])
def test_named_and_left_alone(what: str, tmp_path: Path) -> None:
    code, reason = REFUSED[what]
    assert reason
    output = tmp_path / "output"
    with task(sys.executable, "-c", SETUP + code + READY, cwd=tmp_path, output=output) as pid:
        wait_for("the program", lambda: "\n" in output.read_text())
        assert output.read_text() == "ready\n"
        with pytest.raises(UnsupportedError, match=reason) as caught:
            dump(Settings(pid, tmp_path / "images"), Watcher())
        assert all(refusal.pid == pid for refusal in caught.value.refusals)
        assert not (tmp_path / "images").exists()
        is_unharmed(pid)


def test_strict_seccomp(tmp_path: Path) -> None:
    """Nothing but read, write and exit is left to it, so it says that it is ready before."""
    output = tmp_path / "output"
    code = "r, w = os.pipe(); print('ready', flush=True); libc.prctl(22, 1, 0, 0, 0); os.read(r, 1)"
    with task(sys.executable, "-c", SETUP + code, output=output) as pid:
        status = Path(f"/proc/{pid}/status")
        wait_for("the program", lambda: "\nSeccomp:\t1\n" in status.read_text())
        result = run("dump", "-t", pid, "-D", tmp_path / "images")
        assert result.stderr.endswith(f"pid {pid}: thread {pid} is under seccomp, which is not saved\n")
        assert result.returncode == 1
        is_unharmed(pid)


@pytest.mark.loop("True-dump")
@pytest.mark.parametrize("command", ["dump", "pre-dump"])
@pytest.mark.parametrize("thread", [False, True])
def test_syscall_user_dispatch(command: str, thread: bool, tmp_path: Path) -> None:
    """Whatever system call the thread makes is a SIGSYS instead, which ends it; so also one that is injected."""
    code = (
        "import threading; selector = ctypes.c_char(b'\\1'); prctl = ctypes.PyDLL(None).prctl\n"
        "f = os.open('on', os.O_RDWR | os.O_CREAT); os.truncate(f, 1); on = mmap.mmap(f, 1)\n"
        "def spin():\n"
        "    failed = prctl(59, 1, 0, 0, ctypes.byref(selector)); on[0] = 2 if failed else 1\n"
        "    while True: pass\n"
    )
    begin = "threading.Thread(target=spin).start(); time.sleep(1000)" if thread else "spin()"
    if thread:  # the other one must not ask for the GIL, or there would be system calls
        code += "sys.setswitchinterval(1000)\n"
    output, on = tmp_path / "output", tmp_path / "on"
    with task(sys.executable, "-c", SETUP + code + begin, cwd=tmp_path, output=output) as pid:
        wait_for("the program", lambda: on.exists() and on.read_bytes().strip(b"\0"))
        assert on.read_bytes() == b"\1"
        result = run(command, "-t", pid, "-D", tmp_path / "images")
        (tid,) = [tid for tid in map(int, os.listdir(f"/proc/{pid}/task")) if (tid != pid) == thread]
        assert result.stderr == (
            f"dumptool: can't be dumped: pid {pid}: thread {tid} has its system calls dispatched to itself "
            "(PR_SET_SYSCALL_USER_DISPATCH), which is not saved\n"
        )
        assert result.returncode == 1
        is_unharmed(pid)


@pytest.mark.parametrize(("flag", "reason"), [("ss", "a shadow stack"), ("ht", "huge pages")])
def test_mappings_that_few_machines_have(flag: str, reason: str) -> None:
    """Shadow stacks need a CPU and a kernel with them."""
    vma = proc.parse_maps_line("7f0000000000-7f0000001000 rw-p 00000000 00:00 0\n")
    message = saveable.unsupported_mapping(os.getpid(), vma, frozenset({"rd", flag}))
    assert message
    assert reason in message


REDIS = shutil.which("redis-server") or "/usr/bin/redis-server"


def ask(address: Path, request: bytes) -> bytes:
    """One answer of redis (its protocol: a line per simple answer)."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(30)
        connection.connect(str(address))
        connection.sendall(request + b"\r\n")
        return connection.makefile("rb").readline()


def test_redis(tmp_path: Path) -> None:
    """A server has its socket: refused by pid, fd and kind before it is stopped, and it answers on."""
    address, config = tmp_path / "redis.sock", tmp_path / "redis.conf"
    config.write_text(
        f"port 0\nunixsocket {address}\ndir {tmp_path}\nsave ''\ndaemonize no\n".replace("''", '""')
    )
    with task(REDIS, config, cwd=tmp_path, output=tmp_path / "output") as pid:
        wait_for("redis to listen", address.exists)
        wait_for("redis to answer", lambda: _answers(address))
        assert ask(address, b"SET before dump") == b"+OK\r\n"
        result = run("dump", "-t", pid, "-D", tmp_path / "images")
        assert result.returncode == 1
        fds = sorted(map(int, os.listdir(f"/proc/{pid}/fd")))
        sockets = [fd for fd in fds if "socket:" in os.readlink(f"/proc/{pid}/fd/{fd}")]
        assert sockets
        *others, of_sockets = sorted(result.stderr.splitlines(), key=lambda line: "socket:" in line)
        assert re.fullmatch(
            rf"dumptool: can't be dumped: pid {pid} fd {sockets[0]}: socket:\[\d+\] is a socket; dumptool saves none, "
            r"use `criu dump`.*",
            of_sockets,
        )
        assert all(re.search(rf"\bfd {fd}\b", of_sockets) for fd in sockets)
        assert not any("socket:" in line for line in others)
        assert any("anon_inode:[eventpoll] is not saved; use `criu dump`" in line for line in others)
        assert not (tmp_path / "images").exists()
        assert "\nTracerPid:\t0\n" in Path(f"/proc/{pid}/status").read_text()
        assert ask(address, b"GET before") == b"$4\r\n"
        assert ask(address, b"INCR after") == b":1\r\n"


def _answers(address: Path) -> bool:
    with suppress(OSError):
        return ask(address, b"PING") == b"+PONG\r\n"
    return False


def test_every_kind_of_reason_is_one_line(tmp_path: Path) -> None:
    """Ten sockets of two processes, and two other descriptors, as a server has them."""
    output, images = tmp_path / "output", tmp_path / "images"
    code = (
        "s = [socket.socket() for _ in range(5)]; e = os.eventfd(0); p = select.epoll(); r, w = os.pipe(); "
        "child = os.fork() or os.read(r, 1)"
    )
    with task(sys.executable, "-c", SETUP + code + READY, output=output) as pid:
        wait_for("the program", lambda: "\n" in output.read_text())
        result = run("dump", "-t", pid, "-D", images, "-o", "log", "-v3")
        child = Path(f"/proc/{pid}/task/{pid}/children").read_text().strip()
        is_unharmed(pid)
    assert result.returncode == 1
    eventfd, epoll, sockets = sorted(
        result.stderr.splitlines(), key=lambda line: line.partition("fd ")[2][2:]
    )
    prefix = f"dumptool: can't be dumped: pid {pid} fd"
    assert sockets.startswith(f"{prefix} 3: socket:[")
    assert sockets.endswith(
        "is a socket; dumptool saves none, use `criu dump` "
        f"(9 more of this kind: fd 4, fd 5, fd 6, fd 7, pid {child} fd 3, fd 4, fd 5, fd 6, ...)"
    )
    for line, fd, name in ((eventfd, 8, "eventfd"), (epoll, 9, "eventpoll")):
        assert line == (
            f"{prefix} {fd}: anon_inode:[{name}] is not saved; use `criu dump` "
            f"(1 more of this kind: pid {child} fd {fd})"
        )
    assert (images / "log").read_text().count("is a socket") == 11  # all of them, and the line


def test_what_comes_up_after_the_first_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second look, at the frozen tree, refuses too, and the tree goes on."""
    output = tmp_path / "output"
    code = "signal.signal(signal.SIGUSR1, lambda *_: (os.eventfd(0), print('made', flush=True)))"
    look = saveable.check
    with task(sys.executable, "-c", SETUP + code + READY, output=output) as pid:
        wait_for("the program", lambda: "\n" in output.read_text())

        def check_and_change(*arguments: Any, **options: bool) -> None:
            look(*arguments, **options)
            if "made" not in output.read_text():
                os.kill(pid, signal.SIGUSR1)
                wait_for("the eventfd", lambda: "made" in output.read_text())

        monkeypatch.setattr(saveable, "check", check_and_change)
        with pytest.raises(UnsupportedError, match="eventfd"):
            dump(Settings(pid, tmp_path / "images"), Watcher())
        is_unharmed(pid)
        assert not (tmp_path / "images" / "inventory.img").exists()


def test_guard_regions_in_locked_memory(tmp_path: Path) -> None:
    """The kernel installs none there: they came before the lock. Others are dumped: test_guards.py."""
    output = tmp_path / "output"
    code = (
        "m = mmap.mmap(-1, 65536, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS); m.write(bytes(65536)); "
        "a = ctypes.addressof(ctypes.c_char.from_buffer(m)); "
        "had = libc.madvise(ctypes.c_void_p(a + 4096), 4096, 102) == 0; "
        "assert libc.mlock2(ctypes.c_void_p(a), 65536, 1) == 0; "
        f"assert had == {has_guards()}"
    )
    with task(sys.executable, "-c", SETUP + code + READY, cwd=tmp_path, output=output) as pid:
        wait_for("the program", lambda: "\n" in output.read_text())
        assert output.read_text() == "ready\n"
        with pytest.raises(DumpError, match="locked memory") if has_guards() else nullcontext():
            dump(Settings(pid, tmp_path / "images", leave_running=True), Watcher())
        is_unharmed(pid)


def test_a_traced_task(tmp_path: Path) -> None:
    tracer = (
        "import ctypes, os, sys, time; libc = ctypes.CDLL(None); "
        "assert libc.ptrace(0x4206, int(sys.argv[1]), None, None) == 0; "
        "print('ready', flush=True); time.sleep(1000)"
    )
    with nothing_left(), task("/bin/sleep", "1000") as pid:
        debugger = subprocess.Popen([sys.executable, "-c", tracer, str(pid)], stdout=subprocess.PIPE)
        try:
            assert debugger.stdout
            assert debugger.stdout.readline() == b"ready\n"
            result = run("dump", "-t", pid, "-D", tmp_path / "images")
        finally:
            debugger.kill()
            debugger.communicate(timeout=30)
    assert result.returncode == 1
    assert result.stderr == (
        f"dumptool: can't be dumped: pid {pid}: thread {pid} is traced by pid {debugger.pid} "
        "(a debugger or strace): end that\n"
    )


def test_a_pipe_that_leads_out_of_the_tree(tmp_path: Path) -> None:
    with nothing_left():
        process = subprocess.Popen(
            ["/bin/sleep", "1000"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True
        )
        try:
            result = run("dump", "-t", process.pid, "-D", tmp_path / "images")
        finally:
            process.kill()
            process.communicate(timeout=30)
    assert result.returncode == 1
    assert "fd 1: pipe:[" in result.stderr
    assert f"leads out of the tree, to pid {os.getpid()}" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["-t", "4194300"], "pid 4194300: no such process"),
        (["-t", "2"], "pid 2: "),
    ],
)
def test_no_such_task(arguments: list[str], reason: str, tmp_path: Path) -> None:
    result = run("dump", *arguments, "-D", tmp_path / "images")
    assert result.returncode == 1
    assert result.stderr.startswith(f"dumptool: {reason}")
    assert len(result.stderr.splitlines()) == 1


def test_a_parent_that_is_none(tmp_path: Path) -> None:
    with task("/bin/sleep", "1000") as pid:
        result = run("dump", "-t", pid, "-D", tmp_path / "images", "--prev-images-dir", "../nowhere")
        assert result.returncode == 1
        assert "nowhere" in result.stderr
        (tmp_path / "empty").mkdir()
        result = run("dump", "-t", pid, "-D", tmp_path / "images", "--prev-images-dir", "../empty")
        assert result.returncode == 1
        assert "inventory.img" in result.stderr
        is_unharmed(pid)
