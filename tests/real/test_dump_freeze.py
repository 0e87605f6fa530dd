"""Trees that change while they are being stopped: all of it is stopped in the end, or none, and nobody is harmed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from dumptool import freeze, tracee
from dumptool.dump import Settings, Watcher, dump
from dumptool.errors import DumpError, TaskGoneError
from dumptool.proc import layout
from dumptool.tracee import Gadgets, session
from tests.support.dumptool import is_unharmed, task
from tests.support.processes import descendants, name_of, nothing_left, reap, start, wait_for

# Sets threads up, and one of them calls execve: the same all over again, in a few milliseconds.
EXECS = r"""
#include <pthread.h>
#include <time.h>
#include <unistd.h>

static char **arguments;

static void pause_for(long nanoseconds)
{
    const struct timespec pause = {.tv_nsec = nanoseconds};

    nanosleep(&pause, NULL);
}

static void *rest(void *unused)
{
    for (;;)
        pause_for(100000);
    return unused;
}

static void *again(void *unused)
{
    pause_for(3000000);
    if (write(1, "x", 1) == 1)
        execv("/proc/self/exe", arguments);
    return unused;
}

int main(int argc, char **argv)
{
    pthread_t thread;

    arguments = argv;
    for (int i = 0; i < 20 + 0 * argc; i++)
        pthread_create(&thread, NULL, rest, NULL);
    pthread_create(&thread, NULL, again, NULL);
    for (;;)
        pause();
}
"""

# Says where its stack ends, with the stack pointer right there, and waits for a byte; then checks what it had there.
AT_THE_EDGE = r"""
#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* As deep as the stack is mapped: the next page below is not there yet. */
static int deeper(const char *bottom)
{
    char here[256], byte;

    memset(here, 7, sizeof(here));
    if (here - 2000 > bottom)
        return deeper(bottom) | (here[100] != 7);
    if (write(1, "ready\n", 6) != 6 || read(0, &byte, 1) != 1)
        return 1;
    return here[100] != 7;
}

int main(void)
{
    char line[256];
    char *start = NULL;
    FILE *maps = fopen("/proc/self/maps", "r");

    while (fgets(line, sizeof(line), maps))
        if (strstr(line, "[stack]"))
            sscanf(line, "%p-", (void **)&start);
    fclose(maps);
    return start ? deeper(start) : 2;
}
"""


def compiled(source: str, folder: Path) -> Path:
    (folder / "program.c").write_text(source)
    command = [
        "gcc",
        "-std=gnu11",
        "-O1",
        "-static",
        "-pthread",
        "-o",
        folder / "program",
        folder / "program.c",
    ]
    subprocess.run(command, check=True, timeout=60)
    return folder / "program"


def state(tid: int) -> str:
    return Path(f"/proc/{tid}/stat").read_text().rpartition(") ")[2][0]


def stands(tree: freeze.FrozenTree) -> bool:
    """Whether all threads that there are stand still."""
    return all(
        sorted(map(int, os.listdir(f"/proc/{process.pid}/task"))) == sorted(process.threads)
        and all(state(tid) == "t" for tid in process.threads)
        for process in tree.alive
    )


@pytest.mark.slow
def test_threads_that_end_in_execve(tmp_path: Path) -> None:
    """Whoever calls it waits for the end of the other threads, which whoever traces them has to wait for."""
    program, output, chance = compiled(EXECS, tmp_path), tmp_path / "output", random.Random(11)
    with task(program, output=output) as pid:
        for _ in range(200):
            time.sleep(chance.random() * 0.005)
            with freeze.freeze(pid) as tree:
                assert stands(tree)
        so_far = len(output.read_bytes())
        wait_for("it to go on", lambda: len(output.read_bytes()) > so_far + 3)


def test_one_that_ends_before_it_is_seized(monkeypatch: pytest.MonkeyPatch) -> None:
    look, killed = freeze.members, []

    def members(root: int) -> list[freeze.Process]:
        found = look(root)
        if not killed:
            child = found[1].pid
            killed.append(child)
            os.kill(child, signal.SIGKILL)
            wait_for("its end", lambda: state(child) == "Z")
        return found

    monkeypatch.setattr(freeze, "members", members)
    script = "import subprocess, time; child = subprocess.Popen(['sleep', '100']); time.sleep(100)"
    with task(sys.executable, "-c", script) as pid:
        wait_for("its child", lambda: any(_is("sleep", child) for child in descendants(pid)))
        with freeze.freeze(pid) as tree:
            assert [(process.pid, process.zombie) for process in tree.processes] == [
                (pid, False),
                (killed[0], True),
            ]
            assert stands(tree)
            with pytest.raises(TaskGoneError):
                tracee.seize(killed[0])


def _is(name: str, pid: int) -> bool:
    return name_of(pid) == name


def test_all_go_on_when_one_can_t_be_stopped() -> None:
    """A tracer of ours has the child: what has been stopped by then is let go on while we live."""
    with nothing_left(), ExitStack() as stack:
        shell = start(["/bin/sh", "-c", "sleep 100 & sleep 100 & wait"])
        wait_for("its children", lambda: len(descendants(shell.pid)) == 2)
        *_, last = descendants(shell.pid)
        child = os.fork()
        if child == 0:
            try:
                tracee.seize(last)
            finally:
                time.sleep(100)
                os._exit(1)
        stack.callback(os.kill, child, signal.SIGKILL)
        wait_for(
            "the other tracer", lambda: f"TracerPid:\t{child}" in Path(f"/proc/{last}/status").read_text()
        )
        with pytest.raises(DumpError, match=f"thread {last}: can't be traced"), freeze.freeze(shell.pid):
            pass
        is_unharmed(shell.pid)
        for pid in descendants(shell.pid):
            if pid != last:
                is_unharmed(pid)


def test_stopped_by_somebody_while_we_stop_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first thread stands still already; another one takes the SIGSTOP, which is for the process."""
    seize, stopped = tracee.seize, []

    def late(tid: int) -> None:
        if tid != pid and not stopped:
            wait_for("the first thread", lambda: state(pid) == "t")
            stopped.append(tid)
            seize(tid)
            os.kill(pid, signal.SIGSTOP)
            wait_for("the signal to be taken", lambda: state(tid) == "t")
        else:
            seize(tid)

    script = "import threading, time; threading.Thread(target=time.sleep, args=[100]).start(); print(1, flush=True)"
    output = tmp_path / "output"
    with task(sys.executable, "-c", script, output=output) as pid:
        wait_for("its thread", lambda: output.read_text() and len(os.listdir(f"/proc/{pid}/task")) == 2)
        monkeypatch.setattr(tracee, "seize", late)
        with freeze.freeze(pid) as tree:
            assert tree.root.stop_signal == signal.SIGSTOP
        wait_for("the stop", lambda: state(pid) == "T")
        os.kill(pid, signal.SIGCONT)
        is_unharmed(pid)


