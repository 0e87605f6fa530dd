"""Descriptors, threads and memory of `lazypages serve`: `PYTHONPATH=. python bench/sizes.py [CASE...]`.

A case is TASKSxPAGES or TASKSxPAGESxENTRIES: tasks of so many pages, all missing; each pagemap has so many entries
(default 1), which divide the pages. The tasks are restored without CRIU (tests/support/restored.c), and the daemon has
--no-background: what is printed is that of the daemon while all pages are missing. Counts, not times: a busy machine
does not change them. docs/sizing.md has the results.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

from images_spec import images, pagemap
from images_spec.images import Kind
from tests.support.fake import BASE, PAGE, compile_restored, restored_tasks, serve, write_images
from tests.support.processes import become_subreaper, nothing_left

CASES = ["1x1", "100x1", "1x262144", "1x1048576x524288"]
RUNNING = 10.0  # s for the daemon to receive the tasks


def resize(directory: Path, pids: list[int], pages: int, entries: int) -> None:
    """Enlarge the memory of the tasks in images that `write_images` wrote with one page."""
    each = pages // entries
    for number, pid in enumerate(pids, start=1):
        path = directory / f"mm-{pid}.img"
        mm = images.read_one(path, Kind.MM)
        mm.vmas[0].end = BASE + pages * PAGE
        images.write(path, Kind.MM, [mm])
        # Every second page run has data: neighbours with data would be one extent.
        runs = [(BASE + index * each * PAGE, max(1, each - (entries > 1)), 6) for index in range(entries)]
        pagemap.write(directory / f"pagemap-{pid}.img", number, runs)
        os.truncate(directory / f"pages-{number}.img", sum(nr for _, nr, _ in runs) * PAGE)


def measure(tasks: int, pages: int, entries: int) -> str:
    """A row of the table."""
    with tempfile.TemporaryDirectory(prefix="lazypages-sizes-") as name, nothing_left():
        folder = Path(name)
        with restored_tasks(compile_restored(), tasks, pages) as restored:
            write_images(folder, restored.pids, 1)
            resize(folder, restored.pids, pages, entries)
            with serve(folder, "--no-background") as server:
                server.wait_ready(120)
                restored.say(f"connect {folder}/lazy-pages.socket")
                restored.say("finish")
                proc = Path("/proc") / str(server.pid)
                deadline = time.monotonic() + RUNNING
                uffds = 0
                while uffds < tasks and time.monotonic() < deadline:
                    time.sleep(0.1)
                    links = [os.readlink(path) for path in (proc / "fd").iterdir()]
                    uffds = links.count("anon_inode:[userfaultfd]")
                time.sleep(1)  # the imports after readiness
                status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
                kib = int(status["RssAnon"].split()[0])
                row = f"{tasks:6} {pages:9} {entries:8} {len(links):12} {status['Threads'].strip():>8}"
                return f"{row} {kib / 1024:10.1f}"


def main() -> None:
    become_subreaper()
    print(f"{'tasks':>6} {'pages':>9} {'entries':>8} {'descriptors':>12} {'threads':>8} {'MiB':>10}")
    for case in sys.argv[1:] or CASES:
        tasks, pages, *entries = map(int, case.split("x"))
        print(measure(tasks, pages, entries[0] if entries else 1), flush=True)


if __name__ == "__main__":
    main()
