"""Images that real CRIU wrote: the .proto files know every field, and what we write are the same bytes."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from images_spec import images
from images_spec.checkpoint import open_checkpoint
from images_spec.flags import PE_PRESENT
from images_spec.images import Kind
from images_spec.messages import FdType, PagemapEntry, TaskState
from images_spec.pagemap import Pagemap
from images_spec.placement import PageCount
from lazypages.cli.show import load, show
from tests.support.criu import RELEASES, Criu
from tests.support.processes import nothing_left, wait_for
from tests.unit.test_images_golden import unknown_fields

VICTIM = """
import ctypes, fcntl, os, select, signal, socket, sys, threading, time
os.chdir(sys.argv[1])
reader, writer = os.pipe()
os.write(writer, b"in the pipe")
deleted = open("deleted", "w+")
deleted.write("of a deleted file")
deleted.flush()
os.unlink("deleted")
locked = open("locked", "w")
fcntl.lockf(locked, fcntl.LOCK_EX, 10, 5)
os.mkfifo("fifo")
fifo = os.open("fifo", os.O_RDWR)
os.write(fifo, b"in the fifo")
pair = socket.socketpair()
event = os.eventfd(3)
poll = select.epoll()
poll.register(reader)
memory = os.memfd_create("memory")
terminal = os.openpty()
signal.signal(signal.SIGUSR1, lambda *_: None)
signal.setitimer(signal.ITIMER_REAL, 10000, 5)
threading.Thread(target=time.sleep, args=[10000], daemon=True).start()
if os.fork() == 0:
    os._exit(7)
if os.fork() == 0:
    time.sleep(10000)
name = b"name \\xff of\\xe2\\x82"
ctypes.CDLL(None).prctl(15, name)
os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
open("ready", "w").close()
time.sleep(10000)
"""
KINDS: list[Kind[Any]] = [kind for kind in vars(Kind).values() if isinstance(kind, Kind)]
UNDESCRIBED = re.compile(r"pages-\d+\.img|memfd\.img|sk-queues\.img|dump\.(log|out)")


def kind_of(name: str) -> Kind[Any] | None:
    for kind in KINDS:
        pattern = r"\w+".join(map(re.escape, re.split(r"{.*}", kind.name)))
        if re.fullmatch(pattern, name):
            return kind
    return None


@pytest.fixture(scope="module", params=RELEASES)
def dumped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of images of a process with a bit of everything, a thread, a child and a zombie."""
    folder = tmp_path_factory.mktemp("victim")
    directory = tmp_path_factory.mktemp("images")
    with ExitStack() as stack:
        stack.enter_context(nothing_left())
        null = stack.enter_context(open(os.devnull, "r+b"))
        victim = subprocess.Popen(
            [sys.executable, "-c", VICTIM, folder],
            stdin=null,
            stdout=null,
            stderr=null,
            start_new_session=True,
        )
        stack.callback(victim.wait)
        stack.callback(victim.kill)
        wait_for("the victim", (folder / "ready").exists)
        Criu(request.param).dump(victim.pid, directory, "--file-locks")
    return directory


def test_all_is_described_and_written_the_same(dumped: Path) -> None:
    seen = set()
    for path in sorted(dumped.iterdir()):
        kind = kind_of(path.name)
        if kind is None:
            assert UNDESCRIBED.fullmatch(path.name), f"{path.name} is new"
            continue
        seen.add(kind)
        data = path.read_bytes()
        items = list(images.decode(data, kind, path))
        assert {number for message, _ in items for number in unknown_fields(message)} == set(), path
        assert b"".join(images.encode(kind, items, path)) == data, path
    rare = {Kind.CGROUP, Kind.UTSNS, Kind.TTY_DATA}
    assert seen == set(KINDS) - rare


def test_contents_of_pipes_and_deleted_files(dumped: Path) -> None:
    for name, kind, wanted in (
        ("pipes-data.img", Kind.PIPES_DATA, b"in the pipe"),
        ("fifo-data.img", Kind.FIFO_DATA, b"in the fifo"),
        ("ghost-file-1.img", Kind.GHOST_FILE, b"of a deleted file"),
    ):
        kind_of_any: Kind[Any] = kind
        assert [data for _, data in images.read_with_data(dumped / name, kind_of_any)] == [wanted]


def test_types_of_files(dumped: Path) -> None:
    types = {entry.type for entry in images.read(dumped / "files.img", Kind.FILES)}
    assert types == {
        FdType.FD_REG,
        FdType.FD_PIPE,
        FdType.FD_FIFO,
        FdType.FD_UNIXSK,
        FdType.FD_EVENTFD,
        FdType.FD_EVENTPOLL,
        FdType.FD_TTY,
        FdType.FD_MEMFD,
    }


def test_tasks_and_their_memory(dumped: Path) -> None:
    checkpoint = open_checkpoint(dumped)
    root, *children = checkpoint.tasks
    assert (root.ppid, len(root.threads), root.threads[0]) == (0, 2, root.pid)
    assert [child.ppid for child in children] == [root.pid] * 2
    assert sorted(checkpoint.load_task(child.pid, False).is_dead for child in children) == [False, True]
    for task in checkpoint.tasks:
        core = images.read_one(dumped / Kind.CORE.file_name(task.pid), Kind.CORE)
        assert core.tc.comm.startswith(b"name \xff of\xe2\x82" if task is root else b"python")
        loaded = checkpoint.load_task(task.pid, False)
        if loaded.is_dead:
            assert (core.tc.task_state, core.tc.exit_code) == (TaskState.TASK_DEAD, 7 << 8)
            continue
        (level,) = loaded.levels
        counts = loaded.extents.counts()
        assert counts.levels[0].total * 4096 == level.pages_size
        assert counts.levels[0].lazy > 0 < counts.levels[0].eager
        assert (counts.remote, counts.lost) == (PageCount(), PageCount())


def test_both_ways_of_counting_pages(dumped: Path, request: pytest.FixtureRequest) -> None:
    """CRIU 4.2 leaves the old count 0, 4.1 does not know the new one (docs/criu.md, "Pagemap")."""
    (root, *_) = open_checkpoint(dumped).tasks
    path = dumped / Kind.PAGEMAP.file_name(root.pid)
    entries = [message for message in images.read(path, Kind.PAGEMAP) if isinstance(message, PagemapEntry)]
    old = [entry.compat_nr_pages for entry in entries]
    new = [entry.nr_pages for entry in entries if entry.HasField("nr_pages")]
    counts = [entry.nr_pages for entry in Pagemap.load(path)]
    if request.node.callspec.params["dumped"] == "4.1":
        assert (old, new) == (counts, [])
    else:
        assert (old, new) == ([0] * len(counts), counts)
    assert all(entry.flags & PE_PRESENT for entry in Pagemap.load(path))


def test_show(dumped: Path) -> None:
    output = io.StringIO()
    show(load(dumped), Console(file=output), each=True)
    text = output.getvalue()
    (root, *_) = open_checkpoint(dumped).tasks
    assert f"name \\xff of\\xe2\\x82 ({root.pid}): alive, 2 threads, " in text
    assert "zombie, exit status 7" in text
    for name in ("[heap]", "[stack]", "[vdso]", "[vvar]", "/libc.so.6"):
        assert name in text
