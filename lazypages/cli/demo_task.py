"""The task of ``lazypages demo``: run as a program, ``python demo_task.py FOLDER BYTES``, by any Python 3.11.

It fills its memory, creates the file ``ready`` in FOLDER, and waits for the file ``go``; meanwhile it is checkpointed
and restored. Then it touches random pages, checks every byte of its memory, and writes the results to ``verdict``.
"""

from __future__ import annotations

import json
import mmap
import random
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

PAGE_SIZE = 4096
TOUCHES = 5000
SEED = 20_231_123

_NUMBER = struct.Struct("<Q")


def contents(nr_pages: int) -> Iterator[bytes]:
    """The contents of each page: its number, then bytes that differ from those of neighbouring pages."""
    noise = random.Random(SEED).randbytes(1 << 20)  # noqa: S311 - must be reproducible
    length = PAGE_SIZE - _NUMBER.size
    for page in range(nr_pages):
        start = page * 2654435761 % (len(noise) - length)
        yield _NUMBER.pack(page) + noise[start : start + length]


def touch(memory: mmap.mmap, nr_pages: int) -> list[float]:
    """Touch random pages; return the time of each touch in seconds, sorted. The contents are checked later."""
    pages = random.Random(SEED + 1).sample(range(nr_pages), min(TOUCHES, nr_pages))  # noqa: S311
    seconds = []
    for page in pages:
        started = time.perf_counter()
        memory[page * PAGE_SIZE]
        seconds.append(time.perf_counter() - started)
    return sorted(seconds)


def main() -> None:
    folder, size = Path(sys.argv[1]), int(sys.argv[2])
    nr_pages = size // PAGE_SIZE
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for content in contents(nr_pages):
        memory.write(content)
    (folder / "ready").touch()
    while not (folder / "go").exists():
        time.sleep(0.01)

    awake = time.time()  # the only clock that time namespaces do not change: `lazypages demo` reads it, too
    touches = touch(memory, nr_pages)
    touched = time.time()
    memory.seek(0)
    wrong = [page for page, content in enumerate(contents(nr_pages)) if memory.read(PAGE_SIZE) != content]
    verdict = {
        "wrong": wrong,
        "touches": len(touches),
        "median_touch": touches[len(touches) // 2],
        "worst_touch": touches[-1],
        "awake": awake,
        "touched": touched,
        "checked": time.time(),
    }
    draft = folder / "draft"
    draft.write_text(json.dumps(verdict))
    draft.rename(folder / "verdict")


if __name__ == "__main__":
    main()