class _At(Watcher):
    def __init__(self, stage: str, then: Callable[[], None]) -> None:
        self._stage, self._then = stage, then

    def stage(self, name: str) -> None:
        if name == self._stage:
            self._then()


def test_another_program_between_look_and_stop(tmp_path: Path) -> None:
    """System calls are run with instructions of the process: those of the program that it was are gone."""
    go, output = tmp_path / "go", tmp_path / "output"
    other = "import time; print(1, flush=True); time.sleep(100)"
    script = f'while [ ! -e {go} ]; do :; done; exec {sys.executable} -c "{other}"'
    with task("/bin/sh", "-c", script, output=output) as pid:
        wait_for("the shell", lambda: _is("sh", pid))

        def change() -> None:
            go.touch()
            wait_for("the other program", output.read_text)

        dump(Settings(pid, tmp_path / "images", leave_running=True), _At("freezing", change))
        is_unharmed(pid)


def test_a_stack_that_has_no_room(tmp_path: Path) -> None:
    """It grows as if the thread had gone there itself, and no system call is run before the way back is prepared."""
    program, output = compiled(AT_THE_EDGE, tmp_path), tmp_path / "output"
    with nothing_left():
        reader, writer = os.pipe()
        process = start(
            [program], output=output, pass_fds=(reader,), preexec_fn=lambda: os.dup2(reader, 0) and None
        )
        os.close(reader)
        wait_for("the edge", lambda: output.read_text() == "ready\n")
        before = layout(process.pid)
        with freeze.freeze(process.pid), session(process.pid, Gadgets(process.pid, before.vmas)) as inside:
            assert inside.call(39) == process.pid
        sizes = [
            next(vma.end - vma.start for vma in one.vmas if vma.name == "[stack]")
            for one in (before, layout(process.pid))
        ]
        assert sizes[0] < sizes[1] < sizes[0] + (1 << 16)
        os.write(writer, b"x")
        os.close(writer)
        assert reap(process.pid) == 0


def test_killed_while_it_stands_still() -> None:
    """Its parent hears of that as soon as all has been let go on, and not only when dumptool ends."""
    code = (
        "import threading, time; [threading.Thread(target=time.sleep, args=[1000]).start() for _ in range(8)]"
    )
    ours, theirs = os.pipe()
    with task(sys.executable, "-c", code) as pid:
        wait_for("the threads", lambda: len(os.listdir(f"/proc/{pid}/task")) == 9)
        tracer = os.fork()
        if not tracer:
            try:
                with freeze.freeze(pid):
                    os.kill(pid, signal.SIGKILL)
                    wait_for("the end", lambda: "State:\tZ" in Path(f"/proc/{pid}/status").read_text())
                os.write(theirs, b"x")
                signal.pause()
            finally:
                os._exit(1)
        os.close(theirs)
        try:
            assert os.read(ours, 1)
            done, status = os.waitpid(pid, os.WNOHANG)
            assert (done, os.waitstatus_to_exitcode(status)) == (pid, -signal.SIGKILL)
        finally:
            os.kill(tracer, signal.SIGKILL)
            reap(tracer)
            os.close(ours)
