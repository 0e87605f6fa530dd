"""Restores without CRIU: tasks that register their own memory (restored.c), and images to go with them."""

from __future__ import annotations

import os
import select
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from images_spec import images, pagemap
from images_spec.images import Kind
from images_spec.messages import CoreEntry, InventoryEntry, Machine, MmEntry, PstreeEntry, TaskState
from tests.support.compiling import compiled
from tests.support.processes import Server, end, nothing_left

BASE = 0x100000000000
PAGE = 4096
WORDS = PAGE // 8


def compile_restored() -> Path:
    return compiled(Path(__file__).with_name("restored.c"))


def page_bytes(task: int, page: int) -> bytes:
    """What restored.c expects in a page."""
    first = task << 32 | page
    return struct.pack(f"<{WORDS}Q", *range(first, first + WORDS))


class Restored:
    """The tasks. Commands are those of restored.c; each waits for its answer."""

    def __init__(self, process: subprocess.Popen[bytes], timeout: float) -> None:
        self._process = process
        self._timeout = timeout
        self.pids = [int(word) for word in self._line().split()]

    def _line(self) -> str:
        stdout = self._process.stdout
        assert stdout is not None
        line = b""
        while not line.endswith(b"\n"):
            if not select.select([stdout], [], [], self._timeout)[0]:
                pytest.fail(f"no answer in {self._timeout:g} s")
            byte = os.read(stdout.fileno(), 1)
            if not byte:
                pytest.fail("the tasks ended")
            line += byte
        return line.decode()

    def tell(self, command: str) -> None:
        """Gives a command without waiting for its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(command.encode() + b"\n")
        self._process.stdin.flush()

    def say(self, command: str) -> None:
        self.tell(command)
        assert self._line() == "ok\n"

    def answered(self) -> None:
        """Waits for the answer to a command that was told."""
        assert self._line() == "ok\n"

    def statuses(self) -> list[int]:
        """Waits for all tasks to end; exit statuses, 128 + signal for killed ones."""
        self.tell("wait")
        return self.told_statuses()

    def told_statuses(self) -> list[int]:
        """The answer to "wait"."""
        return [int(word) for word in self._line().split()]


@contextmanager
def restored_tasks(program: Path, tasks: int, pages: int, timeout: float = 60) -> Iterator[Restored]:
    process = subprocess.Popen(
        [program, str(tasks), str(pages)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        yield Restored(process, timeout)
    finally:
        end([process.pid])
        process.wait()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        process.stdout.close()


def write_images(directory: Path, pids: Sequence[int], pages: int, dead: Sequence[int] = ()) -> None:
    """A checkpoint of such tasks, all their pages in the local image; ``dead``: zombies in their tree."""
    inventory = InventoryEntry(img_version=2, fdinfo_per_id=True)
    inventory.root_ids.vm_id = inventory.root_ids.files_id = 1
    inventory.root_ids.fs_id = inventory.root_ids.sighand_id = 1
    images.write(directory / "inventory.img", Kind.INVENTORY, [inventory])
    root = pids[0]
    tree = [
        PstreeEntry(pid=pid, ppid=0 if pid == root else root, pgid=pid, sid=pid, threads=[pid])
        for pid in (*pids, *dead)
    ]
    images.write(directory / "pstree.img", Kind.PSTREE, tree)
    for pid in dead:
        _write_core(directory, pid, TaskState.TASK_DEAD)
    for number, pid in enumerate(pids):
        _write_core(directory, pid, TaskState.TASK_ALIVE)
        mm = MmEntry(exe_file_id=1)
        for field in mm.DESCRIPTOR.fields:
            if field.is_required and not mm.HasField(field.name):
                setattr(mm, field.name, 0)
        mm.vmas.add(
            start=BASE, end=BASE + pages * PAGE, pgoff=0, shmid=0, prot=3, flags=0x22, status=513, fd=-1
        )
        images.write(directory / f"mm-{pid}.img", Kind.MM, [mm])
        pagemap.write(directory / f"pagemap-{pid}.img", number + 1, [(BASE, pages, 6)])
        data = b"".join(page_bytes(number, page) for page in range(pages))
        (directory / f"pages-{number + 1}.img").write_bytes(data)


def _write_core(directory: Path, pid: int, state: TaskState.ValueType) -> None:
    core = CoreEntry(mtype=Machine.MACHINE_X86_64)
    core.tc.task_state = state
    core.tc.exit_code = core.tc.personality = core.tc.flags = core.tc.blk_sigset = 0
    core.tc.comm = b"restored"
    images.write(directory / f"core-{pid}.img", Kind.CORE, [core])


def serve_command(images_dir: Path, *options: str) -> list[str]:
    stats = str(images_dir / "stats.json")
    return [
        sys.executable,
        "-m",
        "lazypages",
        "serve",
        "-D",
        str(images_dir),
        "--stats-json",
        stats,
        *options,
    ]


def serve(images_dir: Path, *options: str) -> Server:
    return Server(serve_command(images_dir, *options), output=images_dir / "serve.out")


@contextmanager
def serving(
    images_dir: Path, tasks: Restored, pages: int, *options: str, start: Callable[..., Server] = serve
) -> Iterator[Server]:
    """A daemon that has images of the tasks, of so many pages each, and has been given all of them.

    ``start``: called with the directory and the options, instead of :func:`serve`.
    """
    write_images(images_dir, tasks.pids, pages)
    with start(images_dir, *options) as server:
        server.wait_ready()
        tasks.say(f"connect {images_dir}/lazy-pages.socket")
        yield server


@contextmanager
def served_tasks(
    program: Path,
    images_dir: Path,
    tasks: int,
    pages: int,
    *options: str,
    finish: bool = True,
    start: Callable[..., Server] = serve,
) -> Iterator[tuple[Restored, Server]]:
    """Restored tasks, and the daemon that serves them; their restore is finished unless the test does that.

    On the way out they are ended, with all else that was started meanwhile.
    """
    with (
        nothing_left(),
        restored_tasks(program, tasks, pages) as restored,
        serving(images_dir, restored, pages, *options, start=start) as server,
    ):
        if finish:
            restored.say("finish")
        yield restored, server


#: As sitecustomize: whoever imports the event loop waits until the file is there, and fails if it has anything in it.
_HELD = """
import os, sys, time
class Held:
    def find_spec(self, name, path=None, target=None):
        if name == "asyncio":
            sys.meta_path.remove(self)
            while not os.path.exists({go!r}):
                time.sleep(0.01)
            if os.path.getsize({go!r}):
                raise ImportError("no event loop here")
sys.meta_path.insert(0, Held())
"""


def write_at_once(path: Path, text: str) -> None:
    """So that nobody finds it empty."""
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").rename(path)


def serve_held(images_dir: Path, *options: str, go: Path) -> Server:
    """Ready, but without its event loop until `go` exists; if that is not empty by then, it never gets one."""
    site = images_dir / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(_HELD.format(go=str(go)))
    path = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
    env = os.environ | {"PYTHONPATH": path}
    return Server(serve_command(images_dir, *options), output=images_dir / "serve.out", env=env)
