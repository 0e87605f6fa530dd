"""`dumptool dump --dry-run`: what is said agrees with what a dump then does, and nothing changes."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dumptool.rehearsal import rehearse
from dumptool.settings import Settings
from images_spec import images
from images_spec.images import Kind
from tests.support.criu import RELEASES, Criu
from tests.support.dumptool import check, is_unharmed, run, task
from tests.support.processes import wait_for

PROGRAM = (
    "import mmap, os, threading, time\n"
    "m = mmap.mmap(-1, 16 << 20)\n"  # shared with the child: counted once
    "m.write(b'x' * (16 << 20))\n"
    "p = mmap.mmap(-1, 32 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\n"
    "p.write(b'y' * (8 << 20))\n"
    "threading.Thread(target=time.sleep, args=[1000], daemon=True).start()\n"
    "if os.fork():\n"
    "    print('ready', flush=True)\n"
    "time.sleep(1000)\n"
)


@contextmanager
def started(program: str, folder: Path) -> Iterator[int]:
    with task(sys.executable, "-c", program, output=folder / "out") as pid:
        wait_for("the program", lambda: (folder / "out").read_text() == "ready\n")
        yield pid


def test_it_agrees_with_the_dump(tmp_path: Path) -> None:
    images_dir = tmp_path / "images"
    with started(PROGRAM, tmp_path) as pid:
        said = check("dump", "-t", pid, "-D", images_dir, "--dry-run")
        assert "nothing is refused: 2 processes, 3 threads; " in said
        assert not images_dir.exists()
        is_unharmed(pid)
        found = rehearse(Settings(pid=pid, images=images_dir), memory_only=False)
        check("dump", "-t", pid, "-D", images_dir, "--leave-running")
        (stats,) = images.read(images_dir / Kind.STATS.file_name("dump"), Kind.STATS)
        written = stats.dump.pages_written + stats.dump.shpages_written
        assert written * 4096 > 24 << 20
        # Python frees and takes some pages meanwhile, and a dump leaves out pages of zeros.
        assert abs(found.pages - written) < 512
        assert found.lazy * 4096 >= 16 << 20  # private memory of both processes


def test_what_is_refused(tmp_path: Path) -> None:
    images_dir = tmp_path / "images"
    program = "import socket, time; s = socket.create_server(('127.0.0.1', 0)); print('ready', flush=True); "
    with started(program + "time.sleep(1000)", tmp_path) as pid:
        done = run("dump", "-t", pid, "-D", images_dir, "--backend", "own", "--dry-run")
        assert done.returncode == 1
        assert re.search(rf"can't be dumped: pid {pid} fd \d+: socket:\[\d+\] is a socket", done.stderr)
        criu = Criu(RELEASES[-1]).path
        said = check("dump", "-t", pid, "-D", images_dir, "--criu", criu, "--dry-run")
        assert re.search(rf"CRIU \({criu}\) would save everything but memory: pid {pid} fd \d+: socket", said)
        for arguments in (("pre-dump",), ("dump", "--backend", "criu", "--criu", criu)):
            said = check(*arguments, "-t", pid, "-D", images_dir, "--dry-run")
            assert "nothing is refused: 1 process, 1 thread; " in said
        assert not images_dir.exists()
        is_unharmed(pid)
