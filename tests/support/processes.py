"""Start, watch and end the processes of a test, by pid and with time-outs; nothing outlives its test.

The test process makes itself a *child subreaper* (prctl(2), PR_SET_CHILD_SUBREAPER), so that what
`criu restore -d` or a daemon leaves behind becomes its child: it can be waited for, has an exit status,
and can be found and ended without ever looking at a process that somebody else started.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

PR_SET_CHILD_SUBREAPER = 36
LOG_TAIL = 6000  # characters of each log that a failure shows


def become_subreaper() -> None:
    """Have orphans among our descendants become our own children. Not inherited by children."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def _stat(pid: int) -> tuple[str, int] | None:
    """State letter and parent pid of a process; None when there is none (proc_pid_stat(5))."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, ppid = text[text.rindex(")") + 2 :].split()[:2]
    return state, int(ppid)


def descendants(root: int | None = None) -> dict[int, str]:
    """All processes below `root` (default: this one): pid -> state letter, zombies ("Z") included."""
    table = {int(name): _stat(int(name)) for name in os.listdir("/proc") if name.isdigit()}
    children: dict[int, list[int]] = {}
    for pid, stat in table.items():
        if stat is not None:
            children.setdefault(stat[1], []).append(pid)
    found: dict[int, str] = {}
    todo = [os.getpid() if root is None else root]
    while todo:
        for child in children.get(todo.pop(), ()):
            stat = table[child]
            assert stat is not None
            found[child] = stat[0]
            todo.append(child)
    return found


def name_of(pid: int) -> str:
    """Its program's name (proc_pid_comm(5)), "" if it is gone."""
    try:
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").rstrip("\n")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def describe(pid: int) -> str:
    """One line about a process, for messages."""
    try:
        command = (
            Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        )
    except OSError:
        command = "?"
    stat = _stat(pid)
    return f"{pid} [{stat[0] if stat else 'gone'}] {command[:160]}"


def reap(pid: int, timeout: float = 30) -> int:
    """Wait for our child `pid` to end; its wait status (see os.waitstatus_to_exitcode)."""
    deadline = time.monotonic() + timeout
    pause = 0.001
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        if time.monotonic() > deadline:
            pytest.fail(f"no end of {describe(pid)} in {timeout:g} s")
        time.sleep(pause)
        pause = min(pause * 2, 0.05)


def end(pids: Sequence[int], timeout: float = 30) -> None:
    """SIGKILL these descendants of ours, and whatever they leave, until none is there any more."""
    deadline = time.monotonic() + timeout
    left = set(pids)
    while True:
        alive = descendants()
        left &= alive.keys()
        for pid in tuple(left):
            left.update(descendants(pid))
        if not left:
            return
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in left:
            with suppress(ChildProcessError):  # not (yet) our own child
                os.waitpid(pid, os.WNOHANG)
        if time.monotonic() > deadline:
            pytest.fail("could not end: " + "; ".join(describe(pid) for pid in sorted(left)))
        time.sleep(0.005)


_started: list[subprocess.Popen[bytes]] = []


def start(
    command: Sequence[str | Path], *, output: Path | None = None, **options: Any
) -> subprocess.Popen[bytes]:
    """A program in a session of its own, for the block of `nothing_left` that it is in.

    What it says goes to `output`, else nowhere. `options`: of subprocess.Popen. Its pid may be waited for by others.
    """
    with (output or Path(os.devnull)).open("wb") as stream:
        process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
            **options,
        )
    _started.append(process)
    return process


def start_as(pid: int) -> None:
    """A process with this pid, which is free, that does nothing (clone3(2), set_tid). It ends with us."""
    libc = ctypes.PyDLL(
        None, use_errno=True
    )  # does not let go of the interpreter's lock, which the child needs
    pids = (ctypes.c_int32 * 1)(pid)
    arguments = (ctypes.c_uint64 * 11)(0, 0, 0, 0, signal.SIGCHLD, 0, 0, 0, ctypes.addressof(pids), 1, 0)
    started = libc.syscall(435, arguments, ctypes.sizeof(arguments))
    if not started:
        libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        os.execv("/bin/sleep", ["sleep", "infinity"])
    assert started == pid, os.strerror(ctypes.get_errno())


@contextmanager
def nothing_left() -> Iterator[None]:
    """End on the way out every descendant of ours that was not there on the way in."""
    before, started = descendants(), len(_started)
    try:
        yield
    finally:
        while new := [pid for pid in descendants() if pid not in before]:
            end(new)  # and then a child that one of them has just had
        for process in _started[started:]:
            process.poll()  # so that it knows of its end, and is not warned of in some later test
        del _started[started:]


def wait_for(what: str, ready: Callable[[], object], timeout: float = 30) -> None:
    """Poll until `ready()` is true; fail the test naming `what` otherwise."""
    deadline = time.monotonic() + timeout
    while not ready():
        if time.monotonic() > deadline:
            pytest.fail(f"waited {timeout:g} s for {what}")
        time.sleep(0.002)


def tail(path: Path) -> str:
    """The end of a log, with its name, for a failure message."""
    try:
        text = path.read_text(errors="replace")
    except OSError as error:
        return f"--- {path}: {error.strerror}\n"
    return f"--- {path} (the last {min(len(text), LOG_TAIL)} of {len(text)} characters)\n{text[-LOG_TAIL:]}\n"


class Server:
    """A daemon that says on `--status-fd` when it is ready: one 0 byte. Use it as a context manager.

    The command is started with `--status-fd N` added. Its standard output and error go to `output`.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        output: Path,
        logs: Sequence[Path] = (),
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        pass_fds: Sequence[int] = (),
    ) -> None:
        self._output, self._logs = output, logs
        self._status, status = os.pipe()
        try:
            with output.open("wb") as stream:
                self.process = subprocess.Popen(
                    [*command, "--status-fd", str(status)],
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=stream,
                    pass_fds=[status, *pass_fds],
                    env=dict(env) if env is not None else None,
                    cwd=cwd,
                )
        except BaseException:
            os.close(self._status)
            raise
        finally:
            os.close(status)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._status)
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if error is not None:
            error.add_note(self.story())

    @property
    def pid(self) -> int:
        return self.process.pid

    def story(self) -> str:
        """What it printed and logged, for a failure message."""
        state = f"--- {self.process.args!r}: exit {self.process.poll()}\n"
        return state + "".join(tail(path) for path in (self._output, *self._logs))

    def wait_ready(self, timeout: float = 30) -> None:
        """Until the ready byte is there; fails the test when it ends or stays silent instead."""
        readable, _, _ = select.select([self._status], [], [], timeout)
        answer = os.read(self._status, 16) if readable else None
        if answer != b"\0":
            what = (
                "no ready byte"
                if answer is None
                else f"{answer!r} on the status fd, exit {self.process.poll()}"
            )
            pytest.fail(f"{self.process.args!r}: {what}\n{self.story()}")

    def ready_bytes(self) -> bytes:
        """What it had to say on the status fd, once it (and whoever shares the fd) has closed it."""
        return os.read(self._status, 16)

    def wait(self, timeout: float = 60) -> int:
        """Its exit code, negative signal number when a signal ended it."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            pytest.fail(f"{self.process.args!r} still runs after {timeout:g} s\n{self.story()}")

    def signal(self, number: int) -> None:
        """Send it a signal."""
        self.process.send_signal(number)
